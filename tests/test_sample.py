"""serve/sample_model: the model that answers before any training."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from benchmarks import load, servers
from mnist import images, inference, predict, registry
from serve import engine
from serve.app import app
from tests.conftest import ROOT
from tests.test_app import png
from tests.test_engine import until
from tests.test_page import ANSWERED, draw

MOST_BYTES = 300_000


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, without saved_models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODELS", raising=False)
    monkeypatch.setattr(engine, "POLL_S", 0.02)
    return tmp_path


@pytest.fixture
def seven() -> bytes:
    picture = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(picture).line([(30, 20), (70, 20), (45, 80)], fill=0, width=8)
    return png(np.asarray(picture))


def test_the_sample_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in registry.SAMPLE.iterdir()) < MOST_BYTES
    name, record = registry.record(registry.SAMPLE)
    for kind in record["files"]:
        registry.file(registry.SAMPLE, name, kind)
    assert record["metrics"]["test"]["errors"] < 100


def test_the_sample_answers_until_a_model_is_saved(empty: Path, saved: Path, seven: bytes) -> None:
    with TestClient(app) as client:
        ready = client.get("/ready").json()
        assert ready["sample"] == registry.SAMPLE_NOTE
        answer = client.post("/predict", content=seven).json()
        assert (answer["prediction"], answer["model"]) == ("7", ready["model"])
        assert [model["name"] for model in client.get("/models").json()["models"]] == [
            ready["model"]
        ]
        shutil.copytree(saved, empty / "saved_models")
        name = until(client, lambda ready: "sample" not in ready)["model"]
        assert name == registry.record(saved)[0]
        assert client.post("/predict", content=seven).json()["model"] == name
        assert client.get(f"/models/{ready['model']}").status_code == 404


def test_the_sample_answers_after_a_bad_first_model(empty: Path, saved: Path, seven: bytes) -> None:
    with TestClient(app) as client:
        sample = client.get("/ready").json()["model"]
        shutil.copytree(saved, empty / "new")
        for path in [*(empty / "new").glob("*.pth"), *(empty / "new").glob("*.onnx")]:
            path.write_bytes(b"?")
        (empty / "new").rename(empty / "saved_models")
        refused = until(client, lambda ready: "refused" in ready)
        assert (refused["model"], refused["sample"]) == (sample, registry.SAMPLE_NOTE)
        assert client.post("/predict", content=seven).json()["model"] == sample


@pytest.mark.usefixtures("empty")
def test_the_sample_does_not_replace_a_configured_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path / "saved_models"))
    with TestClient(app) as client:
        assert client.get("/ready").status_code == 503


def test_predict_uses_the_sample_and_prints_a_note(
    empty: Path, seven: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "7.png").write_bytes(seven)
    assert predict.run_cli(["7.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("7.png  7  ")
    assert printed.err == f"predict: {registry.SAMPLE_NOTE}\n"


@pytest.fixture
def port(empty: Path, seven: bytes) -> Iterator[int]:
    del empty
    command = ("-m", "uvicorn", "--app-dir", str(ROOT), "serve.app:app")
    with servers.server(None, load.request("/predict", seven), command) as server:
        yield server.port


@pytest.mark.slow
def test_the_page_works_before_any_training(port: int, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#state[data-state=ready]")
    assert registry.SAMPLE_NOTE in page.inner_text("#about")
    draw(page)
    page.wait_for_function(ANSWERED)
    assert page.inner_text("#class") == "7"
    page.close()


@pytest.mark.parametrize("number", ["10", "42", "333"])
def test_a_number_of_several_digits_is_uncertain(number: str) -> None:
    page = np.full((300, 500), 255, np.uint8)
    cv2.putText(page, number, (60, 220), cv2.FONT_HERSHEY_SIMPLEX, 6, 0, 14)
    picture = images.normalise(cv2.imencode(".png", page)[1].tobytes())
    assert inference.load(registry.SAMPLE).predict(picture[None]).uncertain.all()
