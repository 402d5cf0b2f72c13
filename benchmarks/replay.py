"""Searches on a table of learning curves instead of on training runs.

The samplers and pruners are Optuna's own, as the project sets them up. A sampler's proposal becomes
the nearest candidate that the search has not had yet, by the distance between the logarithms of
learning rate and batch size, each as a share of its range, plus FAR where the optimizers differ. So
towards the end of the candidates a sampler gets what is left rather than what it proposed.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from mnist.metrics import MIN_PROBABILITY
from mnist.search import budget
from mnist.search import study as studies
from mnist.search.runs import derive_seed
from mnist.search.space import DEFAULT, Space

FAR = 10.0  # distance of two optimizers; all else is at most the square root of 2
CLOSE = 1.1  # by default, a choice is good with at most so many times the least final errors
KEPT = 3  # of a round of "train all a little", as in arXiv 2307.15422
METRICS = ("errors", "log_loss")


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """N candidates and their values at F fidelities.

    `values` by METRICS: (N, F) float64, less is better; `final` (N,): their final errors; `seeds`
    (M, S): those of S seeds of the final training, for the candidates `with_finals` (M,).
    """

    params: list[dict[str, Any]]
    fidelities: list[int]
    n: int
    values: dict[str, np.ndarray]
    final: np.ndarray
    with_finals: np.ndarray
    seeds: np.ndarray
    final_name: str

    def at(self, samples: float) -> int:
        """The index of the fidelity nearest to so many images, by ratio."""
        return int(np.argmin(np.abs(np.log(np.array(self.fidelities) / samples))))

    @functools.cached_property
    def points(self) -> np.ndarray:
        """(N, D): candidates in the normalised space."""
        return np.array([point(params) for params in self.params])


def read(path: Path) -> Table:
    """The default space's part of a table that benchmarks.curves wrote."""
    content = json.loads(path.read_text())
    header = content["header"]
    rows = [row for row in content["rows"] if row["space"] == "default"]
    if not rows:
        raise ValueError(f"{path} has no configuration of the default space")
    errors = np.array([row["errors"] for row in rows], float)
    worst = -math.log(MIN_PROBABILITY)  # of a run that diverged: more than any other has
    log_loss = [[worst if each is None else each for each in row["log_loss"]] for row in rows]
    most = max(len(row.get("finals", ())) for row in rows)
    has = np.array([i for i, row in enumerate(rows) if most and len(row.get("finals", ())) == most])
    seeds = np.array([[each["errors"] for each in rows[i]["finals"]] for i in has], float)
    whole = len(has) == len(rows)
    return Table(
        [row["params"] for row in rows],
        header["fidelities"],
        header["n"],
        {"errors": errors, "log_loss": np.array(log_loss, float)},
        seeds.mean(1) if whole else errors[:, -1],
        has.astype(int),
        seeds,
        f"mean errors of {most} seeds after {header['final_samples']:,} images"
        if whole
        else f"errors after {header['fidelities'][-1]:,} images",
    )


def point(params: dict[str, Any], space: Space = DEFAULT) -> list[float]:
    """Where a configuration lies: numbers as shares of their range, words FAR from each other."""
    found: list[float] = []
    for name, each in sorted(space.items()):
        if isinstance(each, CategoricalDistribution):  # two that differ are FAR apart
            found += [FAR / math.sqrt(2) * (params[name] == word) for word in each.choices]
        else:
            low, high, here = (
                math.log(x) if each.log else x for x in (each.low, each.high, params[name])
            )
            found.append((here - low) / (high - low))
    return found


# --- searches -------------------------------------------------------------------------------------


