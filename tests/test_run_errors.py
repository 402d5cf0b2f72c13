"""run.py where its study, its database or its surroundings fail: one line, and the truth in it."""

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

import optuna
import pytest
from fastapi.testclient import TestClient
from optuna.trial import TrialState

import run as run_module
from mnist import data, registry, shell
from mnist.job import prepare
from mnist.job.options import Options
from mnist.search import loop
from mnist.search.checkpoints import NoRoom
from mnist.search.claims import Trials
from mnist.search.storage import StorageError, StudyGone
from serve.app import app
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures", "known_speed")

URL = "sqlite:///db.sqlite3"
NAME = "digits-linear-quick"
KEPT = "finished work is kept; the same command continues from here"


def test_a_study_that_is_deleted_in_mid_run_ends_it_with_one_line(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(*_: object, **__: object) -> None:
        optuna.delete_study(study_name=NAME, storage=URL)
        real(*_, **__)

    real = Trials.tell
    monkeypatch.setattr(Trials, "tell", tell)
    done = run(*DIGITS, *SHORT)
    assert (done.returncode, done.stdout) == (1, "")
    *progress, line = done.stderr.splitlines()
    assert line.startswith(f"run.py: study {NAME} is gone from {URL}: it was deleted or renamed; ")
    assert "command continues" not in line
    assert not any("run.py:" in other for other in progress)


def test_a_study_of_another_direction_or_optuna_is_refused_in_one_line(
    run: Command, tmp_path: Path
) -> None:
    optuna.create_study(storage=URL, study_name=NAME)
    minimised = run(*DIGITS, *SHORT)
    with contextlib.closing(sqlite3.connect("db.sqlite3")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.commit()
    older = run(*DIGITS, *SHORT)
    for done, words in (
        (minimised, "has the direction minimize"),
        (older, "optuna storage upgrade"),
    ):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr
    assert not [*tmp_path.rglob("*.pth")]


def test_a_password_in_a_storage_url_is_in_no_output_record_or_response(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "sqlite:///file:db.sqlite3?uri=true&password=s3cretWord"
    done = run(*DIGITS, *SHORT, "--storage", url)
    assert done.returncode == 0, done.stderr
    assert "password=***" in done.stdout
    monkeypatch.setenv("MODELS", str(tmp_path / "saved_models"))
    with TestClient(app) as client:
        (model,) = client.get("/models").json()["models"]
        response = client.get(f"/models/{model['name']}").text
    assert "password=***" in response
    assert "s3cretWord" not in done.stdout + done.stderr + response
    assert not [path for path in tmp_path.rglob("*.*") if b"s3cretWord" in path.read_bytes()]


def test_an_enqueued_trial_outside_the_space_is_reported_and_the_study_is_finished(
    run: Command,
) -> None:
    assert run(*DIGITS, *SHORT).returncode == 0
    study = optuna.load_study(study_name=NAME, storage=URL)
    study.enqueue_trial({"optimizer": "AdamW", "lr": 0.001, "batch_size": 64})
    done = run(*DIGITS, *SHORT, "--trials", "2")
    assert done.returncode == 0, done.stderr
    assert "trial 1 failed: space: optimizer 'AdamW' is not in " in done.stdout
    assert [trial.state for trial in study.trials][1] == TrialState.FAIL
    assert len(study.trials) == 3


def test_a_study_may_have_any_printable_name(run: Command, tmp_path: Path) -> None:
    name = "/../../[/old] :x: é" + "n" * 300
    done = run(*DIGITS, *SHORT, "--study", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"]["name"] == name
    assert f"study {name}: 0 of 1" in done.stderr
    assert run(*DIGITS, *SHORT, "--study", name).stderr == ""
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "artifacts",
        "saved_models",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--study", "n" * 513], "has 513 letters, more than 512"),
        (["--study", "a\nb"], r"'a\nb' has letters that cannot be printed"),
        (["--storage", "sqlite://"], "'sqlite://' cannot be opened: it is in memory, and nothing"),
        (["--storage", "postgresql://me:p@ss@host/db"], "'postgresql://***' cannot be opened: "),
    ],
)
def test_a_name_or_a_storage_that_cannot_hold_a_study_is_refused(
    run: Command, tmp_path: Path, options: list[str], words: str
) -> None:
    done = run(*DIGITS, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (loop.Unfinished("--timeout: x"), "--timeout: x; the same command continues from here"),
        (loop.SearchFailed("5 trials failed"), "5 trials failed"),
        (
            StorageError("x: locked", passing=True),
            "x: locked; finished work is kept; the same command continues",
        ),
        (StorageError("x: readonly"), "x: readonly"),
        (StudyGone("s", "x", "deleted"), "study s is gone from x: deleted; this command starts"),
        (NoRoom("no room"), f"no room; {KEPT}"),
        (
            OSError(28, "No space"),
            "[Errno 28] No space; finished work is kept; the same command continues",
        ),
        (PermissionError(13, "Denied", "x"), "[Errno 13] Denied: 'x'"),
    ],
)
def test_a_line_says_that_the_command_continues_only_where_it_does(
    run: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "run", fail)
    done = run(*DIGITS)
    assert done.returncode == 1
    assert done.stderr.startswith(f"run.py: {line}")
    assert ("command continues" in line) == ("command continues" in done.stderr)


def test_studies_that_cannot_continue_do_not_promise_to_continue() -> None:
    gone, invalid = StudyGone("s", "x", "deleted"), registry.RegistryError("x")
    later = loop.Unfinished("--timeout")
    kinds = [
        type(run_module.combine_errors(dict(zip("ab", errors, strict=False))))
        for errors in ([later, gone], [gone, invalid], [invalid])
    ]
    assert [kind.__name__ for kind in kinds] == ["Unfinished", "SearchFailed", "UsageError"]


def test_an_unexpected_error_is_one_line(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run_module.prepare, "prepare", lambda *_: {}["made up"])
    done = run(*DIGITS)
    assert done.returncode == 1
    assert done.stderr.startswith("run.py: unexpected KeyError: 'made up'; the traceback is in ")
    assert done.stderr.count("\n") == 1
    assert "command continues" not in done.stderr


def test_data_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "pets/cat")

    monkeypatch.setattr(data, "load", deny)
    with pytest.raises(run_module.click.UsageError, match="Permission denied: 'pets/cat'"):
        prepare.load_dataset(Options())


def test_the_home_folder_may_stand_in_every_path(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "space.toml").write_text('lr = "0.01"')
    (tmp_path / "home" / "own.py").write_text("# nothing")
    options = ["--output=~/models", "--artifacts=~/artifacts", "--data-dir=~/data"]
    options += ["--space=~/space.toml", "--import=~/own.py", "--storage=sqlite:///~/db.sqlite3"]
    done = run(*DIGITS, *SHORT, *options)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert {"models", "artifacts", "db.sqlite3"} <= {p.name for p in (tmp_path / "home").iterdir()}


def test_a_folder_of_an_unknown_user_is_named(run: Command) -> None:
    done = run("--dataset", "folder:~nobody-of-this-name/pets")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no folder ~nobody-of-this-name/pets" in done.stderr


def test_a_closed_standard_error_leaves_standard_output_to_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert run_module.run_cli(["--trials", "x"]) == 2
    assert capsys.readouterr().out == ""
