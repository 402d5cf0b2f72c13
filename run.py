"""The main job: find the best hyperparameters, train the final model with them, save it.

python run.py            # and `python run.py --help`
"""

import signal

if __name__ == "__main__":
    # Until main() takes over there is nothing to lose: Ctrl-C just ends the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import gc
import json
import logging
import sys
import time
from dataclasses import replace
from typing import Any

import click
import optuna
import torch

from mnist import budget, compare, data, display, registry, report, search
from mnist import study as studies
from mnist.display import Display, format_duration, full_message, root_cause
from mnist.finish import finish
from mnist.job import Job, find_result, publish_result, remove_stale_files
from mnist.members import Claim, Member
from mnist.options import Options, command
from mnist.prepare import check_all, check_writable, choose_device, make_loader, prepare
from mnist.workers import Pool, Run, Setup, available_cores

# Whatever is wrong with what one study is to be made of.
REFUSED = (click.UsageError, data.DataError, registry.RegistryError, studies.StudyError)


def main(each: list[Options]) -> None:
    """One study after the other; nearly always there is just one."""
    if len(each) > 1:  # what is wrong with the last one is to be said before the first is trained
        check_all(each)
    outcomes: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    latest = time.monotonic() + (each[0].timeout or float("inf"))
    for i, options in enumerate(each):
        if options.timeout:  # each plans with its share; what it takes beyond that, others lack
            left_s = latest - time.monotonic()
            options = replace(options, timeout=max(1.0, left_s / (len(each) - i)))
        if len(each) > 1:
            click.echo(f"\n{options.study_name} ({i + 1} of {len(each)})", err=True)
        try:
            outcomes.append(run(options, latest))
        except (search.Unfinished, *REFUSED) as error:
            if len(each) == 1:
                raise
            click.echo(f"{options.study_name}: {full_message(error)}", err=True)
            failed[options.study_name] = error
    if len(each) > 1 and outcomes:
        show_all(each[0], outcomes)
    if each[0].json:
        click.echo(json.dumps(outcomes if len(each) > 1 else outcomes[0]))
    if failed:
        raise incomplete(failed)


def incomplete(failed: dict[str, Exception]) -> Exception:
    """What several studies end with: one that was refused cannot go on by the same command."""
    if again := [name for name, error in failed.items() if isinstance(error, search.Unfinished)]:
        return search.Unfinished(f"not finished: {', '.join(again)}")
    return click.UsageError(f"refused, for the reasons above: {', '.join(failed)}")


