"""A table of learning curves, which benchmarks.curves writes, as searches read it."""

import functools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from mnist.metrics import MIN_PROBABILITY
from mnist.search.space import DEFAULT, Space

OPTIMIZER_DISTANCE = 10.0  # more than the other distances, which are at most the square root of 2
METRICS = ("errors", "log_loss")


@dataclass(frozen=True)
class Table:
    """N candidates and their values at F fidelities (numbers of training images, ascending).

    Errors are counted on `validation_images`. `values` has (N, F) float64 for each of METRICS; less
    is better. `final_errors` (N,) judge a choice, and `final_description` says what they are.
    `seed_errors` (M, S) are those of S seeds of the final training, for the candidates with the
    indices `with_finals` (M,).
    """

    params: list[dict[str, Any]]
    fidelities: list[int]
    validation_images: int
    values: dict[str, np.ndarray]
    final_errors: np.ndarray
    final_description: str
    with_finals: np.ndarray
    seed_errors: np.ndarray

    def nearest_fidelity(self, images: float) -> int:
        """The index of the fidelity nearest to this number of images, by their ratio."""
        return int(np.argmin(np.abs(np.log(np.array(self.fidelities) / images))))

    @functools.cached_property
    def points(self) -> np.ndarray:
        """The candidates (N, D) in the normalised space."""
        return np.array([normalise_params(params) for params in self.params])


def read_table(path: Path) -> Table:
    """Read the default space's rows of a table that benchmarks.curves wrote.

    Raises ValueError if it has no such rows.
    """
    content = json.loads(path.read_text())
    header = content["header"]
    rows = [row for row in content["rows"] if row["space"] == "default"]
    if not rows:
        raise ValueError(f"{path} has no configuration of the default space")
    errors = np.array([row["errors"] for row in rows], float)
    max_log_loss = -math.log(MIN_PROBABILITY)  # for a run that diverged
    log_loss = [
        [max_log_loss if value is None else value for value in row["log_loss"]] for row in rows
    ]
    seeds = max(len(row.get("finals", ())) for row in rows)
    with_finals = [i for i, row in enumerate(rows) if seeds and len(row.get("finals", ())) == seeds]
    seed_errors = np.array(
        [[final["errors"] for final in rows[i]["finals"]] for i in with_finals], float
    )
    if len(with_finals) == len(rows):
        final_errors = seed_errors.mean(1)
        description = f"mean errors of {seeds} seeds after {header['final_samples']:,} images"
    else:
        final_errors = errors[:, -1]
        description = f"errors after {header['fidelities'][-1]:,} images"
    return Table(
        params=[row["params"] for row in rows],
        fidelities=header["fidelities"],
        validation_images=header["n"],
        values={"errors": errors, "log_loss": np.array(log_loss, float)},
        final_errors=final_errors,
        final_description=description,
        with_finals=np.array(with_finals, int),
        seed_errors=seed_errors,
    )


def smooth_errors(table: Table) -> np.ndarray:
    """The expected final errors (N,) of each candidate, where the table has one training of each.

    A count of 50 has a standard deviation of 7, so that the least of many is mostly luck. For each
    optimizer, a Gaussian process of the logarithm of the errors, over those of batch size and
    learning rate, has this noise and that of a training, which is fitted.
    """
    expected = np.empty(len(table.params))
    points = np.array([[params["batch_size"], params["lr"]] for params in table.params])
    optimizers = np.array([params["optimizer"] for params in table.params])
    for optimizer in np.unique(optimizers):
        own = optimizers == optimizer
        errors = np.maximum(table.final_errors[own], 1)
        logarithms = np.log(errors)
        noise = 1 / errors / logarithms.var()  # of normalised targets, to which sklearn adds it
        kernel = ConstantKernel() * Matern([1.0, 1.0], nu=2.5) + WhiteKernel(0.01)
        process = GaussianProcessRegressor(
            kernel, alpha=noise, normalize_y=True, n_restarts_optimizer=4, random_state=0
        )
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            process.fit(np.log(points[own]), logarithms)
        expected[own] = np.exp(process.predict(np.log(points[own])))
    return expected


def normalise_params(params: dict[str, Any], space: Space = DEFAULT) -> list[float]:
    """Turn a configuration into a point (D,), with numbers as shares of their range.

    Two configurations with different categories are at least OPTIMIZER_DISTANCE apart.
    """
    point: list[float] = []
    for name, distribution in sorted(space.items()):
        if isinstance(distribution, CategoricalDistribution):
            length = OPTIMIZER_DISTANCE / math.sqrt(2)  # of each side of a right-angled triangle
            point += [length * (params[name] == choice) for choice in distribution.choices]
        else:
            bounds = (distribution.low, distribution.high, params[name])
            low, high, value = (math.log(x) if distribution.log else x for x in bounds)
            point.append((value - low) / (high - low))
    return point
