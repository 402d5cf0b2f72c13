"""Requests while models are swapped, and while the server itself is restarted.

python -m benchmarks.swaps                      # the current model of saved_models; three minutes

At half of the server's peak, 20 times another model becomes current; four of them cannot answer
(corrupt, of a wrong shape, failing its golden inputs) or are slow to load. The same load before and
after that is what it is compared with. Then a server of two workers is restarted with SIGHUP five
times, each time at half of the peak that it had just before.
"""

import hashlib
import io
import json
import shutil
import signal
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import load, servers
from benchmarks.serving import keep, pictures
from mnist import data, registry

SWAPS = 20
HARMS = ("corrupt", "shape", "slow", "golden")
SLOW_IMAGES = 2_000  # golden inputs of the slow model, which has to read them all before it answers
PAUSE_S = 0.5  # between two swaps
CALM_S, MOST_S = 15.0, 120.0  # of the load before and after the swaps, and at most with them
LONGEST_S = 20.0  # for one swap, under load
RESTARTS, RESTART_S = 5, 15.0  # how many, and the load with each


def another(folder: Path) -> str:
    """The current model once more, under a new name and not current."""
    name, record = registry.record(folder)
    files = {
        kind: (each["file"].removeprefix(name), (folder / each["file"]).read_bytes())
        for kind, each in record["files"].items()
    }
    return registry.save(folder, files, record, "never")


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Other values in a model's record, as no command of ours would write them."""
    info = registry.read(folder)
    info["models"][name] |= changes
    write(folder, info)


def make_current(folder: Path, name: str) -> None:
    """Without the checks of registry.use."""
    write(folder, registry.read(folder) | {"current": name})


def write(folder: Path, info: dict[str, Any]) -> None:
    temporary = folder / ".info"
    temporary.write_text(json.dumps(info))
    temporary.replace(folder / registry.INFO)


def bad(folder: Path, harm: str) -> str:
    """A model that must not answer, or, where `harm` is "slow", takes long to load."""
    name = another(folder)
    record = registry.record(folder, name)[1]
    files = record["files"]
    if harm == "corrupt":
        path = folder / files["onnx_int8"]["file"]
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    elif harm == "shape":
        about = record["dataset"]
        edit(folder, name, dataset=about | {"classes": about["classes"][:-1]})
    else:
        path = folder / files["golden"]["file"]
        with np.load(path) as kept:
            parts = dict(kept)
        for key, part in parts.items():
            if harm == "slow":
                parts[key] = np.resize(part, (SLOW_IMAGES, *part.shape[1:]))  # again and again
            elif key != "images":
                parts[key] = np.roll(part, 1, 1)
        stream = io.BytesIO()
        np.savez(stream, **parts)
        path.write_bytes(stream.getvalue())
        digest = hashlib.sha256(stream.getvalue()).hexdigest()
        edit(folder, name, files=files | {"golden": files["golden"] | {"sha256": digest}})
    return name


def ready(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
        return json.load(answer)


def arrived(answer: dict[str, Any], name: str, bad_one: bool) -> bool:
    """Whether /ready tells that the model answers, or of a bad one that it was refused."""
    return "refused" in answer if bad_one else answer["model"] == name


def prepare(folder: Path) -> list[tuple[str, bool]]:
    """The models to swap to, in this order, and whether each is a bad one."""
    good = [registry.record(folder)[0], another(folder)]
    order = [(good[(i + 1) % 2], False) for i in range(SWAPS - len(HARMS))]
    for i, harm in enumerate(HARMS):
        order.insert(4 * i + 3, (bad(folder, harm), harm != "slow"))
    return order


def swap(port: int, folder: Path, order: list[tuple[str, bool]]) -> tuple[float, float]:
    """All of them, one after the other; each has arrived, or was refused, before the next.

    Returns when the first one began, and when the last one ended.
    """
    start = time.perf_counter()
    for name, bad_one in order:
        make_current(folder, name)
        end = time.monotonic() + LONGEST_S
        while not arrived(answer := ready(port), name, bad_one):
            assert time.monotonic() < end, (name, answer)
            time.sleep(0.1)
        time.sleep(PAUSE_S)
    return start, time.perf_counter()


def half_of_peak(port: int, kept: Path) -> float:
    """Requests a second."""
    load.Load(port, kept, 2.0, connections=16).found()
    rate = load.Load(port, kept, 5.0, connections=16).found().rate / 2
    click.echo(f"half of the peak: {rate:.0f} requests a second")
    return rate


def restart(server: servers.Server, kept: Path) -> load.Found:
    """One rolling restart under load, which begins before and ends after it."""
    old = set(servers.below(server.process.pid))
    during = load.Load(server.port, kept, RESTART_S, rate=half_of_peak(server.port, kept))
    time.sleep(3)
    server.process.send_signal(signal.SIGHUP)
    found = during.found()
    gone = old - set(servers.below(server.process.pid))
    assert len(gone) >= 2, "the load ended before the restart"
    return found


def line(what: str, found: load.Found) -> str:
    lost = Counter(found.statuses[found.statuses != 200].tolist())
    of_status = "".join(f", {n} with {status}" for status, n in lost.items())
    return (
        f"{what}: {len(found.statuses)} requests, {lost.total()} failed{of_status} "
        f"({int((found.tries > 1).sum())} were tried again), p50 {found.ms(50):.1f} ms, p99 "
        f"{found.ms(99):.1f} ms"
    )


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option(
    "--workers", default=1, show_default=True, help="uvicorn's, while models are swapped."
)
def main(folder: Path, data_dir: Path | None, workers: int) -> None:
    """Measure and print."""
    requests = [load.form("/predict", each) for each in pictures(data.load("mnist", data_dir))]
    command = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    with tempfile.TemporaryDirectory() as temporary:
        kept = keep(Path(temporary) / "requests", requests)
        models = Path(shutil.copytree(folder, Path(temporary) / "models"))
        order = prepare(models)
        with servers.server(models, requests[0], command) as server:
            rate = half_of_peak(server.port, kept)
            before = load.Load(server.port, kept, CALM_S, rate=rate).found()
            during = load.Load(server.port, kept, MOST_S, rate=rate)
            time.sleep(3)
            times = swap(server.port, models, order)
            during.stop()
            swaps = during.found().between(*times)
            # Before and after: a machine that others share is now faster, now slower.
            after = load.Load(server.port, kept, CALM_S, rate=rate).found()
            for what, found in (("before", before), (f"{SWAPS} swaps", swaps), ("after", after)):
                click.echo(line(what, found))
            without = np.percentile(np.concatenate([before.of(), after.of()]), 99) * 1000
            ratio = swaps.ms(99) / without
            click.echo(f"p99 of swaps: {ratio:.1f} times that without, before and after together")
        two = (*servers.OURS, "--workers", "2", "--timeout-worker-healthcheck", "30")
        with servers.server(models, requests[0], two) as server:
            for i in range(RESTARTS):
                click.echo(line(f"rolling restart {i + 1}", restart(server, kept)))


if __name__ == "__main__":
    main()
