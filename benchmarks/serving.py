"""This server compared with a usual FastAPI + torch server and LitServe, with equal models.

python -m benchmarks.serving                    # the current model of saved_models; four minutes

Compares, for each server: p50, p99 and requests per second with 1, 16 and 64 clients, the time from
its start to the first response with status 200, right answers, and memory. `benchmarks.peers` has
the other servers. The clients run in one process on the last core.
"""

import io
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image

from benchmarks import load, servers
from mnist import data, registry

CLIENTS = (1, 16, 64)
SIDE, PICTURES = 280, 40


def make_pictures(dataset: data.Dataset) -> list[bytes]:
    """Make PNG files of 280x280, with validation images at random places and sizes."""
    rng, files = np.random.default_rng(0), []
    for image in dataset.validation.images[:PICTURES, 0].numpy():
        side = int(rng.integers(140, 260))
        digit = Image.fromarray(255 - image).resize((side, side), Image.Resampling.BICUBIC)
        page = Image.new("L", (SIDE, SIDE), 255)
        x, y = rng.integers(0, SIDE - side + 1, 2).tolist()
        page.paste(digit, (x, y))
        stream = io.BytesIO()
        page.save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def write_requests(folder: Path, requests: Sequence[bytes]) -> Path:
    """Write each request to a file of a new folder, for load.Load; returns the folder."""
    folder.mkdir()
    for i, request in enumerate(requests):
        (folder / f"{i:03}").write_bytes(request)
    return folder


def measure(
    folder: Path,
    files: Path,
    labelled_requests: Sequence[tuple[bytes, str]],
    command: Sequence[str],
    seconds: float,
) -> dict[str, float]:
    """Start a server and measure it; returns its figures by name.

    `labelled_requests` are requests with the right predictions, `files` the folder of requests.
    """
    figures: dict[str, float] = {}
    with servers.server(folder, labelled_requests[0][0], command) as server:
        figures["first answer s"] = server.ready_s
        figures["right answers"] = sum(
            servers.fetch(server.port, request)["prediction"] == label
            for request, label in labelled_requests
        )
        load.Load(server.port, files, 2.0, connections=4).wait()  # warm-up
        for clients in CLIENTS:
            results = load.Load(server.port, files, seconds, connections=clients).wait()
            assert results.count() == len(results.statuses), results.statuses
            figures[f"{clients} clients: p50 ms"] = results.percentile_ms(50)
            figures[f"{clients} clients: p99 ms"] = results.percentile_ms(99)
            figures[f"{clients} clients: a second"] = results.rate
        memory_mb = server.memory_mb()
        figures["memory MB"] = sum(memory_mb)
        figures["largest process MB"] = max(memory_mb)
    return figures


def format_cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Through all servers.")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers of this server.")
def main(folder: Path, data_dir: Path | None, seconds: float, rounds: int, workers: int) -> None:
    """Print medians of each figure; the columns are this server, the usual one and LitServe."""
    name, record = registry.record(folder)
    dataset = data.load("mnist", data_dir)
    labels = [dataset.classes[i] for i in dataset.validation.labels[:PICTURES].tolist()]
    requests = [load.form("/predict", picture) for picture in make_pictures(dataset)]
    labelled_requests = list(zip(requests, labels, strict=True))
    commands = (
        servers.make_command(workers),
        ("-m", "benchmarks.peers", "usual"),
        ("-m", "benchmarks.peers", "litserve"),
    )
    measured: list[list[dict[str, float]]] = [[] for _ in commands]
    with tempfile.TemporaryDirectory() as temporary:
        files = write_requests(Path(temporary) / "requests", requests)
        for _ in range(rounds):
            for command, own in zip(commands, measured, strict=True):
                own.append(measure(folder, files, labelled_requests, command, seconds))
    click.echo(f"{name}: {record['model']['name']}; {os.cpu_count()} cores, {workers} worker(s)")
    click.echo(f"median of {rounds} rounds, {seconds} s each (least to most)")
    for key in measured[0][0]:
        cells = (format_cell([figures[key] for figures in own]) for own in measured)
        click.echo(f"{key:24}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
