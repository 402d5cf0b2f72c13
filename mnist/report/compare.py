"""Comparison of saved models, as a table and a page, with tests for significant differences."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from mnist import inference, registry

TIMED_CALLS = 50  # calls with a single image per latency
COLUMNS = (
    *("data set", "network", "test errors", "accuracy (95 %)"),
    *("parameters", "final training", "one image", "served file", "compared with the best"),
)
WIDTH = 200  # of the table without a terminal
SIGNIFICANCE = 0.05  # two models differ significantly if p is below it


@dataclass(frozen=True)
class Row:
    """One model of the table. `p` is mcnemar_p() with the best model of the data set, times the
    number of models compared with that one (Bonferroni); None for the best model."""

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
    def max_error_rate(self) -> float:
        """The upper end of the interval of the error rate (0..1)."""
        return 1 - self.interval95[0]


def compare_models(folder: Path, names: Sequence[str]) -> list[Row]:
    """Rows for models of the registry `folder`, by data set, the lowest test error rate first.

    Compares the stored predictions of each model, without a new evaluation. Raises
    registry.RegistryError.
    """
    records = {name: registry.record(folder, name)[1] for name in names}
    ranked = sorted(names, key=lambda name: _sort_key(records[name]))
    rows: list[Row] = []
    for name in ranked:
        record = records[name]
        data = record["dataset"]["name"]
        best = next(other for other in ranked if records[other]["dataset"]["name"] == data)
        others = sum(other["dataset"]["name"] == data for other in records.values()) - 1
        p = None if best == name else min(1.0, others * mcnemar_p(folder, best, name))
        rows.append(_make_row(folder, name, record, p))
    return rows


def _sort_key(record: registry.Record) -> tuple[str, float]:
    test = record["metrics"]["test"]
    return record["dataset"]["name"], test["errors"] / test["n"]


def mcnemar_p(folder: Path, one: str, other: str) -> float:
    """The p-value (0..1) of the difference between two models on the test images.

    McNemar's exact test (1947, doi:10.1007/BF02295996) on the images that only one of them
    classified wrongly.
    """
    wrong = []
    for name in (one, other):
        with np.load(registry.file(folder, name, "predictions")) as predictions:
            wrong.append(predictions["probabilities"].argmax(1) != predictions["labels"])
    only_wrong = [int((wrong[i] & ~wrong[1 - i]).sum()) for i in (0, 1)]
    return binomtest(only_wrong[0], sum(only_wrong)).pvalue if sum(only_wrong) else 1.0


def _make_row(folder: Path, name: str, record: registry.Record, p: float | None) -> Row:
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
        latency_ms=measure_latency_ms(classify, record),
        bytes=record["files"][inference.ENGINE_FILES[classify.engine]]["bytes"],
        p=p,
    )


def measure_latency_ms(classify: inference.Classifier, record: registry.Record) -> float:
    """Milliseconds for one image on this machine's CPU, the median of TIMED_CALLS."""
    channels, size = record["dataset"]["channels"], record["dataset"]["size"]
    image = np.random.default_rng(0).integers(0, 256, (1, channels, size, size), np.uint8)
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        classify(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def render_page(rows: Sequence[Row]) -> str:
    """The comparison as HTML without external files."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("comparison.html")
    groups: dict[str, list[tuple[Row, list[str]]]] = {}
    for row in rows:
        groups.setdefault(row.dataset, []).append((row, format_cells(row)[1:]))
    names = [row.name for row in rows]
    return template.render(groups=groups, columns=COLUMNS[1:], names=names)


def describe_verdict(row: Row) -> str:
    """The comparison with the best model of the data set, in words."""
    if row.p is None:
        return "best"
    p = f"p {row.p:.2f}" if row.p >= 0.01 else "p < 0.01"
    return f"worse ({p})" if row.p < SIGNIFICANCE else f"no significant difference ({p})"


def print_table(rows: Sequence[Row], stderr: bool = False) -> None:
    """Print the rows as a table."""
    table = Table(*COLUMNS, box=None)
    for row in rows:
        table.add_row(*format_cells(row))
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
    console.print("errors are those of the weights, time and size those of the served file")


def format_cells(row: Row) -> list[str]:
    """The text of a row's cells."""
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
        describe_verdict(row),
    ]