def run(options: Options, latest: float) -> dict[str, Any]:
    """options -> data -> study -> final training -> one evaluation -> saved model.

    All before `latest`, by time.monotonic().
    """
    start = time.monotonic()
    registry.check_writable(options.output)
    check_writable(options.artifacts)
    device = choose_device(options)
    workers = options.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    threads = max(1, available_cores() // workers)
    setup = Setup(
        make_loader(options), str(device), threads, options.disk_quota, imports=options.import_
    )
    pool = Pool(workers, setup)  # its imports begin here, beside what comes before the training
    with Member(options.storage, options.study_name, threads) as member, pool:
        job = prepare(options, member, pool, device, (start, latest))
        forecasts: list[tuple[float, float]] = []
        begun = not member.run_locked(
            studies.count_finished
        )  # by this command: else it took longer
        done = find_result(job) if member.run_locked(studies.count_finished) >= job.trials else None
        if done is None:
            screen = Display(job.trials, job.plan, job.space, start)
            remove_stale_files(job)
            with screen:
                find(job, pool, screen)
                done = finish(job, pool, screen)
            forecasts = screen.forecasts
        publish_result(job, done)
        remove_stale_files(job)
        explain(job, done)
        if begun and forecasts:
            keep_forecasts(job, forecasts)
        return show(job, done)


def find(job: Job, pool: Pool, screen: Display) -> None:
    """Search until the budget is reached, or until half of --timeout is over."""
    trials = job.member.run_locked(lambda study: study.get_trials(deepcopy=False))
    for trial in (trial for trial in trials if trial.state in studies.FINISHED):
        screen.add_finished(trial.state, trial.number, trial.value)
    done = screen.done
    if done >= job.trials:
        return
    screen.print_line(
        f"study {job.study.study_name}: {done} of {job.trials} trials finished; a trial sees "
        f"at most {job.plan.trial_samples:,} images; expected: "
        f"{format_duration((job.trials - done) * job.plan.trial_s)} for the search, "
        f"{format_duration(job.plan.after_search_s)} for the final model"
    )
    updates = search.search(
        job.member,
        pool,
        lambda claim: trial_run(job, claim),
        trials=job.trials,
        seed=job.options.seed,
        sampler=job.options.sampler,
        space=job.space,
    )
    half = job.start + (job.options.timeout or float("inf")) / 2
    with contextlib.closing(updates):
        for update in updates:
            screen.show_update(update)
            if time.monotonic() > half:
                break
    if job.member.run_locked(studies.count_finished) < job.trials:
        if not job.member.run_locked(lambda study: studies.best_trials(study, 1)):
            raise search.Unfinished("--timeout: no trial was completed")
        screen.print_line(f"--timeout: the budget of {job.trials} trials was not reached")


def trial_run(job: Job, claim: Claim) -> Run:
    return Run(
        job.options.model,
        claim.params,
        job.plan.trial_samples,
        studies.derive_seed(
            job.options.seed
        ),  # the same start and order for all: paired comparisons
        tuple(budget.rungs(job.plan.trial_samples)),
        plain=job.options.plain,
        bfloat16=job.plan.bfloat16,
        threads=claim.threads,
        checkpoint=job.folder / f"trial-{claim.number}.pt",
    )


def keep_forecasts(job: Job, forecasts: list[tuple[float, float]]) -> None:
    """Leave what was announced, and how long it took, with the study (benchmarks.forecasts)."""
    time_taken = {"seconds": round(time.monotonic() - job.start, 1), "forecasts": forecasts}
    with contextlib.suppress(*studies.STORAGE_ERRORS):  # the model is saved
        job.member.run_locked(lambda study: study.set_user_attr("time", time_taken))


def explain(job: Job, done: dict[str, Any]) -> None:
    """Write and attach the report; without it the model is as good, so a failure is one line."""
    options = job.options
    try:
        report.make(job.member, done["name"], options.output, options.artifacts)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a picture
        print(f"run.py: the report could not be made: {root_cause(error)}", file=sys.stderr)


def show(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """The whole outcome, printed for a person; weights that are here are verified first."""
    options, name = job.options, done["name"]
    models_here = registry.read(options.output)
    here = name in models_here["models"]
    if here:
        registry.file(options.output, name)
    best = done["study"]["trial"]
    outcome = job.member.run_locked(lambda study: studies.summarise(study, best)) | done
    if not options.json:
        display.print_result(
            outcome,
            str(options.output),
            studies.without_password(options.storage),
            str(options.artifacts),
            "current" if models_here["current"] == name else "saved" if here else "elsewhere",
        )
    return outcome


def show_all(options: Options, outcomes: list[dict[str, Any]]) -> None:
    """Compare the models of several studies, as far as they are in this registry."""
    here = registry.read(options.output)["models"]
    names = [outcome["name"] for outcome in outcomes if outcome["name"] in here]
    rows = compare.rows(options.output, names)
    compare.show(rows, stderr=options.json)
    page = options.output / "comparison.html"
    page.write_text(compare.write(rows), "utf-8")
    click.echo(f"the same as a page: {page}", err=options.json)


def guarded(arguments: list[str]) -> int:
    """The whole command; every expected failure is one line on standard error and an exit code."""
    try:
        command(main).main(arguments, "run.py", standalone_mode=False)
        return 0
    except click.ClickException as error:
        return fail(error.format_message(), 2)
    except REFUSED as error:  # a UsageError is a ClickException, above
        return fail(str(error), 2)
    except search.Unfinished as error:
        return fail(f"{error}; the same command goes on from here", 1)
    except (OSError, *studies.STORAGE_ERRORS) as error:
        return fail(
            f"{root_cause(error)}; what was finished is kept, the same command goes on from here", 1
        )
    except (KeyboardInterrupt, click.Abort):
        return fail("interrupted; what was finished is kept, the same command goes on", 130)


def fail(message: str, code: int) -> int:
    print(f"run.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    code = guarded(sys.argv[1:])
    gc.freeze()  # Python would look through all that was imported at its end: 2 s
    sys.exit(code)
