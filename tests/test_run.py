"""run.py as a person uses it: in a process of its own, killed and continued too."""

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from fastapi.testclient import TestClient
from optuna.trial import TrialState
from PIL import Image

import run as run_module
from mnist import data, models, predict, registry
from mnist.job import networks, trials
from mnist.job.options import Options
from mnist.search import loop
from mnist.search.claims import Trials
from serve.app import app
from tests.conftest import DATA_DIR, DIGITS, ROOT, SHORT, Command
from tests.gates import LONG_S, Gates, until
from tests.soak import GATED
from tests.test_folders import fill

pytestmark = pytest.mark.usefixtures("blank_pictures", "known_speed")

NAME = "digits-linear-quick"


MEASURE_SPEED = loop.measure_speed


@pytest.fixture
def measured_speed(known_speed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training speed as run.py measures it."""
    monkeypatch.setattr(loop, "measure_speed", MEASURE_SPEED)


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder}/db.sqlite3")


def states(folder: Path) -> list[TrialState]:
    return [trial.state for trial in study(folder).trials]


@pytest.mark.usefixtures("measured_speed")
def test_a_run_saves_a_model_and_the_next_run_only_prints_it(run: Command, tmp_path: Path) -> None:
    first = run(*DIGITS, "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    name, record = registry.record(tmp_path / "saved_models")
    assert result["name"] == name
    assert result["trials"]["complete"] + result["trials"]["pruned"] == 3
    assert record["study"]["trial"] == result["best"]["number"]
    assert record["options"]["dataset"] == "digits"
    second = run(*DIGITS)
    assert second.returncode == 0, second.stderr
    assert second.stderr == ""
    assert f"model: saved_models/{name}.pth, current" in second.stdout
    assert f"{record['metrics']['test']['errors']} errors of 257" in second.stdout
    assert "uvicorn serve.app:app" in second.stdout
    (tmp_path / "plugin.py").write_text("# with networks, but not this one")
    assert run(*DIGITS, "--import", str(tmp_path / "plugin.py")).stdout == second.stdout
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1
    assert len(states(tmp_path)) == 3 + result["trials"]["fail"]


def test_more_trials_continue_the_study(run: Command, tmp_path: Path) -> None:
    run(*DIGITS, *SHORT, "--trials", "2")
    assert len(states(tmp_path)) == 2
    more = run(*DIGITS, *SHORT, "--trials", "4")
    assert "2 of 4 trials finished" in more.stderr
    assert len(states(tmp_path)) == 4


@pytest.mark.slow
def test_trials_in_two_commands_equal_trials_in_one(run: Command, tmp_path: Path) -> None:
    """With --epochs, as the length of a trial otherwise depends on the time."""
    options = ["--dataset", "digits", "--model", "linear", *SHORT, "--epochs", "1"]
    run(*options, "--study", "parts", "--trials", "8")
    run(*options, "--study", "parts", "--trials", "16")
    run(*options, "--study", "whole", "--trials", "16")
    parts, whole = (
        [
            (trial.params, trial.state, trial.value, trial.intermediate_values)
            for trial in optuna.load_study(
                study_name=name, storage=f"sqlite:///{tmp_path}/db.sqlite3"
            ).trials
        ]
        for name in ("parts", "whole")
    )
    assert len(whole) == 16
    assert parts == whole


def killed(
    folder: Path, options: list[str], when: Callable[[Gates, Callable[[], bool]], None], sig: int
) -> tuple[int, str]:
    """Start run.py and send it `sig` after `when` returns; returns status and standard error."""
    command = [sys.executable, str(ROOT / "run.py"), "--import", str(GATED), *options]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip

    def is_running() -> bool:
        assert process.poll() is None, "it ended before it could be stopped"
        return True

    gates = Gates(folder)
    try:
        when(gates, is_running)
        if sig == signal.SIGINT:  # to the workers, too, like a terminal
            os.killpg(process.pid, sig)
        else:
            process.send_signal(sig)
        _, errors = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
        gates.open()
    return process.returncode, errors


def trial_is_running(gates: Gates, is_running: Callable[[], bool]) -> None:
    """Wait until a trial is finished and the next one is running."""
    gates.hold(runs=1, reports=3, is_running=is_running)


def final_training(gates: Gates, is_running: Callable[[], bool]) -> None:
    until(lambda: is_running() and gates.final.held(), "the final training is under way")


def evaluation(gates: Gates, is_running: Callable[[], bool]) -> None:
    until(lambda: is_running() and gates.saving.held(), "it evaluates")


SLOW = pytest.mark.slow
LONG = [*DIGITS, *SHORT, "--trials", "3", "--epochs", "4"]


@pytest.mark.parametrize(
    "sig",
    [signal.SIGKILL, *(pytest.param(s, marks=SLOW) for s in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_run_stopped_in_mid_trial_loses_no_finished_trial(
    run: Command, tmp_path: Path, sig: int
) -> None:
    Gates(tmp_path).runs.allow(0)
    code, errors = killed(tmp_path, LONG, trial_is_running, sig)
    before = [t for t in study(tmp_path).trials if t.state == TrialState.COMPLETE]
    assert before
    if sig == signal.SIGKILL:
        assert code == -sig
    else:
        assert code == 130, errors
        assert "Traceback" not in errors
        assert errors.endswith(
            "run.py: interrupted; finished work is kept; the same command continues\n"
        )
        assert TrialState.RUNNING not in states(tmp_path)
    done = run(*LONG)
    assert done.returncode == 0, done.stderr
    after = states(tmp_path)
    assert TrialState.RUNNING not in after
    assert TrialState.WAITING not in after
    assert sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in after) == 3
    kept = study(tmp_path).trials[: len(before)]
    assert [t.value for t in kept] == [t.value for t in before]
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", [final_training, evaluation])
def test_a_run_killed_at_the_end_trains_only_the_final_model_again(
    run: Command, tmp_path: Path, moment: Callable[[Gates, Callable[[], bool]], None]
) -> None:
    options = [*DIGITS, *SHORT, "--trials", "2"]
    run(*options)
    earlier, _ = registry.record(tmp_path / "saved_models")
    options = [*options, "--final-epochs", "5"]
    gates = Gates(tmp_path)
    (gates.final if moment == final_training else gates.saving).allow(0)
    killed(tmp_path, options, moment, signal.SIGKILL)
    assert registry.record(tmp_path / "saved_models")[0] == earlier
    registry.file(tmp_path / "saved_models", earlier)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "evaluating, once, and saving" in done.stderr
    assert ("final model: " in done.stderr) == (
        moment == final_training
    )  # or its weights are saved already
    assert not re.search(r"^trial \d", done.stderr, re.MULTILINE)
    assert len(states(tmp_path)) == 2
    models = registry.read(tmp_path / "saved_models")["models"]
    assert len(models) == 2
    assert run(*options).stderr == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trials", "0"], "'--trials': 0 is not in the range"),
        (["--trials", "many"], "'--trials': 'many' is not a valid integer"),
        (["--dataset", "mnits"], "'mnits' is not a data set; known: mnist, digits, fashion"),
        (["--dataset", "/tmp"], "'/tmp' is a folder; write folder:/tmp"),
        (["--dataset", "folder:nowhere"], "'folder:nowhere': there is no folder nowhere"),
        (["--dataset", "folder:"], "'folder:' is not a data set; known: mnist"),
        (["--color"], "--image-size and --color are only for folder:PATH, not for digits"),
        (["--image-size", "20"], "are only for folder:PATH, not for digits"),
        (["--image-size", "4"], "'--image-size': 4 is not in the range"),
        (["--model", "x"], "'x' is not a network; known: parallel"),
        (["--param", "optimizer=Adam,SGD"], "choice:Adam,SGD lets each be chosen"),
        (["--param", "lr=float:2:1"], "lr: 'float:2:1': LOW is above HIGH"),
        (["--space", "nowhere.toml"], "nowhere.toml: neither a space"),
        (["--import", "nowhere.py"], "File 'nowhere.py' does not exist"),
        (["--epochs", "-1"], "'--epochs': -1.0 is not in the range"),
        (["--timeout", "soon"], "'soon' is not a time such as 90s, 15m or 2h"),
        (["--train-samples", "999999"], "--train-samples is 999999; digits takes 10"),
        (["--storage", "sqlite:////no/where/db.sqlite3"], "there is no folder /no/where"),
        (["--colour", "red"], "No such option '--colour'"),
        (["--artifacts", "s3://bucket"], "'s3://bucket' is not a folder; mount the bucket"),
        (["--disk-quota", "1MB"], "'1MB' is under 20MB, which the smallest run needs"),
        (["--device", "mps"], "device 'mps' is not on this machine"),
        (["--storage", "nonsense"], "--storage 'nonsense' cannot be opened"),
        (["--output", "/proc/x"], "cannot write to /proc/x"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    run: Command, options: list[str], words: str
) -> None:
    done = run(*DIGITS, *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("run.py: ")
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_timeout_keeps_what_finished_and_says_so(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any machine, half of the timeout is over when three trials are finished."""
    finished: list[int] = []
    real = Trials.tell

    def tell(*args: Any, **kwargs: Any) -> Any:
        finished.append(1)
        return real(*args, **kwargs)

    def monotonic() -> float:
        return time.monotonic() + (1800 if len(finished) >= 3 else 0)

    monkeypatch.setattr(Trials, "tell", tell)
    monkeypatch.setattr(trials, "time", types.SimpleNamespace(monotonic=monotonic))
    done = run(*DIGITS, "--trials", "100000", "--timeout", "1h", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "expected: 30 min for the search, " in done.stderr
    assert re.search(r"--timeout: [3-9] of 100000 trials are finished", done.stderr)
    assert TrialState.RUNNING not in states(tmp_path)
    assert 3 <= sum(state.is_finished() for state in states(tmp_path)) < 10
    _, record = registry.record(tmp_path / "saved_models")
    assert record["metrics"]["test"]["errors"] < 60  # of 257: the final model is trained


def test_a_full_disk_ends_with_one_line_and_loses_nothing(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = run(*DIGITS, *SHORT, "--trials", "2")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert registry.read(tmp_path / "saved_models")["models"] == {}
    assert run(*DIGITS, *SHORT, "--trials", "2").returncode == 0
    assert len(states(tmp_path)) == 2
    assert not list((tmp_path / "saved_models").glob(".*.tmp"))


@pytest.mark.slow
def test_a_full_disk_under_the_database_ends_with_one_line_and_loses_nothing(
    run: Command, tmp_path: Path
) -> None:
    run(*DIGITS, *SHORT, "--trials", "2")
    values = [trial.value for trial in study(tmp_path).trials]

    def small(connection: sqlite3.Connection, _: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", small)
    try:
        done = run(*DIGITS, *SHORT, "--trials", "60")
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", small)
    assert done.returncode == 1
    assert "database or disk is full; finished work is kept" in done.stderr.splitlines()[-1]
    assert [trial.value for trial in study(tmp_path).trials[:2]] == values
    more = str(len(states(tmp_path)) + 1)
    assert run(*DIGITS, *SHORT, "--trials", more).returncode == 0
    assert TrialState.RUNNING not in states(tmp_path)


def test_the_next_commands_name_the_registry_and_the_storage_in_use(run: Command) -> None:
    where = ["--output", "my models", "--storage", "sqlite:///mine.sqlite3"]
    done = run(*DIGITS, *SHORT, *where, "--promote", "never")
    assert "next:\n  python -m mnist.registry --folder 'my models' use 2" in done.stdout
    assert "MODELS='my models' uvicorn serve.app:app" in done.stdout
    assert "optuna-dashboard sqlite:///mine.sqlite3" in done.stdout


def test_a_study_of_other_trials_is_not_continued(run: Command) -> None:
    run(*DIGITS, *SHORT, "--study", "mine")
    done = run(*DIGITS, *SHORT, "--trials", "2", "--study", "mine", "--epochs", "0.6")
    assert done.returncode == 2
    assert "study mine cannot be continued" in done.stderr
    assert "--study mine-2" in done.stderr


@pytest.mark.parametrize("color", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_folder_s_model_is_served_without_the_folder_by_its_own_class_names(
    run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    color: bool,
) -> None:
    pets = fill(tmp_path / "pets", {"cat": 60, "emu": 60})
    picture = (pets / "emu" / "000.png").read_bytes()
    options = ["--image-size", "20", *(["--color"] if color else [])]
    quick = ["--model", "linear", "--quick", "--trials", "2", "--confirm", "0", "--epochs", "20"]
    where = ["--dataset", "folder:pets", "--data-dir", "kept"]
    done = run(*where, *options, *quick, "--final-epochs", "20", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"]["name"] == "pets-linear-quick"
    assert ("--color keeps" in caplog.text) == (not color)
    _, record = registry.record(tmp_path / "saved_models")
    dataset = record["dataset"]
    assert (dataset["name"], dataset["classes"]) == ("folder:pets", ["cat", "emu"])
    assert (dataset["size"], dataset["channels"], dataset["recipe"]) == (
        20,
        3 if color else 1,
        "plain",
    )
    assert record["options"]["dataset"] == f"folder:{pets}"
    shutil.rmtree(pets)
    shutil.rmtree(tmp_path / "kept")
    monkeypatch.setenv("MODELS", str(tmp_path / "saved_models"))
    with TestClient(app) as client:
        answer = client.post("/predict?view=true", files={"file": ("emu.png", picture)}).json()
        blank = client.post("/predict", files={"file": ("0.ppm", b"P5 9 9 255\n" + bytes(81))})
    assert set(answer["probabilities"]) == {"cat", "emu"}
    assert blank.json()["error"]["code"] == "blank"
    if color:  # in grey, the classes have the same brightness
        assert record["metrics"]["test"]["errors"] == 0
        assert answer["prediction"] == "emu"


def test_names_are_looked_up_when_the_option_is_read(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "mine", data.Source(no_data, ("a", "b")))
    assert run("--dataset", "mine").stderr == "run.py: there is none\n"
    assert "cifar10, mine, folder:PATH" in run("--dataset", "yours").stderr


def no_data(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    raise data.DataError("there is none")


def test_help_names_every_option(run: Command) -> None:
    text = run("--help").stdout
    contract = (
        "dataset model trials epochs final-epochs timeout train-samples storage study workers"
    )
    more = "sampler pruner seed device data-dir output artifacts disk-quota promote quick json "
    more += "image-size color thorough plain"
    for name in f"{contract} {more}".split():
        assert f"--{name} " in text


@pytest.mark.slow
def test_several_networks_end_with_one_table(run: Command, tmp_path: Path) -> None:
    options = ["--dataset", "digits", "--model", "linear", "--model", "compact", *SHORT]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("data set", 1)[1]
    assert re.search(r"digits +linear .* of 257 .* 7,850 ", table)
    assert re.search(r"digits +compact .* of 257 ", table)
    assert re.search(r"kB +best *\n", table)
    page = (tmp_path / "saved_models/comparison.html").read_text()
    for cell in ("linear", "7,850", "compact", "best"):
        assert f"<td>{cell}</td>" in page
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 2
    both = json.loads(run(*options, "--json").stdout)
    assert [model["model"]["name"] for model in both] == ["linear", "compact"]
    refused = run(*options, "--study", "one")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--study names one study; these options make 2" in refused.stderr
    both_ways = run(*options, "--quick", "--thorough")
    assert both_ways.returncode == 2
    assert "--quick and --thorough exclude each other" in both_ways.stderr


def test_an_error_in_one_of_several_studies_is_reported_before_the_first(
    run: Command, tmp_path: Path
) -> None:
    small = fill(tmp_path / "small", {"cat": 12, "dog": 3})
    two = ["--dataset", "digits", "--model", "linear"]
    for options, words in (
        ([*two, "--model", "compact", "--param", "dropout=0.1"], "digits-linear: dropout: the net"),
        ([*two, "--model", "cnn", "--param", "lrr=3"], "digits-linear: lrr: no such hyper"),
        ([*two, "--dataset", f"folder:{small}"], "class 'dog' has 3 pictures"),
        ([*two, "--model", "cnn", "--color"], "--color are only for folder:PATH"),
    ):
        done = run(*options)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "db.sqlite3").exists()


@pytest.mark.slow
def test_a_study_that_cannot_be_finished_does_not_stop_the_others(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.run_trials

    def run_trials(*arguments: Any) -> None:
        if any(isinstance(part, Options) and part.model == "linear" for part in arguments):
            raise loop.Unfinished("--timeout: of linear")
        real(*arguments)

    monkeypatch.setattr(run_module, "run_trials", run_trials)
    done = run("--dataset", "digits", "--model", "linear", "--model", "compact", *SHORT)
    assert done.returncode == 1
    assert "digits-linear: --timeout: of linear" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("run.py: not finished: digits-linear;")
    assert re.search(r"digits +compact .* of 257 ", done.stdout)


@pytest.mark.slow
def test_a_study_that_cannot_be_continued_does_not_stop_the_others(run: Command) -> None:
    assert run("--dataset", "digits", "--model", "linear", *SHORT).returncode == 0
    both = ["--dataset", "digits", "--model", "linear", "--model", "compact"]
    done = run(*both, *SHORT, "--epochs", "0.6")
    assert done.returncode == 2
    assert "digits-linear: study digits-linear cannot be continued" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("refused, for the reasons above: digits-linear")
    assert re.search(r"digits +compact .* of 257 ", done.stdout)


def test_two_studies_of_one_name_are_refused(run: Command, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "pets").mkdir(parents=True)
    done = run("--dataset", "folder:a/pets", "--dataset", "folder:b/pets")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "2 of these would be the study pets-parallel" in done.stderr


def test_a_network_that_is_too_large_for_the_machine_is_refused(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "total_memory", lambda: 7_850 * 16 - 1)
    done = run(*DIGITS)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "its training needs 0.000126 GB" in done.stderr


NETWORK_PLUGIN = """# -*- coding: latin-1 -*-
# un réseau
from torch import nn
from mnist import models

def tiny(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels * size**2, classes))

models.NETWORKS["tiny"] = tiny
"""


@pytest.mark.usefixtures("measured_speed")
def test_a_plugin_s_network_is_searched_saved_and_answers_without_its_python(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.NETWORKS, "tiny", models.Linear)  # removed after the test
    file = tmp_path / "plugin.py"
    file.write_text(NETWORK_PLUGIN, "latin-1")
    options = ["--dataset", "digits", "--import", str(file), "--model", "tiny", *SHORT]
    done = run(*options, "--param", "dropout=float:0:0.5", "--param", "lr=0.01")
    assert done.returncode == 0, done.stderr
    _, record = registry.record(tmp_path / "saved_models")
    assert record["model"] == {"name": "tiny", "parameters": 7850}
    assert record["hyperparameters"]["lr"] == 0.01
    assert 0 <= record["hyperparameters"]["dropout"] <= 0.5
    assert record["imports"] == {"plugin.py": NETWORK_PLUGIN}
    with monkeypatch.context() as later:  # from its ONNX file, without the plugin
        later.delitem(models.NETWORKS, "tiny")
        picture = tmp_path / "blot.png"
        Image.fromarray(np.pad(np.zeros((20, 9), np.uint8), 15, constant_values=255)).save(picture)
        (prediction,) = predict.predict_files([picture], tmp_path / "saved_models")
        assert isinstance(prediction, predict.Prediction)
        later.setenv("MODELS", str(tmp_path / "saved_models"))
        with TestClient(app) as client:
            answer = client.post("/predict", content=picture.read_bytes()).json()
        assert answer["prediction"] == prediction.top[0][0]
    file.write_text(NETWORK_PLUGIN + "# another one", "latin-1")
    other = run(*options, "--trials", "2", "--param", "dropout=float:0:0.5", "--param", "lr=0.01")
    assert other.returncode == 2
    assert "network is tiny of " in other.stderr
    file.write_text(NETWORK_PLUGIN.replace("size**2", "size"), "latin-1")
    invalid = run(*options)
    assert invalid.returncode == 2
    assert invalid.stderr.count("\n") == 1
    assert "network 'tiny' cannot be used: " in invalid.stderr
    file.write_text(
        NETWORK_PLUGIN.replace("nn.Linear(", "nn.Dropout(0.0), nn.BatchNorm1d(3), nn.Linear("),
        "latin-1",
    )
    untrainable = run(*options)
    assert (untrainable.returncode, untrainable.stderr.count("\n")) == (2, 1)
    file.write_text("import this_is_not_there")
    broken = run(*options)
    assert broken.returncode == 2
    assert broken.stderr.count("\n") == 1
    assert "plugin.py, line 1: ModuleNotFoundError" in broken.stderr


DATA_PLUGIN = """
import numpy as np
from mnist.data import DATASETS, Source

def read(data_dir, part):
    random = np.random.default_rng(part == "test")
    labels = np.arange(200) % 2
    images = random.integers(0, 100, (200, 3, 16, 16)).astype(np.uint8)
    images[labels == 1, 0] += 150
    return images, labels

DATASETS["reds"] = Source(read, ("dull", "red"))
"""


def test_a_plugin_s_data_set_is_searched_saved_and_served_without_its_python(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    file = tmp_path / "plugin.py"
    file.write_text(DATA_PLUGIN)
    options = ["--import", str(file), "--dataset", "reds", "--model", "compact", *SHORT]
    done = run(*options, "--final-epochs", "20")
    assert done.returncode == 0, done.stderr
    _, record = registry.record(tmp_path / "saved_models")
    dataset = record["dataset"]
    assert (dataset["name"], dataset["size"], dataset["channels"]) == ("reds", 16, 3)
    del data.DATASETS["reds"]
    monkeypatch.setenv("MODELS", str(tmp_path / "saved_models"))
    picture = np.random.default_rng(0).integers(0, 100, (60, 90, 3)).astype(np.uint8)
    picture[:, :, 0] += 150
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    with TestClient(app) as client:
        answer = client.post("/predict", content=stream.getvalue()).json()
    assert answer["prediction"] == "red"
    assert set(answer["probabilities"]) == {"dull", "red"}


def test_help_lists_networks_and_hyperparameters(run: Command) -> None:
    text = " ".join(run("--help").stdout.split())
    assert text.startswith("Usage: run.py")
    assert "cnn 102,026" in text
    assert "dropout of all the network's dropout layers (0 to 0.9)" in text


@pytest.mark.usefixtures("measured_speed")
def test_a_short_real_search_beats_97_per_cent(
    run: Command, mnist: data.Dataset, tmp_path: Path
) -> None:
    done = run(
        *("--data-dir", str(DATA_DIR), "--json"),
        *("--model", "compact", "--param", "lr=0.01", "--param", "batch_size=128"),
        *("--trials", "1", "--confirm", "0", "--epochs", "0.02", "--final-epochs", "0.5"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["test"]["n"] == 10_000
    assert result["metrics"]["test"]["errors"] < 300
    assert result["dataset"]["sha256"] == mnist.sha256
