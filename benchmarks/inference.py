"""torch, ONNX Runtime and int8: time of one image and of 128, start and memory of a server.

python -m benchmarks.inference     # the current model of saved_models; two minutes

Compares the engines with torch. They take turns, so that a change of the machine's speed meets all
of them.
"""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks import servers
from mnist import inference, registry

BATCH_SIZES = (1, 128)
READY = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
ROUNDS = 5  # through all engines
WARM_UP_S, MEASURE_S = 0.3, 1.5  # in each round


def measure_ms(
    classify: inference.Classifier, images: np.ndarray, duration_s: float
) -> list[float]:
    """Classify the images again and again for this duration; returns the milliseconds of each."""
    times_ms = []
    end = time.perf_counter() + duration_s
    while (start := time.perf_counter()) < end:
        classify(images)
        times_ms.append(1000 * (time.perf_counter() - start))
    return times_ms


def print_times(classifiers: Sequence[inference.Classifier], images: np.ndarray) -> None:
    """Print a table of the time of a batch, for each batch size and engine."""
    click.echo(f"{'engine':10} {'images':>6} {'median ms':>10} {'p99 ms':>8} {'times torch':>12}")
    for n in BATCH_SIZES:
        times_ms: dict[str, list[float]] = {classify.engine: [] for classify in classifiers}
        for _ in range(ROUNDS):
            for classify in classifiers:
                measure_ms(classify, images[:n], WARM_UP_S)
                times_ms[classify.engine] += measure_ms(classify, images[:n], MEASURE_S)
        torch_median = statistics.median(times_ms["torch"])
        for engine, own_times in times_ms.items():
            median, p99 = statistics.median(own_times), float(np.percentile(own_times, 99))
            ratio = torch_median / median
            click.echo(f"{engine:10} {n:6} {median:10.2f} {p99:8.2f} {ratio:12.1f}")


def print_servers(folder: Path, engines: Sequence[str]) -> None:
    """Print a table of the start and the memory of a server, for each engine."""
    click.echo(f"\n{'ENGINE':10} {'ready after s':>14} {'memory MB':>10}")
    for engine in engines:
        ready_s, memory_mb = [], []
        for _ in range(ROUNDS):
            with servers.server(folder, READY, ENGINE=engine) as server:
                ready_s.append(server.ready_s)
                memory_mb.append(sum(server.memory_mb()))
        medians = statistics.median(ready_s), statistics.median(memory_mb)
        click.echo("{:10} {:14.2f} {:10.0f}".format(engine, *medians))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
def main(folder: Path) -> None:
    """Compare the engines on the current model and print two tables."""
    name, record = registry.record(folder)
    dataset = record["dataset"]
    shape = (max(BATCH_SIZES), dataset["channels"], dataset["size"], dataset["size"])
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    engines = [
        engine
        for engine, kind in reversed(inference.ENGINE_FILES.items())
        if kind in record["files"]
    ]
    click.echo(f"{name}: {record['model']['name']}, {os.cpu_count()} cores")
    print_times([inference.load(folder, name, engine=engine) for engine in engines], images)
    print_servers(folder, engines)


if __name__ == "__main__":
    try:
        main()
    except registry.RegistryError as error:
        raise SystemExit(f"inference: {error}") from error
