"""The search of one command: trials until the budget is reached, or half of --timeout is over."""

import contextlib
import math
import time

from mnist.job.clock import Clock
from mnist.job.display import Display, format_duration
from mnist.job.options import Options
from mnist.search import loop
from mnist.search import study as studies
from mnist.search.budget import Plan
from mnist.search.members import Member
from mnist.search.runs import StudyConfig
from mnist.search.space import Space
from mnist.search.workers import Pool


def run_trials(
    member: Member,
    pool: Pool,
    screen: Display,
    options: Options,
    space: Space,
    config: StudyConfig,
    plan: Plan,
    clock: Clock,
) -> None:
    """Run trials; raises loop.Unfinished where --timeout leaves no complete one."""
    trials = options.total_trials
    for trial in member.run_locked(lambda study: study.get_trials(deepcopy=False)):
        if trial.state in studies.FINISHED:
            screen.add_finished(trial.state, trial.number, trial.value)
    if screen.done >= trials:
        return
    half = clock.start + (options.timeout or math.inf) / 2
    search_s = min((trials - screen.done) * plan.trial_s, max(0.0, half - time.monotonic()))
    after_s = min(plan.after_search_s, clock.remaining_s - search_s)
    screen.print_line(
        f"study {member.name}: {screen.done} of {trials} trials finished; a trial sees "
        f"at most {plan.trial_samples:,} images; expected: "
        f"{format_duration(search_s)} for the search, "
        f"{format_duration(after_s)} for the final model"
    )
    updates = loop.search(member, pool, config, trials=trials, sampler=options.sampler, space=space)
    with contextlib.closing(updates):
        for update in updates:
            screen.show_update(update)
            if time.monotonic() > half:
                break
    if (finished := member.run_locked(studies.count_finished)) < trials:
        if not member.run_locked(lambda study: studies.best_trials(study, 1)):
            raise loop.Unfinished("--timeout: no trial was completed")
        text = f"--timeout: {finished} of {trials} trials are finished"
        screen.print_line(f"{text}; the final model is made from the best of them")
