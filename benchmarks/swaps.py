"""Failed requests and latencies during swaps of models and rolling restarts of the server.

python -m benchmarks.swaps                      # the current model of saved_models; three minutes

At half of the server's peak, 20 times another model becomes current; four of these are corrupt, of
a wrong shape, slow to load, or fail their golden inputs. The baseline is the same load before and
after. Then a server of two workers is restarted with SIGHUP five times, each time at half of the
peak that was measured just before.
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
from benchmarks.serving import pictures, write_requests
from mnist import data, registry

SWAPS = 20
HARMS = ("corrupt", "shape", "slow", "golden")
SLOW_IMAGES = 2_000  # golden inputs of the slow model, which classifies them all when it is loaded
PAUSE_S = 0.5  # between two swaps
BASELINE_S, MAX_SWAPS_S = 15.0, 120.0  # load before and after the swaps; most during them
SWAP_TIMEOUT_S = 20.0  # for one swap, under load
RESTARTS, RESTART_S = 5, 15.0  # number, and seconds of load for each


def save_copy(folder: Path) -> str:
    """Save the current model once more, not as the current one; returns its name."""
    name, record = registry.record(folder)
    files = {
        kind: (file["file"].removeprefix(name), (folder / file["file"]).read_bytes())
        for kind, file in record["files"].items()
    }
    return registry.save(folder, files, record, "never")


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change a model's record in a way that no command of the project does."""
    info = registry.read(folder)
    info["models"][name] |= changes
    write_info(folder, info)


def make_current(folder: Path, name: str) -> None:
    """registry.use without its checks."""
    write_info(folder, registry.read(folder) | {"current": name})


def write_info(folder: Path, info: dict[str, Any]) -> None:
    temporary = folder / ".info"
    temporary.write_text(json.dumps(info))
    temporary.replace(folder / registry.INFO)


def save_bad(folder: Path, harm: str) -> str:
    """Save a model that must not answer or, for `harm` "slow", takes long to load."""
    name = save_copy(folder)
    record = registry.record(folder, name)[1]
    files = record["files"]
    if harm == "corrupt":
        path = folder / files["onnx_int8"]["file"]
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    elif harm == "shape":
        dataset = record["dataset"]
        edit(folder, name, dataset=dataset | {"classes": dataset["classes"][:-1]})
    else:
        path = folder / files["golden"]["file"]
        with np.load(path) as golden:
            arrays = dict(golden)
        for key, array in arrays.items():
            if harm == "slow":
                arrays[key] = np.resize(array, (SLOW_IMAGES, *array.shape[1:]))  # repeats them
            elif key != "images":
                arrays[key] = np.roll(array, 1, 1)
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        path.write_bytes(stream.getvalue())
        digest = hashlib.sha256(stream.getvalue()).hexdigest()
        edit(folder, name, files=files | {"golden": files["golden"] | {"sha256": digest}})
    return name


def fetch_ready(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as response:
        return json.load(response)


def is_complete(ready: dict[str, Any], name: str, is_bad: bool) -> bool:
    """Whether, by /ready, the model answers or, if it is bad, was refused."""
    return "refused" in ready if is_bad else ready["model"] == name


def save_models(folder: Path) -> list[tuple[str, bool]]:
    """The models to swap to, in this order, and whether each is bad."""
    good = [registry.record(folder)[0], save_copy(folder)]
    order = [(good[(i + 1) % 2], False) for i in range(SWAPS - len(HARMS))]
    for i, harm in enumerate(HARMS):
        order.insert(4 * i + 3, (save_bad(folder, harm), harm != "slow"))
    return order


def swap(port: int, folder: Path, order: list[tuple[str, bool]]) -> tuple[float, float]:
    """Swap to each model, once the swap before is complete; returns the start and the end."""
    start = time.perf_counter()
    for name, is_bad in order:
        make_current(folder, name)
        end = time.monotonic() + SWAP_TIMEOUT_S
        while not is_complete(ready := fetch_ready(port), name, is_bad):
            assert time.monotonic() < end, (name, ready)
            time.sleep(0.1)
        time.sleep(PAUSE_S)
    return start, time.perf_counter()


def measure_half_peak(port: int, files: Path) -> float:
    """Requests a second."""
    load.Load(port, files, 2.0, connections=16).results()
    rate = load.Load(port, files, 5.0, connections=16).results().rate / 2
    click.echo(f"half of the peak: {rate:.0f} requests a second")
    return rate


def restart(server: servers.Server, files: Path) -> load.Results:
    """One rolling restart, under load that starts before and ends after it."""
    old = set(servers.process_tree(server.process.pid))
    rate = measure_half_peak(server.port, files)
    during = load.Load(server.port, files, RESTART_S, rate=rate)
    time.sleep(3)
    server.process.send_signal(signal.SIGHUP)
    results = during.results()
    ended = old - set(servers.process_tree(server.process.pid))
    assert len(ended) >= 2, "the load ended before the restart"
    return results


def line(stage: str, results: load.Results) -> str:
    failed = Counter(results.statuses[results.statuses != 200].tolist())
    of_status = "".join(f", {n} with {status}" for status, n in failed.items())
    return (
        f"{stage}: {len(results.statuses)} requests, {failed.total()} failed{of_status} "
        f"({int((results.tries > 1).sum())} were tried again), p50 {results.ms(50):.1f} ms, p99 "
        f"{results.ms(99):.1f} ms"
    )


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers during the swaps.")
def main(folder: Path, data_dir: Path | None, workers: int) -> None:
    """Measure and print."""
    dataset = data.load("mnist", data_dir)
    requests = [load.form("/predict", picture) for picture in pictures(dataset)]
    command = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    with tempfile.TemporaryDirectory() as temporary:
        files = write_requests(Path(temporary) / "requests", requests)
        models = Path(shutil.copytree(folder, Path(temporary) / "models"))
        order = save_models(models)
        with servers.server(models, requests[0], command) as server:
            rate = measure_half_peak(server.port, files)
            before = load.Load(server.port, files, BASELINE_S, rate=rate).results()
            during = load.Load(server.port, files, MAX_SWAPS_S, rate=rate)
            time.sleep(3)
            times = swap(server.port, models, order)
            during.stop()
            swaps = during.results().between(*times)
            # Before and after, because the speed of a shared machine varies.
            after = load.Load(server.port, files, BASELINE_S, rate=rate).results()
            for stage, results in (("before", before), (f"{SWAPS} swaps", swaps), ("after", after)):
                click.echo(line(stage, results))
            baseline = np.concatenate([before.latencies(), after.latencies()])
            ratio = swaps.ms(99) / (np.percentile(baseline, 99) * 1000)
            click.echo(f"p99 of swaps: {ratio:.1f} times that without, before and after together")
        two = (*servers.OURS, "--workers", "2", "--timeout-worker-healthcheck", "30")
        with servers.server(models, requests[0], two) as server:
            for i in range(RESTARTS):
                click.echo(line(f"rolling restart {i + 1}", restart(server, files)))


if __name__ == "__main__":
    main()
