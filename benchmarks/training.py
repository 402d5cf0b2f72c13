"""Training speed: the training form, the plain layers and a usual PyTorch loop, in one run.

python -m benchmarks.training                      # `parallel` on MNIST; two minutes

Compares images per second with the usual loop: the network's own layers, torch.optim.Adam with its
defaults, no augmentation, as in a tutorial. "ours" is training.fit on the training form, in float32
and bfloat16; "plain layers" is training.fit on the network's own layers (run.py --plain). They take
turns. The limit is the speed of training the network's own layers if all of its multiplications
were as fast as one large matrix product.
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


def measure_usual_loop(network: str, dataset: Dataset, batch_size: int) -> float:
    """Measure images per second, from the median step; the first two steps do not count."""
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    optimizer, times = torch.optim.Adam(model.parameters(), 0.00039), []
    for images, labels in zip(
        dataset.train.images.split(batch_size)[:STEPS],
        dataset.train.labels.split(batch_size)[:STEPS],
        strict=True,
    ):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(dataset.standardise(images)), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return batch_size / statistics.median(times[2:])


def measure_matrix_flops(side: int = 2048) -> float:
    """Measure additions and multiplications per second of a matrix product in float32."""
    a, b, times = torch.randn(side, side), torch.randn(side, side), []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def count_step_flops(model: nn.Module, dataset: Dataset) -> float:
    """Count additions and multiplications of a training step for one image.

    The backward pass has twice as many as the forward pass. Only convolutions and linear layers
    count.
    """
    forward_flops = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal forward_flops
        positions = output[0].numel() // len(layer.weight)  # type: ignore[arg-type]
        forward_flops += 2 * layer.weight.numel() * positions  # type: ignore[operator]

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(dataset.standardise(dataset.train.images[:1]))
    return 3.0 * forward_flops


def make_measurements(
    network: str, dataset: Dataset, batch_size: int
) -> dict[str, Callable[[], float]]:
    """Make functions that measure images per second, by name."""

    def build_plain() -> nn.Module:
        return models.build(network, dataset.channels, dataset.size, len(dataset.classes))

    def measure_fit(model: nn.Module, bfloat16: bool = False) -> float:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return training.measure_speed(model, dataset, batch_size=batch_size, bfloat16=bfloat16)

    return {
        "usual loop": lambda: measure_usual_loop(network, dataset, batch_size),
        "plain layers": lambda: measure_fit(build_plain()),
        "ours, float32": lambda: measure_fit(folding.training_form(build_plain())),
        "ours, bfloat16": lambda: measure_fit(folding.training_form(build_plain()), bfloat16=True),
    }


@click.command()
@click.option("--model", default="parallel", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(model: str, batch_size: int, rounds: int, data_dir: Path | None) -> None:
    """Compare and print a table."""
    torch.set_num_threads(workers.training_threads())
    memory.keep_freed_memory()  # which helps the usual loop, too
    dataset = data.load("mnist", data_dir)
    measurements = make_measurements(model, dataset, batch_size)
    speeds: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            speeds[name].append(measure())
    network = models.build(model, dataset.channels, dataset.size, len(dataset.classes))
    limit = measure_matrix_flops() / count_step_flops(network, dataset)
    usual = statistics.median(speeds["usual loop"])
    click.echo(
        f"{model}, batch {batch_size}, {workers.training_threads()} threads, {rounds} rounds"
    )
    click.echo("{:15} {:>9} {:>17} {:>6}".format("", "images/s", "min to max", "ratio"))
    for name, own in speeds.items():
        median, least, most = statistics.median(own), min(own), max(own)
        click.echo(f"{name:15} {median:9.0f} {least:8.0f} {most:8.0f} {median / usual:6.1f}")
    click.echo(f"limit of the plain network by matrix products: {limit:.0f} images/s")


if __name__ == "__main__":
    main()
