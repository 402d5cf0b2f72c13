"""What several test modules need: small data, a saved model, the command as people run it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist import data

ROOT = Path(__file__).parent.parent
DIGITS = ["--dataset", "digits", "--model", "linear", "--quick"]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """scikit-learn's small digits, 1,540 for training: real data without files or network."""
    return data.load("digits")


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    """Real MNIST, found or fetched the way run.py does it."""
    folder = Path(os.environ.get("MNIST_DATA_DIR", "data"))
    try:
        return data.load("mnist", folder)
    except data.DataError as error:
        pytest.skip(f"no source of MNIST can be reached: {error}")


@pytest.fixture
def run(tmp_path: Path) -> Command:
    """`python run.py …` in an empty folder."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "run.py"), *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one model that run.py saved, of `linear` on `digits`; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, str(ROOT / "run.py"), *DIGITS, "--final-epochs", "20"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "saved_models"
