"""The options of run.py: each is written once, and is command line, record and default at once."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from mnist import data, models
from mnist import study as studies


def option(default: Any, text: str, **settings: Any) -> Any:
    return field(default=default, metadata={"help": text, "show_default": True} | settings)


class Duration(click.ParamType):
    """Seconds, or a number with s, m or h: 90, 90s, 15m, 2h."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if not found or not float(found[1]):
            self.fail(f"{value!r} is not a time such as 90s, 15m or 2h", param, ctx)
        return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


class Size(click.ParamType):
    """Bytes, or a number with kB, MB or GB: 500MB, 2GB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)B?", str(value))
        if not found or not float(found[1]):
            self.fail(f"{value!r} is not a size such as 500MB or 2GB", param, ctx)
        return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]])


class DatasetName(click.ParamType):
    """A known data set, or folder:PATH; its path becomes absolute, so that workers find it."""

    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if value in data.DATASETS:
            return value
        prefix, path = data.FOLDER, Path(str(value).removeprefix(data.FOLDER)).expanduser()
        if not value.startswith(prefix) or value == prefix:
            known = ", ".join(data.DATASETS)
            self.fail(f"{value!r} is no data set; known: {known}, {prefix}PATH", param, ctx)
        if not path.is_dir():
            self.fail(f"{value!r}: there is no folder {path}", param, ctx)
        return f"{prefix}{path.resolve()}"


AT_LEAST_1 = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, max=10_000, min_open=True)


@dataclass(frozen=True)
class Options:
    """The options of the command and, as they are, a part of the model's record."""

    dataset: str = option("mnist", "Data set: a known name, or folder:PATH.", type=DatasetName())
    model: str = option("parallel", "Network.", type=click.Choice(list(models.NETWORKS)))
    trials: int | None = option(
        None, "The study's total of finished trials. [default: 32]", type=AT_LEAST_1
    )
    epochs: float | None = option(
        None, "Most training a trial may see, in epochs. [default: fits the machine]", type=POSITIVE
    )
    final_epochs: float | None = option(
        None, "The same for the final model. [default: fits the machine]", type=POSITIVE
    )
    timeout: float | None = option(
        None, "Wall clock for the whole command, e.g. 15m; wins over --trials.", type=Duration()
    )
    train_samples: int | None = option(
        None, "Train on a stratified subset of so many images.", type=AT_LEAST_1
    )
    image_size: int | None = option(
        None,
        "Side in pixels at which a folder's pictures are read. [default: 28]",
        type=click.IntRange(8, 256),
    )
    color: bool = option(False, "Read a folder's pictures in color, not grey.", is_flag=True)
    storage: str = option("sqlite:///db.sqlite3", "Where the study is kept (Optuna's RDB storage).")
    study: str | None = option(None, "The study's name. [default: DATASET-MODEL]")
    workers: int | None = option(
        None, "Training processes. [default: 1 on a CPU, else one per GPU]", type=AT_LEAST_1
    )
    sampler: str = option(
        "tpe", "How trials are chosen.", type=click.Choice(list(studies.SAMPLERS))
    )
    pruner: str = option(
        "halving", "How trials are stopped early.", type=click.Choice(list(studies.PRUNERS))
    )
    confirm: int | None = option(
        None,
        "So many of the best trials are run again on fresh seeds. [default: 3, with --quick 1]",
        type=click.IntRange(min=0),
    )
    seed: int = option(0, "Of search and training.", type=click.IntRange(0, 2**31 - 1))
    device: str = option(
        "auto", "Where to train.", type=click.Choice(["auto", "cpu", "cuda", "mps"])
    )
    data_dir: Path = option(
        Path("data"),
        "Folder of the data files, in torchvision's layout.",
        envvar="MNIST_DATA_DIR",
        type=click.Path(path_type=Path, file_okay=False),
    )
    output: Path = option(
        Path("saved_models"), "The registry.", type=click.Path(path_type=Path, file_okay=False)
    )
    artifacts: Path = option(
        Path("artifacts"),
        "Folder of checkpoints; where machines share it, one continues another's trial.",
        type=click.Path(path_type=Path, file_okay=False),
    )
    disk_quota: int | None = option(
        None, "Most that checkpoints may take on disk, e.g. 2GB. [default: no limit]", type=Size()
    )
    promote: str = option(
        "better",
        "Whether the new model becomes the current one.",
        type=click.Choice(["better", "always", "never"]),
    )
    quick: bool = option(False, "The whole path in about a minute.", is_flag=True)
    json: bool = option(False, "The result as JSON on standard output.", is_flag=True)

    @property
    def study_name(self) -> str:
        dataset = self.dataset
        if dataset.startswith(data.FOLDER):
            dataset = Path(dataset).name
        return self.study or f"{dataset}-{self.model}{'-quick' if self.quick else ''}"

    def record(self) -> dict[str, Any]:
        """As JSON values, without what is only about this command's output."""
        values = asdict(self) | {
            "data_dir": str(self.data_dir),
            "output": str(self.output),
            "artifacts": str(self.artifacts),
            "storage": studies.without_password(self.storage),
        }
        return {key: value for key, value in values.items() if key != "json"}


def command(main: Callable[[Options], None]) -> click.Command:
    """The command line of run.py, which calls `main` with its Options."""
    parameters: list[click.Parameter] = [
        click.Option([f"--{each.name.replace('_', '-')}"], default=each.default, **each.metadata)
        for each in fields(Options)
    ]
    text = "Find the best hyperparameters, keep every trial, and save one verified model."
    return click.Command(
        "run.py", params=parameters, callback=lambda **values: main(Options(**values)), help=text
    )
