"""mnist.inference: a saved model answers alike in every engine, or another engine answers."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist import conformal, data, export, inference, models, registry
from tests.conftest import ROOT
from tests.test_export import fresh, small
from tests.test_registry import entry

HEAVY = {"torch", "torchvision", "optuna", "sklearn", "scipy", "onnx", "matplotlib"}


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model's registry, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "registry"))


def rewrite(folder: Path, kind: str, content: bytes) -> None:
    """Replace a file of the current model, and its checksum in the record."""
    path = registry.file(folder, registry.record(folder)[0], kind)
    path.write_bytes(content)
    change(folder, lambda record: record["files"][kind].update(sha256=sha256(content)))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def change(folder: Path, edit: Any) -> None:
    info = json.loads((folder / registry.INFO).read_text())
    edit(info["models"][info["current"]])
    (folder / registry.INFO).write_text(json.dumps(info))


def other_golden(folder: Path, engine: str, first: int = 0) -> None:
    """Change the stored probabilities of the golden inputs from `first` on."""
    with np.load(registry.file(folder, registry.record(folder)[0], "golden")) as golden:
        parts = dict(golden)
    parts[engine][first:] = np.roll(parts[engine], 1, axis=1)[first:]
    stream = io.BytesIO()
    np.savez(stream, **parts)
    rewrite(folder, "golden", stream.getvalue())


@pytest.mark.parametrize("engine", inference.ENGINE_FILES)
def test_every_engine_reads_pictures_as_the_others_do(
    saved: Path, digits: data.Dataset, engine: str
) -> None:
    images = digits.validation.images.numpy()
    classify = inference.load(saved, engine=engine)
    assert classify.engine == engine
    assert classify.skipped_engines == {}
    predicted = classify(images)
    assert predicted.dtype == np.float32
    assert predicted.sum(1) == pytest.approx(1, abs=1e-5)
    wanted = inference.load(saved, engine="torch")(images)
    assert predicted == pytest.approx(wanted, abs=0.1 if engine == "onnx_int8" else 1e-5)
    alone = np.concatenate([classify(image[None]) for image in images[:20]])
    assert alone == pytest.approx(predicted[:20], abs=1e-6)


@pytest.mark.parametrize("engine", inference.ENGINE_FILES)
def test_every_engine_is_uncertain_of_the_same_pictures(
    saved: Path, digits: data.Dataset, engine: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28), np.uint8)
    images = np.concatenate([digits.validation.images.numpy(), noise])
    wanted = inference.load(saved, engine="torch")
    classify = inference.load(saved, engine=engine)
    predicted = classify.scores(*classify.outputs(images))
    assert predicted == pytest.approx(wanted.scores(*wanted.outputs(images)), rel=0.1)
    shares, uncertain, sets = classify.predict(images)
    assert classify.set_limits is not None
    assert np.array_equal(sets, conformal.make_sets(shares, predicted, classify.set_limits))
    assert np.array_equal(shares, classify(images))
    assert np.array_equal(uncertain, predicted < classify.uncertain_below)


def test_an_older_record_is_never_uncertain(folder: Path) -> None:
    def make_old(record: dict[str, Any]) -> None:
        del record["files"]["likeness"]
        record["calibration"] = {"temperature": record["calibration"]["temperature"]}

    noise = np.random.default_rng(0).integers(0, 256, (20, 1, 28, 28), np.uint8)
    change(folder, make_old)
    assert not inference.load(folder).predict(noise)[1].any()


def test_auto_takes_int8(saved: Path) -> None:
    assert inference.load(saved).engine == "onnx_int8"


def test_on_a_gpu_auto_takes_torch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "NVIDIA", (saved,))
    assert inference.load(saved).engine == "onnx_int8"  # a device file alone is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda model: model)
    assert inference.load(saved).engine == "torch"


def test_torch_answers_several_threads_at_once(saved: Path, digits: data.Dataset) -> None:
    classify = inference.load(saved, engine="torch")
    images = digits.validation.images[:8].numpy()
    expected, expected_uncertain, _ = classify.predict(images)
    with ThreadPoolExecutor(4) as threads:
        for predicted, uncertain, _ in threads.map(lambda _: classify.predict(images), range(200)):
            assert predicted == pytest.approx(expected, abs=1e-6)
            assert (uncertain == expected_uncertain).all()


def test_more_images_than_one_part_are_all_answered(saved: Path) -> None:
    images = np.random.default_rng(0).integers(
        0, 256, (inference.BATCH_SIZE + 3, 1, 28, 28), np.uint8
    )
    classify = inference.load(saved)
    parts = [classify(images[:7]), classify(images[7:])]
    assert classify(images) == pytest.approx(np.concatenate(parts))


def test_an_engine_that_fails_the_golden_inputs_gives_way_to_the_next(folder: Path) -> None:
    other_golden(folder, "onnx_int8")
    classify = inference.load(folder)
    assert classify.engine == "onnx"
    assert "golden inputs" in classify.skipped_engines["onnx_int8"]
    other_golden(folder, "onnx")
    classify = inference.load(folder)
    assert classify.engine == "torch"
    assert list(classify.skipped_engines) == ["onnx_int8", "onnx"]
    other_golden(folder, "torch")
    with pytest.raises(registry.RegistryError, match=r"cannot be loaded: .*torch: golden inputs"):
        inference.load(folder)


def test_a_preflighted_model_is_checked_with_one_golden_input(folder: Path) -> None:
    other_golden(folder, "onnx_int8", first=1)
    assert inference.load(folder).engine == "onnx"
    assert inference.load(folder, preflighted=True).engine == "onnx_int8"
    other_golden(folder, "onnx_int8")
    assert inference.load(folder, preflighted=True).engine == "onnx"


def test_a_file_the_runtime_cannot_read_gives_way_to_the_next(folder: Path) -> None:
    rewrite(folder, "onnx_int8", b"no ONNX")
    classify = inference.load(folder)
    assert classify.engine == "onnx"
    assert classify.skipped_engines["onnx_int8"]


def test_a_model_of_another_shape_is_not_served(folder: Path) -> None:
    dataset = small(1, 28, 4)
    wrong = export.to_onnx(models.build("linear", 1, 28, 4), dataset)
    for kind in ("onnx", "onnx_int8"):
        rewrite(folder, kind, wrong)
    classify = inference.load(folder)
    assert classify.engine == "torch"
    assert "no 10 probabilities" in classify.skipped_engines["onnx"]


@pytest.mark.parametrize("kind", ["onnx_int8", "golden"])
def test_an_altered_or_missing_file_is_no_reason_to_use_another(folder: Path, kind: str) -> None:
    path = registry.file(folder, registry.record(folder)[0], kind)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(registry.RegistryError, match=f"{path.name} was altered"):
        inference.load(folder)
    path.unlink()
    with pytest.raises(registry.RegistryError, match=f"{path.name}: No such file"):
        inference.load(folder)


def test_an_old_record_without_onnx_files_is_served_by_torch(folder: Path) -> None:
    wanted = inference.load(folder, engine="torch")(np.zeros((1, 1, 28, 28), np.uint8))

    def make_old(record: dict[str, Any]) -> None:
        for kind in ("onnx", "onnx_int8", "golden", "likeness"):
            del record["files"][kind]
        for key in ("golden", "engines", "calibration"):
            del record[key]

    temperature = registry.record(folder)[1]["calibration"]["temperature"]
    change(folder, make_old)
    classify = inference.load(folder)
    assert classify.engine == "torch"
    assert classify.skipped_engines == {
        "onnx_int8": "there is no onnx_int8 file",
        "onnx": "there is no onnx file",
    }
    predicted = inference.probabilities(
        classify.logits(np.zeros((1, 1, 28, 28), np.uint8)), temperature
    )
    assert predicted == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(registry.RegistryError, match="onnx_int8: there is no onnx_int8 file"):
        inference.load(folder, engine="onnx_int8")


def test_an_unknown_engine_is_named_with_those_there_are(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"'fast'; known: auto, onnx_int8, onnx, torch"):
        inference.load(saved, engine="fast")


def test_the_recorded_temperature_is_applied_in_every_engine(folder: Path) -> None:
    change(folder, lambda record: record["files"].pop("golden"))
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28), np.uint8)
    for engine in inference.ENGINE_FILES:
        change(folder, lambda record: record.update(calibration={"temperature": 2.0}))
        classify = inference.load(folder, engine=engine)
        wanted = torch.softmax(torch.from_numpy(classify.logits(image)) / 2, 1).numpy()
        assert classify(image) == pytest.approx(wanted, abs=1e-6)


# Starts the server as uvicorn does, and prints what it answered with and has imported by then.
SERVE = """
import asyncio, json, sys
from pathlib import Path
from serve.app import app

