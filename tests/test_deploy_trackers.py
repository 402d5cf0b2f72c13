"""Studies in real trackers, read back: each trial once, with its curve, and the model."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest

from mnist.job.trackers import TRACKERS
from tests.conftest import DIGITS, ROOT
from tests.test_readme import DOCS

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.filterwarnings("ignore:::mlflow"),  # deprecations of its own libraries
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]

BLOCK, HEADER = 32_768, 7  # of LevelDB's log format, which W&B writes


class Seen(NamedTuple):
    """A run as a tracker has it."""

    state: str
    params: dict[str, str]
    curve: dict[int, float]
    accuracy: float | None
    files: set[str]


def start(folder: Path, *options: str, **environment: str) -> str:
    """`python run.py` in a process of its own; returns its standard error."""
    command = [sys.executable, str(ROOT / "run.py"), *DIGITS, *options]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model: saved_models/" in done.stdout
    return done.stderr


def read_mlflow(folder: Path) -> dict[str, list[Seen]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/artifacts/mlflow.db")
    experiment = client.get_experiment_by_name("digits-linear-quick")
    seen: dict[str, list[Seen]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        curve = client.get_metric_history(run.info.run_id, "validation_accuracy")
        assert run.info.status == {"complete": "FINISHED"}.get(run.data.tags["state"], "KILLED")
        seen.setdefault(run.info.run_name, []).append(
            Seen(
                run.data.tags["state"],
                run.data.params,
                {point.step: point.value for point in curve},
                run.data.metrics.get("accuracy", run.data.metrics.get("test_accuracy")),
                {Path(file.path).suffix for file in client.list_artifacts(run.info.run_id)},
            )
        )
    return seen


def read_leveldb(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: W&B's own header, then blocks of LevelDB's log."""
    content, record = path.read_bytes(), b""
    at = HEADER
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def read_wandb(folder: Path) -> dict[str, list[Seen]]:
    from wandb.proto.wandb_internal_pb2 import Record

    seen: dict[str, list[Seen]] = {}
    for path in (folder / "artifacts/wandb").glob("offline-run-*/*.wandb"):
        name, summary, curve, files = "", {}, {}, set()
        config: dict[str, Any] = {}
        for content in read_leveldb(path):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name
                config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "history":
                items = record.history.item
                row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                curve[record.history.step.num] = row["validation_accuracy"]
            elif kind == "summary":
                items = record.summary.update
                summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            elif kind == "artifact":
                files |= {Path(e.path).suffix for e in record.artifact.manifest.contents}
        state = config.pop("state")
        params = {key: str(value) for key, value in config.items() if key != "_wandb"}
        accuracy = summary.get("accuracy", summary.get("test_accuracy"))
        seen.setdefault(name, []).append(Seen(state, params, curve, accuracy, files))
    return seen


def read_tensorboard(folder: Path) -> dict[str, list[Seen]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    seen: dict[str, list[Seen]] = {}
    for place in (folder / "artifacts/tensorboard/digits-linear-quick").iterdir():
        events = EventAccumulator(str(place))
        events.Reload()
        tags = events.Tags()["scalars"]
        curve = events.Scalars("validation_accuracy") if "validation_accuracy" in tags else []
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        params = {key: v.string_value or f"{v.number_value:g}" for key, v in values.items()}
        accuracy = next(
            events.Scalars(name)[0].value for name in ("accuracy", "test_accuracy") if name in tags
        )
        name = place.name.partition("-")[2].replace("-", " ", 1)
        files = {".json"} if "record/text_summary" in events.Tags()["tensors"] else set()
        seen.setdefault(name, []).append(
            Seen(params.pop("state"), params, {e.step: e.value for e in curve}, accuracy, files)
        )
    return seen


READERS: dict[str, tuple[Callable[[Path], dict[str, list[Seen]]], set[str]]] = {
    "mlflow": (read_mlflow, {".pth", ".onnx", ".json"}),
    "wandb": (read_wandb, {".pth", ".onnx"}),
    "tensorboard": (read_tensorboard, {".json"}),
}


@pytest.mark.parametrize("name", READERS)
def test_a_continued_study_is_in_the_tracker_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip(TRACKERS[name].module, reason="it is in deploy/requirements-test.txt")
    read, suffixes = READERS[name]
    environment = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": ""}
    start(tmp_path, "--trials", "2", "--track", name, **environment)
    before = read(tmp_path)
    errors = start(tmp_path, "--trials", "4", "--track", name, **environment)
    assert not any(word in errors for word in (f"--track {name}", "INFO", "WARNING")), errors
    seen = read(tmp_path)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/db.sqlite3")
    assert all(seen[name] == runs for name, runs in before.items())
    assert {name for name in seen if name.startswith("trial")} == {
        f"trial {trial.number}" for trial in study.trials
    }
    for trial in study.trials:
        (run,) = seen[f"trial {trial.number}"]
        assert run.state == trial.state.name.lower()
        assert run.curve == pytest.approx(trial.intermediate_values)
        assert run.accuracy == pytest.approx(trial.value)
        assert run.params.keys() == trial.params.keys()
        for key, value in trial.params.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert (
                run.params[key] if isinstance(value, str) else float(run.params[key])
            ) == expected
    models = json.loads((tmp_path / "saved_models/model_info.json").read_text())["models"]
    for model, record in models.items():
        (run,) = seen[f"model {model}"]
        assert suffixes <= run.files
        assert run.accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])


