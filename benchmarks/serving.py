"""This server, a usual FastAPI + torch server and LitServe, with the same model and pictures.

python -m benchmarks.serving                    # the current model of saved_models; some minutes

For each: p50, p99 and requests a second with 1, 16 and 64 clients, the time from its start to the
first response with status 200, and its memory. The clients run in one process on the last core.
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


def pictures(dataset: data.Dataset) -> list[bytes]:
    """Validation images as PNG of 280x280, dark on light, at random places and sizes."""
    rng, files = np.random.default_rng(0), []
    for image in dataset.validation.images[:PICTURES, 0].numpy():
        side = int(rng.integers(140, 260))
        page = Image.new("L", (SIDE, SIDE), 255)
        x, y = rng.integers(0, SIDE - side + 1, 2).tolist()
        page.paste(
            Image.fromarray(255 - image).resize((side, side), Image.Resampling.BICUBIC), (x, y)
        )
        stream = io.BytesIO()
        page.save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def write_requests(folder: Path, requests: Sequence[bytes]) -> Path:
    """Write the requests to files of a new folder, for load.Load."""
    folder.mkdir()
    for i, request in enumerate(requests):
        (folder / f"{i:03}").write_bytes(request)
    return folder


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Through all servers.")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers of this server.")
def main(folder: Path, data_dir: Path | None, seconds: float, rounds: int, workers: int) -> None:
    """Compare and print a table of medians."""
    name, record = registry.record(folder)
    dataset = data.load("mnist", data_dir)
    labels = [dataset.classes[i] for i in dataset.validation.labels[:PICTURES].tolist()]
    requests = [load.form("/predict", picture) for picture in pictures(dataset)]
    labelled = list(zip(requests, labels, strict=True))
    peers = ("-m", "benchmarks.peers")
    ours = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    commands = {"ours": ours, "usual": (*peers, "usual"), "litserve": (*peers, "litserve")}
    figures: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        files = write_requests(Path(temporary) / "requests", requests)
        for _ in range(rounds):
            for kind, command in commands.items():
                for key, value in measure(folder, files, labelled, command, seconds).items():
                    figures.setdefault((kind, key), []).append(value)
    click.echo(f"{name}: {record['model']['name']}; {os.cpu_count()} cores, {workers} worker(s)")
    click.echo(f"median of {rounds} rounds, {seconds} s each (least to most)")
    keys = list(dict.fromkeys(key for _, key in figures))
    for key in keys:
        cells = [figures[kind, key] for kind in commands]
        click.echo(f"{key:24}" + "".join(f"{cell(values):>28}" for values in cells))


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def measure(
    folder: Path,
    files: Path,
    labelled: list[tuple[bytes, str]],
    command: Sequence[str],
    seconds: float,
) -> dict[str, float]:
    """The figures of one server; `labelled` has requests and their digits, `files` requests."""
    figures: dict[str, float] = {}
    with servers.server(folder, labelled[0][0], command) as server:
        figures["first answer s"] = server.ready_s
        right = sum(
            servers.fetch(server.port, request)["prediction"] == label
            for request, label in labelled
        )
        figures["right answers"] = right
        load.Load(server.port, files, 2.0, connections=4).results()  # warm-up
        for clients in CLIENTS:
            stage = load.Load(server.port, files, seconds, connections=clients).results()
            assert stage.count() == len(stage.statuses), stage.statuses
            figures[f"{clients} clients: p50 ms"] = stage.ms(50)
            figures[f"{clients} clients: p99 ms"] = stage.ms(99)
            figures[f"{clients} clients: a second"] = stage.rate
        memory = server.memory_mb()
        figures["memory MB"] = sum(memory)
        figures["largest process MB"] = max(memory)
    return figures


if __name__ == "__main__":
    main()
