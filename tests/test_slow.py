"""Minutes rather than seconds: real sources, the dashboard in a browser."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist import data, sources
from tests.conftest import DIGITS, Command

pytestmark = pytest.mark.slow


def test_mnist_is_fetched_into_an_empty_folder_from_what_is_in_reach(tmp_path: Path) -> None:
    found = data.load("mnist", tmp_path)
    assert len(found.train) == 52_500
    assert {path.name for path in (tmp_path / "MNIST" / "raw").iterdir()} == set(
        sources.MNIST.files
    )
    assert len(found.open_test()) == 10_000


def test_the_dashboard_opens_the_study_in_a_browser(run: Command, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "chromium is not installed"
    run(*DIGITS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dashboard = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("optuna-dashboard")),
            "sqlite:///db.sqlite3",
            "--port",
            str(port),
        ],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=flags)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/dashboard")
            page.get_by_text("digits-linear-quick").first.click()
            page.get_by_text("Best Trial").first.wait_for()
            page.screenshot(path=tmp_path / "dashboard.png")
            browser.close()
    finally:
        dashboard.terminate()
        dashboard.wait(10)