DOWN = "http://127.0.0.1:9"
KEY = "0" * 40


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("mlflow", {"MLFLOW_TRACKING_URI": DOWN}),
        ("wandb", {"WANDB_BASE_URL": DOWN, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}),
    ],
)
def test_a_server_that_is_down_is_one_warning(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip(TRACKERS[name].module, reason="it is in deploy/requirements-test.txt")
    errors = start(tmp_path, "--track", name, **environment)
    (line,) = [line for line in errors.splitlines() if name in line]
    assert line.startswith(f"--track {name}: ")
    assert "the search is not affected" in line


def test_a_study_is_logged_after_a_server_was_silent(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="it is in deploy/requirements-test.txt")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        errors = start(tmp_path, "--track", "mlflow", MLFLOW_TRACKING_URI=url)
    assert errors.count("--track mlflow") == 1
    start(tmp_path, "--track", "mlflow", MLFLOW_TRACKING_URI="")
    assert len(read_mlflow(tmp_path)) == 4


def test_an_interrupted_run_is_completed(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="it is in deploy/requirements-test.txt")
    start(tmp_path, "--track", "mlflow", MLFLOW_TRACKING_URI="")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/artifacts/mlflow.db")
    experiment = client.get_experiment_by_name("digits-linear-quick")
    query = "attributes.run_name = 'trial 1'"
    (run,) = client.search_runs([experiment.experiment_id], query)
    client.update_run(run.info.run_id, status="RUNNING")  # as a killed command leaves it
    start(tmp_path, "--track", "mlflow", MLFLOW_TRACKING_URI="")
    (again,) = client.search_runs([experiment.experiment_id], query)
    assert again.info.run_id == run.info.run_id
    assert again.info.status in ("FINISHED", "KILLED")


def documented_command(name: str, program: str) -> list[str]:
    (row,) = re.findall(rf"^\| `--track {name}` .*", DOCS["search.md"], re.MULTILINE)
    (command,) = re.findall(rf"`({program} [^`]*-[^`]*)`", row)
    return shlex.split(command)


@pytest.mark.parametrize(
    ("name", "program", "page"),
    [
        ("mlflow", "mlflow", "ajax-api/2.0/mlflow/experiments/search?max_results=9"),
        ("tensorboard", "tensorboard", "data/runs"),
    ],
)
def test_the_documented_command_shows_the_study(
    name: str, program: str, page: str, tmp_path: Path
) -> None:
    pytest.importorskip(name, reason="it is in deploy/requirements-test.txt")
    start(tmp_path, "--track", name, MLFLOW_TRACKING_URI="")
    program, *arguments = documented_command(name, program)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    viewer = subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *arguments, "--port", str(port)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        shown = ""
        for _ in range(1200):
            try:
                url = f"http://127.0.0.1:{port}/{page}"
                with urllib.request.urlopen(url, timeout=60) as response:
                    shown = response.read().decode()
            except OSError:  # it has not started yet
                assert viewer.poll() is None
            if "digits-linear-quick" in shown:
                break
            time.sleep(0.1)
        assert "digits-linear-quick" in shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(viewer.pid, signal.SIGTERM)
        viewer.wait(60)


def test_the_documented_command_of_wandb_finds_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="it is in deploy/requirements-test.txt")
    start(tmp_path, "--track", "wandb", WANDB_MODE="offline")
    program, command, pattern = documented_command("wandb", "wandb")
    runs = [str(path.relative_to(tmp_path)) for path in tmp_path.glob(pattern)]
    assert runs
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), command, *runs, "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(run in done.stdout + done.stderr for run in runs)
