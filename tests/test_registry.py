"""mnist.registry and mnist.inference: what is saved stays whole, and is loaded only if it is."""

import errno
import fcntl
import io
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mnist import inference, models, registry
from mnist.registry.__main__ import main
from tests.conftest import ROOT, Disk

DATASET = {"name": "made-up", "sha256": "0", "classes": ["0", "1"], "recipe": "plain"} | {
    "size": 28,
    "channels": 1,
    "mean": 0.1,
    "std": 0.3,
}


def entry(errors: int = 10, n: int = 100, **changes: Any) -> dict[str, Any]:
    """The least that registry.save takes."""
    return {
        "dataset": DATASET,
        "model": {"name": "linear"},
        "study": {"name": "made-up-linear", "trial": 0},
        "metrics": {
            "calibration": {"errors": errors, "n": n},
            "test": {"errors": 1, "n": 100, "accuracy": 0.99},
        },
        "quick": False,
    } | changes


def save(folder: Path, record: dict[str, Any], promote: str = "better") -> str:
    return registry.save(folder, {"weights": (".pth", b"weights")}, record, promote)


def current(folder: Path) -> str | None:
    return registry.read(folder)["current"]


def test_a_saved_model_is_found_with_its_files(tmp_path: Path) -> None:
    name = save(tmp_path, entry())
    assert registry.NAME.fullmatch(name)
    current_name, record = registry.record(tmp_path)
    assert current_name == name
    assert record["files"]["weights"]["bytes"] == 7
    assert registry.file(tmp_path, name).read_bytes() == b"weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        f"{name}.pth",
        "model_info.json",
    ]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, disk_calls: list[Disk]
) -> None:
    name = save(tmp_path, entry())
    calls = [call[:2] for call in disk_calls]
    expected = []
    for path in (tmp_path / f"{name}.pth", tmp_path / registry.INFO):
        inode, folder = path.stat().st_ino, tmp_path.stat().st_ino
        expected += [("sync", inode), ("rename", inode), ("sync", folder)]
    assert calls == expected
    assert [call.size for call in disk_calls[:2]] == [7, 7]


def test_a_file_beside_a_model_is_removed_with_it(tmp_path: Path) -> None:
    name, current = save(tmp_path, entry()), save(tmp_path, entry())
    registry.attach_file(tmp_path, name, ".report.html", b"page")
    assert (tmp_path / f"{name}.report.html").read_bytes() == b"page"
    assert list(registry.record(tmp_path, name)[1]["files"]) == ["weights"]
    registry.remove(tmp_path, name)
    assert not list(tmp_path.glob(f"*{name}.*"))
    assert (tmp_path / f"{current}.pth").exists()
    with pytest.raises(registry.UnknownModel):
        registry.attach_file(tmp_path, name, ".report.html", b"page")


def test_two_models_of_one_second_have_two_names(tmp_path: Path) -> None:
    names = {save(tmp_path, entry()) for _ in range(3)}
    assert len(names) == 3
    assert all(registry.NAME.fullmatch(name) for name in names)


def test_a_new_model_has_a_name_that_no_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=lambda zone: datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone))
    monkeypatch.setattr(registry, "datetime", clock)
    folder = tmp_path / "a" / "b"
    names = [save(folder, entry()) for _ in range(2)]
    (folder / registry.INFO).unlink()  # the record is lost, the models are not
    names.append(save(folder, entry(dataset=DATASET | {"classes": ["pâté", "數"]})))
    assert names == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]
    assert '"pâté"' in (folder / registry.INFO).read_text("utf-8")


