"""What a short comparison decides: the network of --model auto, and mirroring for folders."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import click
import optuna
import torch

from mnist import data
from mnist.job import networks, prepare
from mnist.job.options import Options
from mnist.job.parameters import AUTO, CANDIDATES
from mnist.search import loop
from mnist.search.members import Member
from mnist.search.runs import Report, Run, RunResult
from mnist.search.workers import Pool, training_threads

# Training time of each candidate, and its largest share of --timeout.
COMPARE_S, QUICK_COMPARE_S, TIMEOUT_SHARE = 15.0, 3.0, 0.03
MAX_WEIGHTS = 100_000_000  # `parallel` has more from 56x56 pixels on: too large to be served well
# Training images of a folder for which mirroring is compared: of a larger one, a short training
# sees most images once, so that it hardly needs augmentation.
MAX_IMAGES = 5_000
# Fewer validation images do not tell candidates apart: with 10 pictures of each class, the first
# candidate makes fewer errors than the one that 10 validation images prefer (docs/lab-log.md).
MIN_VALIDATION_IMAGES = 100
NO_MIRRORING = "mirror=0"  # an entry of the search space
PARAMS: dict[str, Any] = {"batch_size": 64, "optimizer": "Adam", "lr": 0.003}


class Choice(NamedTuple):
    """The name of the chosen candidate, and the candidates' log-losses on the validation images."""

    name: str | None  # None: nothing is to be chosen
    log_losses: dict[str, float]  # empty if they were not compared


def choose(options: Options, member: Member, pool: Pool, device: torch.device) -> Options:
    """The options with a network instead of "auto", and for a folder with or without mirroring.

    Candidates train for the same time; the lowest log-loss on the validation images wins. Where
    these images are too few, the first network wins, without mirroring. The study keeps the choice
    of its first member. Raises click.UsageError where no network can be trained.
    """
    name = options.study_name
    if options.model == AUTO:
        network = _agree(member, "networks", lambda: compare_networks(options, pool, device))
        options = replace(options, model=network or CANDIDATES[0], study=name)
    is_folder = options.dataset.startswith(data.FOLDER_PREFIX)
    if is_folder and not options.quick and not _names_augmentation(options):
        winner = _agree(member, "mirroring", lambda: compare_mirroring(options, pool, device))
        if winner == "without":
            options = replace(options, param=(NO_MIRRORING, *options.param))
    return options


def _names_augmentation(options: Options) -> bool:
    """Whether the options say how images are augmented, or let the search find out."""
    names = {entry.partition("=")[0].strip() for entry in options.param}
    is_default = options.augment == AUTO and options.space == "default"
    return not is_default or bool(names & {"augment", "mirror"})


def compare_networks(options: Options, pool: Pool, device: torch.device) -> Choice:
    """Choose among the networks with at most MAX_WEIGHTS.

    Raises click.UsageError where none can be trained.
    """
    dataset = prepare.load_dataset(options)
    params = PARAMS if options.augment == AUTO else PARAMS | {"augment": options.augment}
    choices = {name: (replace(options, model=name), params) for name in CANDIDATES}
    for name, (choice, _) in list(choices.items()):
        if networks.count_weights(replace(choice, plain=True), dataset) > MAX_WEIGHTS:
            del choices[name]
    chosen = compare("networks", choices, len(dataset.validation), pool, device)
    if chosen.name is None:
        raise click.UsageError(f"none of {', '.join(choices)} can be trained on these data")
    return chosen


def compare_mirroring(options: Options, pool: Pool, device: torch.device) -> Choice:
    """Choose "with" or "without" mirrored images; nothing where training images are too many, or
    where classes are known to be each other's mirror image."""
    dataset = prepare.load_dataset(options)
    if len(dataset.train) > MAX_IMAGES or dataset.mirrored_classes:
        return Choice(None, {})
    choices = {"without": (options, PARAMS | {"mirror": 0.0}), "with": (options, PARAMS)}
    return compare("mirrored images", choices, len(dataset.validation), pool, device)


def _agree(member: Member, attribute: str, measure: Callable[[], Choice]) -> str | None:
    """The choice that the study has, or that of `measure`."""

    def read(study: optuna.Study) -> dict[str, Any] | None:
        stored = study.user_attrs.get(attribute)
        if stored is None and "plan" in study.user_attrs:  # begun by a version without comparisons
            return Choice(None, {})._asdict()
        return stored

    def store(study: optuna.Study) -> dict[str, Any]:
        if attribute not in study.user_attrs:
            study.set_user_attr(attribute, measured._asdict())
        return study.user_attrs[attribute]

    choice = member.run_locked(read)
    if choice is None:
        measured = measure()
        choice = member.run_locked(store)
    return choice.get("name")


def compare(
    subject: str,
    choices: Mapping[str, tuple[Options, dict[str, Any]]],
    validation_images: int,
    pool: Pool,
    device: torch.device,
) -> Choice:
    """Choose by the log-loss on the validation images, without those that cannot be trained; the
    first one where these images are too few.

    Each choice is a network, in its options, and hyperparameters.
    """
    if choices and validation_images < MIN_VALIDATION_IMAGES:
        first = next(iter(choices))
        click.echo(
            f"comparing {subject}: skipped, as {validation_images} validation images are fewer "
            f"than {MIN_VALIDATION_IMAGES}; chosen: {first}",
            err=True,
        )
        return Choice(first, {})
    log_losses: dict[str, float] = {}
    for name, (options, params) in choices.items():
        seconds = QUICK_COMPARE_S if options.quick else COMPARE_S
        seconds = min(seconds, TIMEOUT_SHARE * (options.timeout or math.inf))
        try:
            log_losses[name] = train_briefly(options, params, pool, device, seconds)
            result = f"log-loss {log_losses[name]:.3f} on validation images"
        except (click.UsageError, loop.RunFailed) as error:
            result = f"left out: {error}"
        click.echo(f"comparing {subject}, {seconds:.2g} s each: {name}, {result}", err=True)
    return Choice(min(log_losses, key=log_losses.__getitem__, default=None), log_losses)


def train_briefly(
    options: Options, params: dict[str, Any], pool: Pool, device: torch.device, seconds: float
) -> float:
    """Train a network for about `seconds`; returns its log-loss on the validation images.

    Raises click.UsageError or loop.RunFailed where it cannot be trained.
    """
    dataset = prepare.load_dataset(options)
    model = networks.validate_network(options, dataset, device)
    prepare.read_space(options, model, dataset)  # a network without dropout may not suit --param
    try_bfloat16 = networks.may_use_bfloat16(options, device, model)
    images_per_s, bfloat16 = networks.measure_speed(options, pool, try_bfloat16)
    run = Run(
        options.model,
        params,
        max(1, round(seconds * images_per_s)),
        options.seed,
        plain=options.plain,
        bfloat16=bfloat16,
        threads=training_threads(),
    )
    log_loss = None
    for _, message in loop.execute_runs(pool, {options.model: run}):
        if isinstance(message, Report):
            log_loss = message.progress.log_loss
        elif isinstance(message, RunResult) and message.failure:
            raise loop.RunFailed(message.reason)
    if log_loss is None:
        raise loop.RunFailed("its training ended without a validation")
    return log_loss
