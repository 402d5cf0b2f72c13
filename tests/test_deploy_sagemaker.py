"""deploy/sagemaker/train.py under SageMaker's own toolkit, interrupted and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from mnist import registry
from serve.app import app
from tests.conftest import ROOT
from tests.gates import Gates, until
from tests.soak import GATED
from tests.test_folders import fill

pytestmark = pytest.mark.deploy

PROGRAM = "deploy/sagemaker/train.py"
HYPERPARAMETERS = {"model": "linear", "quick": True, "trials": 4, "import": str(GATED)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """/opt/ml as SageMaker prepares it: configuration, the channel `train`, the program."""
    pytest.importorskip("sagemaker_training", reason="it is in deploy/requirements-test.txt")
    config = tmp_path / "ml/input/config"
    config.mkdir(parents=True)
    group = {"instance_group_name": "g", "instance_type": "local", "hosts": ["localhost"]}
    files = {
        "hyperparameters": {key: json.dumps(value) for key, value in HYPERPARAMETERS.items()},
        "inputdataconfig": {"train": {"TrainingInputMode": "File"}},
        "resourceconfig": {"current_host": "localhost", "hosts": ["localhost"]}
        | {"current_instance_group": "g", "instance_groups": [group]},
    }
    for name, content in files.items():
        (config / f"{name}.json").write_text(json.dumps(content))
    fill(tmp_path / "ml/input/data/train", {"cat": 60, "dog": 60})
    for folder in ("model", "output", "code"):
        (tmp_path / "ml" / folder).mkdir()
    for name in ("run.py", "mnist", "deploy"):  # no requirements.txt, which would be installed
        (tmp_path / "ml/code" / name).symlink_to(ROOT / name)
    return tmp_path / "ml"


def start(base: Path) -> subprocess.Popen[str]:
    """The toolkit's command `train`, in a session of its own."""
    variables = {"SAGEMAKER_BASE_DIR": str(base), "SAGEMAKER_PROGRAM": PROGRAM}
    command = [sys.executable, "-c", "from sagemaker_training.cli.train import main; main()"]
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def find_program(toolkit: subprocess.Popen[str]) -> int:
    """The process of train.py."""
    children = Path(f"/proc/{toolkit.pid}/task/{toolkit.pid}/children").read_text().split()
    return next(int(pid) for pid in children if PROGRAM in Path(f"/proc/{pid}/cmdline").read_text())


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL], ids=lambda sig: sig.name)
def test_an_interrupted_job_goes_on_and_leaves_a_registry(
    base: Path, tmp_path: Path, sig: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = Gates(base / "code")
    gates.runs.allow(0)
    first = start(base)
    try:
        gates.hold(runs=2, reports=1)
        if sig == signal.SIGKILL:  # an interruption without a warning: what was copied counts
            copy = base / "checkpoints/db.sqlite3"
            seen = copy.stat().st_mtime_ns if copy.exists() else 0
            until(lambda: copy.exists() and copy.stat().st_mtime_ns > seen, "the study is copied")
            os.killpg(first.pid, sig)
        else:
            os.kill(find_program(first), sig)
        text, _ = first.communicate()
    finally:
        gates.open()
        first.kill()
    assert first.returncode != 0, text
    assert not list((base / "model").iterdir())
    second = start(base)
    text, _ = second.communicate()
    assert second.returncode == 0, text
    assert "2 of 4 trials finished" in text
    accuracy = re.search(r"^validation_accuracy=(0\.\d+|1\.0+);$", text, re.MULTILINE)
    assert accuracy
    assert (base / "output/success").exists()
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(base / "model", ".")
    shutil.unpack_archive(tmp_path / "model.tar.gz", tmp_path / "unpacked")
    name, record = registry.record(tmp_path / "unpacked")
    assert record["metrics"]["validation"]["mean"] == pytest.approx(float(accuracy[1]), abs=1e-6)
    monkeypatch.setenv("MODELS", str(tmp_path / "unpacked"))
    picture = next((base / "input/data/train").rglob("*.png"))
    with TestClient(app) as client:
        answer = client.post("/predict", content=picture.read_bytes()).json()
    assert answer["model"] == name
