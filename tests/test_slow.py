"""Minutes rather than seconds: real sources, the report and the dashboard in a browser."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mnist import data, registry
from mnist.data import sources
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.slow


def test_mnist_is_downloaded_into_an_empty_folder_from_any_source(tmp_path: Path) -> None:
    dataset = data.load("mnist", tmp_path)
    assert len(dataset.train) == 52_500
    assert {path.name for path in (tmp_path / "MNIST" / "raw").iterdir()} == set(
        sources.MNIST.files
    )
    assert len(dataset.open_test()) == 10_000


LOADED = "[...document.images].filter(image => image.complete && image.naturalWidth > 0).length"


def test_the_report_opens_offline_on_any_screen(saved: Path, browser: Any) -> None:
    page_file = saved / f"{registry.record(saved)[0]}.report.html"
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(page_file.as_uri())
            assert page.evaluate(LOADED) == page.evaluate("document.images.length") == 7
            assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.close()


def test_the_dashboard_opens_the_study_in_a_browser(
    run: Command, tmp_path: Path, browser: Any
) -> None:
    run(*DIGITS, *SHORT, "--trials", "3")
    best = registry.record(tmp_path / "saved_models")[1]["study"]["trial"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dashboard = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("optuna-dashboard")),
            "sqlite:///db.sqlite3",
            "--port",
            str(port),
            "--artifact-dir",
            "artifacts",
        ],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/dashboard")
        page.get_by_text("digits-linear-quick").first.click()
        page.get_by_text("Best Trial").first.wait_for()
        page.get_by_text("history.png").first.wait_for()
        page.goto(f"http://127.0.0.1:{port}/dashboard/studies/1/trials?numbers={best}")
        page.get_by_text("mistakes.png").wait_for()
        page.wait_for_function(f"{LOADED} == 3")
        page.goto(f"http://127.0.0.1:{port}/dashboard/studies/1/note")
        page.get_by_text("for the network linear").first.wait_for()
    finally:
        dashboard.terminate()
        dashboard.wait(60)
