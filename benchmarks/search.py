"""Searches replayed on a table of learning curves: how many images each needs for a good trial.

python -m benchmarks.search                       # on benchmarks/curves.json, 100 seeds

The candidates are the table's configurations of the default space; `benchmarks.replay` says how a
search goes on them. A trial ends at the table's fidelity nearest to --trial; a rung is at the
nearest fidelity, too. A search ends when it has seen --trials times that many images, or has had
all candidates. Its choice at any moment is the complete trial with the best value so far, and is
judged by its final errors: those at the last fidelity, or the mean over the seeds of the final
training where the table has them for all candidates. No confirmations on fresh seeds are replayed.
The seeds are those of the searches; the table is one sample, and its luck is in all of them.
"""

import functools
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler
from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr
from scipy.stats import kendalltau, mannwhitneyu

from benchmarks.replay import (
    CLOSE,
    KEPT,
    METRICS,
    Limits,
    Rounds,
    Search,
    Step,
    Table,
    Trials,
    read,
)
from mnist.process import available_cores
from mnist.search import budget
from mnist.search import study as studies
from mnist.search.space import Space

TABLE = Path(__file__).with_name("curves.json")
TRIAL_SAMPLES = 12_000  # the fidelity between the least and the most images of a trial
GP_SEEDS = 10  # a search of 32 trials takes 2.5 s of a core, where TPE's takes 0.05


def _gp(seed: int, _: Space) -> BaseSampler:
    return GPSampler(seed=seed)


def _shares(rungs: Sequence[float]) -> str:
    return " and ".join(f"1/{1 / share:g}" for share in rungs)


TPE, RANDOM = studies.SAMPLERS["tpe"], studies.SAMPLERS["random"]
HALVING = f"TPE, halving at {_shares(budget.RUNGS)}"
CURRENT = f"{HALVING}, published best first"
FORMER = (1 / 6, 1 / 2)  # rungs of before
LAYOUTS = (FORMER, (1 / 3,), (1 / 4,), (1 / 6,), (1 / 12,), (1 / 12, 1 / 3))
SEARCHES: dict[str, Search] = {
    CURRENT: Trials(TPE, budget.RUNGS, first=True),
    HALVING: Trials(TPE, budget.RUNGS),
    "random": Trials(RANDOM),
    "TPE": Trials(TPE),
    "GP": Trials(_gp),
    f"random, halving at {_shares(budget.RUNGS)}": Trials(RANDOM, budget.RUNGS),
    f"GP, halving at {_shares(budget.RUNGS)}": Trials(_gp, budget.RUNGS),
    **{f"TPE, halving at {_shares(rungs)}": Trials(TPE, rungs) for rungs in LAYOUTS},
    f"{HALVING}, by log-loss": Trials(TPE, budget.RUNGS, metric="log_loss"),
    "TPE, halving at 1/12, by log-loss": Trials(TPE, (1 / 12,), metric="log_loss"),
    "TPE, Hyperband": Trials(TPE, hyperband=True),
    **{
        f"{n or 'all'} to {_shares([rung])}, best {KEPT} on": Rounds(n, rung)
        for n in (32, 0)
        for rung in (1 / 12, 1 / 6, 1 / 3)
    },
    f"32 to 1/12, best {KEPT} on, by log-loss": Rounds(32, 1 / 12, "log_loss"),
    f"32 to 1/12, best {KEPT} on, published best among": Rounds(32, 1 / 12, first=True),
}


# --- what they are worth --------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """`needed` images for a good choice (inf: not within the limit), and of the choice in the end
    the final errors above the least (`regret`); `complete` trials."""

    needed: float
    regret: float
    complete: int


def replay(table: Table, limits: Limits, task: tuple[str, int]) -> Outcome:
    """One search, by its name and seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    # Optuna's goes number by number in Python, half of the time; the values are the same.
    _truncnorm._log_ndtr = log_ndtr
    name, seed = task
    steps = list(SEARCHES[name](table, limits, seed))
    return outcome(steps, table.final, limits.close)


def outcome(steps: Sequence[Step], final: np.ndarray, close: float = CLOSE) -> Outcome:
    """Judge the choices of a search by the candidates' final errors (N,)."""
    least, needed, chosen = final.min(), math.inf, None
    for step in steps:
        if chosen is None or step.value < chosen.value:
            chosen = step
            if final[step.candidate] <= close * least:
                needed = min(needed, step.images)
    regret = (final[chosen.candidate] if chosen else final.max()) - least
    return Outcome(needed, float(regret), len(steps))


def replays(
    table: Table, limits: Limits, seeds: int, gp_seeds: int, processes: int
) -> dict[str, list[Outcome]]:
    """The outcomes of all searches, the slow ones first, so that no process ends late."""
    slow = [name for name in SEARCHES if name.startswith("GP")]
    names = [*slow, *(name for name in SEARCHES if name not in slow)]
    tasks = [(name, i) for name in names for i in range(gp_seeds if name in slow else seeds)]
    one = functools.partial(replay, table, limits)
    if processes == 1:
        done = list(map(one, tasks))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            done = list(pool.map(one, tasks, chunksize=4))
    found: dict[str, list[Outcome]] = {name: [] for name in SEARCHES}
    for (name, _), each in zip(tasks, done, strict=True):
        found[name].append(each)
    return found


