"""The main job: find the best hyperparameters, train the final model with them, save it.

python run.py            # and `python run.py --help`
"""

import signal

if __name__ == "__main__":
    # Ctrl-C ends the imports at once, as nothing can be lost yet.
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

from mnist import data, registry, training
from mnist.job import display
from mnist.job.display import Display, format_duration, full_message, root_cause
from mnist.job.final import finish
from mnist.job.options import Options, make_command
from mnist.job.prepare import check_all, check_writable, choose_device, make_loader, prepare
from mnist.job.state import Job, find_result, publish_result, remove_stale_files
from mnist.report import compare, page
from mnist.search import budget, loop
from mnist.search import study as studies
from mnist.search.members import Claim, Member
from mnist.search.workers import Pool, Run, Setup, available_cores

# Errors in a study's options, data, registry or database: exit code 2.
INVALID_INPUT = (click.UsageError, data.DataError, registry.RegistryError, studies.StudyError)


def main(option_sets: list[Options]) -> None:
    """Run one study after the other; usually there is only one."""
    if len(option_sets) > 1:  # report errors of any study before the first is trained
        check_all(option_sets)
    outcomes: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    deadline = time.monotonic() + (option_sets[0].timeout or float("inf"))
    for i, options in enumerate(option_sets):
        if options.timeout:  # each study gets an equal share of the remaining time
            remaining_s = deadline - time.monotonic()
            options = replace(options, timeout=max(1.0, remaining_s / (len(option_sets) - i)))
        if len(option_sets) > 1:
            click.echo(f"\n{options.study_name} ({i + 1} of {len(option_sets)})", err=True)
        try:
            outcomes.append(run(options, deadline))
        except (loop.Unfinished, *INVALID_INPUT) as error:
            if len(option_sets) == 1:
                raise
            click.echo(f"{options.study_name}: {full_message(error)}", err=True)
            failed[options.study_name] = error
    if len(option_sets) > 1 and outcomes:
        print_comparison(option_sets[0], outcomes)
    if option_sets[0].json:
        click.echo(json.dumps(outcomes if len(option_sets) > 1 else outcomes[0]))
    if failed:
        raise combine_errors(failed)


def combine_errors(failed: dict[str, Exception]) -> Exception:
    """The error of several studies: Unfinished if the same command can continue one of them."""
    names = [name for name, error in failed.items() if isinstance(error, loop.Unfinished)]
    if names:
        return loop.Unfinished(f"not finished: {', '.join(names)}")
    return click.UsageError(f"refused, for the reasons above: {', '.join(failed)}")


