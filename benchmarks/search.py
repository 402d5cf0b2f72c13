"""Searches replayed on a table of learning curves: how many images each needs for a good choice.

python -m benchmarks.search                # on benchmarks/curves.json, 100 seeds; three minutes

Compares samplers, rungs and pruners with the default search, by a one-sided Mann-Whitney test of
the images needed. The candidates are the table's configurations of the default space;
`benchmarks.replay` says how a search chooses among them. A trial ends at the table's fidelity
nearest to --trial, and each rung is at the nearest fidelity, too. A search ends when its trials
have seen --trials times that many images, or when all candidates were tried.

The choice of a search, at any moment, is the complete trial with the best value so far. Its final
errors judge it: the mean over the seeds of the final trainings or, if not all candidates have them,
the errors that `curve_table.smooth_errors` expects at the last fidelity. Confirmations on fresh
seeds are not replayed. The spread is that of the searches' seeds. A search sees one training of
each candidate, and its chance is in all searches.
"""

import functools
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler
from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr
from scipy.stats import kendalltau, mannwhitneyu

from benchmarks.curve_table import METRICS, Table, read_table, smooth_errors
from benchmarks.replay import (
    GOOD_RATIO,
    PROMOTED,
    CompleteTrial,
    Limits,
    OptunaSearch,
    RoundSearch,
    Search,
)
from mnist.process import available_cores
from mnist.search import budget
from mnist.search import study as studies
from mnist.search.space import Space

TABLE = Path(__file__).with_name("curves.json")
TRIAL_IMAGES = 12_000  # the fidelity between the least and the most images of a trial
GP_SEEDS = 10  # a search of 32 trials takes 2.5 s of a core, where TPE's takes 0.05


def _make_gp(seed: int, _: Space) -> BaseSampler:
    return GPSampler(seed=seed)


def _describe(rungs: Sequence[float]) -> str:
    return " and ".join(f"1/{1 / share:g}" for share in rungs)


TPE, RANDOM = studies.SAMPLERS["tpe"], studies.SAMPLERS["random"]
HALVING = f"TPE, halving at {_describe(budget.RUNGS)}"
DEFAULT_SEARCH = f"{HALVING}, published best first"
FORMER_RUNGS = (1 / 6, 1 / 2)  # of an earlier default search
RUNG_LAYOUTS = (FORMER_RUNGS, (1 / 3,), (1 / 6,), (1 / 12,), (1 / 12, 1 / 3))
SEARCHES: dict[str, Search] = {
    DEFAULT_SEARCH: OptunaSearch(TPE, budget.RUNGS, published_first=True),
    HALVING: OptunaSearch(TPE, budget.RUNGS),
    "random": OptunaSearch(RANDOM),
    "TPE": OptunaSearch(TPE),
    "GP": OptunaSearch(_make_gp),
    f"random, halving at {_describe(budget.RUNGS)}": OptunaSearch(RANDOM, budget.RUNGS),
    f"GP, halving at {_describe(budget.RUNGS)}": OptunaSearch(_make_gp, budget.RUNGS),
    **{f"TPE, halving at {_describe(rungs)}": OptunaSearch(TPE, rungs) for rungs in RUNG_LAYOUTS},
    f"{HALVING}, by log-loss": OptunaSearch(TPE, budget.RUNGS, metric="log_loss"),
    "TPE, halving at 1/12, by log-loss": OptunaSearch(TPE, (1 / 12,), metric="log_loss"),
    "TPE, Hyperband": OptunaSearch(TPE, hyperband=True),
    **{
        f"{n or 'all'} to {_describe([rung])}, best {PROMOTED} on": RoundSearch(n, rung)
        for n in (32, 0)
        for rung in (1 / 12, 1 / 6, 1 / 3)
    },
    f"32 to 1/12, best {PROMOTED} on, by log-loss": RoundSearch(32, 1 / 12, "log_loss"),
    f"32 to 1/12, best {PROMOTED} on, published best among": RoundSearch(
        32, 1 / 12, published_first=True
    ),
}


