"""mnist.registry and mnist.inference: what is saved stays whole, and is loaded only if it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist import inference, models, registry


def entry(errors: int = 10, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": {"name": "made-up", "sha256": "0", "classes": ["0", "1"]},
        "metrics": {"calibration": {"errors": errors, "n": 100}},
        "quick": False,
    } | changes


def save(folder: Path, record: dict[str, Any], promote: str = "better") -> str:
    return registry.save(folder, {"weights": (".pth", b"weights")}, record, promote)


def current(folder: Path) -> str | None:
    return registry.read(folder)["current"]


def test_a_saved_model_is_found_with_its_files(tmp_path: Path) -> None:
    name = save(tmp_path, entry())
    assert registry.NAME.fullmatch(name)
    found, record = registry.record(tmp_path)
    assert found == name
    assert record["files"]["weights"]["bytes"] == 7
    assert registry.file(tmp_path, name).read_bytes() == b"weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        f"{name}.pth",
        "model_info.json",
    ]


def test_two_models_of_one_second_have_two_names(tmp_path: Path) -> None:
    names = {save(tmp_path, entry()) for _ in range(3)}
    assert len(names) == 3
    assert all(registry.NAME.fullmatch(name) for name in names)


@pytest.mark.parametrize(
    ("new", "promoted"),
    [
        (entry(errors=10), True),  # as good
        (entry(errors=9), True),
        (entry(errors=11), False),
        (entry(errors=0, quick=True), False),
        (entry(0, dataset={"name": "made-up", "sha256": "0", "classes": ["a", "b"]}), False),
        (entry(0, dataset={"name": "other", "sha256": "1", "classes": ["0", "1"]}), False),
        (entry(10, metrics={"calibration": {"errors": 15, "n": 200}}), True),  # 7.5 % against 10 %
    ],
)
def test_a_new_model_becomes_current_only_by_merit(
    tmp_path: Path, new: dict[str, Any], promoted: bool
) -> None:
    old = save(tmp_path, entry(errors=10))
    name = save(tmp_path, new)
    assert current(tmp_path) == (name if promoted else old)


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

    monkeypatch.setattr(registry.os, "fsync", crash(registry.os.fsync))
    monkeypatch.setattr(Path, "replace", crash(Path.replace))
    with pytest.raises(SystemExit):
        save(tmp_path, entry(errors=0))
    monkeypatch.undo()
    after = registry.read(tmp_path)
    if moment < 5:  # at 5 only the folder's own fsync was left to do
        assert after == before
    assert registry.file(tmp_path, old).read_bytes() == b"weights"
    new = save(tmp_path, entry(errors=0))
    assert current(tmp_path) == new


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
def test_a_name_that_is_no_model_is_refused_on_read_use_and_remove(
    tmp_path: Path, name: str
) -> None:
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


def test_the_command_lists_uses_verifies_and_removes(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(saved, folder)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "mnist.registry", "--folder", str(folder), *words]
        return subprocess.run(line, capture_output=True, text=True)

    name, _ = registry.record(folder)
    assert f"* {name}  digits  linear" in command("list").stdout
    assert command("verify").stdout == f"{name} ok\n"
    assert command("use", name).returncode == 0
    refused = command("remove", name)
    assert refused.returncode == 1
    assert refused.stderr.startswith("registry: ")
    assert "Traceback" not in refused.stderr


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
    }
    assert record["quick"] is True


def test_the_classifier_gives_what_the_weights_give(saved: Path) -> None:
    name, record = registry.record(saved)
    model = models.build("linear", 1, 28, 10)
    model.load_state_dict(torch.load(saved / f"{name}.pth", weights_only=True))
    pictures = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), np.uint8)
    about = record["dataset"]
    with torch.no_grad():
        inputs = (torch.from_numpy(pictures / 255.0) - about["mean"]) / about["std"]
        expected = model(inputs.float()).softmax(1).numpy()
    assert inference.load(saved)(pictures) == pytest.approx(expected, abs=1e-6)
