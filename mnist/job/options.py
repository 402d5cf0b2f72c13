"""The options of run.py: one definition for the command line, the record and the default."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import torch

from mnist import augmentation, data, folding, models
from mnist.job import trackers
from mnist.job.parameters import (
    ALL,
    AUTO,
    DatasetName,
    Duration,
    Folder,
    NetworkName,
    Size,
    StorageURL,
    check_study_name,
    load_plugins,
)
from mnist.search import space as spaces
from mnist.search import study as studies
from mnist.search.urls import mask_url_secrets
from mnist.shell import UserPath


def option(default: Any, text: str, **settings: Any) -> Any:
    return field(default=default, metadata={"help": text, "show_default": True} | settings)


DEFAULT_TRIALS, QUICK_TRIALS = 32, 3
DEFAULT_CONFIRM, QUICK_CONFIRM = 2, 0
AT_LEAST_1 = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, max=10_000, min_open=True)


@dataclass(frozen=True)
class Options:
    """The options of one study; the record of its model repeats them."""

    dataset: str = option(
        "mnist",
        "Data set, listed below, or folder:PATH; more than one can be given.",
        type=DatasetName(),
        multiple=True,
    )
    model: str = option(
        "parallel",
        f"Network, listed below, {AUTO} (by a short comparison), or {ALL}; several can be given.",
        type=NetworkName(),
        multiple=True,
    )
    trials: int | None = option(
        None, "The study's total of finished trials. [default: 32, with --quick 3]", type=AT_LEAST_1
    )
    epochs: float | None = option(
        None, "Longest training of a trial, in epochs. [default: fits the machine]", type=POSITIVE
    )
    final_epochs: float | None = option(
        None, "Length of the final training, in epochs. [default: fits the machine]", type=POSITIVE
    )
    timeout: float | None = option(
        None,
        "Time limit for the whole command, e.g. 15m; takes precedence over --trials.",
        type=Duration(),
    )
    train_samples: int | None = option(
        None, "Train on a stratified subset of this many images.", type=AT_LEAST_1
    )
    space: str = option("default", "Search space: default, wide, or a TOML file.")
    param: tuple[str, ...] = option(
        (), f"One entry of the space, as NAME=SPEC; SPEC is {spaces.SPECS}.", multiple=True
    )
    augment: str = option(
        AUTO,
        "Kind of random changes to training images; auto: by the data set.",
        type=click.Choice([AUTO, *augmentation.KINDS]),
    )
    image_size: int | None = option(
        None,
        "Side in pixels at which a folder's pictures are read. [default: 28]",
        type=click.IntRange(8, 256),
    )
    color: bool = option(False, "Read a folder's pictures in color, not grey.", is_flag=True)
    storage: str = option(
        "sqlite:///db.sqlite3",
        "Database of the study (Optuna's RDB storage).",
        type=StorageURL(),
    )
    study: str | None = option(None, "The study's name. [default: DATASET-MODEL]")
    workers: int | None = option(
        None, "Training processes. [default: 1 on a CPU, else one per GPU]", type=AT_LEAST_1
    )
    sampler: str = option(
        "tpe", "How hyperparameters are chosen.", type=click.Choice(list(studies.SAMPLERS))
    )
    pruner: str = option(
        "halving", "How trials are stopped early.", type=click.Choice(list(studies.PRUNERS))
    )
    confirm: int | None = option(
        None,
        "Number of best trials that are trained again on fresh seeds. [default: 2, with --quick 0]",
        type=click.IntRange(min=0),
    )
    seed: int = option(0, "Seed of search and training.", type=click.IntRange(0, 2**31 - 1))
    device: str = option(
        "auto", "Where to train.", type=click.Choice(["auto", "cpu", "cuda", "mps"])
    )
    data_dir: Path = option(
        Path("data"),
        "Folder of the data files, in torchvision's layout.",
        envvar="MNIST_DATA_DIR",
        type=UserPath(path_type=Path, file_okay=False),
    )
    output: Path = option(
        Path("saved_models"), "The registry.", type=Folder(path_type=Path, file_okay=False)
    )
    artifacts: Path = option(
        Path("artifacts"),
        "Folder of pictures and checkpoints; machines that share it continue each other's trials.",
        type=Folder(path_type=Path, file_okay=False),
    )
    disk_quota: int | None = option(
        None, "Size limit for all files in --artifacts, e.g. 2GB. [default: no limit]", type=Size()
    )
    promote: str = option(
        "better",
        "Whether the new model becomes the current one.",
        type=click.Choice(["better", "always", "never"]),
    )
    import_: tuple[Path, ...] = option(
        (),
        "Python file with a network or data set of your own.",
        multiple=True,
        is_eager=True,
        callback=load_plugins,
        type=UserPath(path_type=Path, exists=True, dir_okay=False, resolve_path=True),
    )
    quick: bool = option(False, "The whole path in about a minute.", is_flag=True)
    thorough: bool = option(
        False,
        "For a night or a GPU: a trial trains for one epoch, the final model for 60.",
        is_flag=True,
    )
    plain: bool = option(
        False, "Train the network's own layers, not its training form.", is_flag=True
    )
    track: tuple[str, ...] = option(
        (),
        "Experiment tracker that gets each trial and the final model; more than one can be given.",
        multiple=True,
        callback=trackers.check_installed,
        type=click.Choice(list(trackers.TRACKERS)),
    )
    json: bool = option(False, "The result as JSON on standard output.", is_flag=True)

    @property
    def total_trials(self) -> int:
        return self.trials or (QUICK_TRIALS if self.quick else DEFAULT_TRIALS)

    @property
    def confirmed(self) -> int:
        """The number of best trials that are run again on fresh seeds."""
        if self.confirm is None:
            return QUICK_CONFIRM if self.quick else DEFAULT_CONFIRM
        return self.confirm

    @property
    def study_name(self) -> str:
        dataset = self.dataset
        if dataset.startswith(data.FOLDER_PREFIX):
            dataset = Path(dataset).name
        extent = "-quick" if self.quick else "-thorough" if self.thorough else ""
        return self.study or f"{dataset}-{self.model}{extent}"

    def record(self) -> dict[str, Any]:
        """The options as JSON values, except those that only concern the command's output."""
        values = asdict(self) | {
            "data_dir": str(self.data_dir),
            "output": str(self.output),
            "artifacts": str(self.artifacts),
            "storage": mask_url_secrets(self.storage),
            "import_": list(map(str, self.import_)),
        }
        return {key.rstrip("_"): value for key, value in values.items() if key != "json"}


