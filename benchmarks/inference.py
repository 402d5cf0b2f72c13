"""One image and a batch of 128 in torch, ONNX Runtime and int8; and a server process of each.

python -m benchmarks.inference     # the current model of saved_models
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from mnist import inference, registry

BATCHES = (1, 128)
ROUNDS = 5  # through all engines, so that a change of the machine's speed meets them all


def times(classify: inference.Classifier, images: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of each call, for so long."""
    found = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        classify(images)
        found.append(1000 * (time.perf_counter() - start))
    return found


@contextmanager
def server(folder: Path, engine: str) -> Iterator[tuple[float, float]]:
    """Seconds from the process's start until it is ready, and its resident memory in MB then."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve.app:app", "--port", str(port)]
    environment = os.environ | {"MODELS": str(folder.resolve()), "ENGINE": engine}
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment)
    try:
        while not ready(port):
            if process.poll() is not None:
                raise click.ClickException(f"the server with ENGINE={engine} has ended")
            time.sleep(0.005)
        passed = time.perf_counter() - start
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        yield passed, int(resident.split()[1]) / 1000
    finally:
        process.terminate()
        process.wait()


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
            return json.load(answer)["status"] == "ready"
    except OSError:
        return False


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
        engine for engine, kind in reversed(inference.FILES.items()) if kind in record["files"]
    ]
    click.echo(f"{name}: {record['model']['name']}, {os.cpu_count()} cores")
    speeds([inference.load(folder, name, engine=engine) for engine in engines], images)
    click.echo(f"\n{'ENGINE':10} {'ready after s':>14} {'memory MB':>10}")
    for engine in engines:
        found = []
        for _ in range(ROUNDS):
            with server(folder, engine) as measured:
                found.append(measured)
        seconds, memory = (statistics.median(column) for column in zip(*found, strict=True))
        click.echo(f"{engine:10} {seconds:14.2f} {memory:10.0f}")


if __name__ == "__main__":
    try:
        main()
    except registry.RegistryError as error:
        raise SystemExit(f"inference: {error}") from error
