"""run.py as a person uses it: in a process of its own, killed and continued too."""

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from mnist import data, registry
from tests.conftest import DATA_DIR, DIGITS, ROOT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")

NAME = "digits-linear-quick"


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder}/db.sqlite3")


def states(folder: Path) -> list[TrialState]:
    return [trial.state for trial in study(folder).trials]


def test_a_run_saves_a_model_and_the_next_run_only_prints_it(run: Command, tmp_path: Path) -> None:
    first = run(*DIGITS, "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    name, record = registry.record(tmp_path / "saved_models")
    assert result["name"] == name
    assert result["trials"]["complete"] + result["trials"]["pruned"] == 6
    assert record["study"]["trial"] == result["best"]["number"]
    assert record["options"]["dataset"] == "digits"
    second = run(*DIGITS)
    assert second.returncode == 0, second.stderr
    assert second.stderr == ""
    assert f"model: saved_models/{name}.pth, current" in second.stdout
    assert f"{record['metrics']['test']['errors']} errors of 257" in second.stdout
    assert "uvicorn serve.app:app" in second.stdout
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1
    assert len(states(tmp_path)) == 6 + result["trials"]["fail"]


def test_more_trials_continue_the_study(run: Command, tmp_path: Path) -> None:
    run(*DIGITS, "--trials", "2")
    assert len(states(tmp_path)) == 2
    more = run(*DIGITS, "--trials", "4")
    assert "2 of 4 trials finished" in more.stderr
    assert len(states(tmp_path)) == 4


def killed(
    folder: Path, options: list[str], when: Callable[[subprocess.Popen[str]], bool], sig: int
) -> tuple[int, str]:
    """Start run.py and send it `sig` once `when` is true; its exit status and standard error."""
    command = [sys.executable, str(ROOT / "run.py"), *options]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        while not when(process):
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.02)
        process.send_signal(sig)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, errors


def trial_is_running(folder: Path) -> Callable[[subprocess.Popen[str]], bool]:
    """True once a trial is finished and the next one is under way."""

    def check(_: subprocess.Popen[str]) -> bool:
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{folder}/db.sqlite3?mode=ro", uri=True)
            ) as db:
                found = {state for (state,) in db.execute("SELECT state FROM trials")}
        except sqlite3.OperationalError:  # no file, or no table yet
            return False
        return {"RUNNING", "COMPLETE"} <= found

    return check


def line_is_printed(words: str) -> Callable[[subprocess.Popen[str]], bool]:
    def check(process: subprocess.Popen[str]) -> bool:
        assert process.stderr is not None
        return words in process.stderr.readline()

    return check


LONG = [*DIGITS, "--trials", "3", "--epochs", "12", "--final-epochs", "5"]