async def scenario():
    async with app.router.lifespan_context(app):
        engine = app.state.engine
        answer = await engine.answer(engine.current, Path(sys.argv[1]).read_bytes(), None)
        print(json.dumps([answer["prediction"], engine.current.classifier.engine, [*sys.modules]]))

asyncio.run(scenario())
"""


def serve(models_folder: Path, picture: Path, **settings: str) -> tuple[str, str, set[str]]:
    """Classify in a new server process; returns prediction, engine and imported modules."""
    environment = os.environ | {"MODELS": str(models_folder)} | settings
    command = [sys.executable, "-W", "error", "-c", SERVE, str(picture)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prediction, engine, modules = json.loads(done.stdout)
    return prediction, engine, set(modules)


@pytest.fixture
def picture(digits: data.Dataset, tmp_path: Path) -> Path:
    """One of digits' training images, as a file."""
    path = tmp_path / "picture.png"
    Image.fromarray(digits.train.images[0, 0].numpy()).save(path)
    return path


@pytest.mark.parametrize("engine", ["auto", "onnx"])
def test_a_server_imports_nothing_that_only_training_needs(
    saved: Path, picture: Path, engine: str
) -> None:
    _, used, modules = serve(saved, picture, ENGINE=engine)
    assert used == {"auto": "onnx_int8"}.get(engine, engine)
    assert "onnxruntime" in modules
    assert not modules & HEAVY


