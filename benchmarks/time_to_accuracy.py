"""Seconds of training, without validation, for a validation accuracy of 99.0, 99.3 and 99.5 %.

python -m benchmarks.time_to_accuracy              # `parallel` on MNIST, 10 seeds; some 45 minutes

Compares the targets, over seeds. Each seed is trained anew by each of TRAININGS, the shortest
first, until all targets are reached: the learning rate falls to zero at the end of a training, so a
target is reached at an end only. The time of a target is that of the first whole training that
reaches it.
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
# Images, batch size, augmentation: a short training needs smaller batches and less augmentation.
TRAININGS = ((40_000, 40, 0.5), (330_000, 64, 1.0))


def train(
    network: str, dataset: Dataset, samples: int, seed: int, bfloat16: bool, **params: object
) -> tuple[float, float]:
    """Train a new network; returns its accuracy on all validation images, and the seconds."""
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
    errors = metrics.errors(model, dataset, dataset.validation)
    return 1 - errors / len(dataset.validation), seconds


@click.command()
@click.option("--model", default="parallel", show_default=True)
@click.option("--seeds", default=10, show_default=True)
@click.option("--optimizer", default="Adam", show_default=True)
@click.option("--lr", default=0.003, show_default=True)
@click.option("--bfloat16/--float32", default=False, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(
    model: str,
    seeds: int,
    optimizer: str,
    lr: float,
    bfloat16: bool,
    data_dir: Path | None,
) -> None:
    """Train and print a line for each seed, then the median of each target."""
    torch.set_num_threads(workers.training_threads())
    memory.keep_freed_memory()
    dataset = data.load("mnist", data_dir)
    times: dict[float, list[float]] = {target: [] for target in TARGETS}
    threads = workers.training_threads()
    click.echo(f"{model}, {optimizer}, lr {lr:g}, {threads} threads, bfloat16 {bfloat16}")
    for seed in range(seeds):
        reached: dict[float, float] = {}  # target -> seconds
        for samples, batch_size, augmentation in TRAININGS:
            params = {"batch_size": batch_size, "augmentation": augmentation}
            params |= {"optimizer": optimizer, "lr": lr}
            accuracy, seconds = train(model, dataset, samples, seed, bfloat16, **params)
            for target in TARGETS:
                if accuracy >= target:
                    reached.setdefault(target, seconds)
            click.echo(f"seed {seed}: {samples:7,} images {seconds:5.1f} s {accuracy:.2%}")
            if len(reached) == len(TARGETS):
                break
        for target in TARGETS:
            times[target].append(reached.get(target, float("inf")))
    for target, target_times in times.items():
        click.echo(f"{target:.1%}: {summarise(target_times)}")


def summarise(times: list[float]) -> str:
    """Format the median over all seeds (inf: not reached), and mean and deviation of the others."""
    reached = [seconds for seconds in times if seconds < float("inf")]
    counts = f"reached by {len(reached)} of {len(times)}"
    if len(reached) < 2:
        return counts
    mean, deviation = statistics.fmean(reached), statistics.stdev(reached)
    return f"median {statistics.median(times):.1f} s; {counts} in {mean:.1f} ± {deviation:.1f} s"


if __name__ == "__main__":
    main()
