"""mnist.shell: what the commands share."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mnist import predict, shell
from mnist.registry import __main__ as registry_command
from serve.settings import Settings
from tests.conftest import ROOT


def test_a_path_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    convert = shell.UserPath(path_type=Path).convert
    assert convert("~/x", None, None) == tmp_path / "x"
    assert convert(Path("~"), None, None) == tmp_path
    assert convert("a~b", None, None) == Path("a~b")
    assert convert("~nobody-of-this-name/x", None, None) == Path("~nobody-of-this-name/x")


def test_an_unexpected_error_is_one_line_and_its_traceback_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell.tempfile, "tempdir", str(tmp_path))
    try:
        raise KeyError("postgresql://me:s3cret@host/db?password=s3cret\nmore")
    except KeyError as error:
        line = shell.describe_crash(error)
    assert line.startswith("unexpected KeyError: 'postgresql://***@host/db?password=***")
    assert "\n" not in line
    (file,) = tmp_path.iterdir()
    assert line.endswith(f"; the traceback is in {file}")
    assert "line " in file.read_text()
    assert "s3cret" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(shell.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert shell.describe_crash(ValueError("so")) == "unexpected ValueError: so"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(predict, ["x.png", "--models", "x"]), (registry_command, ["--folder", "x", "list"])],
)
def test_each_command_reports_an_unexpected_error_in_one_line(
    command: object,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("made up")

    monkeypatch.setattr(shell.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(predict.registry, "record", fail)
    monkeypatch.setattr(predict.registry, "read", fail)
    assert command.run_cli(arguments) == 1  # type: ignore[attr-defined]
    line = capsys.readouterr().err
    assert re.fullmatch(r"\w+: unexpected LookupError: made up; the traceback is in \S+\n", line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_is_not_utf_8_shows_the_letters_that_it_lacks_as_escapes(
    encoding: str,
) -> None:
    program = "from mnist import shell; shell.accept_any_text(); print('3 ± 1 …')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout == "3 ± 1 …\n".encode(encoding, "backslashreplace")


def test_the_server_s_folders_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HOME": tmp_path, "MODELS": "~/x", "FEEDBACK_DIR": "~/y"}.items():
        monkeypatch.setenv(name, str(value))
    settings = Settings()
    assert (settings.models, settings.feedback_dir) == (tmp_path / "x", tmp_path / "y")
