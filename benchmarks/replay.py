"""Searches that read the values of trials from a table of learning curves, instead of training.

The searches of `benchmarks.search`. The samplers and pruners are Optuna's own, as the project sets
them up. A sampler's proposal is replaced by the nearest candidate of the table that the search has
not tried yet. The distance is that between the logarithms of learning rate and batch size, each as
a share of its range, plus curve_table.OPTIMIZER_DISTANCE if the optimizers differ. So when few
candidates are left, a trial can be far from the proposal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from benchmarks.curve_table import Table, normalise_params
from mnist.search import budget
from mnist.search import study as studies
from mnist.search.runs import derive_seed
from mnist.search.space import DEFAULT, Space

GOOD_RATIO = 1.1  # a good choice has at most this many times the least final errors
PROMOTED = 3  # candidates of a round that are trained to the end, as in arXiv 2307.15422


@dataclass(frozen=True)
class Limits:
    """The images of a trial that is not pruned, and those of all trials of a search together.

    A choice is good if it has at most `good_ratio` times the least final errors.
    """

    trial_images: int
    search_images: int
    good_ratio: float = GOOD_RATIO


@dataclass(frozen=True)
class CompleteTrial:
    """A complete trial: its candidate, its value, and the images of all trials up to its end."""

    images: int
    candidate: int
    value: float  # less is better


class Search(Protocol):
    """A combination of sampler, pruner and fidelities."""

    def run(self, table: Table, limits: Limits, seed: int) -> Iterator[CompleteTrial]:
        """Search within the limits; yields each trial that is complete."""


class NearestCandidateSampler(BaseSampler):
    """Replaces proposals of another sampler by the nearest candidates that are still available."""

    def __init__(self, table: Table, published_first: bool) -> None:
        self.table, self.published_first = table, published_first
        self.available = np.full(len(table.params), True)
        self.sampler: BaseSampler  # a new one for each trial, as in studies.ask
        self.candidate = -1  # of the last trial

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return DEFAULT

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        is_published = self.published_first and trial.number == 0
        proposal = studies.FIRST_PARAMS if is_published else self._propose(study, trial)
        distances = ((self.table.points - normalise_params(proposal)) ** 2).sum(1)
        self.candidate = int(np.where(self.available, distances, np.inf).argmin())
        self.available[self.candidate] = False
        return self.table.params[self.candidate]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        raise AssertionError(f"{param_name} is not in the default space")

    def _propose(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """The hyperparameters that the other sampler proposes for a trial."""
        space = self.sampler.infer_relative_search_space(study, trial)
        params = self.sampler.sample_relative(study, trial, space)
        return params | {
            name: self.sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in DEFAULT.items()
            if name not in params
        }


@dataclass(frozen=True)
class OptunaSearch:
    """Trials one after the other, proposed by a sampler, and compared at rungs by a pruner."""

    sampler: Callable[[int, Space], BaseSampler]
    rungs: tuple[float, ...] = ()  # shares of a trial
    reduction: int = budget.REDUCTION_FACTOR
    metric: str = "errors"
    hyperband: bool = False
    published_first: bool = False  # the first trial is the published best, as in run.py

    def run(self, table: Table, limits: Limits, seed: int) -> Iterator[CompleteTrial]:
        """Search within the limits; yields each trial that is complete."""
        indices = self.fidelity_indices(table, limits)
        sampler = NearestCandidateSampler(table, self.published_first)
        study = optuna.create_study(
            study_name=str(seed),  # by which Hyperband chooses a trial's bracket
            sampler=sampler,
            pruner=self._make_pruner([table.fidelities[i] for i in indices]),
            direction="maximize",
        )
        images, number = 0, 0
        while sampler.available.any():
            sampler.sampler = self.sampler(derive_seed(seed, number), DEFAULT)
            trial = study.ask(DEFAULT)
            values = table.values[self.metric][sampler.candidate]
            state, last = self._report(trial, values, indices, table)
            images, number = images + table.fidelities[last], number + 1
            if images > limits.search_images:
                return
            is_complete = state == TrialState.COMPLETE
            study.tell(trial, self._objective(values[last], table) if is_complete else None, state)
            if is_complete:
                yield CompleteTrial(images, sampler.candidate, values[last])

    def fidelity_indices(self, table: Table, limits: Limits) -> list[int]:
        """The indices of the fidelities of the rungs and, last, of the end of a trial."""
        last = table.nearest_fidelity(limits.trial_images)
        if self.hyperband:
            return list(range(last + 1))
        rungs = {table.nearest_fidelity(share * table.fidelities[last]) for share in self.rungs}
        return [*sorted(rungs - {last}), last]

    def _report(
        self, trial: optuna.Trial, values: np.ndarray, indices: Sequence[int], table: Table
    ) -> tuple[TrialState, int]:
        """Report values (F,) until the trial is pruned; returns its state and its last index."""
        for i in indices[:-1]:
            trial.report(self._objective(values[i], table), table.fidelities[i])
            if trial.should_prune():
                return TrialState.PRUNED, i
        return TrialState.COMPLETE, indices[-1]

    def _objective(self, value: float, table: Table) -> float:
        """What the study maximizes: the accuracy, or the mean log-likelihood."""
        accuracy = 1 - value / table.validation_images
        return float(accuracy if self.metric == "errors" else -value)

    def _make_pruner(self, images: Sequence[int]) -> BasePruner:
        """Make the pruner of trials that report after these numbers of images."""
        if self.hyperband:
            return HyperbandPruner(images[0], images[-1], self.reduction)
        if len(images) == 1:
            return NopPruner()
        return SuccessiveHalvingPruner(images[0], self.reduction)


@dataclass(frozen=True)
class RoundSearch:
    """Rounds: train `n` random candidates up to a rung, and the best PROMOTED of them to the end.

    From arXiv 2307.15422. With n = 0 there is one round, of as many candidates as the limit allows.
    """

    n: int
    rung: float  # share of a trial
    metric: str = "errors"
    published_first: bool = False  # the published best is in the first round

    def run(self, table: Table, limits: Limits, seed: int) -> Iterator[CompleteTrial]:
        """Search within the limits; yields each trial that is complete."""
        rung = table.nearest_fidelity(self.rung * limits.trial_images)
        last = table.nearest_fidelity(limits.trial_images)
        rung_images = table.fidelities[rung]
        promotion_images = table.fidelities[last] - rung_images
        n = self.n or (limits.search_images - PROMOTED * promotion_images) // rung_images
        values = table.values[self.metric]
        order = np.random.default_rng(seed).permutation(len(table.params))
        if self.published_first:
            published = table.params.index(studies.FIRST_PARAMS)
            order = np.array([published, *order[order != published]])
        images = 0
        for start in range(0, len(order), n):
            candidates = order[start : start + n]
            images += rung_images * len(candidates)
            ranking = candidates[np.argsort(values[candidates, rung], kind="stable")]
            for candidate in ranking[:PROMOTED]:
                images += promotion_images
                if images > limits.search_images:
                    return
                yield CompleteTrial(images, int(candidate), values[candidate, last])