@pytest.mark.parametrize(
    ("new", "promoted"),
    [
        (entry(errors=10), True),  # as good
        (entry(errors=9), True),
        (entry(errors=11), False),
        (entry(errors=0, quick=True), False),
        (entry(0, dataset=DATASET | {"classes": ["a", "b"]}), False),
        (entry(0, dataset=DATASET | {"name": "other", "sha256": "1"}), False),
        (entry(errors=15, n=200), True),  # 7.5 % against 10 %
        (entry(errors=21, n=200), False),  # 10.5 % against 10 %
    ],
)
def test_a_new_model_becomes_current_only_by_merit(
    tmp_path: Path, new: dict[str, Any], promoted: bool
) -> None:
    old = save(tmp_path, entry(errors=10))
    name = save(tmp_path, new)
    assert current(tmp_path) == (name if promoted else old)


@pytest.mark.parametrize(("wrong", "served", "promoted"), [(10, 8, 1), (10, 9, 0), (11, 7, 0)])
def test_a_model_that_is_worse_as_served_is_not_promoted(
    tmp_path: Path, wrong: int, served: int, promoted: bool
) -> None:
    def save_model(wrong: int, served: int) -> str:
        record = entry(wrong)
        record["metrics"]["calibration"]["served_errors"] = served
        return save(tmp_path, record)

    old, new = save_model(10, 8), save_model(wrong, served)
    assert current(tmp_path) == (new if promoted else old)


def test_promote_always_and_never_are_obeyed(tmp_path: Path) -> None:
    assert current(tmp_path) is None
    save(tmp_path, entry(), promote="never")
    assert current(tmp_path) is None
    save(tmp_path, entry(errors=1))
    worse = save(tmp_path, entry(errors=50), promote="always")
    assert current(tmp_path) == worse


