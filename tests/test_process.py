"""mnist/process.py, and what the project's processes leave in the home folder: nothing."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, servers
from mnist.process import extend_environment
from tests.conftest import ROOT, empty_home
from tests.test_app import png

PICTURE = png(np.eye(28, dtype=np.uint8) * 255)
LIBRARY = """
import sys
from pathlib import Path
from mnist import inference
inference.load(Path(sys.argv[1]))
"""


def test_the_environment_is_extended_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with suppress(OSError), extend_environment(SET="a", UNSET="b"):
        monkeypatch.setenv("OTHER", "kept")
        assert (os.environ["SET"], os.environ["UNSET"]) == ("a", "b")
        raise OSError
    assert (os.environ["SET"], os.environ.get("UNSET")) == ("before", None)
    assert os.environ["OTHER"] == "kept"


def test_a_run_leaves_nothing_in_the_home_folder(saved: Path) -> None:
    assert not [*(saved.parent / "home").rglob("*")]


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "mnist.predict", "picture.png", "--plot", "out.png", "--models"),
        ("-m", "mnist.registry", "--folder"),
        ("-m", "serve.preflight_worker"),
        ("-c", LIBRARY),
    ],
    ids=["predict", "registry", "preflight", "library"],
)
def test_no_command_leaves_anything_in_the_home_folder(
    saved: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURE)
    environment = empty_home(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    last = ["list"] if "mnist.registry" in command else []
    check = json.dumps([str(saved), saved_name(saved), 1, "auto"])
    subprocess.run(
        [sys.executable, *command, str(saved), *last],
        cwd=tmp_path, env=environment, input=check.encode(), capture_output=True, check=True,
    )  # fmt: skip
    assert not [*(tmp_path / "home").rglob("*")]


def saved_name(folder: Path) -> str:
    return json.loads((folder / "model_info.json").read_text())["current"]


def test_the_server_leaves_nothing_in_the_home_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", empty_home(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    with servers.server(saved, load.request("/predict", PICTURE)):
        pass
    assert not [*(tmp_path / "home").rglob("*")]
