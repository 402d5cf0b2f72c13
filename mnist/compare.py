"""Several saved models side by side: a table and a page; whether they differ by more than noise."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest

from mnist import inference, registry

CALLS = 50  # single images behind a latency
COLUMNS = (
    *("data set", "network", "test errors", "accuracy (95 %)"),
    *("parameters", "final training", "one image", "served file", "beside the best"),
)
WIDTH = 200  # of the table where there is no terminal
NOISE = 0.05  # two models differ where chance alone would make so large a difference less often


@dataclass(frozen=True)
class Row:
    """One model of the table; `p` is the chance() of so large a difference from the best of its
    data set, times the number of models compared with it (Bonferroni); None for the best itself.
    """

    name: str
    dataset: str
    network: str
    errors: int
    n: int
    interval95: tuple[float, float]
    parameters: int
    training_s: float | None
    latency_ms: float
    bytes: int
    p: float | None

    @property
    def most(self) -> float:
        """The error rate (0..1) that is still likely."""
        return 1 - self.interval95[0]


def rows(folder: Path, names: Sequence[str]) -> list[Row]:
    """The models of the registry `folder`, by data set, the fewest test errors first.

    Nothing is evaluated again: the predictions that each model made when it was saved are
    compared. Raises registry.RegistryError.
    """
    records = {name: registry.record(folder, name)[1] for name in names}
    ranked = sorted(names, key=lambda name: _order(records[name]))
    found: list[Row] = []
    for name in ranked:
        record = records[name]
        data = record["dataset"]["name"]
        first = next(other for other in ranked if records[other]["dataset"]["name"] == data)
        others = sum(each["dataset"]["name"] == data for each in records.values()) - 1
        p = None if first == name else min(1.0, others * chance(folder, first, name))
        found.append(_row(folder, name, record, p))
    return found


def _order(record: dict[str, Any]) -> tuple[str, float]:
    test = record["metrics"]["test"]
    return record["dataset"]["name"], test["errors"] / test["n"]


def chance(folder: Path, one: str, other: str) -> float:
    """How likely models of equal merit differ so much on these images, 0..1.

    McNemar's exact test (1947, doi:10.1007/BF02295996) on the images that one of them alone got
    wrong.
    """
    wrong = []
    for name in (one, other):
        with np.load(registry.file(folder, name, "predictions")) as kept:
            wrong.append(kept["probabilities"].argmax(1) != kept["labels"])
    alone = [int((wrong[i] & ~wrong[1 - i]).sum()) for i in (0, 1)]
    return binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0


def _row(folder: Path, name: str, record: dict[str, Any], p: float | None) -> Row:
    test = record["metrics"]["test"]
    low, high = test["interval95"]
    classify = inference.load(folder, name)
    return Row(
        name=name,
        dataset=record["dataset"]["name"],
        network=record["model"]["name"],
        errors=test["errors"],
        n=test["n"],
        interval95=(low, high),
        parameters=record["model"]["parameters"],
        training_s=record.get("training", {}).get("seconds"),
        latency_ms=latency_ms(classify, record),
        bytes=record["files"][inference.ENGINE_FILES[classify.engine]]["bytes"],
        p=p,
    )


def latency_ms(classify: inference.Classifier, record: dict[str, Any]) -> float:
    """Milliseconds for one image, the median of CALLS, on this machine's CPU."""
    channels, size = record["dataset"]["channels"], record["dataset"]["size"]
    image = np.random.default_rng(0).integers(0, 256, (1, channels, size, size), np.uint8)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        classify(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def write(found: Sequence[Row]) -> str:
    """The page: HTML that needs nothing but itself."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("comparison.html")
    groups: dict[str, list[tuple[Row, list[str]]]] = {}
    for row in found:
        groups.setdefault(row.dataset, []).append((row, words(row)[1:]))
    names = [row.name for row in found]
    return template.render(groups=groups, columns=COLUMNS[1:], names=names)


def verdict(row: Row) -> str:
    """In words: how the row stands to the best of its data set."""
    if row.p is None:
        return "best"
    chance = f"p {row.p:.2f}" if row.p >= 0.01 else "p < 0.01"
    return f"worse ({chance})" if row.p < NOISE else f"not told apart ({chance})"


def show(found: Sequence[Row], stderr: bool = False) -> None:
    """Print the table."""
    table = Table(*COLUMNS, box=None)
    for row in found:
        table.add_row(*map(escape, words(row)))
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
    console.print("errors are the weights' own; time and size are those of the file that is served")


def words(row: Row) -> list[str]:
    """The row's cells."""
    low, high = row.interval95
    training = "" if row.training_s is None else f"{row.training_s:.0f} s"
    return [
        row.dataset,
        row.network,
        f"{row.errors} of {row.n:,}",
        f"{1 - row.errors / row.n:.2%} ({low:.2%} to {high:.2%})",
        f"{row.parameters:,}",
        training,
        f"{row.latency_ms:.2f} ms",
        f"{row.bytes / 1e6:.1f} MB" if row.bytes >= 1e6 else f"{row.bytes / 1e3:.0f} kB",
        verdict(row),
    ]
