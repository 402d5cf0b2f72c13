"""The main job: find the best hyperparameters, train the final model with them, save it.

python run.py            # and `python run.py --help`
"""

import os
import signal

if __name__ == "__main__":
    # Until main() takes over there is nothing to lose: Ctrl-C just ends the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Huge pages spare the page faults of the big gradients: 104 instead of 89 images/s at batch
    # 33 on two cores (2026-11-21). torch reads this when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import contextlib
import importlib.metadata
import io
import json
import logging
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import torch

from mnist import data, display, models, registry, search, training
from mnist.display import Display, duration
from mnist.options import QUICK_TRIALS, TRIALS, Options, command

TARGET_S = 16.5 * 60  # what the default run plans with: it ends within 20 minutes, also where the
# machine slows down by a fifth meanwhile
QUICK_S = 30.0
SPEED_BATCH = 64  # with which the machine is measured at the start
TINY_LR = 1e-8  # with which it is measured later: no step of it diverges


@dataclass(frozen=True)
class Job:
    """What one command works on, and what it shows."""

    options: Options
    study: optuna.Study
    dataset: data.Dataset
    device: torch.device
    plan: search.Plan
    trials: int
    total_s: float
    start: float
    screen: Display


def main(options: Options) -> None:
    """options -> data -> study -> final training -> one evaluation -> saved model."""
    start = time.monotonic()
    registry.writable(options.output)
    device = choose_device(options)
    with search.lock(options.storage, options.study_name):
        study = search.open_study(options.storage, options.study_name)
        search.release(study)
        dataset = load(options).to(device)
        trials = options.trials or (QUICK_TRIALS if options.quick else TRIALS)
        total_s = min(QUICK_S if options.quick else TARGET_S, options.timeout or float("inf"))
        plan = fit_to_machine(options, study, dataset, device, trials, total_s)
        with Display(trials, plan.trial_s, plan.final_s) as screen:
            job = Job(options, study, dataset, device, plan, trials, total_s, start, screen)
            if search.finished(study) < trials:
                find_safely(job)
            name = saved_model(job) or save(job, train_final(job))
        show(options, study, name)