def make_command(main: Callable[[list[Options]], None]) -> click.Command:
    """The command line of run.py; it calls `main` with the Options of each study."""

    def parse(dataset: tuple[str, ...], model: tuple[str, ...], **values: Any) -> None:
        if values["quick"] and values["thorough"]:
            raise click.UsageError("--quick and --thorough exclude each other")
        networks = dict.fromkeys(model)
        if ALL in model:  # small ones first: they leave more of --timeout to the large ones
            networks = dict.fromkeys(
                sorted(models.NETWORKS, key=lambda name: _count_parameters(name) or 0)
            )
        pairs = [(d, m) for m in networks for d in dict.fromkeys(dataset)]
        if len(pairs) > 1 and values["study"]:
            raise click.UsageError(f"--study names one study; these options make {len(pairs)}")
        option_sets = [Options(dataset=d, model=m, **values) for d, m in pairs]
        for options in option_sets:
            check_study_name(options.study_name)
        for name, n in Counter(options.study_name for options in option_sets).items():
            if n > 1:
                text = f"{n} of these would be the study {name}; run one at a time, with --study"
                raise click.UsageError(text)
        main(option_sets)

    parameters: list[click.Parameter] = []
    for entry in fields(Options):
        name = f"--{entry.name.strip('_').replace('_', '-')}"
        one_of_several = entry.metadata.get("multiple") and isinstance(entry.default, str)
        default = [entry.default] if one_of_several else entry.default
        parameters.append(click.Option([name, entry.name], default=default, **entry.metadata))
    help_text = "Find the best hyperparameters, keep every trial, and save one verified model."
    return Command("run.py", params=parameters, callback=parse, help=help_text)


class Command(click.Command):
    """A command whose help also lists data sets, networks and hyperparameters."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Data sets"):
            formatter.write_text(", ".join(data.DATASETS))
        with formatter.section("Networks, with their parameters (28x28, grey, 10 classes)"):
            formatter.write_dl([(name, _describe_network(name)) for name in models.NETWORKS])
        with formatter.section("Hyperparameters, for --space and --param"):
            rows = [
                (name, f"{param.description} ({param.describe_limits()})")
                for name, param in spaces.HYPERPARAMETERS.items()
            ]
            formatter.write_dl(rows)


def _describe_network(name: str) -> str:
    """The network's number of parameters, and that of its training form if it has one."""
    with contextlib.suppress(Exception), torch.device("meta"):
        model = models.build(name, 1, 28, 10)
        plain, in_training = map(models.count_parameters, (model, folding.training_form(model)))
        note = "" if plain == in_training else f"; {in_training:,} in training (--plain)"
        return f"{plain:,}{note}"
    return "?"


def _count_parameters(name: str) -> int:
    """The parameters for 28x28 grey images; 0 where a plugin's network does not take these."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return models.count_parameters(models.build(name, 1, 28, 10))
    return 0
