"""serve/visibility.py: what GET routes show without an API key."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mnist import registry
from serve.app import app
from tests.test_app import refused

KEY = {"X-API-Key": "secret"}
NAME = registry.record(registry.SAMPLE)[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry whose record has a secret in each entry that is not for everybody."""
    folder = Path(shutil.copytree(registry.SAMPLE, tmp_path / "registry"))
    info = registry.read(folder)
    private = {key: f"/home/{key}" for key in ("imports", "commit", "versions", "new")}
    record: dict[str, Any] = info["models"][NAME]  # type: ignore[assignment]
    record |= private | {"options": {"output": "/home/options"}}
    record["study"]["storage"] = "/home/storage"
    (folder / registry.INFO).write_text(json.dumps(info))
    monkeypatch.setenv("MODELS", str(folder))
    return folder


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("API_KEYS", "secret")
    with TestClient(app) as client:
        yield client


def test_a_record_without_a_key_has_its_public_part(client: TestClient, folder: Path) -> None:
    whole = registry.record(folder)[1]
    assert client.get(f"/models/{NAME}", headers=KEY).json() == whole
    for headers in ({}, {"X-API-Key": "wrong"}):
        public = client.get(f"/models/{NAME}", headers=headers).json()
        assert "/home/" not in str(public)
        assert public["dataset"] == whole["dataset"]  # the page needs the classes
        assert public["metrics"] == whole["metrics"]
        assert public["study"]["name"] == whole["study"]["name"]
    assert client.get("/models").json() == client.get("/models", headers=KEY).json()


def test_without_keys_everybody_sees_the_whole_record(folder: Path) -> None:
    with TestClient(app) as client:
        assert client.get(f"/models/{NAME}").json() == registry.record(folder)[1]


def test_a_record_with_a_path_that_is_not_utf_8_and_without_a_number_is_shown(folder: Path) -> None:
    info = registry.read(folder)
    record: Any = info["models"][NAME]
    record["dataset"]["name"] = record["options"]["data_dir"] = "folder:caf\udce9"
    record["metrics"]["test"]["accuracy"] = record["options"]["timeout"] = float("nan")
    (folder / registry.INFO).write_text(json.dumps(info))
    with TestClient(app) as client:
        shown = client.get(f"/models/{NAME}")
        summary = client.get("/models")
    for response in (shown, summary):
        assert (response.status_code, b"NaN" in response.content) == (200, False)
    assert shown.json()["options"]["data_dir"] == "folder:caf\udce9"
    assert shown.json()["options"]["timeout"] is None
    assert summary.json()["models"][0]["test_accuracy"] is None


def test_a_reason_without_a_key_has_no_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / registry.INFO).write_text("{")
    monkeypatch.setenv("API_KEYS", "secret")
    with TestClient(app) as client:
        for headers in ({}, KEY):
            ready = client.get("/ready", headers=headers)
            assert ready.status_code == 503
            assert set(ready.json()) == {"status", "reason", "refused"}
            models = client.get("/models", headers=headers)
            refused(models, 503, "no_model")
            for response in (ready, models):
                assert (str(folder) in response.text) == bool(headers)
        assert str(folder) in client.post("/predict", headers=KEY).text
