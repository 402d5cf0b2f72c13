"""The runs of a table of learning curves: which configurations are trained, and how."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from scipy.stats import qmc

from mnist import folding, models, training
from mnist.data import Dataset
from mnist.search import study as studies
from mnist.search.runs import derive_seed
from mnist.search.space import DEFAULT, WIDE, Space

# With them trials of 24,000 images can be replayed with rungs at 1/24, 1/12, 1/6, 1/4 and 1/2.
FIDELITIES = (1_000, 2_000, 4_000, 6_000, 12_000, 24_000, 40_000, 60_000)
SPACES: dict[str, Space] = {"default": DEFAULT, "wide": WIDE, "finals": DEFAULT}


@dataclass(frozen=True)
class Settings:
    """What the table is of. `default`, `wide` and `finals` are numbers of configurations."""

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

    def command(self) -> str:
        """The command that makes this table, with the options that are not the defaults."""
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
    """One training run: configuration `number` of a study's space, validated at `fidelities`."""

    part: str  # a key of SPACES
    number: int
    params: dict[str, Any]
    seed: int
    fidelities: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.number, self.seed


def configurations(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """n configurations of the space: in DEFAULT the published best, then a Sobol sequence.

    The first of them are the same, and spread over the space, whatever n is.
    """
    first = [studies.FIRST_PARAMS] if space == DEFAULT else []
    sequence = qmc.Sobol(len(space), rng=derive_seed(seed))
    points = sequence.random_base2(max(1, math.ceil(math.log2(n + 1))))
    drawn = [
        {name: value(space[name], share) for name, share in zip(space, point, strict=True)}
        for point in points.tolist()
    ]
    return [*first, *drawn][:n]


def value(distribution: BaseDistribution, share: float) -> Any:
    """What lies at that share (0..1) of a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    whole = isinstance(distribution, IntDistribution)
    low, high = distribution.low - whole / 2, distribution.high + whole / 2
    number = low * (high / low) ** share if distribution.log else low + (high - low) * share
    number = min(max(number, distribution.low), distribution.high)
    return round(number) if whole else float(f"{number:.6g}")


def runs(settings: Settings) -> list[Run]:
    """All runs in their order: the default space, the wide one, the finals a seed at a time."""
    default = configurations(DEFAULT, settings.default, settings.seed)
    wide = configurations(WIDE, settings.wide, settings.seed)
    whole, last = settings.fidelities, (settings.final_samples,)
    seeds = [settings.seed + 1 + i for i in range(settings.final_seeds)]
    return [
        *(Run("default", i, params, settings.seed, whole) for i, params in enumerate(default)),
        *(Run("wide", i, params, settings.seed, whole) for i, params in enumerate(wide)),
        *(
            Run("finals", i, params, seed, last)
            for seed in seeds
            for i, params in enumerate(default[: settings.finals])
        ),
    ]


def carry_out(run: Run, settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """Train; `errors` and `log_loss` at each of the run's fidelities, and `diverged`."""
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
    return curve(reports, run.fidelities, dataset) | {"diverged": diverged}


def curve(
    reports: Sequence[training.Progress], fidelities: Sequence[int], dataset: Dataset
) -> dict[str, list[Any]]:
    """The reports by fidelity; where a run that diverged has none, the errors are those of a guess.

    A fidelity's report is the first one after at least as many images, or the last one of a run
    that came to its end: a run is rounded to whole batches.
    """
    n, classes = len(dataset.validation), len(dataset.classes)
    over = [report for report in reports if report.samples == report.total]
    errors, log_loss = [], []
    for fidelity in fidelities:
        reached = [report for report in reports if report.samples >= fidelity] or over
        errors.append(reached[0].errors if reached else round(n * (1 - 1 / classes)))
        log_loss.append(_finite(reached[0].log_loss) if reached else None)
    return {"errors": errors, "log_loss": log_loss}


def _finite(number: float | None) -> float | None:
    return round(number, 6) if number is not None and math.isfinite(number) else None