def test_a_plugin_s_network_is_served_without_its_python(
    digits: data.Dataset, tmp_path: Path, picture: Path
) -> None:
    class Plugin(models.Linear):
        """Known to this process only."""

    model = fresh(Plugin, digits)
    exported = export.export(model, digits)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    record = entry(
        dataset=digits.record(257),
        model={"name": "plugin"},
        calibration={"temperature": exported.served.temperature},
    )
    files = {"weights": (".pth", weights.getvalue())} | exported.files
    registry.save(tmp_path / "models", files, record, "always")
    prediction, used, _ = serve(tmp_path / "models", picture)
    assert used == exported.served.engine
    assert used.startswith("onnx")
    image = digits.train.images[:1].numpy()
    assert prediction == digits.classes[int(exported.served(image).argmax())]
    with pytest.raises(registry.RegistryError, match="unknown network 'plugin'"):
        inference.load(tmp_path / "models", engine="torch")


# uvicorn, and what it has imported when it was asked to stop.
LISTEN = """
import sys, uvicorn
uvicorn.run("serve.app:app", port=int(sys.argv[1]), log_level="warning")
print("imported:", *sys.modules, flush=True)
"""


@pytest.mark.slow
def test_the_server_s_requirements_are_enough_for_it(
    saved: Path, picture: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    requirements = str(ROOT / "requirements-serve.txt")
    install = [python, "-m", "pip", "install", "--quiet", "-r", requirements]
    subprocess.run(install, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [python, "-c", LISTEN, str(port)],
        cwd=ROOT,
        env={"MODELS": str(saved), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        body = picture.read_bytes()
        answer = post(port, body)
        wanted = inference.load(saved)(np.asarray(Image.open(picture))[None, None])[0]
        assert list(answer["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
        server.send_signal(signal.SIGINT)
        imported = set(server.communicate(timeout=120)[0].split())
    finally:
        server.kill()
        server.wait()
    assert "onnxruntime" in imported
    assert not imported & HEAVY


def post(port: int, body: bytes) -> dict[str, Any]:
    """Post to a server that may still be starting; returns the answer."""
    for _ in range(1200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection), contextlib.suppress(ConnectionRefusedError):
            connection.request("POST", "/predict", body, {"content-type": "image/png"})
            return json.load(connection.getresponse())
        time.sleep(0.1)
    raise AssertionError("the server does not answer")
