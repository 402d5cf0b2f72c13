"""serve/app.py and uploads.py: the routes, their answers and their errors."""

import asyncio
import base64
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from mnist import data, images, inference, metrics, models, registry
from serve import uploads
from serve.app import app
from serve.engine import Engine
from serve.metrics import Metrics
from serve.settings import Settings
from tests.conftest import ROOT
from tests.test_inference import change, other_golden
from tests.test_registry import entry


@pytest.fixture
def client(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("MODELS", str(saved))
    monkeypatch.setenv("MAX_UPLOAD_BYTES", "200000")
    monkeypatch.setenv("MAX_PIXELS", "1000000")
    with TestClient(app) as client:
        yield client


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def drawn_seven() -> bytes:
    """A PNG that every model gets an answer from."""
    page = np.full((60, 60), 255, np.uint8)
    page[10:16, 15:45], page[10:50, 39:45] = 0, 0
    return png(page)


@pytest.fixture
def picture(digits: data.Dataset) -> bytes:
    return png(digits.validation.images[0, 0].numpy())


def refused(response: object, status: int, code: str) -> str:
    assert response.status_code == status  # type: ignore[attr-defined]
    error = response.json()["error"]  # type: ignore[attr-defined]
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]  # type: ignore[attr-defined]
    return error["message"]


def test_the_server_is_alive_and_ready(client: TestClient, saved: Path) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    name, _ = registry.record(saved)
    ready = client.get("/ready").json()
    assert ready.pop("coverage") == 0.98  # 64 calibration images are too few for 0.999
    assert ready == {"status": "ready", "model": name, "engine": "onnx_int8"}


