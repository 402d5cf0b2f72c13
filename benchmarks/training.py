"""Training speed: our step, a plain PyTorch loop, and the limit of matrix products, in one run.

python -m benchmarks.training                      # `parallel` on MNIST; two minutes

"ours" is training.fit on the training form, in float32 and, where it is faster, bfloat16; "plain
layers" is the same on the network's own layers (run.py --plain); "usual loop" is what a tutorial
has: the network's own layers, torch.optim.Adam as it comes, no augmentation. They take turns. The
limit is how many images a second the plain network could be trained on if all of its
multiplications went at the speed of one large matrix product.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn
from torch.nn import functional as F

from mnist import data, folding, memory, models, training
from mnist.data import Dataset
from mnist.search import workers

STEPS = 12  # of the usual loop, in each round


def usual_loop(network: str, dataset: Dataset, batch_size: int) -> float:
    """Images a second, from the median step."""
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    adam, times = torch.optim.Adam(model.parameters(), 0.00039), []
    for images, labels in zip(
        dataset.train.images.split(batch_size)[:STEPS],
        dataset.train.labels.split(batch_size)[:STEPS],
        strict=True,
    ):
        start = time.perf_counter()
        adam.zero_grad()
        F.cross_entropy(model(dataset.standardise(images)), labels).backward()
        adam.step()
        times.append(time.perf_counter() - start)
    return batch_size / statistics.median(times[2:])


def matrix_flops(side: int = 2048) -> float:
    """Additions and multiplications a second in a product of two matrices, float32."""
    a, b, times = torch.randn(side, side), torch.randn(side, side), []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def step_flops(model: nn.Module, dataset: Dataset) -> float:
    """Additions and multiplications of one training step for one image: forward and, twice as many,
    backward; of convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        places = output[0].numel() // len(layer.weight)  # type: ignore[arg-type]
        total += 2 * layer.weight.numel() * places  # type: ignore[operator,union-attr]

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(dataset.standardise(dataset.train.images[:1]))
    return 3.0 * total


def ways(network: str, dataset: Dataset, batch_size: int) -> dict[str, Callable[[], float]]:
    """By name, what measures images a second."""

    def plain() -> nn.Module:
        return models.build(network, dataset.channels, dataset.size, len(dataset.classes))

    def ours(model: nn.Module, bfloat16: bool = False) -> float:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return training.measure_speed(model, dataset, batch_size=batch_size, bfloat16=bfloat16)

    return {
        "usual loop": lambda: usual_loop(network, dataset, batch_size),
        "plain layers": lambda: ours(plain()),
        "ours, float32": lambda: ours(folding.training_form(plain())),
        "ours, bfloat16": lambda: ours(folding.training_form(plain()), bfloat16=True),
    }


@click.command()
@click.option("--model", default="parallel", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(model: str, batch_size: int, rounds: int, data_dir: Path | None) -> None:
    """Compare and print a table."""
    torch.set_num_threads(workers.training_threads())
    memory.keep_freed_memory()  # which helps the usual loop as well
    dataset = data.load("mnist", data_dir)
    measured: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, measure in ways(model, dataset, batch_size).items():
            measured.setdefault(name, []).append(measure())
    network = models.build(model, dataset.channels, dataset.size, len(dataset.classes))
    limit = matrix_flops() / step_flops(network, dataset)
    usual = statistics.median(measured["usual loop"])
    threads = torch.get_num_threads()
    click.echo(f"{model}, batch {batch_size}, {threads} threads, {rounds} rounds")
    click.echo("{:15} {:>9} {:>17} {:>6}".format("", "images/s", "min to max", "ratio"))
    for name, speeds in measured.items():
        median, least, most = statistics.median(speeds), min(speeds), max(speeds)
        click.echo(f"{name:15} {median:9.0f} {least:8.0f} {most:8.0f} {median / usual:6.1f}")
    click.echo(f"limit of the plain network by matrix products: {limit:.0f} images/s")


if __name__ == "__main__":
    main()
