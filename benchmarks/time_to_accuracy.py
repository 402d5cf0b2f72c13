"""Seconds of training, and nothing else, until the validation accuracy is 99.0, 99.3 and 99.5 %.

python -m benchmarks.time_to_accuracy              # `parallel` on MNIST, 10 seeds; some 45 minutes

Each target has a length of training of its own, as the learning rate falls to zero at its end: what
counts is the time of the whole training of that length, and whether the target was reached. Each
seed is trained at each of LENGTHS, the shortest first, until all targets are reached.
"""

import statistics
import time
from pathlib import Path

import click
import torch

from mnist import data, folding, memory, metrics, models, training
from mnist.data import Dataset
from mnist.search import workers

TARGETS = (0.990, 0.993, 0.995)
LENGTHS = (20_000, 30_000, 60_000, 120_000, 240_000, 480_000)  # images


def train(
    network: str, dataset: Dataset, samples: int, seed: int, bfloat16: bool, **params: object
) -> tuple[float, float]:
    """Accuracy on all validation images, and seconds of training up to it."""
    torch.manual_seed(seed)
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    model, start = folding.training_form(model), time.perf_counter()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _ in training.fit(
        model,
        dataset,
        dataset.train,
        samples=samples,
        seed=seed,
        bfloat16=bfloat16,
        **params,  # type: ignore[arg-type]
    ):
        pass
    seconds = time.perf_counter() - start
    wrong = metrics.errors(model, dataset, dataset.validation)
    return 1 - wrong / len(dataset.validation), seconds


@click.command()
@click.option("--model", default="parallel", show_default=True)
@click.option("--seeds", default=10, show_default=True)
@click.option("--optimizer", default="Adam", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr", default=0.003, show_default=True)
@click.option("--bfloat16/--float32", default=False, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(
    model: str,
    seeds: int,
    optimizer: str,
    batch_size: int,
    lr: float,
    bfloat16: bool,
    data_dir: Path | None,
) -> None:
    """Train and print a line for each seed, then the median of each target."""
    torch.set_num_threads(workers.training_threads())
    memory.keep_freed_memory()
    dataset = data.load("mnist", data_dir)
    params = {"optimizer": optimizer, "batch_size": batch_size, "lr": lr}
    times: dict[float, list[float]] = {target: [] for target in TARGETS}
    click.echo(f"{model}, {params}, {workers.training_threads()} threads, bfloat16 {bfloat16}")
    for seed in range(seeds):
        reached: dict[float, float] = {}
        for samples in LENGTHS:
            accuracy, seconds = train(model, dataset, samples, seed, bfloat16, **params)
            for target in TARGETS:
                if accuracy >= target:
                    reached.setdefault(target, seconds)
            click.echo(f"seed {seed}: {samples:7,} images {seconds:5.1f} s {accuracy:.2%}")
            if len(reached) == len(TARGETS):
                break
        for target in TARGETS:
            times[target].append(reached.get(target, float("inf")))
    for target, seconds_of in times.items():
        click.echo(f"{target:.1%}: {summary(seconds_of)}")


def summary(seconds: list[float]) -> str:
    """Median of all; mean and deviation of those that reached it."""
    finite = [value for value in seconds if value < float("inf")]
    if len(finite) < 2:
        return f"reached by {len(finite)} of {len(seconds)}"
    mean, deviation = statistics.fmean(finite), statistics.stdev(finite)
    return (
        f"median {statistics.median(seconds):.1f} s; reached by {len(finite)} of {len(seconds)} "
        f"in {mean:.1f} ± {deviation:.1f} s"
    )


if __name__ == "__main__":
    main()
