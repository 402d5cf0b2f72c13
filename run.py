"""The main job: find the best hyperparameters, train the final model with them, save it.

python run.py            # and `python run.py --help`
"""

import os
import signal

if __name__ == "__main__":
    # Until main() takes over there is nothing to lose: Ctrl-C just ends the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Huge pages spare the page faults of the big gradients: 104 instead of 89 images/s at batch
    # 33 on two cores (2026-11-21). torch reads this when it is imported, here and by workers.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import contextlib
import functools
import gc
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import optuna
import torch

from mnist import compare, data, display, models, own, registry, report, search, training
from mnist import space as spaces
from mnist import study as studies
from mnist.display import Display, duration
from mnist.finish import finish
from mnist.job import Job, lowering, network, publish, result, sweep
from mnist.members import Claim, Member
from mnist.options import Options, command
from mnist.release import origin
from mnist.workers import Pool, Run, Setup, cores

BYTES_A_WEIGHT = 16  # itself, its gradient, and what Adam keeps of it, in float32
TRIALS, QUICK_TRIALS = 32, 3
CONFIRM, QUICK_CONFIRM = 2, 0
# Least images that a trial sees. Where a slow machine left 300, the best of 32 was 43 % right, its
# rank a matter of luck. With 1,500 it was 90 %, but that took much of the final training's time.
LEAST, QUICK_LEAST = 1_000, 300
TARGET_S = 15.5 * 60  # what the default run plans with: it ends within 20 minutes, also where the
# machine slows down by a quarter meanwhile (16.5 once took 20.7)
QUICK_S = 20.0
# Whatever is wrong with what one study is to be made of.
REFUSED = (click.UsageError, data.DataError, registry.RegistryError, studies.StudyError)
SPEED_BATCH = 64  # with which the machine is measured at the start


def main(each: list[Options]) -> None:
    """One study after the other; nearly always there is just one."""
    if len(each) > 1:  # what is wrong with the last one is to be said before the first is trained
        check(each)
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
            click.echo(f"{options.study_name}: {said(error)}", err=True)
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


def said(error: Exception) -> str:
    return error.format_message() if isinstance(error, click.ClickException) else str(error)


def run(options: Options, latest: float) -> dict[str, Any]:
    """options -> data -> study -> final training -> one evaluation -> saved model.

    All before `latest`, by time.monotonic().
    """
    start = time.monotonic()
    registry.writable(options.output)
    writable(options.artifacts)
    device = choose_device(options)
    workers = options.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    threads = max(1, cores() // workers)
    setup = Setup(
        source(options), str(device), threads, options.disk_quota, imports=options.import_
    )
    pool = Pool(workers, setup)  # its imports begin here, beside what comes before the training
    with Member(options.storage, options.study_name, threads) as member:
        job = prepare(options, member, device, (start, latest))
        done = result(job) if member.update(studies.finished) >= job.trials else None
        if done is None:
            screen = Display(job.trials, job.plan.trial_s, job.rest_s, job.space)
            sweep(job)
            with screen, pool:
                find(job, pool, screen)
                done = finish(job, pool, screen)
        publish(job, done)
        sweep(job)
        explain(job, done)
        return show(job, done)


def check(each: list[Options]) -> None:
    """Raises what `prepare` would for any of these, after reading each data set once."""
    device = choose_device(each[0])
    for name in dict.fromkeys(options.dataset for options in each):
        some = [options for options in each if options.dataset == name]
        dataset = loaded(some[0])
        for options in some:
            try:
                choices(options, sound(options, dataset, device))
            except click.UsageError as error:
                raise click.UsageError(f"{options.study_name}: {said(error)}") from error


def writable(artifacts: Path) -> None:
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=artifacts):
            pass
    except OSError as error:
        reason = f"cannot write to {artifacts}: {error.strerror}; see --artifacts"
        raise click.UsageError(reason) from error


