"""What comes before a study: data, network and hyperparameters, and a plan for this machine."""

import contextlib
import functools
import math
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from torch.overrides import TorchFunctionMode

from mnist import budget, data, folding, models, plugins, search, training
from mnist import space as spaces
from mnist import study as studies
from mnist.display import full_message, root_cause
from mnist.job import Job, network, origin, speed_run
from mnist.members import Member
from mnist.options import Options
from mnist.workers import Pool

BYTES_A_WEIGHT = 16  # itself, its gradient, and what Adam keeps of it, in float32
TRIALS, QUICK_TRIALS = 32, 3
CONFIRM, QUICK_CONFIRM = 2, 0
BFLOAT16_GAIN = 1.2  # least ratio of speeds for which rounding to 8 bits is worth it
SPEED_BATCHES = (64, 8)  # with which the machine is measured: the second where the first fails


def prepare(
    options: Options,
    member: Member,
    pool: Pool,
    device: torch.device,
    times: tuple[float, float],
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
    work = budget.Workload(
        trials,
        (confirmed + len(studies.BASELINES)) * studies.CONFIRM_SEEDS if confirmed else 0,
        len(dataset.train),
        len(dataset.validation),
        min(training.VALIDATION_SUBSET, len(dataset.validation)),
        training.NORM_IMAGES if training.batch_norms(model) else 0,
        options.thorough,
    )
    may_round = may_be_bfloat16(options, device, model)
    plan = fit_to_machine(options, member, pool, dataset, space, work, times[0], may_round)
    member.study.pruner = studies.PRUNERS[options.pruner](plan.trial_samples)
    return Job(options, member, dataset, space, device, plan, trials, confirmed, work, *times)


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
                raise click.UsageError(f"{options.study_name}: {full_message(error)}") from error


def writable(artifacts: Path) -> None:
    """Make the folder; raises click.UsageError where nothing can be written there."""
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=artifacts):
            pass
    except OSError as error:
        text = f"cannot write to {artifacts}: {error.strerror}; see --artifacts"
        raise click.UsageError(text) from error


def choose_device(options: Options) -> torch.device:
    """Of --device; raises click.UsageError where this machine has no such one."""
    try:
        return training.select_device(options.device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def source(options: Options) -> functools.partial[data.Dataset]:
    """What loads the data set, here and in each worker."""
    validation = training.VALIDATION_SUBSET if options.quick else None
    return functools.partial(
        data.load,
        options.dataset,
        options.data_dir,
        options.train_samples,
        validation,
        options.image_size,
        options.color,
    )


def loaded(options: Options) -> data.Dataset:
    """Raises data.DataError, or click.UsageError where --image-size or the like is not for it."""
    try:
        return source(options)()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def sound(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """A new network that was seen to give a logit for each class.

    Raises click.UsageError: a plugin's network may fail in any way.
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


class _Uninitialised(TorchFunctionMode):
    """Leaves out `normal_`: on the device "meta" torch imports its compiler for it, 64 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def weights(options: Options, dataset: data.Dataset) -> int:
    """How many the network has, before it is built; 0 where it cannot tell."""
    with contextlib.suppress(Exception), torch.device("meta"), _Uninitialised():
        return models.count_parameters(network(options, dataset, torch.device("meta")))
    return 0


def memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choices(options: Options, model: torch.nn.Module) -> spaces.Space:
    """What trials choose from; raises click.UsageError."""
    try:
        return spaces.read(options.space, options.param, bool(training.dropout_layers(model)))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def fit_to_machine(
    options: Options,
    member: Member,
    pool: Pool,
    dataset: data.Dataset,
    space: spaces.Space,
    work: budget.Workload,
    start: float,
    may_round: bool,
) -> budget.Plan:
    """The study's own plan, or one by the speed of this machine, in bfloat16 if it `may_round`."""
    kept = member.run_locked(lambda study: study.user_attrs.get("plan"))
    asked = round(options.epochs * len(dataset.train)) if options.epochs else None
    if kept and asked in (None, kept["trial_samples"]):
        plan = budget.Plan(**kept)
    else:
        images_per_s, bfloat16 = measured(options, pool, may_round)
        plan = budget.make_plan(
            work,
            images_per_s,
            time.monotonic() - start,
            timeout_s=options.timeout or math.inf,
            trial_samples=asked,
            quick=options.quick,
            bfloat16=bfloat16,
        )

    def agree(study: optuna.Study) -> budget.Plan:
        """By the first member's plan, if another one came first."""
        first = study.user_attrs.get("plan", asdict(plan))
        chosen = budget.Plan(**first) if asked in (None, first["trial_samples"]) else plan
        if "plan" not in study.user_attrs:  # before the fingerprint: a kill in between must not
            study.set_user_attr("plan", asdict(chosen))  # leave one without its plan
            study.set_user_attr("origin", origin(options))
        parts = (models.NETWORKS[options.model], data.reader(options.dataset))
        model = options.model + (
            plugins.digest(options.import_) if any(map(plugins.is_from_plugin, parts)) else ""
        )
        wanted = studies.fingerprint(dataset, model, chosen.trial_samples, space, options.plain)
        studies.check_fingerprint(study, wanted, studies.count_finished(study) >= work.trials)
        return chosen

    plan = member.run_locked(agree)
    if options.final_epochs:
        samples = options.final_epochs * (len(dataset.train) + len(dataset.validation))
        plan = replace(plan, final_s=samples / plan.images_per_s, total_s=0.0)
    return plan


def measured(options: Options, pool: Pool, may_round: bool) -> tuple[float, bool]:
    """Training images a second of a worker with all cores, and whether that is in bfloat16.

    Raises click.UsageError where the network cannot be trained.
    """
    for batch_size in SPEED_BATCHES:
        run = speed_run(options, {"batch_size": batch_size, "optimizer": "Adam"})
        try:
            speed = search.measure_speed(pool, run)
            break
        except search.RunFailed as error:  # for lack of memory, perhaps
            failure = error
    else:
        raise click.UsageError(f"network {options.model!r} cannot be used: {failure}")
    if may_round:
        with contextlib.suppress(search.RunFailed):  # an operation that has no bfloat16
            faster = search.measure_speed(pool, replace(run, bfloat16=True))
            if faster > BFLOAT16_GAIN * speed:
                return faster, True
    return speed, False


def may_be_bfloat16(options: Options, device: torch.device, model: torch.nn.Module) -> bool:
    """Whether bfloat16 is worth a try: for a training form, where the device has it, unless others
    on the same study may lack it and are to get the same results."""
    if not folding.has_factors(model) or studies.sqlite_file(options.storage) is None:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capable = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capable.get(f"{kind}_bf16") for kind in ("avx512", "amx"))


def unsound(options: Options, error: Exception) -> click.UsageError:
    text = f"{type(error).__name__}: {root_cause(error)}"
    return click.UsageError(f"network {options.model!r} cannot be used: {text}")
