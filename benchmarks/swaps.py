"""Failed requests and latencies during swaps of models and rolling restarts of the server.

python -m benchmarks.swaps                      # the current model of saved_models; three minutes

Compares the swaps with the same load, half of the server's peak, before and after. 20 times another
model becomes current; four of these models are corrupt, of a wrong shape, slow to load, or fail
their golden inputs. Then a server of two workers is restarted with SIGHUP five times, each time at
half of the peak that was measured just before.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import load, servers
from benchmarks.serving import make_pictures, write_requests
from mnist import data, registry

SWAPS = 20
DEFECTS = ("corrupt", "shape", "slow", "golden")
SLOW_IMAGES = 2_000  # golden inputs of the slow model, which classifies them all when it is loaded
PAUSE_S = 0.5  # between two swaps
BASELINE_S, MAX_SWAPS_S = 15.0, 120.0  # duration of the load before and after; limit during swaps
SETTLE_S = 3.0  # of load before the first swap, or before a restart
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


def edit_record(folder: Path, name: str, **changes: Any) -> None:
    """Change a model's record in a way that no command of the project does."""
    info: dict[str, Any] = dict(registry.read(folder))
    info["models"][name] |= changes
    write_info(folder, info)


def make_current(folder: Path, name: str) -> None:
    """Make a model current without the checks of registry.use."""
    write_info(folder, registry.read(folder) | {"current": name})


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Replace model_info.json."""
    temporary = folder / ".info"
    temporary.write_text(json.dumps(info))
    temporary.replace(folder / registry.INFO)


def save_defective(folder: Path, defect: str) -> str:
    """Save a model that must not answer or, with the defect "slow", takes long to load."""
    name = save_copy(folder)
    record = registry.record(folder, name)[1]
    if defect == "corrupt":
        path = folder / record["files"]["onnx_int8"]["file"]
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    elif defect == "shape":
        dataset = record["dataset"]
        edit_record(folder, name, dataset=dataset | {"classes": dataset["classes"][:-1]})
    else:
        change_golden(folder, name, defect)
    return name


def change_golden(folder: Path, name: str, defect: str) -> None:
    """Repeat the golden inputs of a model ("slow"), or assign their probabilities to other classes.

    The record gets the checksum of the changed file.
    """
    files = registry.record(folder, name)[1]["files"]
    path = folder / files["golden"]["file"]
    with np.load(path) as golden:
        arrays = dict(golden)
    for key, array in arrays.items():
        if defect == "slow":
            arrays[key] = np.resize(array, (SLOW_IMAGES, *array.shape[1:]))
        elif key != "images":
            arrays[key] = np.roll(array, 1, 1)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    path.write_bytes(stream.getvalue())
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    edit_record(folder, name, files=files | {"golden": files["golden"] | {"sha256": digest}})


def fetch_ready(port: int) -> dict[str, Any]:
    """Fetch the response of GET /ready."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as response:
        return json.load(response)


def is_complete(ready: dict[str, Any], name: str, is_defective: bool) -> bool:
    """Whether the model answers or, if it is defective, was refused, according to /ready."""
    return "refused" in ready if is_defective else ready["model"] == name


def save_models(folder: Path) -> list[tuple[str, bool]]:
    """Save the models to swap to; returns them in order, and whether each must be refused."""
    good = [registry.record(folder)[0], save_copy(folder)]
    order = [(good[(i + 1) % 2], False) for i in range(SWAPS - len(DEFECTS))]
    for i, defect in enumerate(DEFECTS):
        order.insert(4 * i + 3, (save_defective(folder, defect), defect != "slow"))
    return order


def swap_all(port: int, folder: Path, order: list[tuple[str, bool]]) -> tuple[float, float]:
    """Swap to each model when the swap before is complete; returns the start and the end."""
    start = time.perf_counter()
    for name, is_defective in order:
        make_current(folder, name)
        deadline = time.monotonic() + SWAP_TIMEOUT_S
        while not is_complete(ready := fetch_ready(port), name, is_defective):
            assert time.monotonic() < deadline, (name, ready)
            time.sleep(0.1)
        time.sleep(PAUSE_S)
    return start, time.perf_counter()


def measure_half_peak(port: int, files: Path) -> float:
    """Measure and print half of the peak, in requests per second."""
    load.Load(port, files, 2.0, connections=16).wait()  # warm-up
    rate = load.Load(port, files, 5.0, connections=16).wait().rate / 2
    click.echo(f"half of the peak: {rate:.0f} requests a second")
    return rate


def restart(server: servers.Server, files: Path) -> load.Results:
    """Restart the workers, under load that starts before and ends after it."""
    old_processes = set(servers.list_processes(server.process.pid))
    rate = measure_half_peak(server.port, files)
    stage = load.Load(server.port, files, RESTART_S, rate=rate)
    time.sleep(SETTLE_S)
    server.process.send_signal(signal.SIGHUP)
    results = stage.wait()
    ended = old_processes - set(servers.list_processes(server.process.pid))
    assert len(ended) >= 2, "the load ended before the restart"
    return results


def print_results(label: str, results: load.Results) -> None:
    """Print the numbers of requests, failures by status and retries, and the latencies."""
    failures = Counter(results.statuses[results.statuses != 200].tolist())
    statuses = "".join(f", {n} with {status}" for status, n in failures.items())
    retried = int((results.tries > 1).sum())
    p50, p99 = results.percentile_ms(50), results.percentile_ms(99)
    click.echo(
        f"{label}: {len(results.statuses)} requests, {failures.total()} failed{statuses} "
        f"({retried} were tried again), p50 {p50:.1f} ms, p99 {p99:.1f} ms"
    )


def measure_swaps(port: int, files: Path, models: Path, order: list[tuple[str, bool]]) -> None:
    """Swap models under load; print the results, and those of the same load without swaps."""
    rate = measure_half_peak(port, files)
    before = load.Load(port, files, BASELINE_S, rate=rate).wait()
    stage = load.Load(port, files, MAX_SWAPS_S, rate=rate)
    time.sleep(SETTLE_S)
    times = swap_all(port, models, order)
    stage.stop()
    swaps = stage.wait().select(*times)
    # Before and after, because the speed of a shared machine varies.
    after = load.Load(port, files, BASELINE_S, rate=rate).wait()
    for label, results in (("before", before), (f"{SWAPS} swaps", swaps), ("after", after)):
        print_results(label, results)
    baseline = np.concatenate([before.latencies(), after.latencies()])
    ratio = swaps.percentile_ms(99) / (np.percentile(baseline, 99) * 1000)
    click.echo(f"p99 of swaps: {ratio:.1f} times that without, before and after together")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers during the swaps.")
def main(folder: Path, data_dir: Path | None, workers: int) -> None:
    """Print failed requests and latencies of each stage."""
    dataset = data.load("mnist", data_dir)
    requests = [load.form("/predict", picture) for picture in make_pictures(dataset)]
    with tempfile.TemporaryDirectory() as temporary:
        files = write_requests(Path(temporary) / "requests", requests)
        models = Path(shutil.copytree(folder, Path(temporary) / "models"))
        order = save_models(models)
        with servers.server(models, requests[0], servers.make_command(workers)) as server:
            measure_swaps(server.port, files, models, order)
        command = (*servers.make_command(2), "--timeout-worker-healthcheck", "30")
        with servers.server(models, requests[0], command) as server:
            for i in range(RESTARTS):
                print_results(f"rolling restart {i + 1}", restart(server, files))


if __name__ == "__main__":
    main()
