"""`python -m tests.cold_starts`: start-up time, memory and size of each way to run the server.

It prints a table: the server in the virtual environment of `--python` and in a container, and the
Lambda function in Amazon's emulator with the memory and CPU share of several sizes. All use the
sample model. The files are in the page cache.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from mnist import registry
from tests import containers
from tests.conftest import ROOT
from tests.emulator import Function, make_event, start_function

PICTURE = (ROOT / "docs" / "7.png").read_bytes()
CORE_MB = 1769  # of memory, with which a function gets one whole core
PERIOD_US = 100_000
LATER = 20  # requests after the first one


class Started(NamedTuple):
    """A server that has just been started, or will start with its first request."""

    answer: Callable[[], dict[str, Any]]
    pids: Callable[[], list[int]]


@contextmanager
def start_in_venv(python: str) -> Iterator[Started]:
    port = containers.free_port()
    command = [python, "-m", "uvicorn", "serve.app:app", "--port", str(port)]
    environment = os.environ | {"MODELS": str(registry.SAMPLE)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield Started(lambda: ask(port), lambda: [process.pid])
    finally:
        process.terminate()
        process.wait()


@contextmanager
def start_in_container() -> Iterator[Started]:
    port = containers.free_port()
    options = ["--memory", "512m", "--env", "UVICORN_HOST=127.0.0.1"]
    options += ["--env", f"UVICORN_PORT={port}"]
    with containers.run(containers.build("serve"), options=options) as container:
        yield Started(lambda: ask(port), lambda: find_pids(container))


@contextmanager
def start_in_lambda(memory_mb: int) -> Iterator[Started]:
    quota = str(round(memory_mb / CORE_MB * PERIOD_US))
    options = ["--memory", f"{memory_mb}m", "--cpu-period", str(PERIOD_US), "--cpu-quota", quota]
    with start_function(*options) as function:
        yield Started(lambda: invoke(function), lambda: find_pids(function.container))


def ask(port: int) -> dict[str, Any]:
    return json.loads(containers.request(port, "POST", "/predict", PICTURE)[1])


def invoke(function: Function) -> dict[str, Any]:
    return json.loads(function.invoke(make_event("POST", "/predict", PICTURE))["body"])


def find_pids(container: str) -> list[int]:
    return [int(pid) for pid in containers.podman("top", container, "hpid").split()[1:]]


def peak_mb(pid: int) -> float:
    """The largest resident set of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def measure(started: Any) -> tuple[float, float, float]:
    """Seconds to the first right answer, median ms of later ones, and peak memory in MB."""
    start = time.perf_counter()
    with started as server:
        while True:
            try:
                answer = server.answer()
                break
            except OSError:
                time.sleep(0.01)
        first_s = time.perf_counter() - start
        assert answer["prediction"] == "7", answer
        times_ms = []
        for _ in range(LATER):
            begin = time.perf_counter()
            server.answer()
            times_ms.append((time.perf_counter() - begin) * 1000)
        return first_s, statistics.median(times_ms), max(map(peak_mb, server.pids()))


@click.command()
@click.option("--python", required=True, help="Python with requirements-serve.txt alone")
@click.option("--runs", default=5, help="starts of each kind; medians are printed")
def main(python: str, runs: int) -> None:
    prefix = Path(python).parents[1]
    venv_mb = int(subprocess.check_output(["du", "-sm", prefix]).split()[0])
    serve_mb, lambda_mb = (
        containers.size(containers.build(target)) / 1e6 for target in ("serve", "lambda")
    )
    base_mb = containers.size(containers.BASE) / 1e6
    rows: list[tuple[str, Callable[[], Any], str]] = [
        ("virtual environment", lambda: start_in_venv(python), f"{venv_mb:.0f}"),
        ("container, 512 MB", start_in_container, f"{serve_mb - base_mb:.0f} + {base_mb:.0f}"),
    ]
    for size in (2048, CORE_MB, 512, 256):
        disk = f"{lambda_mb - base_mb:.0f} + {base_mb:.0f}"
        rows.append((f"Lambda, {size} MB", lambda size=size: start_in_lambda(size), disk))
    print("| | first right answer | later ones, p50 | peak memory | on disk (+ base) |")
    print("|---|---|---|---|---|")
    for name, start, disk in rows:
        first, later, peak = zip(*(measure(start()) for _ in range(runs)), strict=True)
        spread = f"{statistics.median(first):.1f} s ({min(first):.1f} to {max(first):.1f})"
        figures = f"{statistics.median(later):.1f} ms | {max(peak):.0f} MB"
        print(f"| {name} | {spread} | {figures} | {disk} MB |", flush=True)


if __name__ == "__main__":
    main()
