"""Ours, the usual FastAPI + torch server and LitServe, with the same model and the same pictures.

python -m benchmarks.serving                    # the current model of saved_models; some minutes

For each: p50, p99 and requests a second with 1, 16 and 64 clients, the time from its start to the
first right answer, and its memory. The clients run in one other process, kept on the last core.
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
    """Validation images as PNG of 280x280, dark on light, at different places and sizes."""
    chance, found = np.random.default_rng(0), []
    for image in dataset.validation.images[:PICTURES, 0].numpy():
        side = int(chance.integers(140, 260))
        page = Image.new("L", (SIDE, SIDE), 255)
        x, y = chance.integers(0, SIDE - side + 1, 2).tolist()
        page.paste(
            Image.fromarray(255 - image).resize((side, side), Image.Resampling.BICUBIC), (x, y)
        )
        stream = io.BytesIO()
        page.save(stream, "PNG")
        found.append(stream.getvalue())
    return found


def keep(folder: Path, requests: Sequence[bytes]) -> Path:
    """Requests as files, which the load is made of."""
    folder.mkdir()
    for i, request in enumerate(requests):
        (folder / f"{i:03}").write_bytes(request)
    return folder


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Through all servers.")
@click.option("--workers", default=1, show_default=True, help="uvicorn's, of ours.")
def main(folder: Path, data_dir: Path | None, seconds: float, rounds: int, workers: int) -> None:
    """Compare and print a table of medians."""
    name, record = registry.record(folder)
    dataset = data.load("mnist", data_dir)
    labels = [dataset.classes[i] for i in dataset.validation.labels[:PICTURES].tolist()]
    bodies = [load.form("/predict", each) for each in pictures(dataset)]
    requests = list(zip(bodies, labels, strict=True))
    others = ("-m", "benchmarks.peers")
    ours = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    commands = {"ours": ours, "usual": (*others, "usual"), "litserve": (*others, "litserve")}
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = keep(Path(temporary) / "requests", bodies)
        for _ in range(rounds):
            for kind, command in commands.items():
                for key, value in measure(folder, kept, requests, command, seconds).items():
                    found.setdefault((kind, key), []).append(value)
    click.echo(f"{name}: {record['model']['name']}; {os.cpu_count()} cores, {workers} worker(s)")
    click.echo(f"median of {rounds} rounds, {seconds} s each (least to most)")
    keys = list(dict.fromkeys(key for _, key in found))
    for key in keys:
        cells = [found[kind, key] for kind in commands]
        click.echo(f"{key:24}" + "".join(f"{cell(values):>28}" for values in cells))


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def measure(
    folder: Path,
    kept: Path,
    requests: list[tuple[bytes, str]],
    command: Sequence[str],
    seconds: float,
) -> dict[str, float]:
    """One server, from its start to its end; `requests` with the digits they show."""
    figures: dict[str, float] = {}
    with servers.server(folder, requests[0][0], command) as server:
        figures["first answer s"] = server.ready_s
        right = sum(
            servers.ask(server.port, each)["prediction"] == label for each, label in requests
        )
        figures["right answers"] = right
        load.Load(server.port, kept, 2.0, connections=4).found()  # warm
        for clients in CLIENTS:
            stage = load.Load(server.port, kept, seconds, connections=clients).found()
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
