"""benchmarks/curves.py: the table of learning curves is the same after any stop."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import curve_runs, curves
from mnist import data, training
from mnist.search.space import DEFAULT, SPACES, WIDE, filter_params
from mnist.search.study import FIRST_PARAMS
from tests.conftest import ROOT

SMALL = ["--dataset", "digits", "--network", "linear", "--threads", "1"]
SMALL += ["--fidelities", "100,200,400", "--final-samples", "300"]
SMALL += ["--default", "4", "--wide", "2", "--finals", "2", "--final-seeds", "2"]
KEYS = [
    *(("default", i, 0) for i in range(4)),
    *(("wide", i, 0) for i in range(2)),
    *(("finals", i, seed) for seed in (1, 2) for i in range(2)),
]


def options(folder: Path, *more: str) -> list[str]:
    storage = f"sqlite:///{folder}/curves.sqlite3"
    return [*SMALL, "--storage", storage, "--table", str(folder / "curves.json"), *more]


def invoke(folder: Path, *more: str) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(curves.main, options(folder, *more))
    finally:
        torch.set_num_threads(threads)


def read_table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "curves.json").read_text())


def load_keys(folder: Path) -> list[tuple[str, int, int]]:
    """Load the parts, numbers and seeds of all recorded runs, in the order of each study."""
    keys = []
    for part in curve_runs.SPACES:
        name, storage = f"curves-{part}", f"sqlite:///{folder}/curves.sqlite3"
        for trial in optuna.load_study(study_name=name, storage=storage).trials:
            keys.append((part, trial.user_attrs["number"], trial.user_attrs["seed"]))
    return keys


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a table that was made without a stop."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = invoke(folder)
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == len(KEYS) + 1
    return folder


def test_the_table_has_a_row_for_each_configuration(uninterrupted: Path) -> None:
    header, rows = read_table(uninterrupted)["header"], read_table(uninterrupted)["rows"]
    assert [(row["space"], row["number"]) for row in rows] == [key[:2] for key in KEYS[:6]]
    assert load_keys(uninterrupted) == KEYS
    assert header["fidelities"] == [100, 200, 400]
    assert header["runs"]["finals"] == {"done": 4, "of": 4}
    assert header["command"].startswith(
        "python -m benchmarks.curves --dataset digits --network lin"
    )
    assert {"date", "dtype", "n", "processor", "ranks", "torch"} <= {*header}
    for row in rows:
        assert len(row["errors"]) == len(row["log_loss"]) == 3
        assert filter_params(curve_runs.SPACES[row["space"]], row["params"]) == row["params"]
        finals = [final["seed"] for final in row.get("finals", [])]
        assert finals == ([1, 2] if row["space"] == "default" and row["number"] < 2 else [])
    assert rows[0]["params"] == FIRST_PARAMS
    assert rows[1]["finals"][0] != rows[1]["finals"][1]


def test_the_values_are_those_of_training_on_all_validation_images(
    uninterrupted: Path, digits: data.Dataset
) -> None:
    row = read_table(uninterrupted)["rows"][1]
    run = curve_runs.Run("default", 1, row["params"], 0, (100, 200, 400))
    settings = curve_runs.Settings(network="linear")
    assert curve_runs.train(run, settings, digits)["errors"] == row["errors"]
    torch.manual_seed(0)
    model = curve_runs.models.build("linear", 1, digits.size, 10)
    more = {"samples": 400, "validate_at": [100, 200], "subset": 10**9}
    progresses = training.fit(
        model, digits, digits.train, digits.validation, **row["params"], **more
    )
    reports = [progress for progress in progresses if progress.n]
    assert {progress.n for progress in reports} == {len(digits.validation)}
    assert [progress.errors for progress in reports] == row["errors"]


def test_a_stopped_table_is_resumed_and_no_complete_run_is_repeated(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, fit = [], training.fit

    def fit_and_stop(*arguments: Any, **keywords: Any) -> Iterator[training.Progress]:
        started.append(keywords["lr"])
        for progress in fit(*arguments, **keywords):
            yield progress
            if len(started) == 3:
                raise RuntimeError("stopped in the middle")

    monkeypatch.setattr(training, "fit", fit_and_stop)
    assert str(invoke(tmp_path).exception) == "stopped in the middle"
    assert load_keys(tmp_path) == KEYS[:2]
    exported = invoke(tmp_path, "--export")
    assert exported.exit_code == 0, exported.output
    assert len(read_table(tmp_path)["rows"]) == 2
    assert read_table(tmp_path)["header"]["runs"]["default"] == {"done": 2, "of": 4}
    assert invoke(tmp_path).exit_code == 0
    assert load_keys(tmp_path) == KEYS
    assert len(started) == len(KEYS) + 1  # the stopped run is repeated
    assert read_table(tmp_path)["rows"] == read_table(uninterrupted)["rows"]
    assert invoke(tmp_path).exit_code == 0
    assert len(started) == len(KEYS) + 1


def test_a_kill_loses_at_most_the_run_in_progress(uninterrupted: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "benchmarks.curves", *options(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    assert lines[2].startswith("default 2 ")
    recorded = load_keys(tmp_path)
    assert recorded == KEYS[: len(recorded)]
    assert len(recorded) >= 3
    assert invoke(tmp_path).exit_code == 0
    assert load_keys(tmp_path) == KEYS
    assert read_table(tmp_path)["rows"] == read_table(uninterrupted)["rows"]


def test_a_table_without_its_studies_is_resumed(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = read_table(uninterrupted)
    content["rows"].pop()
    del content["rows"][0]["finals"][1]
    curves.write_table(content, tmp_path / "curves.json")
    started, fit = [], training.fit

    def count_and_fit(*arguments: Any, **keywords: Any) -> Iterator[training.Progress]:
        started.append(keywords["samples"])
        return fit(*arguments, **keywords)

    monkeypatch.setattr(training, "fit", count_and_fit)
    assert invoke(tmp_path).exit_code == 0
    assert started == [400, 300]
    assert read_table(tmp_path)["rows"] == read_table(uninterrupted)["rows"]


def test_a_table_of_another_recipe_is_not_used(uninterrupted: Path, tmp_path: Path) -> None:
    content = read_table(uninterrupted)
    del content["header"]["label_smoothing"]
    content["rows"][0]["errors"] = [0, 0, 0]
    curves.write_table(content, tmp_path / "curves.json")
    result = invoke(tmp_path)
    assert "had other settings; they are not used" in result.output
    assert read_table(tmp_path)["rows"] == read_table(uninterrupted)["rows"]


def test_commands_share_the_runs(uninterrupted: Path, tmp_path: Path) -> None:
    assert invoke(tmp_path, "--share", "2/2").exit_code == 0
    assert load_keys(tmp_path) == sorted(
        KEYS[1::2], key=lambda key: [*curve_runs.SPACES].index(key[0])
    )
    assert invoke(tmp_path, "--share", "1/2").exit_code == 0
    assert read_table(tmp_path)["rows"] == read_table(uninterrupted)["rows"]
    assert "'3/2' is not a share" in invoke(tmp_path, "--share", "3/2").output


def test_a_table_of_other_settings_is_not_continued(uninterrupted: Path) -> None:
    result = invoke(uninterrupted, "--bfloat16")
    assert result.exit_code == 1
    assert "dtype is bfloat16, in the study float32" in result.output
    assert "no study curves-default" in invoke(uninterrupted / "..", "--export").output


def test_a_run_that_diverges_has_the_errors_of_a_guess(
    digits: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> Iterator[training.Progress]:
        yield training.Progress(128, 400, 1.0, 12, 128, 0.5)
        raise training.Diverged("the loss is nan")

    monkeypatch.setattr(training, "fit", diverge)
    run = curve_runs.Run("default", 0, FIRST_PARAMS, 0, (100, 200, 400))
    result = curve_runs.train(run, curve_runs.Settings(network="linear"), digits)
    guess = round(len(digits.validation) * 0.9)
    assert result == {"errors": [12, guess, guess], "log_loss": [0.5, None, None], "diverged": True}


@pytest.mark.parametrize("name", SPACES)
def test_configurations_are_the_same_however_many_and_cover_the_space(name: str) -> None:
    space = SPACES[name]
    many = curve_runs.make_configurations(space, 128, 0)
    assert many[:5] == curve_runs.make_configurations(space, 5, 0)
    assert (many[0] == FIRST_PARAMS) == (space == DEFAULT)
    assert all(
        filter_params(space, params) == params and params.keys() == space.keys() for params in many
    )
    shares = [np.log10(params["lr"] / 1e-5) / 4 for params in many]
    assert np.histogram(shares, 8, (0, 1))[0].min() >= 14  # 16 on average
    kinds = {params["optimizer"] for params in many}
    assert kinds == {*space["optimizer"].choices}
    assert curve_runs.make_configurations(WIDE, 3, 0) != curve_runs.make_configurations(WIDE, 3, 1)


def test_the_fidelities_ascend(tmp_path: Path) -> None:
    assert "does not ascend" in invoke(tmp_path, "--fidelities", "200,100").output