def run(options: Options, deadline: float) -> dict[str, Any]:
    """options -> data -> study -> final training -> one evaluation -> saved model.

    `deadline`: by time.monotonic().
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
    pool = Pool(workers, setup)  # workers start their imports now, during the preparation
    with Member(options.storage, options.study_name, threads) as member, pool:
        job = prepare(options, member, pool, device, (start, deadline))
        forecasts: list[tuple[float, float]] = []
        started_here = not member.run_locked(studies.count_finished)
        complete = member.run_locked(studies.count_finished) >= job.trials
        result = find_result(job) if complete else None
        if result is None:
            screen = Display(job.trials, job.plan, job.space, start)
            remove_stale_files(job)
            with screen:
                run_search(job, pool, screen)
                result = finish(job, pool, screen)
            forecasts = screen.forecasts
        publish_result(job, result)
        remove_stale_files(job)
        write_report(job, result)
        if started_here and forecasts:  # a continued study took longer than this command
            save_forecasts(job, forecasts)
        return print_result(job, result)


def run_search(job: Job, pool: Pool, screen: Display) -> None:
    """Search until the budget of trials is reached, or half of --timeout is over."""
    trials = job.member.run_locked(lambda study: study.get_trials(deepcopy=False))
    for trial in (trial for trial in trials if trial.state in studies.FINISHED):
        screen.add_finished(trial.state, trial.number, trial.value)
    finished = screen.done
    if finished >= job.trials:
        return
    screen.print_line(
        f"study {job.study.study_name}: {finished} of {job.trials} trials finished; a trial sees "
        f"at most {job.plan.trial_samples:,} images; expected: "
        f"{format_duration((job.trials - finished) * job.plan.trial_s)} for the search, "
        f"{format_duration(job.plan.after_search_s)} for the final model"
    )
    updates = loop.search(
        job.member,
        pool,
        lambda claim: make_trial_run(job, claim),
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
            raise loop.Unfinished("--timeout: no trial was completed")
        screen.print_line(f"--timeout: the budget of {job.trials} trials was not reached")


def make_trial_run(job: Job, claim: Claim) -> Run:
    return Run(
        job.options.model,
        claim.params,
        job.plan.trial_samples,
        studies.derive_seed(job.options.seed),  # the same for all trials: paired comparisons
        tuple(budget.rungs(job.plan.trial_samples)),
        plain=job.options.plain,
        bfloat16=job.plan.bfloat16,
        threads=claim.threads,
        checkpoint=job.folder / f"trial-{claim.number}.pt",
    )


def save_forecasts(job: Job, forecasts: list[tuple[float, float]]) -> None:
    """Store the forecasts and the command's duration with the study, for benchmarks.forecasts."""
    timing = {"seconds": round(time.monotonic() - job.start, 1), "forecasts": forecasts}
    with contextlib.suppress(*studies.STORAGE_ERRORS):  # the model is already saved
        job.member.run_locked(lambda study: study.set_user_attr("time", timing))


def write_report(job: Job, result: dict[str, Any]) -> None:
    """Write and attach the report; an error only prints a line, as the model is complete."""
    options = job.options
    training.return_freed_memory()  # of the export
    try:
        page.make(job.member, result["name"], options.output, options.artifacts)
    except Exception as error:  # noqa: BLE001 - drawing figures may raise anything
        print(f"run.py: the report could not be made: {root_cause(error)}", file=sys.stderr)


def print_result(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Print and return the outcome; verifies the weights first, if they are in this registry."""
    options, name = job.options, result["name"]
    local = registry.read(options.output)
    is_local = name in local["models"]
    if is_local:
        registry.file(options.output, name)
    best = result["study"]["trial"]
    outcome = job.member.run_locked(lambda study: studies.summarise(study, best)) | result
    if not options.json:
        display.print_result(
            outcome,
            str(options.output),
            studies.without_password(options.storage),
            str(options.artifacts),
            "current" if local["current"] == name else "saved" if is_local else "elsewhere",
        )
    return outcome


def print_comparison(options: Options, outcomes: list[dict[str, Any]]) -> None:
    """Compare the models of several studies that are in this registry: a table and a page."""
    local = registry.read(options.output)["models"]
    names = [outcome["name"] for outcome in outcomes if outcome["name"] in local]
    rows = compare.compare_models(options.output, names)
    compare.print_table(rows, stderr=options.json)
    path = options.output / "comparison.html"
    path.write_text(compare.render_page(rows), "utf-8")
    click.echo(f"the same as a page: {path}", err=options.json)


def run_cli(arguments: list[str]) -> int:
    """Run the command; each expected error is one line on standard error and an exit code."""
    try:
        make_command(main).main(arguments, "run.py", standalone_mode=False)
        return 0
    except click.ClickException as error:
        return print_error(error.format_message(), 2)
    except INVALID_INPUT as error:
        return print_error(str(error), 2)
    except loop.Unfinished as error:
        return print_error(f"{error}; the same command goes on from here", 1)
    except (OSError, *studies.STORAGE_ERRORS) as error:
        return print_error(
            f"{root_cause(error)}; what was finished is kept, the same command goes on from here", 1
        )
    except (KeyboardInterrupt, click.Abort):
        return print_error("interrupted; what was finished is kept, the same command goes on", 130)


def print_error(message: str, code: int) -> int:
    print(f"run.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    code = run_cli(sys.argv[1:])
    gc.freeze()  # skips a collection of all imported objects at exit: 2 s
    sys.exit(code)