@pytest.mark.parametrize(
    "sig", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_stopped_in_mid_trial_loses_no_finished_trial(
    run: Command, tmp_path: Path, sig: int
) -> None:
    code, errors = killed(tmp_path, LONG, trial_is_running(tmp_path), sig)
    before = [t for t in study(tmp_path).trials if t.state == TrialState.COMPLETE]
    assert before
    if sig == signal.SIGKILL:
        assert code == -sig
    else:
        assert code == 130, errors
        assert "Traceback" not in errors
        assert errors.endswith(
            "run.py: interrupted; what was finished is kept, the same command goes on\n"
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
@pytest.mark.parametrize("moment", ["final model: ", "evaluating, once, and saving"])
def test_a_run_killed_at_the_end_trains_only_the_final_model_again(
    run: Command, tmp_path: Path, moment: str
) -> None:
    options = [*DIGITS, "--trials", "2"]
    run(*options)
    earlier, _ = registry.record(tmp_path / "saved_models")
    options = [*options, "--final-epochs", "60"]
    killed(tmp_path, options, line_is_printed(moment), signal.SIGKILL)
    assert registry.record(tmp_path / "saved_models")[0] == earlier
    registry.file(tmp_path / "saved_models", earlier)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "evaluating, once, and saving" in done.stderr
    assert ("final model: " in done.stderr) == (moment == "final model: ")  # else it is trained
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
        (["--dataset", "mnits"], "'mnits' is not one of 'mnist'"),
        (["--model", "x"], "'x' is not one of 'parallel'"),
        (["--epochs", "-1"], "'--epochs': -1.0 is not in the range"),
        (["--timeout", "soon"], "'soon' is not a time such as 90s, 15m or 2h"),
        (["--train-samples", "999999"], "train-samples is 999999; digits takes 10"),
        (["--colour", "red"], "No such option '--colour'"),
        (["--device", "mps"], "device 'mps' is not on this machine"),
        (["--storage", "nonsense"], "--storage 'nonsense' cannot be opened"),
        (["--storage", "sqlite:////proc/x/db.sqlite3"], "db.sqlite3' cannot be opened: [Errno 2]"),
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


def test_a_timeout_keeps_what_finished_and_says_so(run: Command, tmp_path: Path) -> None:
    done = run(*DIGITS, "--trials", "100000", "--timeout", "24s", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "--timeout: the budget of 100000 trials was not reached" in done.stderr
    assert TrialState.RUNNING not in states(tmp_path)
    _, record = registry.record(tmp_path / "saved_models")
    assert record["metrics"]["test"]["errors"] < 60  # of 257: it was not just begun


def test_a_full_disk_ends_with_one_line_and_loses_nothing(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(registry.os, "fsync", full)
        done = run(*DIGITS, "--trials", "2")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert registry.read(tmp_path / "saved_models")["models"] == {}
    assert run(*DIGITS, "--trials", "2").returncode == 0
    assert len(states(tmp_path)) == 2
    assert not list((tmp_path / "saved_models").glob(".*.tmp"))


def test_a_full_disk_under_the_database_ends_with_one_line_and_loses_nothing(
    run: Command, tmp_path: Path
) -> None:
    run(*DIGITS, "--trials", "2")
    kept = [trial.value for trial in study(tmp_path).trials]

    def small(connection: sqlite3.Connection, _: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", small)
    try:
        done = run(*DIGITS, "--trials", "60")
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", small)
    assert done.returncode == 1
    assert "database or disk is full; what was finished is kept" in done.stderr.splitlines()[-1]
    assert [trial.value for trial in study(tmp_path).trials[:2]] == kept
    more = str(len(states(tmp_path)) + 1)
    assert run(*DIGITS, "--trials", more).returncode == 0
    assert TrialState.RUNNING not in states(tmp_path)


def test_the_next_commands_name_the_registry_and_the_storage_in_use(run: Command) -> None:
    where = ["--output", "my models", "--storage", "sqlite:///mine.sqlite3", "--trials", "1"]
    run(*DIGITS, *where)
    done = run(*DIGITS, *where, "--promote", "never")
    assert "MODELS='my models' uvicorn serve.app:app" in done.stdout
    assert "optuna-dashboard sqlite:///mine.sqlite3" in done.stdout


def test_a_study_of_other_trials_is_not_continued(run: Command) -> None:
    run(*DIGITS, "--trials", "1", "--study", "mine")
    done = run(*DIGITS, "--trials", "2", "--study", "mine", "--epochs", "0.5")
    assert done.returncode == 2
    assert "study mine cannot be continued" in done.stderr
    assert "--study mine-2" in done.stderr


def test_help_names_every_option(run: Command) -> None:
    text = run("--help").stdout
    contract = (
        "dataset model trials epochs final-epochs timeout train-samples storage study workers"
    )
    more = "sampler pruner seed device data-dir output artifacts disk-quota promote quick json"
    for name in f"{contract} {more}".split():
        assert f"--{name} " in text


def test_a_short_real_search_beats_97_per_cent(
    run: Command, mnist: data.Dataset, tmp_path: Path
) -> None:
    done = run(
        *("--data-dir", str(DATA_DIR), "--json"),
        *("--quick", "--trials", "1", "--confirm", "0"),
        *("--epochs", "0.02", "--final-epochs", "0.16"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["test"]["n"] == 10_000
    assert result["metrics"]["test"]["errors"] < 300
    assert result["dataset"]["sha256"] == mnist.sha256