# --- outcomes of searches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a search reached.

    `images_needed`: until its choice was good; inf if it never was within the limit. `is_good`:
    whether its last choice is good; `regret`: the final errors of this choice above the least.
    `complete_trials`: their number.
    """

    images_needed: float
    is_good: bool
    regret: float
    complete_trials: int


def replay(table: Table, limits: Limits, task: tuple[str, int]) -> Outcome:
    """Replay one search, given by its name and seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    # Optuna's function loops in Python, which takes half of the time; SciPy's gives equal values.
    _truncnorm._log_ndtr = log_ndtr
    name, seed = task
    trials = list(SEARCHES[name].run(table, limits, seed))
    return judge(trials, table.final_errors, limits.good_ratio)


def judge(
    trials: Sequence[CompleteTrial], final_errors: np.ndarray, good_ratio: float = GOOD_RATIO
) -> Outcome:
    """Judge the choices of a search by the candidates' final errors (N,)."""
    least, images_needed, choice = final_errors.min(), math.inf, None
    most = good_ratio * least
    for trial in trials:
        if choice is None or trial.value < choice.value:
            choice = trial
            if final_errors[trial.candidate] <= most:
                images_needed = min(images_needed, trial.images)
    errors = final_errors[choice.candidate] if choice else final_errors.max()
    return Outcome(images_needed, bool(errors <= most), float(errors - least), len(trials))


def replay_all(
    table: Table, limits: Limits, seeds: int, gp_seeds: int, processes: int
) -> dict[str, list[Outcome]]:
    """Replay all searches; returns the outcomes of each by its name.

    The slow ones come first, so that no process ends late.
    """
    slow = [name for name in SEARCHES if name.startswith("GP")]
    names = [*slow, *(name for name in SEARCHES if name not in slow)]
    tasks = [(name, i) for name in names for i in range(gp_seeds if name in slow else seeds)]
    replay_task = functools.partial(replay, table, limits)
    if processes == 1:
        task_outcomes = list(map(replay_task, tasks))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            task_outcomes = list(pool.map(replay_task, tasks, chunksize=4))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in SEARCHES}
    for (name, _), outcome in zip(tasks, task_outcomes, strict=True):
        outcomes[name].append(outcome)
    return outcomes


def compute_p_value(images_needed: Sequence[float], reference: Sequence[float]) -> float:
    """p (0..1) of a one-sided Mann-Whitney test that `images_needed` tend to be less."""
    if len({*images_needed, *reference}) == 1:
        return 1.0
    samples = [np.nan_to_num(sample, posinf=1e18) for sample in (images_needed, reference)]
    return float(mannwhitneyu(*samples, alternative="less").pvalue)


def compute_tau(values: np.ndarray, final_errors: np.ndarray) -> float:
    """Kendall's tau-b (-1..1) of two rankings (N,); nan for one candidate, or if all are equal."""
    if len(final_errors) < 2:
        return math.nan
    return float(kendalltau(values, final_errors).statistic)


# --- the printed tables ---------------------------------------------------------------------------


def format_quartiles(numbers: Sequence[float], limit: float, scale: float = 1) -> str:
    """Format the median and quartiles, divided by `scale`; those over the limit as ">limit"."""
    quantiles = np.quantile(numbers, [0.5, 0.25, 0.75], method="inverted_cdf")
    median, low, high = (
        f"{number / scale:,.0f}" if number <= limit else f">{limit / scale:,.0f}"
        for number in quantiles
    )
    return f"{median} ({low} to {high})"


