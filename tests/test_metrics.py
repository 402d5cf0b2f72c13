"""serve/metrics.py: metrics of several workers."""

import os
import re
import signal
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, servers
from tests.gates import until
from tests.test_app import png
from tests.test_settings import start

FOLDER = Path(tempfile.gettempdir())
NO_TEMPORARY_FOLDER = """
import tempfile

def fail():
    raise FileNotFoundError(2, "No usable temporary directory found")

tempfile._get_default_tempdir = fail
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_of_metrics_that_is_a_file_stops_the_start_with_one_line(workers: str) -> None:
    _, log = start("--workers", workers, PROMETHEUS_MULTIPROC_DIR=__file__)
    assert f"PROMETHEUS_MULTIPROC_DIR={__file__}: File exists; set" in log
    assert "Traceback" not in log


def test_workers_without_a_temporary_folder_stop_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_TEMPORARY_FOLDER)  # Python imports it first
    _, log = start("--workers", "2", PYTHONPATH=str(tmp_path))
    assert "no temporary folder can be written to; set PROMETHEUS_MULTIPROC_DIR" in log
    assert "Traceback" not in log


def worker_ids(folder: Path) -> list[int]:
    """Process ids of all workers that ever had counters there."""
    return [int(path.stem.removeprefix("counter_")) for path in folder.glob("counter_*.db")]


def count_answers(port: int) -> float:
    """The number of pictures answered by all workers, as one of them reports it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        metrics = response.read().decode()
    answered = r'requests_total\{method="POST",route="/predict",status="200"\} (\S+)'
    (count,) = re.findall(answered, metrics)
    return float(count)


@pytest.mark.slow
def test_each_worker_reports_the_metrics_of_all_and_is_replaced_if_killed(saved: Path) -> None:
    page = np.full((60, 50), 255, np.uint8)
    page[10:50, 22:28] = 0
    request = load.request("/predict", png(page))
    with servers.server(saved, request, (*servers.OURS, "--workers", "2")) as server:
        for _ in range(30):  # each on a new connection, to either worker
            assert servers.answers(server.port, request)
        # With the first request of servers.server. A request is counted just after its response.
        until(lambda: count_answers(server.port) == 31, "all requests are counted")
        (folder,) = FOLDER.glob(f"serve-metrics-{server.process.pid}-*")
        workers = worker_ids(folder)
        os.kill(workers[0], signal.SIGKILL)
        until(lambda: len(worker_ids(folder)) == 3, "another worker takes its place")
        counts = {count_answers(server.port) for _ in range(10)}
        stale = FOLDER / "serve-metrics-99999999999999999999-x"
        stale.mkdir()
    assert counts == {31}
    with servers.server(saved, request, (*servers.OURS, "--workers", "2")):
        assert not folder.exists()
        assert not stale.exists()