def chance(needed: Sequence[float], reference: Sequence[float]) -> float:
    """p (0..1) of a one-sided Mann-Whitney test that `needed` tends to be less."""
    if len({*needed, *reference}) == 1:
        return 1.0
    finite = [np.nan_to_num(each, posinf=1e18) for each in (needed, reference)]
    return float(mannwhitneyu(*finite, alternative="less").pvalue)


def tau(values: np.ndarray, final: np.ndarray) -> float:
    """Kendall's tau-b (-1..1) of two rankings (N,); nan where one is of equals only."""
    return float(kendalltau(values, final).statistic) if len(final) > 1 else math.nan


# --- and how it is printed ------------------------------------------------------------------------


def quartiles(numbers: Sequence[float], limit: float, scale: float = 1) -> str:
    """Median and quartiles, each a number that was seen; above `limit` as that."""
    found = np.quantile(numbers, [0.5, 0.25, 0.75], method="inverted_cdf") / scale
    median, low, high = (
        f"{each:,.0f}" if each * scale <= limit else f">{limit / scale:,.0f}" for each in found
    )
    return f"{median} ({low} to {high})"


def print_searches(found: dict[str, list[Outcome]], limits: Limits) -> None:
    reference = [each.needed for each in found[CURRENT]]
    columns = "{:48} {:>5} {:>8} {:>22} {:>6} {:>16} {:>8}"
    heads = ("seeds", "complete", "1,000 images needed", "good", "regret", "p")
    click.echo(columns.format("search", *heads))
    for name, outcomes in found.items():
        if not outcomes:
            continue
        needed = [each.needed for each in outcomes]
        good = sum(map(math.isfinite, needed)) / len(needed)
        click.echo(
            columns.format(
                name,
                len(outcomes),
                f"{np.median([each.complete for each in outcomes]):.0f}",
                quartiles(needed, limits.images, 1_000),
                f"{good:.0%}",
                quartiles([each.regret for each in outcomes], math.inf),
                "" if name == CURRENT else f"{chance(needed, reference):.2g}",
            )
        )


def print_tau(table: Table, name: str, chosen: np.ndarray, final: np.ndarray) -> None:
    """Rankings at each fidelity of the candidates `chosen` (M,) against their `final` (M,)."""
    half = final <= np.median(final)
    click.echo(f"\nKendall's tau with the {name}: n = {len(final)}, better half {half.sum()}")
    columns = "{:>10} {:>10} {:>10} {:>16} {:>16}"
    click.echo(columns.format("images", "errors", "log-loss", "errors, half", "log-loss, half"))
    for i, samples in enumerate(table.fidelities):
        values = [table.values[metric][chosen, i] for metric in METRICS]
        whole = [tau(each, final) for each in values]
        better = [tau(each[half], final[half]) for each in values]
        numbers = (f"{each:.2f}" for each in (*whole, *better))
        click.echo(columns.format(f"{samples:,}", *numbers))


@click.command()
@click.option(
    "--table", "path", type=click.Path(exists=True, path_type=Path), default=TABLE, help="To read."
)
@click.option("--seeds", default=100, show_default=True)
@click.option("--gp-seeds", default=GP_SEEDS, show_default=True, help="Of the Gaussian process.")
@click.option("--trials", default=32, show_default=True, help="Whole ones, that a search may cost.")
@click.option("--trial", default=TRIAL_SAMPLES, show_default=True, help="Images of a trial.")
@click.option("--close", default=CLOSE, show_default=True, help="Times the least errors: good.")
@click.option("--processes", type=int, help="By default one a core.")
def main(
    path: Path,
    seeds: int,
    gp_seeds: int,
    trials: int,
    trial: int,
    close: float,
    processes: int | None,
) -> None:
    """Replay and print the tables."""
    start = time.perf_counter()
    table = read(path)
    trial = table.fidelities[table.at(trial)]
    limits = Limits(trial, trials * trial, close)
    least = table.final.min()
    click.echo(
        f"{path.name}: {len(table.params)} configurations of the default space; final: "
        f"{table.final_name} (of {table.n:,}), at best {least:g}; good: at most {close * least:g}, "
        f"as {(table.final <= close * least).sum()} are.\n"
        f"Trials of {trial:,} images, at most {limits.images:,} in a search. "
        f"Median (quartiles); p: fewer images than {CURRENT}.\n"
    )
    gp_seeds = min(seeds, gp_seeds)
    print_searches(replays(table, limits, seeds, gp_seeds, processes or available_cores()), limits)
    everyone = np.arange(len(table.params))
    print_tau(table, table.final_name, everyone, table.final)
    if len(table.with_finals) > 1 and len(table.with_finals) < len(everyone):
        name = f"mean errors of {table.seeds.shape[1]} seeds of the final training"
        print_tau(table, name, table.with_finals, table.seeds.mean(1))
    click.echo(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