def test_a_quick_model_gives_way_to_a_full_one(tmp_path: Path) -> None:
    save(tmp_path, entry(errors=10, quick=True))
    full = save(tmp_path, entry(errors=10))
    assert current(tmp_path) == full


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_at_any_moment_of_saving_leaves_the_registry_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    old = save(tmp_path, entry())
    before = registry.read(tmp_path)
    calls = iter(range(100))

    def crash(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            if next(calls) == moment:
                raise SystemExit("killed")
            return function(*args)

        return wrapped

    monkeypatch.setattr(os, "fsync", crash(os.fsync))
    monkeypatch.setattr(Path, "replace", crash(Path.replace))
    with pytest.raises(SystemExit):
        save(tmp_path, entry(errors=0))
    monkeypatch.undo()
    after = registry.read(tmp_path)
    if moment < 5:  # at 5 only the fsync of the folder remained
        assert after == before
    assert registry.file(tmp_path, old).read_bytes() == b"weights"
    new = save(tmp_path, entry(errors=0))
    assert current(tmp_path) == new


# Saves a model and is killed between its files and its record; or removes one, and is killed
# between its record and its files.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from mnist import registry

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

folder, what = Path(sys.argv[1]), sys.argv[2]
if what == "save":
    registry._write_info = kill
    entry = registry.record(folder)[1]
    files = {"weights": (".pth", b"new"), "predictions": (".test.npz", b"new")}
    registry.save(folder, files, entry, "always")
Path.unlink = kill
registry.remove(folder, what)
"""


def killed(folder: Path, what: str) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_kill_while_saving_leaves_the_previous_model_and_the_next_save_nothing_else(
    saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(saved, folder)
    others = {"20200101-000000.pth", "notes.txt"}  # a person's
    for name in others:
        (folder / name).write_text("mine")
    before, previous = names(folder), current(folder)
    killed(folder, "save")
    left = names(folder) - before
    assert {Path(name).suffix for name in left} == {".pth", ".npz", ".tmp"}
    assert current(folder) == previous
    assert inference.load(folder)(np.zeros((1, 1, 28, 28), np.uint8)).shape == (1, 10)
    new = save(folder, entry())
    assert names(folder) == before | {f"{new}.pth"}
    assert list(registry.read(folder)["models"]) == [previous, new]


def test_the_next_save_completes_a_killed_removal(tmp_path: Path) -> None:
    old, new = save(tmp_path, entry()), save(tmp_path, entry())
    killed(tmp_path, old)
    assert list(registry.read(tmp_path)["models"]) == [new]
    assert f"{old}.pth" in names(tmp_path)
    newer = save(tmp_path, entry())
    assert {name for name in names(tmp_path) if name.endswith(".pth")} == {
        f"{new}.pth",
        f"{newer}.pth",
    }


def test_a_model_without_its_record_is_not_removed_as_an_orphan(tmp_path: Path) -> None:
    name = save(tmp_path, entry())
    (tmp_path / "model_info.json").unlink()
    save(tmp_path, entry())
    assert (tmp_path / f"{name}.pth").exists()


def test_an_altered_or_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    name = save(tmp_path, entry())
    path = tmp_path / f"{name}.pth"
    path.write_bytes(b"weightz")
    with pytest.raises(registry.RegistryError, match=f"{name}.pth was altered"):
        registry.file(tmp_path, name)
    path.unlink()
    with pytest.raises(registry.RegistryError, match=f"{name}.pth: No such file"):
        registry.file(tmp_path, name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "20261121-120301/../x", "nothing"])
def test_an_unknown_name_is_refused_on_read_use_and_remove(tmp_path: Path, name: str) -> None:
    save(tmp_path, entry())
    for act in (registry.record, registry.use, registry.remove, registry.file):
        with pytest.raises(registry.RegistryError, match="no model"):
            act(tmp_path, name)


def test_the_current_model_is_not_removed_but_another_is(tmp_path: Path) -> None:
    old, new = save(tmp_path, entry()), save(tmp_path, entry())
    with pytest.raises(registry.RegistryError, match="is the current model"):
        registry.remove(tmp_path, new)
    registry.remove(tmp_path, old)
    assert list(registry.read(tmp_path)["models"]) == [new]
    assert not (tmp_path / f"{old}.pth").exists()


def test_unreadable_info_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_info.json").write_text("{")
    with pytest.raises(registry.RegistryError, match=r"model_info.json cannot be read"):
        registry.read(tmp_path)
    (tmp_path / "model_info.json").write_text('{"schema": 2}')
    with pytest.raises(registry.RegistryError, match="a newer version wrote it"):
        registry.read(tmp_path)


def without(*keys: str) -> Any:
    """A change that deletes the value at these keys from a model_info.json."""

    def change(info: Any) -> None:
        for key in keys[:-1]:
            info = info[key]
        del info[keys[-1]]

    return change


def put(value: Any, *keys: str) -> Any:
    """A change that puts `value` at these keys of a model_info.json."""

    def change(info: Any) -> None:
        for key in keys[:-1]:
            info = info[key]
        info[keys[-1]] = value

    return change


NAME = "20261121-120301"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("models"), "models"),
        (without("current"), "current"),
        (put("20200101-000000", "current"), "current"),
        (put(["x"], "current"), "current"),
        (put([], "models"), "models"),
        (put(None, "models", NAME), NAME),
        (without("models", NAME, "created"), f"{NAME} created"),
        (without("models", NAME, "quick"), f"{NAME} quick"),
        (without("models", NAME, "dataset"), f"{NAME} dataset"),
        (without("models", NAME, "dataset", "mean"), f"{NAME} dataset mean"),
        (put("28", "models", NAME, "dataset", "size"), f"{NAME} dataset size"),
        (put("linear", "models", NAME, "model"), f"{NAME} model"),
        (without("models", NAME, "study", "trial"), f"{NAME} study trial"),
        (without("models", NAME, "files"), f"{NAME} files"),
        (without("models", NAME, "files", "weights"), f"{NAME} files weights"),
        (put({}, "models", NAME, "files", "onnx"), f"{NAME} files onnx file"),
        (without("models", NAME, "metrics", "test"), f"{NAME} metrics test"),
        (without("models", NAME, "metrics", "calibration", "n"), f"{NAME} metrics calibration n"),
    ],
)
def test_info_of_another_shape_is_refused_in_a_line_that_says_where(
    tmp_path: Path, change: Any, named: str
) -> None:
    files = {"weights": {"file": f"{NAME}.pth", "sha256": "0", "bytes": 1}}
    whole = entry() | {"created": "2026-11-21T12:03:01Z", "files": files}
    info = {"schema": 1, "current": NAME, "models": {NAME: whole}}
    info = json.loads(json.dumps(info))
    path = tmp_path / "model_info.json"
    path.write_text(json.dumps(info | {"later": 1}))
    assert registry.record(tmp_path)[0] == NAME  # unknown keys are ignored
    change(info)
    path.write_text(json.dumps(info))
    with pytest.raises(registry.RegistryError, match=named) as refused:
        registry.read(tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "correct it" in message
    assert "\n" not in message


def test_info_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_info.json").write_text("[" * 100_000)
    with pytest.raises(registry.RegistryError, match="cannot be read"):
        registry.read(tmp_path)


def test_an_unknown_name_is_distinguished_from_a_broken_registry(tmp_path: Path) -> None:
    with pytest.raises(registry.UnknownModel, match="it has none"):
        registry.record(tmp_path, NAME)
    (tmp_path / "model_info.json").write_text("{")
    with pytest.raises(registry.RegistryError) as broken:
        registry.record(tmp_path, NAME)
    assert not isinstance(broken.value, registry.UnknownModel)


def test_the_command_says_in_a_line_that_a_folder_cannot_be_written(tmp_path: Path) -> None:
    # A file in the folder's place fails alike, and for the superuser too.
    (tmp_path / "file").touch()
    line = ["-m", "mnist.registry", "--folder", str(tmp_path / "file"), "use", NAME]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("registry: ")
    assert done.stderr.count("\n") == 1


def test_the_command_lists_uses_verifies_and_removes(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(saved, folder)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "mnist.registry", *words]
        environment = os.environ | {"MODELS": str(folder)}  # as of the server
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    name, _ = registry.record(folder)
    assert f"* {name}  digits  linear" in command("list").stdout
    empty = command("--folder", str(tmp_path / "none"), "list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "no models in" in empty.stderr
    assert command("verify").stdout == f"{name} ok\n"
    assert command("use", name).returncode == 0
    refused = command("remove", name)
    assert refused.returncode == 1
    assert refused.stderr.startswith("registry: ")
    assert "Traceback" not in refused.stderr


def test_every_model_is_verified_whatever_is_wrong_with_another(tmp_path: Path) -> None:
    names = [save(tmp_path, entry()) for _ in range(3)]
    (tmp_path / f"{names[0]}.pth").write_bytes(b"altered")
    (tmp_path / f"{names[2]}.pth").unlink()
    done = CliRunner().invoke(main, ["--folder", str(tmp_path), "verify"])
    assert done.stdout == f"{names[1]} ok\n"
    assert [f"{name}.pth" in str(done.exception) for name in names] == [True, False, True]


def test_a_saved_record_has_the_contract_s_fields(saved: Path) -> None:
    info = json.loads((saved / "model_info.json").read_text())
    assert info["schema"] == 1
    record = info["models"][info["current"]]
    assert set(record) >= {
        "created",
        "dataset",
        "model",
        "hyperparameters",
        "study",
        "files",
        "metrics",
        "calibration",
        "golden",
        "quick",
        "versions",
        "options",
        "seed",
        "commit",
    }
    assert set(record["dataset"]) == {
        "name",
        "sha256",
        "classes",
        "size",
        "channels",
        "recipe",
        "mean",
        "std",
        "splits",
    }
    assert record["dataset"]["splits"]["test"] == record["metrics"]["test"]["n"] == 257
    assert set(record["metrics"]["test"]) == {
        "errors",
        "n",
        "accuracy",
        "interval95",
        "served_errors",
        "per_class",
        "coverage",
        "set_size",
    }
    assert record["quick"] is True


@pytest.mark.parametrize("harm", ["no pickle", "another network", "unknown network", "code"])
def test_unusable_weights_are_refused_in_a_line_with_the_model_s_name(
    tmp_path: Path, harm: str
) -> None:
    stream = io.BytesIO()
    torch.save(models.build("linear", 1, 28, 10).state_dict(), stream)
    good = stream.getvalue()
    weights = {"no pickle": b"weights", "code": pickle.dumps(print, 2)}.get(harm, good)
    network = "nothing" if harm == "unknown network" else "linear"  # for two classes, not ten
    name = registry.save(
        tmp_path, {"weights": (".pth", weights)}, entry(model={"name": network}), "always"
    )
    with pytest.raises(registry.RegistryError, match=f"model {name} cannot be loaded: ") as refused:
        inference.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_classifier_gives_what_the_weights_give(saved: Path) -> None:
    name, record = registry.record(saved)
    model = models.build("linear", 1, 28, 10)
    model.load_state_dict(torch.load(saved / f"{name}.pth", weights_only=True))
    pictures = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), np.uint8)
    dataset = record["dataset"]
    with torch.no_grad():
        inputs = (torch.from_numpy(pictures / 255.0) - dataset["mean"]) / dataset["std"]
        expected = (model(inputs.float()) / record["calibration"]["temperature"]).softmax(1).numpy()
    classify = inference.load(saved, engine="torch")
    assert classify(pictures) == pytest.approx(expected, abs=1e-6)


def test_a_path_that_is_not_utf_8_is_recorded(tmp_path: Path) -> None:
    name = save(tmp_path, entry() | {"options": {"dataset": "folder:caf\udce9"}})
    _, record = registry.record(tmp_path, name)
    assert record["options"]["dataset"] == "folder:caf\udce9"


def test_a_record_has_the_time_of_saving_in_utc_and_names_the_golden_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        files = {"weights": (".pth", b"weights"), "golden": (".golden.npz", b"golden")}
        name = registry.save(tmp_path, files, entry(), "better")
    finally:
        monkeypatch.undo()
        time.tzset()
    record = registry.record(tmp_path, name)[1]
    created = datetime.fromisoformat(record["created"])
    assert abs(datetime.now(UTC) - created) < timedelta(hours=1)
    assert record["created"].endswith("Z")
    assert created.strftime("%Y%m%d-%H%M%S") == name
    assert record["golden"] == f"{name}.golden.npz"
    assert "golden" not in registry.record(tmp_path, save(tmp_path, entry()))[1]


def test_a_version_changes_with_its_file(tmp_path: Path) -> None:
    file, missing = tmp_path / "file", tmp_path / "missing"
    file.write_bytes(b"1")
    before = registry.versions([file, missing])
    assert before[0] is not None
    assert before[1] is None
    assert registry.versions([file, missing]) == before
    os.utime(file, ns=(1, 1))
    touched = registry.versions([file])[0]
    (tmp_path / "new").write_bytes(b"2")
    (tmp_path / "new").replace(file)
    os.utime(file, ns=(1, 1))
    assert len({before[0], touched, registry.versions([file])[0]}) == 3


def test_the_default_folder_is_the_sample_s_until_there_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert registry.default_folder() == registry.SAMPLE
    save(registry.FOLDER, entry())
    assert registry.default_folder() == registry.FOLDER


@pytest.mark.parametrize("has_served_errors", ["old", "new"])
def test_errors_as_served_count_only_where_both_models_have_them(
    tmp_path: Path, has_served_errors: str
) -> None:
    records = {name: entry(errors=10) for name in ("old", "new")}
    records[has_served_errors]["metrics"]["calibration"]["served_errors"] = 5
    save(tmp_path, records["old"])
    assert save(tmp_path, records["new"]) == current(tmp_path)


def test_a_model_is_used_only_if_all_its_files_are_whole(tmp_path: Path) -> None:
    files = {"weights": (".pth", b"weights"), "onnx": (".onnx", b"onnx")}
    old = registry.save(tmp_path, files, entry(), "always")
    new = save(tmp_path, entry(), "always")  # which has fewer files
    registry.use(tmp_path, old)
    assert current(tmp_path) == old
    assert {*registry.read(tmp_path)["models"]} == {old, new}
    registry.use(tmp_path, new)
    (tmp_path / f"{old}.onnx").write_bytes(b"altered")
    with pytest.raises(registry.RegistryError, match=f"{old}.onnx was altered"):
        registry.use(tmp_path, old)
    assert current(tmp_path) == new


def test_a_model_whose_file_is_gone_can_be_removed(tmp_path: Path) -> None:
    old = save(tmp_path, entry())
    save(tmp_path, entry())
    (tmp_path / f"{old}.pth").unlink()
    registry.remove(tmp_path, old)
    assert old not in registry.read(tmp_path)["models"]


def test_a_folder_is_made_and_checked_before_a_training(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        registry.check_writable(folder)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(registry.RegistryError, match=r"cannot write to .*/file/b: Not a directory"):
        registry.check_writable(tmp_path / "file" / "b")
    (folder / registry.INFO).write_text("{")
    with pytest.raises(registry.RegistryError, match="cannot be read"):
        registry.check_writable(folder)


def test_without_a_current_model_the_message_says_what_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(registry.RegistryError, match=r"no current model in .* `python run.py`"):
        registry.record(tmp_path)
    folder = tmp_path / "my models"
    name = save(folder, entry(), "never")
    command = f"`python -m mnist.registry --folder '{folder}' use NAME` makes one current: {name}"
    with pytest.raises(registry.RegistryError, match=re.escape(command)):
        registry.record(folder)
    monkeypatch.chdir(tmp_path)
    name = save(registry.FOLDER, entry(), "never")
    with pytest.raises(registry.RegistryError, match=f"registry use NAME` makes .*: {name}"):
        registry.record(registry.FOLDER)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folders_is_accepted(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    if code == errno.EIO:  # of a failing disk
        with pytest.raises(OSError, match="Input/output error"):
            save(tmp_path, entry())
    else:
        name = save(tmp_path, entry())
        assert current(tmp_path) == name


def test_a_folder_that_cannot_be_locked_is_refused_before_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(registry.RegistryError, match=r"cannot write to .*: No locks available"):
        registry.check_writable(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_readable_by_those_whom_the_umask_admits(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        name = save(tmp_path, entry())
        registry.attach_file(tmp_path, name, ".report.html", b"report")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.iterdir() if path.name != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert len(files) == 3


def test_info_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    name = save(tmp_path, entry())
    info = tmp_path / registry.INFO
    info.write_text("\ufeff" + info.read_text().replace("\n", "\r\n"))
    assert registry.record(tmp_path)[0] == name


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://***@host/db"),
        ("postgresql://me:s3@cret@host/db", "postgresql://***@host/db"),
        ("postgresql://me:p?s3cret@host/db", "postgresql://***"),
        (
            "postgresql://h/db?sslmode=on&password=s3cret",
            "postgresql://h/db?sslmode=on&password=***",
        ),
        ("postgresql://***@host/db?user=***", "postgresql://***@host/db?user=***"),
        ("sqlite:////home/me@work/db.sqlite3", "sqlite:////home/me@work/db.sqlite3"),
        ("***", "***"),
        (None, None),
    ],
)
def test_a_secret_in_an_older_record_is_not_shown(
    storage: str | None, shown: str | None, tmp_path: Path
) -> None:
    name = save(tmp_path, entry(options={"storage": storage, "trials": 3}))
    assert registry.record(tmp_path, name)[1]["options"] == {"storage": shown, "trials": 3}
    registry.use(tmp_path, name)
    assert "s3" not in (tmp_path / registry.INFO).read_text()


def test_an_object_store_is_not_taken_for_a_folder() -> None:
    with pytest.raises(registry.RegistryError, match="s3://bucket/models is an object store"):
        registry.read(Path("s3://bucket/models"))