def choose_device(options: Options) -> torch.device:
    try:
        return training.device(options.device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def load(options: Options) -> data.Dataset:
    try:
        dataset = data.load(options.dataset, options.data_dir, options.train_samples)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if options.quick:
        dataset = replace(dataset, validation=dataset.validation.head(training.SUBSET))
    return dataset


def fit_to_machine(
    options: Options,
    study: optuna.Study,
    dataset: data.Dataset,
    device: torch.device,
    trials: int,
    total_s: float,
) -> search.Plan:
    """How much trials and the final model may see: as the study has it, or what fits in total_s."""
    kept = study.user_attrs.get("plan")
    asked = round(options.epochs * len(dataset.train)) if options.epochs else None
    if kept and asked in (None, kept["trial_samples"]):
        plan = search.Plan(**kept)
    else:
        speed = training.speed(network(options, dataset, device), dataset, batch_size=SPEED_BATCH)
        plan = search.plan(dataset, trials, speed, total_s, asked)
    if not kept:  # before the fingerprint: a kill in between must not leave one without its plan
        study.set_user_attr("plan", asdict(plan))
    search.agree(study, search.fingerprint(dataset, options.model, plan.trial_samples))
    if options.final_epochs:
        samples = options.final_epochs * (len(dataset.train) + len(dataset.validation))
        plan = replace(plan, final_s=samples / plan.images_per_s)
    return plan


def network(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """A new network for the data."""
    classes = len(dataset.classes)
    return models.build(options.model, dataset.channels, dataset.size, classes).to(device)


def find_safely(job: Job) -> None:
    """find(), with nothing left RUNNING even if an interrupt came in the middle of a statement."""
    try:
        find(job)
    except KeyboardInterrupt:
        # Over a new connection: the interrupt may have broken the old one.
        search.release(search.open_study(job.options.storage, job.options.study_name))
        raise


def find(job: Job) -> None:
    """Search until the budget is reached, or until half of --timeout is over."""
    finished = search.finished(job.study)
    job.screen.say(
        f"study {job.study.study_name}: {finished} of {job.trials} trials finished; a trial sees "
        f"at most {job.plan.trial_samples:,} images; expected: "
        f"{duration((job.trials - finished) * job.plan.trial_s)} for the search, "
        f"{duration(job.plan.final_s)} for the final model"
    )
    for trial in job.study.get_trials(deepcopy=False, states=search.FINISHED):
        job.screen.earlier(trial.state, trial.number, trial.value)
    updates = search.search(
        job.study,
        job.dataset,
        job.options.model,
        trials=job.trials,
        trial_samples=job.plan.trial_samples,
        seed=job.options.seed,
        device=job.device,
        deadline=job.start + (job.options.timeout or float("inf")) / 2,
    )
    with contextlib.closing(updates):
        for update in updates:
            job.screen.trial(update)
    if search.finished(job.study) < job.trials:
        if search.best_trial(job.study) is None:
            raise search.Unfinished("--timeout: no trial was completed")
        job.screen.say(f"--timeout: the budget of {job.trials} trials was not reached")


def saved_model(job: Job) -> str | None:
    """The name of the model that was saved from the study's best trial, if there is one."""
    best, asked = search.best_trial(job.study), job.options.final_epochs
    wanted = (job.study.user_attrs["id"], best.number if best else None)
    for name, record in reversed(registry.read(job.options.output)["models"].items()):
        same = (record["study"].get("id"), record["study"].get("trial")) == wanted
        if same and asked in (None, record.get("options", {}).get("final_epochs")):
            return name
    return None


def train_final(job: Job) -> torch.nn.Module:
    """Train on training and validation data with the best trial's hyperparameters.

    Where that diverges, the trial is set aside and the next best is taken.
    """
    seed = search.seed_of(job.options.seed)
    while best := search.best_trial(job.study):
        samples = final_samples(job, best)
        words = ", ".join(
            f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in best.params.items()
        )
        job.screen.say(f"final model: as trial {best.number} ({words}), {samples:,} images")
        torch.manual_seed(seed)
        model = network(job.options, job.dataset, job.device)
        both = job.dataset.train + job.dataset.validation
        run = training.fit(model, job.dataset, both, **best.params, samples=samples, seed=seed)
        try:
            for progress in run:
                job.screen.final(progress)
                late = time.monotonic() > job.start + (job.options.timeout or float("inf"))
                if late and progress.samples < progress.total:
                    raise search.Unfinished("--timeout: the final training was not finished")
        except training.Diverged as error:
            search.set_aside(job.study, best, str(error))
            job.screen.say(f"trial {best.number} is set aside: {error}")
            continue
        return model
    raise search.Unfinished("no complete trial is left to make the final model from")


def final_samples(job: Job, best: optuna.trial.FrozenTrial) -> int:
    """Images the final model sees: as asked for, as begun before, or what the time left allows."""
    epoch = len(job.dataset.train) + len(job.dataset.validation)
    if job.options.final_epochs:
        return round(job.options.final_epochs * epoch)
    kept = job.study.user_attrs.get("final_samples", {})
    if str(best.number) not in kept or job.options.timeout:
        throwaway = network(job.options, job.dataset, job.device)
        measured = training.speed(throwaway, job.dataset, **best.params | {"lr": TINY_LR})
        left_s = job.total_s - (time.monotonic() - job.start)
        if job.options.timeout:  # leave room for the evaluation, and for a machine that slows down
            seconds = min(0.7 * left_s, job.plan.final_s)
        else:
            seconds = min(max(left_s, 0.6 * job.plan.final_s), 1.1 * job.plan.final_s)
        speed = min(measured, job.plan.images_per_s)  # a machine is rarely alone for long
        kept[str(best.number)] = max(
            1, round(min(seconds * speed, search.MOST_FINAL_EPOCHS * epoch))
        )
        if not job.options.timeout:
            job.study.set_user_attr("final_samples", kept)
    return kept[str(best.number)]


def save(job: Job, model: torch.nn.Module) -> str:
    """Measure the finished model, open the test split this one time, save; returns the name."""
    job.screen.say("evaluating, once, and saving")
    options, study, dataset, best = (
        job.options,
        job.study,
        job.dataset,
        search.best_trial(job.study),
    )
    assert best is not None
    calibration = training.errors(model, dataset, dataset.calibration)
    test = dataset.open_test()
    probabilities = training.predict(model, dataset, test.images.to(job.device))
    scores = training.scores(probabilities, test.labels, dataset.classes)
    record = {
        "dataset": dataset.record(test),
        "model": {"name": options.model, "parameters": models.parameters(model)},
        "hyperparameters": best.params,
        "study": {
            "name": study.study_name,
            "id": study.user_attrs["id"],
            "trial": best.number,
            "trials": search.finished(study),
        },
        "metrics": {
            "validation": validation_metrics(best, len(dataset.validation)),
            "calibration": {"errors": calibration, "n": len(dataset.calibration)},
            "test": scores | {"served_errors": scores["errors"]},  # the .pth is what is served
        },
        "quick": options.quick,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "optuna")},
        "options": options.record(),
        "seed": options.seed,
        "commit": commit(),
    }
    weights, predictions = io.BytesIO(), io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, weights)
    np.savez_compressed(predictions, probabilities=probabilities.numpy(), labels=test.labels)
    files = {
        "weights": (".pth", weights.getvalue()),
        "predictions": (".test.npz", predictions.getvalue()),
    }
    return registry.save(options.output, files, record, options.promote)


def validation_metrics(best: optuna.trial.FrozenTrial, n: int) -> dict[str, Any]:
    """Of the winning trial, which was run with one seed."""
    assert best.value is not None
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": best.value,
        "std": None,
        "seeds": 1,
    }


def commit() -> str | None:
    """The commit of this code, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(options: Options, study: optuna.Study, name: str) -> None:
    """Print the result, for a person or as JSON; its weights are verified first."""
    registry.file(options.output, name)
    result = search.summary(study) | registry.record(options.output, name)[1] | {"name": name}
    if options.json:
        click.echo(json.dumps(result))
        return
    current = registry.read(options.output)["current"] == name
    storage = search.without_password(options.storage)
    display.result(result, str(options.output), storage, current)


def guarded(arguments: list[str]) -> int:
    """The whole command; every expected failure is one line on standard error and an exit code."""
    try:
        command(main).main(arguments, standalone_mode=False)
        return 0
    except click.ClickException as error:
        return fail(error.format_message(), 2)
    except (data.DataError, registry.RegistryError, search.StudyError) as error:
        return fail(str(error), 2)
    except search.Unfinished as error:
        return fail(f"{error}; the same command goes on from here", 1)
    except (OSError, *search.STORAGE_ERRORS) as error:
        return fail(
            f"{reason(error)}; what was finished is kept, the same command goes on from here", 1
        )
    except (KeyboardInterrupt, click.Abort):
        return fail("interrupted; what was finished is kept, the same command goes on", 130)


def reason(error: BaseException) -> str:
    """The first line of what is at the bottom of it: "database or disk is full"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fail(message: str, code: int) -> int:
    print(f"run.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sys.exit(guarded(sys.argv[1:]))
