"""The end of a study: confirm the best trials, train the final model, have it saved."""

import time
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial

from mnist import budget, release, search
from mnist import study as studies
from mnist.display import Display, format_params
from mnist.job import Job, result, speed_run, winner
from mnist.release import Trained
from mnist.workers import Pool, Report, Run, RunResult, available_cores, load_checkpoint

WAIT_S = 1.0
LEAST_FINAL = 1_200  # images; a model that has seen fewer is not worth saving


def finish(job: Job, pool: Pool, screen: Display) -> dict[str, Any]:
    """The study's result(), made by exactly one of the members that work on it."""
    while True:
        if job.member.become_leader():
            confirm(job, pool, screen)
            if found := result(job):
                screen.print_line(
                    f"trial {found['study']['trial']} has won before; its model is kept"
                )
                return found
            trained = train(job, pool, screen)
            pool.stop_workers()  # the plain network and its export take their room
            if found := release.save(job, trained, screen):
                return found
        screen.show_waiting("another process finishes the study")
        time.sleep(WAIT_S)
        job.in_time("another process has not finished the study yet")
        job.member.poll()
        if found := result(job):
            return found


def confirm(job: Job, pool: Pool, screen: Display) -> None:
    """Have the best trials run again on fresh seeds, and beside them the yardsticks."""

    def make_run(trial: FrozenTrial, i: int) -> Run:
        return Run(
            job.options.model,
            trial.params,
            job.plan.trial_samples,
            studies.derive_seed(job.options.seed, i, 1),  # the same seeds for all of them
            plain=job.options.plain,
            bfloat16=job.plan.bfloat16,
            micro_batch=studies.micro_batch(trial),
            checkpoint=job.folder / f"confirm-{trial.number}-{i}.pt",
        )

    for done, total in search.confirm(job.member, pool, make_run, job.confirmed):
        screen.show_confirmation(done, total)
        job.in_time("the best trials are not confirmed yet")


def train(job: Job, pool: Pool, screen: Display) -> Trained:
    """Train the final model as the winner.

    Where that training fails, the trial is set aside and the next best is taken.
    """
    while job.member.run_locked(lambda study: studies.best_trials(study, 1)):
        confirm(job, pool, screen)
        best = winner(job)
        if best is None:  # another member has just finished a better trial
            continue
        run = final_run(job, pool, best)
        weights = load_checkpoint(
            run.weights
        )  # of a process that was killed when it had got so far
        if weights is not None:
            return Trained(best, weights, run.samples, None)
        if means := job.member.run_locked(
            lambda study: studies.mean_confirmations(study, job.confirmed)
        ):
            text = ", ".join(f"trial {number} {mean:.2%}" for number, mean in means.items())
            screen.print_line(f"on fresh seeds: {text}")
        text = f"as trial {best.number} ({format_params(best.params)}), {run.samples:,} images"
        screen.print_line(f"final model: {text}")
        result, seconds = carry_out(job, pool, screen, run)
        weights = load_checkpoint(run.weights)
        if result.failure is None and weights is not None:
            return Trained(best, weights, run.samples, seconds)
        if result.failure in (None, "died"):
            raise search.Unfinished(f"the final training failed: {result.reason or run.weights}")
        set_aside(job, best.number, f"{result.failure}: {result.reason}")
        screen.print_line(f"trial {best.number} is set aside: {result.reason}")
    raise search.Unfinished("no complete trial is left to make the final model from")


def set_aside(job: Job, number: int, reason: str) -> None:
    job.member.run_locked(lambda study: studies.exclude_trial(study, number, reason))


def carry_out(job: Job, pool: Pool, screen: Display, run: Run) -> tuple[RunResult, float | None]:
    """Have one worker train the final model; also the seconds that all of it takes."""
    seen: list[tuple[int, float]] = []  # images, at what time; fewer of them after a restart
    expected_s = final_s(job)
    for _, message in search.execute_runs(pool, {"final": run}):
        if isinstance(message, Report):
            screen.show_training("final", message.progress, expected_s, job.plan.release_s)
            seen.append((message.progress.samples, time.monotonic()))
        elif message is not None:
            (m, start), (n, end) = (seen[0], seen[-1]) if seen else ((0, 0.0), (0, 0.0))
            return message, (end - start) / (n - m) * run.samples if n > m else None
        else:
            job.in_time("the final training is not finished yet")
    raise AssertionError("a run ends with a RunResult")


def final_run(job: Job, pool: Pool, best: FrozenTrial) -> Run:
    """By all cores, as there is nothing else to do."""
    samples = final_samples(job, pool, best)
    stem = job.folder / f"final-{best.number}-{samples}"
    return Run(
        job.options.model,
        best.params,
        samples,
        studies.derive_seed(job.options.seed),
        final=True,
        plain=job.options.plain,
        bfloat16=job.plan.bfloat16,
        threads=available_cores(),
        micro_batch=studies.micro_batch(best),
        checkpoint=stem.with_suffix(".pt"),
        weights=stem.with_suffix(".weights.pt"),
    )


def final_s(job: Job) -> float:
    """Seconds that the final training may take, as far as it goes by the time left."""
    if job.options.final_epochs:
        return job.plan.final_s
    elapsed_s = time.monotonic() - job.start
    if job.options.timeout:
        return budget.allot_final_s_until(job.plan, job.options.timeout - elapsed_s)
    return budget.allot_final_s(job.plan, job.plan.total_s - elapsed_s)


def final_samples(job: Job, pool: Pool, best: FrozenTrial) -> int:
    """Images the final model sees: as asked for, as begun before, or what the time left allows."""
    epoch = len(job.dataset.train) + len(job.dataset.validation)
    if job.options.final_epochs:
        return round(job.options.final_epochs * epoch)
    for path in job.folder.glob(f"final-{best.number}-*.pt"):
        return int(path.name.split("-")[2].split(".")[0])
    least = min(LEAST_FINAL, epoch)
    if final_s(job) * job.plan.images_per_s <= least:
        return least
    run = replace(
        speed_run(job.options, best.params),
        bfloat16=job.plan.bfloat16,
        micro_batch=studies.micro_batch(best),
    )
    try:
        measured = search.measure_speed(pool, run)
    except search.RunFailed:  # the final training will say why
        measured = job.plan.images_per_s
    return max(least, round(min(final_s(job) * measured, job.work.max_final_samples)))