def choose_device(options: Options) -> torch.device:
    try:
        return training.device(options.device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def source(options: Options) -> functools.partial[data.Dataset]:
    """What loads the data set, here and in each worker."""
    validation = training.SUBSET if options.quick else None
    return functools.partial(
        data.load,
        options.dataset,
        options.data_dir,
        options.train_samples,
        validation,
        options.image_size,
        options.color,
    )


def prepare(
    options: Options, member: Member, device: torch.device, times: tuple[float, float]
) -> Job:
    """Load the data; see how much trials and the final model may see, and that trials compare.

    `times`: when the study began, and when it must be over.
    """
    dataset = loaded(options).to(device)
    model = sound(options, dataset, device)
    space = choices(options, model)
    trials = options.trials or (QUICK_TRIALS if options.quick else TRIALS)
    confirmed = options.confirm
    if confirmed is None:
        confirmed = QUICK_CONFIRM if options.quick else CONFIRM
    total_s = min(QUICK_S if options.quick else TARGET_S, options.timeout or float("inf"))
    plan = fit_to_machine(options, member, dataset, space, model, (trials, confirmed), total_s)
    member.study.pruner = studies.PRUNERS[options.pruner](plan.trial_samples)
    return Job(options, member, dataset, space, device, plan, trials, confirmed, total_s, *times)


def loaded(options: Options) -> data.Dataset:
    """Raises data.DataError, or click.UsageError where --image-size or the like is not for it."""
    try:
        return source(options)()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def choices(options: Options, model: torch.nn.Module) -> spaces.Space:
    """What trials choose from; raises click.UsageError."""
    try:
        return spaces.read(options.space, options.param, bool(training.dropouts(model)))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def sound(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """A new network that was seen to give a logit for each class.

    Raises click.UsageError: with a network of one's own anything can be wrong.
    """
    images, classes = dataset.train.images[:2].to(device), len(dataset.classes)
    try:
        if device.type == "cpu" and (n := weights(options, dataset)) * BYTES_A_WEIGHT > memory():
            text = f"its {n:,} weights are too many to be trained here"
            raise MemoryError(f"{text}; try --model cnn or a smaller --image-size")
        model = network(options, dataset, device)
        with torch.no_grad():
            shape = tuple(model.eval()(training.standardise(images, dataset)).shape)
    except Exception as error:  # whatever it is
        raise unsound(options, error) from error
    if shape != (2, classes):
        text = f"2 images give {shape}, not {(2, classes)}"
        raise click.UsageError(f"network {options.model!r} cannot be used: {text}")
    return model.train()


def measured(options: Options, model: torch.nn.Module, dataset: data.Dataset) -> float:
    """Training images a second; raises click.UsageError where the network cannot be trained."""
    try:
        return training.speed(model, dataset, batch_size=SPEED_BATCH)
    except Exception as error:
        raise unsound(options, error) from error


def unsound(options: Options, error: Exception) -> click.UsageError:
    text = f"{type(error).__name__}: {reason(error)}"
    return click.UsageError(f"network {options.model!r} cannot be used: {text}")


def weights(options: Options, dataset: data.Dataset) -> int:
    """How many the network has, before it is built; 0 where it cannot tell."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return models.parameters(network(options, dataset, torch.device("meta")))
    return 0


def memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_to_machine(
    options: Options,
    member: Member,
    dataset: data.Dataset,
    space: spaces.Space,
    model: torch.nn.Module,
    runs: tuple[int, int],
    total_s: float,
) -> search.Plan:
    """The study's own plan, or one by the speed of this machine, for which `model` is trained;
    `runs`: trials, confirmed."""
    kept = member.update(lambda study: study.user_attrs.get("plan"))
    asked = round(options.epochs * len(dataset.train)) if options.epochs else None
    if kept and asked in (None, kept["trial_samples"]):
        plan = search.Plan(**kept)
    else:
        speed = measured(options, model, dataset)
        least = QUICK_LEAST if options.quick else LEAST
        plan = search.plan(dataset, *runs, speed, total_s, least, asked, lowering(options))

    def agree(study: optuna.Study) -> search.Plan:
        """By the first member's plan, if another one came first."""
        chosen = plan if asked else search.Plan(**study.user_attrs.get("plan", asdict(plan)))
        if "plan" not in study.user_attrs:  # before the fingerprint: a kill in between must not
            study.set_user_attr("plan", asdict(chosen))  # leave one without its plan
            study.set_user_attr("origin", origin(options))
        parts = (models.NETWORKS[options.model], data.reader(options.dataset))
        model = options.model + (own.digest(options.import_) if any(map(own.made, parts)) else "")
        wanted = studies.fingerprint(dataset, model, chosen.trial_samples, space)
        studies.agree(study, wanted)
        return chosen

    plan = member.update(agree)
    if options.final_epochs:
        samples = options.final_epochs * (len(dataset.train) + len(dataset.validation))
        plan = replace(plan, final_s=samples / plan.images_per_s)
    return plan


def find(job: Job, pool: Pool, screen: Display) -> None:
    """Search until the budget is reached, or until half of --timeout is over."""
    trials = job.member.update(lambda study: study.get_trials(deepcopy=False))
    for trial in (trial for trial in trials if trial.state in studies.FINISHED):
        screen.earlier(trial.state, trial.number, trial.value)
    done = screen.done
    if done >= job.trials:
        return
    screen.say(
        f"study {job.study.study_name}: {done} of {job.trials} trials finished; a trial sees "
        f"at most {job.plan.trial_samples:,} images; expected: "
        f"{duration((job.trials - done) * job.plan.trial_s)} for the search, "
        f"{duration(job.rest_s)} for the final model"
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
            screen.trial(update)
            if time.monotonic() > half:
                break
    if job.member.update(studies.finished) < job.trials:
        if not job.member.update(lambda study: studies.best_trials(study, 1)):
            raise search.Unfinished("--timeout: no trial was completed")
        screen.say(f"--timeout: the budget of {job.trials} trials was not reached")


def trial_run(job: Job, claim: Claim) -> Run:
    return Run(
        job.options.model,
        claim.params,
        job.plan.trial_samples,
        studies.seed_of(job.options.seed, claim.number),
        tuple(studies.rungs(job.plan.trial_samples)),
        threads=claim.threads,
        checkpoint=job.folder / f"trial-{claim.number}.pt",
    )


def explain(job: Job, done: dict[str, Any]) -> None:
    """Write and attach the report; without it the model is as good, so a failure is one line."""
    options = job.options
    try:
        report.make(job.member, done["name"], options.output, options.artifacts)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a picture
        print(f"run.py: the report could not be made: {reason(error)}", file=sys.stderr)


def show(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """The whole outcome, printed for a person; weights that are here are verified first."""
    options, name = job.options, done["name"]
    models_here = registry.read(options.output)
    here = name in models_here["models"]
    if here:
        registry.file(options.output, name)
    best = done["study"]["trial"]
    outcome = job.member.update(lambda study: studies.summary(study, best)) | done
    if not options.json:
        display.result(
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
    code = guarded(sys.argv[1:])
    gc.freeze()  # Python would look through all that was imported at its end: 2 s
    sys.exit(code)