class Nearest(BaseSampler):
    """A sampler whose proposals become the nearest candidates that it has not proposed before."""

    def __init__(self, table: Table, first: bool) -> None:
        self.table, self.first = table, first
        self.free = np.full(len(table.params), True)
        self.sampler: BaseSampler  # a new one for each trial, as in studies.ask
        self.taken = -1

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return DEFAULT

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        begins = self.first and trial.number == 0
        proposal = studies.FIRST_PARAMS if begins else self.proposal(study, trial)
        distance = ((self.table.points - point(proposal)) ** 2).sum(1)
        self.taken = int(np.where(self.free, distance, np.inf).argmin())
        self.free[self.taken] = False
        return self.table.params[self.taken]

    def proposal(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """What the sampler itself would have as a trial's hyperparameters."""
        own = self.sampler.infer_relative_search_space(study, trial)
        drawn = self.sampler.sample_relative(study, trial, own)
        return drawn | {
            name: self.sampler.sample_independent(study, trial, name, each)
            for name, each in DEFAULT.items()
            if name not in drawn
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        raise AssertionError(f"{param_name} is not in the default space")


@dataclass(frozen=True)
class Limits:
    """Of a search: images of a trial that is not pruned, and of all trials together.

    A choice is good with at most `close` times the least final errors.
    """

    trial: int
    images: int
    close: float = CLOSE


@dataclass(frozen=True)
class Step:
    """A trial that was completed: its candidate, and the images that all trials had seen then."""

    images: int
    candidate: int
    value: float  # less is better


@dataclass(frozen=True)
class Trials:
    """A search of Optuna's kind: trials one after the other, compared at `rungs`."""

    sampler: Callable[[int, Space], BaseSampler]
    rungs: tuple[float, ...] = ()  # shares of a trial
    reduction: int = budget.REDUCTION_FACTOR
    metric: str = "errors"
    hyperband: bool = False
    first: bool = False  # begin with the published best, as run.py does

    def __call__(self, table: Table, limits: Limits, seed: int) -> Iterator[Step]:
        """The trials that are completed within the limits."""
        fidelities = self.fidelities(table, limits)
        nearest = Nearest(table, self.first)
        study = optuna.create_study(
            study_name=str(seed),  # by which Hyperband chooses a trial's bracket
            sampler=nearest,
            pruner=self.pruner([table.fidelities[i] for i in fidelities]),
            direction="maximize",
        )
        seen, number = 0, 0
        while nearest.free.any():
            nearest.sampler = self.sampler(derive_seed(seed, number), DEFAULT)
            trial = study.ask(DEFAULT)
            values = table.values[self.metric][nearest.taken]
            state, i = self.state(trial, values, fidelities, table)
            seen, number = seen + table.fidelities[i], number + 1
            if seen > limits.images:
                return
            complete = state == TrialState.COMPLETE
            study.tell(trial, self.told(values[i], table) if complete else None, state)
            if complete:
                yield Step(seen, nearest.taken, values[i])

    def state(
        self, trial: optuna.Trial, values: np.ndarray, fidelities: Sequence[int], table: Table
    ) -> tuple[TrialState, int]:
        """Report the values (F,) of a trial; how it ends, and the index of its last fidelity."""
        for i in fidelities[:-1]:
            trial.report(self.told(values[i], table), table.fidelities[i])
            if trial.should_prune():
                return TrialState.PRUNED, i
        return TrialState.COMPLETE, fidelities[-1]

    def told(self, value: float, table: Table) -> float:
        """What the study is told: the accuracy, or the mean log-likelihood."""
        return float(1 - value / table.n if self.metric == "errors" else -value)

    def fidelities(self, table: Table, limits: Limits) -> list[int]:
        """Indices of the fidelities at which a trial is compared, and of its end."""
        last = table.at(limits.trial)
        if self.hyperband:
            return list(range(last + 1))
        rungs = {table.at(share * table.fidelities[last]) for share in self.rungs}
        return [*sorted(rungs - {last}), last]

    def pruner(self, samples: Sequence[int]) -> BasePruner:
        """For trials that report after those numbers of images."""
        if self.hyperband:
            return HyperbandPruner(samples[0], samples[-1], self.reduction)
        if len(samples) == 1:
            return NopPruner()
        return SuccessiveHalvingPruner(samples[0], self.reduction)


@dataclass(frozen=True)
class Rounds:
    """Train `n` candidates a little, finish the best KEPT, begin again (arXiv 2307.15422).

    Candidates come at random; with n = 0 there is one round, of all for which the images suffice.
    """

    n: int
    rung: float  # share of a trial
    metric: str = "errors"
    first: bool = False  # have the published best in the first round

    def __call__(self, table: Table, limits: Limits, seed: int) -> Iterator[Step]:
        """The trials that are completed within the limits."""
        low, last = (table.at(share * limits.trial) for share in (self.rung, 1))
        little, rest = table.fidelities[low], table.fidelities[last] - table.fidelities[low]
        n = self.n or (limits.images - KEPT * rest) // little
        values = table.values[self.metric]
        order = np.random.default_rng(seed).permutation(len(table.params))
        if self.first:
            published = table.params.index(studies.FIRST_PARAMS)
            order = np.array([published, *order[order != published]])
        seen = 0
        for start in range(0, len(order), n):
            batch = order[start : start + n]
            seen += little * len(batch)
            for candidate in batch[np.argsort(values[batch, low], kind="stable")][:KEPT]:
                seen += rest
                if seen > limits.images:
                    return
                yield Step(seen, int(candidate), values[candidate, last])


Search = Callable[[Table, Limits, int], Iterator[Step]]
