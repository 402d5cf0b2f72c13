"""Training images that a search needs for the same best accuracy, with and without pruning.

python -m benchmarks.pruning                       # MNIST and digits, `linear`, five seeds

For each seed both searches ask for the same number of trials; the accuracy to reach is the lower
of their two best, and what counts is how many images all trials together had seen when a complete
trial first reached it.
"""

import functools
import statistics
import tempfile
from pathlib import Path

import click
import optuna
from optuna.trial import TrialState

from mnist import data, search
from mnist import study as studies
from mnist.members import Claim, Member
from mnist.workers import Pool, Run, Setup

SETTINGS = {"mnist": 5_000, "digits": 4_000}  # images a trial


def curve(
    pool: Pool, model: str, samples: int, trials: int, seed: int, pruner: str
) -> list[tuple[int, float]]:
    """After each complete trial: images seen by all so far, and the best accuracy."""

    def run_of(claim: Claim) -> Run:
        rungs = tuple(studies.rungs(samples))
        return Run(model, claim.params, samples, studies.seed_of(seed, claim.number), rungs)

    with (
        tempfile.TemporaryDirectory() as folder,
        Member(f"sqlite:///{folder}/db.sqlite3", "study", threads=2) as member,
    ):
        member.study.pruner = studies.PRUNERS[pruner](samples)
        for _ in search.search(member, pool, run_of, trials=trials, seed=seed):
            pass
        seen, best, points = 0, 0.0, []
        for trial in member.study.trials:
            seen += trial.last_step or 0
            if trial.state == TrialState.COMPLETE:
                best = max(best, trial.value or 0.0)
                points.append((seen, best))
        return points


def needed(points: list[tuple[int, float]], accuracy: float) -> int:
    return next(seen for seen, best in points if best >= accuracy)


@click.command()
@click.option("--model", default="linear", show_default=True)
@click.option("--trials", default=32, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(model: str, trials: int, seeds: int, data_dir: Path | None) -> None:
    """Compare and print a table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    click.echo(f"{model}, {trials} trials a search, {seeds} seeds")
    head = ("data set", "seed", "accuracy", "images, pruned", "images, not", "ratio")
    click.echo("{:9} {:>5} {:>9} {:>15} {:>12} {:>6}".format(*head))
    for name, samples in SETTINGS.items():
        ratios = []
        with Pool(1, Setup(functools.partial(data.load, name, data_dir), "cpu", 2)) as pool:
            for seed in range(seeds):
                halving, whole = (
                    curve(pool, model, samples, trials, seed, pruner)
                    for pruner in ("halving", "none")
                )
                accuracy = min(halving[-1][1], whole[-1][1])
                pruned, full = needed(halving, accuracy), needed(whole, accuracy)
                ratios.append(pruned / full)
                click.echo(
                    f"{name:9} {seed:5} {accuracy:9.2%} {pruned:15,} {full:12,} {ratios[-1]:6.2f}"
                )
        click.echo(
            f"{name:9} median ratio {statistics.median(ratios):.2f}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
