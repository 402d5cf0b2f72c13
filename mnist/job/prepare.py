"""Preparation of a study: data, network, search space, and the plan for this machine."""

import functools
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import optuna
import torch

from mnist import batch_norms, data, disk, models, plugins, training
from mnist.data.kinds import describe_mirrored_classes
from mnist.job import networks
from mnist.job.clock import Clock
from mnist.job.display import full_message
from mnist.job.options import Options
from mnist.job.parameters import AUTO, CANDIDATES
from mnist.job.results import describe_origin
from mnist.search import budget, existing
from mnist.search import space as spaces
from mnist.search import study as studies
from mnist.search.checkpoints import Checkpoints, is_disk_full
from mnist.search.members import Member
from mnist.search.runs import StudyConfig
from mnist.search.workers import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """What a study needs: search space, plan, config, and the images in an epoch of the final
    training."""

    space: spaces.Space
    plan: budget.Plan
    config: StudyConfig
    epoch: int


def prepare(
    options: Options, member: Member, pool: Pool, device: torch.device, clock: Clock
) -> Preparation:
    """Load the data, check network and space, make the plan, check the study's fingerprint."""
    dataset = load_dataset(options).to(device)
    model = networks.validate_network(options, dataset, device)
    space = read_space(options, model, dataset)
    if note := spaces.describe_repeats(space, options.total_trials):
        log.warning("%s", note)
    note = describe_mirrored_classes(dataset.classes, dataset.mirrored_classes)
    if note and "mirror" not in space:
        log.warning("%s", note)
    work = budget.Workload(
        options.total_trials,
        (options.confirmed + len(studies.BASELINES)) * studies.CONFIRM_SEEDS
        if options.confirmed
        else 0,
        len(dataset.train),
        len(dataset.validation),
        min(training.VALIDATION_SUBSET, len(dataset.validation)),
        batch_norms.NORM_IMAGES if batch_norms.list_layers(model) else 0,
        budget.ENOUGH_FINAL_SAMPLES if dataset.kind == "digit" else budget.ENOUGH_PICTURE_SAMPLES,
        options.thorough,
        1.0 if options.pruner == "none" else budget.SURVIVING,
    )
    stored = member.run_locked(lambda study: study.user_attrs.get("plan"))
    requested = round(options.epochs * len(dataset.train)) if options.epochs else None
    if stored and requested in (None, stored["trial_samples"]):
        plan = budget.Plan(**stored)
    else:
        try_bfloat16 = networks.may_use_bfloat16(options, device, model)
        plan = make_plan(options, pool, work, clock, requested, try_bfloat16)
    plan = agree_on_plan(options, member, dataset, space, plan, requested)
    epoch = len(dataset.train) + len(dataset.validation)
    if options.final_epochs:
        final_s = options.final_epochs * epoch / plan.images_per_s
        plan = replace(plan, final_s=final_s, total_s=0.0)
    member.study.pruner = studies.PRUNERS[options.pruner](plan.trial_samples)
    config = StudyConfig(
        options.model,
        options.seed,
        plan.trial_samples,
        Checkpoints.of_study(options.artifacts, member.name, member.study_id),
        options.plain,
        plan.bfloat16,
    )
    return Preparation(space, plan, config, epoch)


def check_all(option_sets: list[Options]) -> None:
    """Raise the errors that prepare() would raise for these options; loads each data set once."""
    device = choose_device(option_sets[0])
    for name in dict.fromkeys(options.dataset for options in option_sets):
        same_data = [options for options in option_sets if options.dataset == name]
        dataset = load_dataset(same_data[0])
        for options in same_data:
            network = CANDIDATES[-1] if options.model == AUTO else options.model
            checked = replace(options, model=network)
            try:
                read_space(options, networks.validate_network(checked, dataset, device), dataset)
            except click.UsageError as error:
                raise click.UsageError(f"{options.study_name}: {full_message(error)}") from error


def check_writable(artifacts: Path) -> None:
    """Create the folder; raises click.UsageError where it is not writable."""
    try:
        disk.check_writable(artifacts)
    except OSError as error:
        text = f"cannot write to {artifacts}: {error.strerror}; see --artifacts"
        raise click.UsageError(text) from error


def choose_device(options: Options) -> torch.device:
    """The device of --device; raises click.UsageError where this machine lacks it."""
    try:
        return networks.select_device(options.device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def make_loader(options: Options) -> functools.partial[data.Dataset]:
    """A function that loads the data set, for this process and each worker."""
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


def load_dataset(options: Options) -> data.Dataset:
    """Load the data set. Raises data.DataError, or click.UsageError for options it rejects."""
    try:
        return make_loader(options)()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        if is_disk_full(error):
            raise
        raise click.UsageError(f"the data set cannot be read: {error}") from error


def read_space(options: Options, model: torch.nn.Module, dataset: data.Dataset) -> spaces.Space:
    """The search space of --space and --param; raises click.UsageError."""
    try:
        entries = () if options.augment == AUTO else (f"augment={options.augment}",)
        return spaces.read_space(
            options.space,
            (*entries, *options.param),
            bool(training.dropout_layers(model)),
            dataset.kind != "digit",
            not dataset.mirrored_classes,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def make_plan(
    options: Options,
    pool: Pool,
    work: budget.Workload,
    clock: Clock,
    trial_samples: int | None,
    try_bfloat16: bool,
) -> budget.Plan:
    """A plan for this machine, from a speed measurement, which may `try_bfloat16`."""
    images_per_s, bfloat16 = networks.measure_speed(options, pool, try_bfloat16)
    return budget.make_plan(
        work,
        images_per_s,
        clock.elapsed_s,
        timeout_s=options.timeout or math.inf,
        trial_samples=trial_samples,
        quick=options.quick,
        bfloat16=bfloat16,
    )


def agree_on_plan(
    options: Options,
    member: Member,
    dataset: data.Dataset,
    space: spaces.Space,
    plan: budget.Plan,
    trial_samples: int | None,
) -> budget.Plan:
    """Store the plan, or return the plan of the member that stored one first, unless other
    `trial_samples` are requested. Raises StudyError where the fingerprint differs."""

    def store_plan(study: optuna.Study) -> budget.Plan:
        first = study.user_attrs.get("plan", asdict(plan))
        agreed = budget.Plan(**first) if trial_samples in (None, first["trial_samples"]) else plan
        # The plan is stored before the fingerprint: after a kill between the two, no fingerprint
        # lacks its plan.
        if "plan" not in study.user_attrs:
            study.set_user_attr("plan", asdict(agreed))
            study.set_user_attr("origin", describe_origin(options))
        components = (models.NETWORKS[options.model], data.find_reader(options.dataset))
        from_plugin = any(map(plugins.is_from_plugin, components))
        model = options.model + (plugins.digest(options.import_) if from_plugin else "")
        fingerprint = studies.fingerprint(
            dataset, model, agreed.trial_samples, space, options.plain
        )
        finished = studies.count_finished(study) >= options.total_trials
        studies.check_fingerprint(study, fingerprint, finished)
        existing.check_trials(study, space)
        return agreed

    return member.run_locked(store_plan)