def test_ready_names_the_skipped_engine_and_the_reason(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    other_golden(folder, "onnx_int8")
    monkeypatch.setenv("MODELS", str(folder))
    with TestClient(app) as client:
        answer = client.get("/ready").json()
    assert answer["engine"] == "onnx"
    assert "golden inputs" in answer["passed_over"]["onnx_int8"]


@pytest.mark.parametrize("engine", inference.ENGINE_FILES)
def test_a_training_image_posted_as_png_gets_the_probabilities_python_gives(
    engine: str, saved: Path, digits: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(saved))
    monkeypatch.setenv("ENGINE", engine)
    with TestClient(app) as client:
        assert client.get("/ready").json()["engine"] == engine
        compare(client, inference.load(saved, engine=engine), digits)


def compare(client: TestClient, classify: inference.Classifier, digits: data.Dataset) -> None:
    for i in range(20):
        image = digits.validation.images[i].numpy()
        body = png(image[0])
        assert np.array_equal(images.normalise(body), image)
        answer = client.post("/predict", files={"file": ("digit.png", body)}).json()
        expected = classify(image[None])[0]
        assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def view(answer: dict[str, Any]) -> np.ndarray:
    scheme, encoded = answer["view"].split(",")
    assert scheme == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_real_images_posted_as_png_are_read_bit_for_bit_and_answered_as_in_python(
    mnist: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in mnist.validation.images[:500].numpy():
        assert np.array_equal(images.normalise(png(image[0])), image)
    torch.manual_seed(0)
    model = models.build("parallel", mnist.channels, mnist.size, len(mnist.classes))
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    changes = {"dataset": mnist.record(10_000), "model": {"name": "parallel"}}
    files = {"weights": (".pth", weights.getvalue())}
    registry.save(tmp_path, files, entry(**changes), "always")
    pictures = mnist.validation.images[:20]
    expected = metrics.predict(model, mnist, pictures).numpy()
    assert len(np.unique(expected.argmax(1))) > 1  # not the same class for all
    monkeypatch.setenv("MODELS", str(tmp_path))
    with TestClient(app) as client:
        for image, shares in zip(pictures.numpy(), expected, strict=True):
            form = {"file": ("digit.png", png(image[0]))}
            answer = client.post("/predict?view=true", files=form).json()
            assert list(answer["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
            assert np.array_equal(view(answer), image[0])


def test_an_answer_has_the_contract_s_fields(
    client: TestClient, picture: bytes, saved: Path
) -> None:
    answer = client.post("/predict", files={"file": ("3.png", picture)}).json()
    name, record = registry.record(saved)
    shares = answer["probabilities"]
    assert list(shares) == list("0123456789")
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert answer["prediction"] == max(shares, key=lambda digit: shares[digit])
    assert answer["probability"] == max(shares.values())
    ranked = sorted(shares.items(), key=lambda pair: -pair[1])
    assert answer["top"] == [list(pair) for pair in ranked[:3]]
    assert (answer["filename"], answer["uncertain"]) == ("3.png", False)
    assert (answer["model"], answer["study"]) == (name, "digits-linear-quick")
    assert answer["trial"] == record["study"]["trial"]


def test_a_picture_below_the_threshold_is_uncertain(
    saved: Path, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    monkeypatch.setenv("MODELS", str(folder))
    for limit, uncertain in ((-1e9, False), (0.0, True)):
        change(folder, lambda record, to=limit: record["calibration"].update(uncertain_below=to))
        with TestClient(app) as client:
            answer = client.post("/predict", files={"file": ("3.png", picture)}).json()
        assert answer["uncertain"] is uncertain


@pytest.mark.parametrize(
    ("coverage", "members"), [("0.9", 0), ("0.95", 1), ("0.96", 10), ("0.999", 10)]
)
def test_an_answer_has_the_prediction_set_of_its_coverage(
    saved: Path,
    picture: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coverage: str,
    members: int,
) -> None:
    limits = {"0.9": [0.0, 1e9], "0.95": [0.5, None], "0.99": [0.0, -1e9]}
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    change(folder, lambda record: record["calibration"].update(prediction_sets=limits))
    monkeypatch.setenv("MODELS", str(folder))
    monkeypatch.setenv("COVERAGE", coverage)
    with TestClient(app) as client:
        answer = client.post("/predict?top=10", files={"file": ("3.png", picture)}).json()
    assert answer["probability"] > 0.5
    assert answer["labels"] == [name for name, _ in answer["top"]][:members]


def test_an_older_model_has_no_prediction_sets(
    saved: Path, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    change(folder, lambda record: record["calibration"].pop("prediction_sets"))
    monkeypatch.setenv("MODELS", str(folder))
    with TestClient(app) as client:
        answer = client.post("/predict", files={"file": ("3.png", picture)}).json()
    assert answer["labels"] is None


def test_body_top_view_and_model_have_their_effects(
    client: TestClient, picture: bytes, saved: Path
) -> None:
    name, _ = registry.record(saved)
    for content_type in ("image/png", "application/octet-stream"):
        answer = client.post(
            f"/predict?top=1&view=true&model={name}",
            content=picture,
            headers={"content-type": content_type},
        ).json()
        assert len(answer["top"]) == 1
        assert answer["filename"] is None
        assert np.array_equal(view(answer), images.normalise(picture)[0])


def test_each_error_has_its_status_and_code(client: TestClient, picture: bytes) -> None:
    def post(body: bytes, query: str = "") -> object:
        return client.post(f"/predict{query}", files={"file": ("x.png", body)})

    large = png(np.random.default_rng(0).integers(0, 256, (500, 500), np.uint8))
    refused(post(b"hello"), 415, "not_an_image")
    refused(post(picture[: len(picture) // 2]), 415, "not_an_image")
    refused(post(png(np.zeros((28, 28), np.uint8))), 422, "blank")
    assert "MAX_UPLOAD_BYTES" in refused(post(large), 413, "too_large")
    wide = png(np.zeros((1001, 1000), np.uint8))
    assert "MAX_PIXELS" in refused(post(wide), 413, "too_many_pixels")
    refused(post(b""), 422, "missing_file")
    refused(client.post("/predict"), 422, "missing_file")
    refused(client.post("/predict", files={"other": b"x"}), 422, "missing_file")
    refused(post(picture, "?model=../x"), 404, "unknown_model")
    assert "top" in refused(post(picture, "?top=0"), 400, "bad_request")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "MAX_BODIES_BYTES", 1_000)
        several = client.post("/predict/batch", files=[("files", ("x.png", large))])
        assert "together may have 1000 bytes; send fewer" in refused(several, 413, "too_large")
    assert set(app.openapi()["paths"]["/models/{name}"]["get"]["responses"]) == {
        "200",
        "404",
        "503",
    }
    broken = {"content-type": "multipart/form-data"}
    refused(client.post("/predict", content=b"x", headers=broken), 400, "bad_request")
    refused(client.get("/models/../x"), 404, "not_found")
    refused(client.get("/models/nothing"), 404, "unknown_model")
    refused(client.get("/predict"), 405, "bad_request")
    for length in ("many", "-1", "1" * 5000):
        headers = {"content-length": length}
        message = refused(client.post("/predict", headers=headers), 400, "bad_request")
        assert "Content-Length" in message


def test_a_form_s_type_is_read_in_any_case_and_a_broken_form_is_an_error(
    client: TestClient, picture: bytes
) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="3.png"\r\n\r\n'
    headers = {"content-type": "Multipart/Form-Data; boundary=x"}
    form = head + picture + b"\r\n--x--"
    field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    answer = client.post("/predict", content=field * 5 + form, headers=headers)
    assert answer.json()["filename"] == "3.png"
    for broken in (form[:-2], field * 30 + form, b"--x\r\n\xff: 1\r\n\r\n\r\n" + form):
        refused(client.post("/predict", content=broken, headers=headers), 400, "bad_request")


SEVEN = drawn_seven()


def test_a_picture_of_just_the_limit_is_read_by_each_route(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: dict[str, dict[str, Any]] = {
        "/predict": {"files": {"file": SEVEN}},
        "/predict/batch": {"files": {"files": SEVEN}},
        "/predict/base64": {"json": {"image": base64.b64encode(SEVEN).decode()}},
    }
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("MAX_UPLOAD_BYTES", str(len(SEVEN)))
    with TestClient(app) as client:
        for path, request in requests.items():
            assert "prediction" in client.post(path, **request).text
    monkeypatch.setenv("MAX_UPLOAD_BYTES", str(len(SEVEN) - 1))
    remedy = f"the upload is too large: a picture may have {len(SEVEN) - 1} bytes"
    with TestClient(app) as client:
        for path, request in requests.items():
            assert f"{remedy} (MAX_UPLOAD_BYTES)" in client.post(path, **request).text


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ({"label": b"7", "file": SEVEN}, 201, '{"label":"7"}'),
        ({"file": SEVEN, "label": b"\xff7"}, 400, 'the label is \\"\ufffd7\\"; it must be'),
        ({"file": SEVEN}, 400, "no label was sent; it must be a class of "),
        ({"file": b"", "label": b"7"}, 422, "send it as `file` or as the body"),
        ({"files": SEVEN, "label": b"7"}, 422, "as the field `file`"),
    ],
)
def test_a_correction_is_a_picture_and_its_label(
    files: dict[str, bytes],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("FEEDBACK_DIR", str(tmp_path))
    parts = [
        (name, (None if name == "label" else "7.png", content)) for name, content in files.items()
    ]
    with TestClient(app) as client:
        response = client.post("/feedback", files=parts)
    assert (response.status_code, words in response.text) == (status, True)
    assert len([*tmp_path.rglob("*.png")]) == (status == 201)


FORM = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="7.png"\r\n\r\n'
LIMIT, CHUNK = 20_000, 1_000  # bytes


@pytest.mark.parametrize(
    ("path", "content_type", "start", "limit"),
    [
        ("/predict", "image/png", b"", LIMIT),
        ("/predict", "multipart/form-data; boundary=x", FORM % b"file", LIMIT + uploads.FORM_BYTES),
        ("/predict", "multipart/form-data; boundary=x", b"", LIMIT + uploads.FORM_BYTES),
        (
            "/feedback",
            "multipart/form-data; boundary=x",
            FORM % b"file",
            LIMIT + uploads.FORM_BYTES,
        ),
        (
            "/predict/batch",
            "multipart/form-data; boundary=x",
            FORM % b"files",
            3 * (LIMIT + uploads.FORM_BYTES),
        ),
        (
            "/predict/base64",
            "application/json",
            b'{"image": "',
            LIMIT * 4 // 3 + uploads.FORM_BYTES,
        ),
    ],
)
def test_an_endless_upload_without_a_length_is_not_read_past_its_limit(
    path: str,
    content_type: str,
    start: bytes,
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"MAX_UPLOAD_BYTES": LIMIT, "MAX_BATCH_FILES": 3, "FEEDBACK_DIR": tmp_path}
    for name, value in (settings | {"MODELS": registry.SAMPLE}).items():
        monkeypatch.setenv(name, str(value))
    read_bytes, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read_bytes
        chunk = start if read_bytes == 0 and start else b"A" * CHUNK
        read_bytes += len(chunk)
        assert read_bytes <= limit + CHUNK, "the server reads on"
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", content_type.encode()), (b"transfer-encoding", b"chunked")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": headers,
    }
    with TestClient(app) as client:
        assert client.portal is not None
        client.portal.call(app, scope, receive, send)
    assert sent[0]["status"] == 413
    error = json.loads(sent[1]["body"])["error"]
    assert (error["code"], "MAX_UPLOAD_BYTES" in error["message"]) == ("too_large", True)
    assert limit < read_bytes


def test_models_are_listed_and_shown(client: TestClient, saved: Path) -> None:
    name, record = registry.record(saved)
    answer = client.get("/models").json()
    assert answer["current"] == name
    assert answer["models"] == [
        {
            "name": name,
            "dataset": "digits",
            "network": "linear",
            "test_accuracy": record["metrics"]["test"]["accuracy"],
            "created": record["created"],
        }
    ]
    assert client.get(f"/models/{name}").json() == record


def test_a_corrupt_record_is_reported_as_no_model_not_as_unknown(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: bytes
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(saved, folder)
    name, _ = registry.record(folder)
    monkeypatch.setenv("MODELS", str(folder))
    with TestClient(app) as client:
        for content in ("{", '{"schema": 1, "current": null}'):
            (folder / "model_info.json").write_text(content)
            for route in ("/models", f"/models/{name}", "/models/nothing"):
                assert "model_info.json" in refused(client.get(route), 503, "no_model")
            for query in (f"?model={name}", "?model=nothing"):
                refused(client.post(f"/predict{query}", content=picture), 503, "no_model")
            assert client.post("/predict", content=picture).json()["model"] == name


def test_a_removed_model_is_unknown_even_where_it_was_loaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: bytes
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(saved, folder)
    old, record = registry.record(folder)
    weights = registry.file(folder, old).read_bytes()
    registry.save(folder, {"weights": (".pth", weights)}, record, "always")
    monkeypatch.setenv("MODELS", str(folder))
    with TestClient(app) as client:
        post = f"/predict?model={old}"
        assert client.post(post, content=picture).json()["model"] == old
        registry.remove(folder, old)
        refused(client.post(post, content=picture), 404, "unknown_model")


@pytest.mark.parametrize(
    "harm", ["none", "altered", "missing", "shape", "network", "engine", "unexpected"]
)
def test_without_a_usable_model_the_server_is_alive_but_not_ready(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: bytes, harm: str
) -> None:
    folder = tmp_path / "registry"
    if harm != "none":
        shutil.copytree(saved, folder)
        info = folder / "model_info.json"
        served = folder / f"{registry.record(folder)[0]}.int8.onnx"
    if harm == "missing":
        served.unlink()
    elif harm == "altered":
        served.write_bytes(b"x")
    elif harm == "shape":
        info.write_text('{"schema": 1, "models": []}')
    elif harm == "network":
        info.write_text(info.read_text().replace('"name": "linear"', '"name": "parallel"'))
        monkeypatch.setenv("ENGINE", "torch")  # ONNX has the network in its file
    elif harm == "engine":
        change(folder, lambda record: record["files"].pop("onnx"))
        monkeypatch.setenv("ENGINE", "onnx")
    elif harm == "unexpected":
        monkeypatch.setattr(inference, "load", lambda *_: 1 / 0)
    monkeypatch.setenv("MODELS", str(folder))
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        answer = client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["status"] == "unavailable"
        expected = {
            "none": "no current model",
            "altered": "was altered",
            "missing": "No such file",
            "shape": "models is missing or malformed",
            "network": "cannot be loaded",
            "engine": "onnx: there is no onnx file",
            "unexpected": "cannot be used: division by zero",
        }
        assert expected[harm] in answer.json()["reason"]
        refused(client.post("/predict", content=picture), 503, "no_model")


def test_inference_never_blocks_the_event_loop(
    saved: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    loop_ran, normalise = threading.Event(), images.normalise

    def slow(*args: object, **kwargs: object) -> object:
        threads.add(threading.current_thread().name)
        assert loop_ran.wait(60), "the event loop is blocked"
        return normalise(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "normalise", slow)

    async def scenario() -> None:
        engine = Engine(Settings(models=saved), Metrics())
        await engine.start()
        model = await engine.choose_model(None)
        answering = asyncio.create_task(engine.answer(model, picture, None))
        while not threads:
            await asyncio.sleep(0.001)
        for _ in range(10):
            await asyncio.sleep(0.001)
        loop_ran.set()
        await answering
        await engine.stop()

    asyncio.run(scenario())
    assert all(name.startswith("inference") for name in threads)


def test_a_model_s_record_is_not_read_on_the_event_loop(
    client: TestClient, saved: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = registry.record(saved)
    threads, read = [], registry.read

    def noting_thread(folder: Path) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return read(folder)

    monkeypatch.setattr(registry, "read", noting_thread)
    assert client.post(f"/predict?model={name}", content=picture).status_code == 200
    refused(client.post("/predict?model=nothing", content=picture), 404, "unknown_model")
    assert threads
    assert all(thread.startswith(("loader", "named")) for thread in threads)


@contextmanager
def serving(
    saved: Path, monkeypatch: pytest.MonkeyPatch, parser: str = "auto", **options: Any
) -> Iterator[Any]:
    """The address of a real server; at the exit it has completed and logged all requests."""
    monkeypatch.setenv("MODELS", str(saved))
    # Without a configuration of the log, caplog gets it.
    config = uvicorn.Config(app, port=0, http=parser, log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


def test_an_unexpected_error_is_in_the_log_but_not_in_the_response(
    saved: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(images, "normalise", broken)
    with serving(saved, monkeypatch) as address:
        connection = http.client.HTTPConnection(*address, timeout=10)
        connection.request("POST", "/predict", picture, {"X-Request-ID": "mine"})
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        connection.close()
    assert (answer.status, answer.headers["X-Request-ID"]) == (500, "mine")
    assert (error["code"], error["request_id"]) == ("internal", "mine")
    assert "secret" not in error["message"]
    assert "RuntimeError: a secret\nrequest_id mine" in caplog.text


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_client_that_disconnects_during_an_upload_causes_no_traceback(
    saved: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reading, read_picture = threading.Event(), uploads.read_picture

    async def noting_start(*args: Any) -> tuple[bytes, str | None]:
        reading.set()
        return await read_picture(*args)

    monkeypatch.setattr(uploads, "read_picture", noting_start)
    lines = ("POST /predict HTTP/1.1", "Host: x", f"Content-Type: {kind}", "Content-Length: 1000")
    with serving(saved, monkeypatch) as address, socket.create_connection(address) as connection:
        connection.sendall("\r\n".join([*lines, "", "--x\r\n"]).encode())
        assert reading.wait(10)
    assert "Traceback" not in caplog.text


def test_a_setting_out_of_range_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PIXELS", "0")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Settings()


def test_settings_come_from_the_environment_in_either_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("api_keys", "one, two")
    monkeypatch.setenv("MAX_QUEUE", "3")
    assert Settings(max_queue=4).model_dump(include={"api_keys", "max_queue"}) == {
        "api_keys": ("one", "two"),
        "max_queue": 4,
    }
    with pytest.raises(ValueError, match="not permitted"):
        Settings(max_queu=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "serve.app",
            (
                "torch",
                "torchvision",
                "optuna",
                "sklearn",
                "pydantic.v1.main",
                "filelock",
                "obstore",
            ),
        ),
        ("serve.preflight_worker", ("torch", "asyncio", "filelock")),
    ],
)
def test_importing_the_server_imports_nothing_that_is_seldom_needed(
    module: str, names: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == "[]\n", done.stderr


def test_garbage_collection_is_enabled_after_the_import_of_the_server() -> None:
    code = "import gc, serve.app; assert gc.isenabled()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ)


def test_libraries_use_no_threads_besides_those_of_the_server() -> None:
    picture = png(np.pad(np.full((12, 4), 255, np.uint8), 8))
    code = "import serve.app, cv2, threadpoolctl as pools; from mnist import images; "
    code += f"images.normalise({picture!r}); print(cv2.getNumThreads(), "
    code += "*[pool['num_threads'] for pool in pools.threadpool_info()])"
    environment = {key: value for key, value in os.environ.items() if "_NUM_THREADS" not in key}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert set(done.stdout.split()) == {b"1"}
    assert len(done.stdout.split()) > 1  # NumPy's pool is among them
