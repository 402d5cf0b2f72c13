"""One image and a batch of 128 in torch, ONNX Runtime and int8; and a server process of each.

python -m benchmarks.inference     # the current model of saved_models
"""

import os
import statistics
import time
from pathlib import Path

import click
import numpy as np

from benchmarks import servers
from mnist import inference, registry

BATCHES = (1, 128)
READY = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
ROUNDS = 5  # through all engines, so that a change of the machine's speed meets them all


def times(classify: inference.Classifier, images: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of each call, for so long."""
    found = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        classify(images)
        found.append(1000 * (time.perf_counter() - start))
    return found


def speeds(classifiers: list[inference.Classifier], images: np.ndarray) -> None:
    """The first table."""
    click.echo(f"{'engine':10} {'images':>6} {'median ms':>10} {'p99 ms':>8} {'times torch':>12}")
    for n in BATCHES:
        taken: dict[str, list[float]] = {each.engine: [] for each in classifiers}
        for _ in range(ROUNDS):
            for each in classifiers:
                times(each, images[:n], 0.3)
                taken[each.engine] += times(each, images[:n], 1.5)
        torch = statistics.median(taken["torch"])
        for engine, found in taken.items():
            median, p99 = statistics.median(found), float(np.percentile(found, 99))
            click.echo(f"{engine:10} {n:6} {median:10.2f} {p99:8.2f} {torch / median:12.1f}")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
def main(folder: Path) -> None:
    """Compare the engines on the current model and print two tables."""
    name, record = registry.record(folder)
    about = record["dataset"]
    shape = (max(BATCHES), about["channels"], about["size"], about["size"])
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    engines = [
        engine
        for engine, kind in reversed(inference.ENGINE_FILES.items())
        if kind in record["files"]
    ]
    click.echo(f"{name}: {record['model']['name']}, {os.cpu_count()} cores")
    speeds([inference.load(folder, name, engine=engine) for engine in engines], images)
    click.echo(f"\n{'ENGINE':10} {'ready after s':>14} {'memory MB':>10}")
    for engine in engines:
        found = []
        for _ in range(ROUNDS):
            with servers.server(folder, READY, ENGINE=engine) as server:
                found.append((server.ready_s, sum(server.memory_mb())))
        seconds, memory = (statistics.median(column) for column in zip(*found, strict=True))
        click.echo(f"{engine:10} {seconds:14.2f} {memory:10.0f}")


if __name__ == "__main__":
    try:
        main()
    except registry.RegistryError as error:
        raise SystemExit(f"inference: {error}") from error
