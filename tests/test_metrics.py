"""serve/metrics.py: several processes count together."""

import re
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, servers
from tests.test_app import png

FOLDER = Path(tempfile.gettempdir())


@pytest.mark.slow
def test_each_of_several_workers_tells_what_all_have_counted(saved: Path) -> None:
    page = np.full((60, 50), 255, np.uint8)
    page[10:50, 22:28] = 0
    request = load.request("/predict", png(page))
    answered = r'requests_total\{method="POST",route="/predict",status="200"\} (\S+)'
    with servers.server(saved, request, (*servers.OURS, "--workers", "2")) as server:
        for _ in range(30):  # each on a connection of its own, to either of them
            assert servers.answers(server.port, request)
        seen = set()
        for _ in range(10):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                seen |= set(re.findall(answered, answer.read().decode()))
        (kept,) = FOLDER.glob(f"serve-metrics-{server.process.pid}-*")
        ended = FOLDER / "serve-metrics-99999999999999999999-x"
        ended.mkdir()
    assert seen == {"31.0"}  # with the one that it was started with
    with servers.server(saved, request, (*servers.OURS, "--workers", "2")):
        assert not kept.exists()  # of servers that have ended
        assert not ended.exists()
