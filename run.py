"""The main job: find the best hyperparameters, train the final model with them, save it.

python run.py            # and `python run.py --help`
"""

import signal

if __name__ == "__main__":
    # During the imports, Ctrl-C ends the process at once: nothing can be lost yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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

from mnist import data, memory, registry, shell
from mnist.job import comparison, display, prepare, release, results
from mnist.job.clock import Clock
from mnist.job.display import Display, full_message, root_cause
from mnist.job.final import FinalTraining
from mnist.job.options import Options, make_command
from mnist.job.tracking import Tracking
from mnist.job.trials import run_trials
from mnist.report import compare, page
from mnist.search import checkpoints, loop, storage, summary
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.runs import Setup
from mnist.search.workers import Pool, training_threads

# Errors in a study's options, data, registry or database: exit code 2.
INVALID_INPUT = (click.UsageError, data.DataError, registry.RegistryError, storage.StudyError)


def run(options: Options, clock: Clock) -> dict[str, Any]:
    """options -> data -> study -> final training -> one evaluation -> saved model -> report."""
    registry.check_writable(options.output)
    prepare.check_writable(options.artifacts)
    device = prepare.choose_device(options)
    workers = options.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    threads = max(1, training_threads() // workers)
    torch.set_num_threads(min(torch.get_num_threads(), training_threads()))  # of this process
    load = prepare.make_loader(options)
    setup = Setup(load, str(device), threads, options.disk_quota, imports=options.import_)
    pool = Pool(workers, setup)  # workers start their imports now, during the preparation
    member = Member(options.storage, options.study_name, threads)
    with member, pool, Tracking(member, options) as tracking:
        options = comparison.choose(options, member, pool, device)
        prepared = prepare.prepare(options, member, pool, device, clock)
        tracking.start()
        plan, config, space = prepared.plan, prepared.config, prepared.space
        finished = member.run_locked(studies.count_finished)
        result = None
        if finished >= options.total_trials:
            result = results.find_result(member, options)
        screen = Display(options.total_trials, plan, space, clock)
        if result is None:
            results.remove_stale_files(member, options, config.checkpoints)
            epoch = prepared.epoch
            final = FinalTraining(member, pool, screen, options, config, plan, clock, epoch)
            with screen:
                run_trials(member, pool, screen, options, space, config, plan, clock)
                result = release.finish(final, lambda: load().to(device))
        results.publish_result(member, result)
        results.remove_stale_files(member, options, config.checkpoints)
        tracking.add_model(result)
        write_report(member, options, result["name"])
        if not finished and screen.forecasts:  # a continued study took longer than this command
            results.save_forecasts(member, clock.elapsed_s, screen.forecasts)
        place = results.find_place(options, result["name"])
        best = result["study"]["trial"]
        outcome = member.run_locked(lambda study: summary.summarise(study, best)) | result
    if not options.json:
        display.print_result(outcome, options, place)
    return outcome


def write_report(member: Member, options: Options, name: str) -> None:
    """Write and attach the report; an error only prints a line, as the model is already saved."""
    memory.return_freed_memory()  # of the export
    try:
        page.make(member, name, options.output, options.artifacts)
    except Exception as error:  # noqa: BLE001 - drawing figures may raise anything
        click.echo(f"run.py: the report could not be made: {root_cause(error)}", err=True)


def main(option_sets: list[Options]) -> None:
    """Run one study after the other; usually there is only one."""
    if len(option_sets) > 1:  # report errors of any study before the first is trained
        prepare.check_all(option_sets)
    outcomes: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    deadline = time.monotonic() + (option_sets[0].timeout or float("inf"))
    for i, options in enumerate(option_sets):
        clock = Clock(time.monotonic(), deadline)
        if options.timeout:  # each study gets an equal share of the remaining time
            share_s = (deadline - clock.start) / (len(option_sets) - i)
            options = replace(options, timeout=max(1.0, share_s))
        if len(option_sets) > 1:
            click.echo(f"\n{options.study_name} ({i + 1} of {len(option_sets)})", err=True)
        try:
            outcomes.append(run(options, clock))
        except (loop.Unfinished, storage.StudyGone, *INVALID_INPUT) as error:
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


def print_comparison(options: Options, outcomes: list[dict[str, Any]]) -> None:
    """Compare the models of several studies that are in this registry: a table and a page."""
    local = registry.read(options.output)["models"]
    names = [outcome["name"] for outcome in outcomes if outcome["name"] in local]
    rows = compare.compare_models(options.output, names)
    compare.print_table(rows, stderr=options.json)
    path = options.output / "comparison.html"
    path.write_text(compare.render_page(rows), "utf-8", "backslashreplace")
    click.echo(f"the same as a page: {path}", err=options.json)


def combine_errors(failed: dict[str, Exception]) -> Exception:
    """The error of several studies: Unfinished if the same command can continue one of them."""
    unfinished = {
        name: error for name, error in failed.items() if not isinstance(error, INVALID_INPUT)
    }
    if any(map(describe_continuation, unfinished.values())):
        return loop.Unfinished(f"not finished: {', '.join(unfinished)}")
    if unfinished:
        return loop.SearchFailed(f"not finished, for the reasons above: {', '.join(unfinished)}")
    return click.UsageError(f"refused, for the reasons above: {', '.join(failed)}")


def run_cli(arguments: list[str]) -> int:
    """Run the command; each error is one line on standard error and an exit code."""
    shell.accept_any_text()
    try:
        make_command(main).main(arguments, "run.py", standalone_mode=False)
        return 0
    except click.ClickException as error:
        return print_error(error.format_message(), 2)
    except INVALID_INPUT as error:
        return print_error(str(error), 2)
    except BrokenPipeError:
        shell.discard_output()
        return 1
    except (loop.Unfinished, OSError, storage.StorageError) as error:
        return print_error(f"{root_cause(error)}{describe_continuation(error)}", 1)
    except (KeyboardInterrupt, click.Abort):
        return print_error("interrupted; finished work is kept; the same command continues", 130)
    except Exception as error:  # noqa: BLE001 - the last resort
        return print_error(shell.describe_crash(error), 1)


def describe_continuation(error: Exception) -> str:
    """A clause that the same command continues; empty where it would fail again."""
    if isinstance(error, loop.SearchFailed):
        return ""
    if isinstance(error, loop.Unfinished):
        return "; the same command continues from here"
    if isinstance(error, storage.StorageError) and not error.passing:
        return ""
    if isinstance(error, OSError) and not checkpoints.is_disk_full(error):
        return ""
    return "; finished work is kept; the same command continues from here"


def print_error(message: str, code: int) -> int:
    click.echo(f"run.py: {message}", err=True)  # with stderr closed, print() would use stdout
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    code = run_cli(sys.argv[1:])
    gc.freeze()  # without it, a collection of all imported objects at exit takes 2 s
    sys.exit(code)