def print_searches(outcomes: dict[str, list[Outcome]], limits: Limits) -> None:
    """Print a row for each search."""
    reference = [outcome.images_needed for outcome in outcomes[DEFAULT_SEARCH]]
    columns = "{:48} {:>5} {:>8} {:>22} {:>6} {:>16} {:>8}"
    headings = ("seeds", "complete", "1,000 images needed", "good", "regret", "p")
    click.echo(columns.format("search", *headings))
    for name, own in outcomes.items():
        if not own:
            continue
        images_needed = [outcome.images_needed for outcome in own]
        good = sum(outcome.is_good for outcome in own) / len(own)
        p_value = compute_p_value(images_needed, reference)
        click.echo(
            columns.format(
                name,
                len(own),
                f"{np.median([outcome.complete_trials for outcome in own]):.0f}",
                format_quartiles(images_needed, limits.search_images, 1_000),
                f"{good:.0%}",
                format_quartiles([outcome.regret for outcome in own], math.inf),
                "" if name == DEFAULT_SEARCH else f"{p_value:.2g}",
            )
        )


def print_tau(
    table: Table, description: str, candidates: np.ndarray, final_errors: np.ndarray
) -> None:
    """Print Kendall's tau of the values at each fidelity with `final_errors` (M,).

    `candidates` (M,) are indices; the last columns are of the half with the least final errors.
    """
    half = final_errors <= np.median(final_errors)
    n = len(final_errors)
    click.echo(f"\nKendall's tau with the {description}: n = {n}, better half {half.sum()}")
    columns = "{:>10} {:>10} {:>10} {:>16} {:>16}"
    click.echo(columns.format("images", "errors", "log-loss", "errors, half", "log-loss, half"))
    for i, images in enumerate(table.fidelities):
        values = [table.values[metric][candidates, i] for metric in METRICS]
        taus = [compute_tau(column, final_errors) for column in values]
        half_taus = [compute_tau(column[half], final_errors[half]) for column in values]
        click.echo(columns.format(f"{images:,}", *(f"{tau:.2f}" for tau in (*taus, *half_taus))))


@click.command()
@click.option(
    "--table", "path", type=click.Path(exists=True, path_type=Path), default=TABLE, help="To read."
)
@click.option("--seeds", default=100, show_default=True, help="Of each search.")
@click.option("--gp-seeds", default=GP_SEEDS, show_default=True, help="Of the Gaussian process.")
@click.option("--trials", default=32, show_default=True, help="Limit of a search, in whole trials.")
@click.option(
    "--trial", "trial_images", default=TRIAL_IMAGES, show_default=True, help="Images of a trial."
)
@click.option(
    "--close",
    "good_ratio",
    default=GOOD_RATIO,
    show_default=True,
    help="A choice is good with at most this many times the least errors.",
)
@click.option("--processes", type=int, help="By default one a core.")
def main(
    path: Path,
    seeds: int,
    gp_seeds: int,
    trials: int,
    trial_images: int,
    good_ratio: float,
    processes: int | None,
) -> None:
    """Replay all searches and print the tables."""
    start = time.perf_counter()
    table = read_table(path)
    judged = table
    if len(table.with_finals) < len(table.params):
        description = f"expected {table.final_description}"
        expected = smooth_errors(table)
        judged = replace(table, final_errors=expected, final_description=description)
    trial_images = table.fidelities[table.nearest_fidelity(trial_images)]
    limits = Limits(trial_images, trials * trial_images, good_ratio)
    most_errors = good_ratio * judged.final_errors.min()
    click.echo(
        f"{path.name}: {len(table.params)} configurations of the default space; final: "
        f"{judged.final_description} (of {table.validation_images:,}), at best "
        f"{judged.final_errors.min():.3g}; good: at most {most_errors:.3g}, "
        f"as {(judged.final_errors <= most_errors).sum()} are.\n"
        f"Trials of {trial_images:,} images, at most {limits.search_images:,} in a search. "
        f"Median (quartiles); p: fewer images than {DEFAULT_SEARCH}.\n"
    )
    gp_seeds, processes = min(seeds, gp_seeds), processes or available_cores()
    print_searches(replay_all(judged, limits, seeds, gp_seeds, processes), limits)
    candidates = np.arange(len(table.params))
    print_tau(table, table.final_description, candidates, table.final_errors)
    if 1 < len(table.with_finals) < len(candidates):
        description = f"mean errors of {table.seed_errors.shape[1]} seeds of the final training"
        print_tau(table, description, table.with_finals, table.seed_errors.mean(1))
    click.echo(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
