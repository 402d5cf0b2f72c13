"""The training runs of benchmarks.curves: their configurations, and the values of each run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import click
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from scipy.stats import qmc

from mnist import folding, models, training
from mnist.data import Dataset
from mnist.search import study as studies
from mnist.search.runs import derive_seed
from mnist.search.space import DEFAULT, WIDE, Space

# With these, trials of 24,000 images can be replayed with rungs at 1/24, 1/12, 1/6, 1/4 and 1/2.
FIDELITIES = (1_000, 2_000, 4_000, 6_000, 12_000, 24_000, 40_000, 60_000)
SPACES: dict[str, Space] = {"default": DEFAULT, "wide": WIDE, "finals": DEFAULT}


@dataclass(frozen=True)
class Settings:
    """The settings of a table; also the options of the command.

    `default`, `wide` and `finals` are the numbers of configurations of the parts.
    """

    dataset: str = "mnist"
    network: str = "parallel"
    default: int = 128
    wide: int = 64
    finals: int = 32
    final_seeds: int = 3
    fidelities: tuple[int, ...] = FIDELITIES
    final_samples: int = 150_000
    seed: int = 0
    bfloat16: bool = False

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"

    def format_command(self) -> str:
        """Format the command that makes this table, with the options that are not the defaults."""
        words = ["python -m benchmarks.curves"]
        for option in fields(self):
            value, name = getattr(self, option.name), option.name.replace("_", "-")
            if value == option.default:
                continue
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{name}" if value is True else f"--{name} {text}")
        return " ".join(words)


@dataclass(frozen=True)
class Run:
    """One training run: configuration `number` of a part's space, validated at `fidelities`."""

    part: str  # a key of SPACES
    number: int
    params: dict[str, Any]
    seed: int
    fidelities: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.number, self.seed


def parse_fidelities(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse the option --fidelities; raises click.BadParameter."""
    try:
        fidelities = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not numbers separated by commas") from error
    if not all(a < b for a, b in zip((0, *fidelities), fidelities, strict=False)):
        raise click.BadParameter(f"{text!r} does not ascend from above 0")
    return fidelities


def parse_share(_: click.Context, __: click.Parameter, text: str) -> tuple[int, int]:
    """Parse the option --share; raises click.BadParameter."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n:
        raise click.BadParameter(f"{text!r} is not a share such as 1/2")
    return i, n


def make_configurations(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """Make n configurations of the space: in DEFAULT the published best, then a Sobol sequence.

    A larger n only adds configurations; the first ones, too, are spread over the space.
    """
    published = [studies.FIRST_PARAMS] if space == DEFAULT else []
    sequence = qmc.Sobol(len(space), rng=derive_seed(seed))
    points = sequence.random_base2(max(1, math.ceil(math.log2(n + 1))))
    configurations = [
        {name: compute_quantile(space[name], p) for name, p in zip(space, point, strict=True)}
        for point in points.tolist()
    ]
    return [*published, *configurations][:n]


def compute_quantile(distribution: BaseDistribution, p: float) -> Any:
    """The quantile at p (0..1) of a uniform, log-uniform or categorical distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(p * len(distribution.choices))]
    is_int = isinstance(distribution, IntDistribution)
    low, high = distribution.low - is_int / 2, distribution.high + is_int / 2
    number = low * (high / low) ** p if distribution.log else low + (high - low) * p
    number = min(max(number, distribution.low), distribution.high)
    return round(number) if is_int else float(f"{number:.6g}")


def list_runs(settings: Settings) -> list[Run]:
    """List all runs in their order: the default space, the wide space, the finals seed by seed."""
    default = make_configurations(DEFAULT, settings.default, settings.seed)
    wide = make_configurations(WIDE, settings.wide, settings.seed)
    fidelities, seed = settings.fidelities, settings.seed
    return [
        *(Run("default", i, params, seed, fidelities) for i, params in enumerate(default)),
        *(Run("wide", i, params, seed, fidelities) for i, params in enumerate(wide)),
        *(
            Run("finals", i, params, seed + 1 + k, (settings.final_samples,))
            for k in range(settings.final_seeds)
            for i, params in enumerate(default[: settings.finals])
        ),
    ]


def train(run: Run, settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """Train; returns `errors` and `log_loss` at each of the run's fidelities, and `diverged`."""
    torch.manual_seed(run.seed)
    model = models.build(settings.network, dataset.channels, dataset.size, len(dataset.classes))
    model = folding.training_form(model).to(dataset.train.labels.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progresses = training.fit(
        model,
        dataset,
        dataset.train,
        dataset.validation,
        **run.params,
        samples=run.fidelities[-1],
        validate_at=run.fidelities[:-1],
        subset=len(dataset.validation),
        seed=run.seed,
        bfloat16=settings.bfloat16,
    )
    reports, diverged = list[training.Progress](), False
    try:
        reports += (progress for progress in progresses if progress.n)
    except training.Diverged:
        diverged = True
    return collect_values(reports, run.fidelities, dataset) | {"diverged": diverged}


def collect_values(
    reports: Sequence[training.Progress], fidelities: Sequence[int], dataset: Dataset
) -> dict[str, list[Any]]:
    """Collect the errors and the log-loss at each fidelity from the reports of a run.

    A fidelity's report is the first one after at least as many images. As a run is rounded to whole
    batches, the last report of a run that ended stands in for a missing one. A run that diverged
    before a fidelity has the errors of random guesses there, and no log-loss.
    """
    n, classes = len(dataset.validation), len(dataset.classes)
    last_report = [report for report in reports if report.samples == report.total]
    errors, log_loss = [], []
    for fidelity in fidelities:
        reached = [report for report in reports if report.samples >= fidelity] or last_report
        errors.append(reached[0].errors if reached else round(n * (1 - 1 / classes)))
        log_loss.append(_round_finite(reached[0].log_loss) if reached else None)
    return {"errors": errors, "log_loss": log_loss}


def _round_finite(number: float | None) -> float | None:
    return round(number, 6) if number is not None and math.isfinite(number) else None
