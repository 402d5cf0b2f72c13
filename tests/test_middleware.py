"""serve/middleware.py: ids, keys, origins, admission, log."""

import asyncio
import base64
import io
import json
import logging
import re
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from mnist.registry import SAMPLE
from serve import admission, middleware, uploads
from serve.admission import Admission, Busy
from serve.app import app
from serve.loading import LoadedModel
from serve.settings import Settings
from tests.conftest import Clock
from tests.gates import until
from tests.test_app import png, refused


@pytest.fixture
def models(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELS", str(saved))
    return saved


def test_a_request_id_is_the_client_s_or_a_new_one(models: Path) -> None:
    with TestClient(app) as client:
        response = client.get("/health", headers={"X-Request-ID": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        for bad in ("x" * 200, "two words"):
            new = client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
            assert new != bad
            assert len(new) == 32


def test_a_head_is_answered_as_its_get_is(models: Path) -> None:
    with TestClient(app) as client:
        for path in ("/health", "/ready", "/"):
            assert client.head(path).status_code == 200
        assert client.head("/predict").status_code == 405


def test_with_keys_posts_and_metrics_need_one(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", "first, second")
    with TestClient(app) as client:
        assert client.get("/ready").status_code == 200
        for headers in ({}, {"X-API-Key": "third"}, {"X-API-Key": "first, second"}):
            refused(client.post("/predict", headers=headers), 401, "unauthorised")
            refused(client.get("/metrics", headers=headers), 401, "unauthorised")
        for key in ("first", "second"):
            assert client.get("/metrics", headers={"X-API-Key": key}).status_code == 200
            refused(client.post("/predict", headers={"X-API-Key": key}), 422, "missing_file")


def test_other_origins_are_allowed_only_if_configured(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Origin": "https://a.example"}
    with TestClient(app) as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=headers).headers
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example")
    with TestClient(app) as client:
        answered = client.get("/health", headers=headers).headers
        assert answered["access-control-allow-origin"] == "https://a.example"
        assert answered["access-control-expose-headers"] == "Retry-After, X-Request-ID"
        other = client.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_busy_server_rejects_a_request_before_it_reads_the_body(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_busy(*_: Any) -> None:
        raise Busy("queue", "it is full", 7)

    with TestClient(app) as client:
        monkeypatch.setattr(Admission, "admit", raise_busy)
        answer = client.post("/predict", headers={"content-length": "10", "x-request-id": '"\\'})
        assert "busy" in refused(answer, 429, "busy")
        assert answer.headers["retry-after"] == "7"
        assert client.get("/ready").status_code == 200


def test_every_request_releases_its_place_and_its_bytes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_QUEUE", "1")
    monkeypatch.setattr(admission, "MAX_BODIES_BYTES", 1_000)
    with TestClient(app) as client:
        for _ in range(3):
            refused(client.post("/predict"), 422, "missing_file")
            refused(client.post("/predict?model=none", content=b"x"), 404, "unknown_model")
            refused(client.post("/predict", content=bytes(600)), 415, "not_an_image")
            refused(client.post("/predict", content=bytes(2_000)), 429, "busy")
            refused(client.post("/feedback", content=bytes(2_000)), 404, "not_found")


def test_behind_the_prefix_of_a_proxy_the_same_routes_need_a_key(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", "first")
    with TestClient(app, root_path="/digits") as client:
        for path in ("/metrics", "/digits/metrics"):
            refused(client.get(path), 401, "unauthorised")


def test_the_prefix_of_a_proxy_is_the_page_with_and_without_a_slash(models: Path) -> None:
    with TestClient(app, root_path="/digits") as client:
        moved = client.get("/digits", follow_redirects=False)
        assert (moved.status_code, moved.headers["location"]) == (307, "/digits/")
        assert "What does the model see?" in client.get("/digits").text
        refused(client.get("/digits/x"), 404, "not_found")


def test_a_final_slash_opens_no_route(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "first")
    for prefix in ("", "/digits"):
        with TestClient(app, root_path=prefix) as client:
            for path in ("/metrics/", "/metrics//", "/%6detrics/"):
                refused(client.get(prefix + path), 401, "unauthorised")
            assert client.get(f"{prefix}/").status_code == 200


def test_an_error_has_the_cors_header_for_an_allowed_origin(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example")
    monkeypatch.setenv("API_KEYS", "first")
    with TestClient(app) as client:
        answer = client.post("/predict", headers={"Origin": "https://a.example"})
    refused(answer, 401, "unauthorised")
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_each_admitted_request_is_a_json_line_of_the_log_and_counted(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    with TestClient(app) as client:
        monkeypatch.setattr(middleware.log.handlers[0], "stream", stream)
        client.post("/predict?model=none", headers={"X-Request-ID": "mine"})
        client.get("/nothing/here")
        client.request("X-SCAN", "/nothing/here")
        metrics = client.get("/metrics").text
    monkeypatch.delenv("TZ")
    time.tzset()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["time"])
    age = datetime.now(UTC) - datetime.fromisoformat(lines[0]["time"])
    assert abs(age) < timedelta(minutes=10)  # in UTC, whatever the time zone is
    assert lines[0]["request_id"] == "mine"
    assert (lines[0]["status"], lines[0]["code"]) == (404, "unknown_model")
    assert lines[1]["path"] == "/nothing/here"
    assert 'requests_total{method="POST",route="/predict",status="404"} 1.0' in metrics
    assert 'requests_total{method="GET",route="other",status="404"} 1.0' in metrics
    assert 'requests_total{method="other",route="other",status="404"} 1.0' in metrics
    assert not logging.getLogger("uvicorn.access").hasHandlers()


@pytest.mark.parametrize("every_s", [0.1, 60])  # or when the server ends
def test_one_log_line_counts_rejected_requests(
    models: Path, monkeypatch: pytest.MonkeyPatch, every_s: float
) -> None:
    def raise_busy(*_: Any) -> None:
        raise Busy("queue", "it is full", 7)

    def read_log() -> list[tuple[str, int]]:
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [
            (line["event"], line["requests"]) for line in lines if line.get("path") != "/metrics"
        ]

    stream = io.StringIO()
    monkeypatch.setattr(admission, "REPORT_S", every_s)
    with TestClient(app) as client:
        monkeypatch.setattr(Admission, "admit", raise_busy)
        monkeypatch.setattr(middleware.log.handlers[0], "stream", stream)
        for _ in range(3):
            refused(client.post("/predict", content=b"x"), 429, "busy")
        if every_s > 1:
            assert not read_log()
        else:
            until(lambda: sum(n for _, n in read_log()) == 3, "all three are logged", 60)
            metrics = client.get("/metrics").text
            assert 'requests_total{method="POST",route="other",status="429"} 3.0' in metrics
            assert 'turned_away_total{why="queue"} 3.0' in metrics
    assert {event for event, _ in read_log()} == {"rejected"}
    assert sum(n for _, n in read_log()) == 3


def read_threads() -> int | None:
    return Settings().threads


@pytest.mark.parametrize(("setting", "alone", "one_of_several"), [(None, None, 1), ("3", 3, 3)])
def test_one_of_several_workers_has_one_inference_thread_by_default(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, alone: int | None, one_of_several: int
) -> None:
    monkeypatch.delenv("THREADS", raising=False)
    if setting:
        monkeypatch.setenv("THREADS", setting)
    assert read_threads() == alone
    with ProcessPoolExecutor(1, get_context("spawn")) as workers:  # as uvicorn starts its workers
        assert workers.submit(read_threads).result() == one_of_several


def test_openapi_lists_every_status_of_predict(models: Path) -> None:
    with TestClient(app) as client:
        paths = client.get("/openapi.json").json()["paths"]
    predict = paths["/predict"]["post"]
    assert {*predict["responses"]} == {
        "200", "400", "401", "404", "413", "415", "422", "429", "503"
    }  # fmt: skip
    for status, response in predict["responses"].items():
        name = "Answer" if status == "200" else "ErrorResponse"
        assert response["content"]["application/json"]["schema"]["$ref"].endswith(name)


def test_a_picture_in_base64_gets_the_answer_of_its_file(models: Path, digits: object) -> None:
    picture = png(digits.validation.images[0, 0].numpy())  # type: ignore[attr-defined]
    text = base64.b64encode(picture).decode()
    with TestClient(app) as client:
        expected = client.post("/predict", content=picture).json()
        for image in (text, f"data:image/png;base64,{text}"):
            assert client.post("/predict/base64", json={"image": image}).json() == expected
        refused(client.post("/predict/base64", content=b"{"), 400, "bad_request")
        refused(client.post("/predict/base64", json={"image": "?"}), 400, "bad_request")
        none = client.post("/predict/base64", json={"image": ""})
        refused(none, 422, "missing_file")
        assert "`image`" in none.text


def test_a_batch_has_an_answer_or_an_error_for_each_file(
    models: Path, digits: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_BATCH_FILES", "3")
    picture = png(digits.validation.images[0, 0].numpy())  # type: ignore[attr-defined]
    files = [("files", ("a.png", picture)), ("files", ("b.png", b"no")), ("files", ("c.png", b""))]
    with TestClient(app) as client:
        first, second, third = client.post("/predict/batch", files=files).json()["results"]
        assert first == client.post("/predict", files={"file": ("a.png", picture)}).json()
        assert (second["filename"], second["error"]["code"]) == ("b.png", "not_an_image")
        assert third["error"]["code"] == "missing_file"
        refused(client.post("/predict/batch", files=files * 2), 413, "too_many_files")
        refused(client.post("/predict/batch", files={"x": b"x"}), 422, "missing_file")
        refused(client.post("/predict/batch"), 400, "bad_request")
        two = [("file", ("a.png", picture))] * 2
        assert "/predict/batch" in refused(
            client.post("/predict", files=two), 413, "too_many_files"
        )


def test_pictures_of_a_batch_miss_the_deadline_only_because_of_other_requests(
    models: Path, digits: object, queue_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = png(digits.validation.images[0, 0].numpy())  # type: ignore[attr-defined]
    files = [("files", (f"{i}.png", picture)) for i in range(20)]
    monkeypatch.setenv("DEADLINE_MS", "100")
    monkeypatch.setenv("THREADS", "1")
    monkeypatch.setattr(admission, "MAX_WAIT_SHARE", 100)  # all are admitted
    normalise = LoadedModel.normalise
    gate = threading.Event()

    def slow(*args: Any) -> Any:
        queue_clock.now_s += 0.04
        assert gate.wait(60)
        return normalise(*args)

    monkeypatch.setattr(LoadedModel, "normalise", slow)

    def count_busy() -> int:
        results = client.post("/predict/batch", files=files).json()["results"]
        errors = [result["error"]["code"] for result in results if "error" in result]
        assert {*errors} <= {"busy"}
        return len(errors)

    with TestClient(app) as client, ThreadPoolExecutor(6) as clients:
        gate.set()
        assert count_busy() == 0
        gate.clear()
        requests = [clients.submit(count_busy) for _ in range(6)]
        queue = app.state.engine.batcher
        until(lambda: queue._pictures == 12, "each request has two pictures in the queue", 60)
        gate.set()
        rejected = sum(request.result() for request in requests)
        assert 0 < rejected < 120
        metric = f'turned_away_total{{why="deadline"}} {rejected}.0'
        assert metric in client.get("/metrics").text


# --- with the sample model, which is loaded faster ------------------------------------------------


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(SAMPLE))


def test_every_response_has_the_security_headers(sample: None) -> None:
    expected = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    with TestClient(app) as client:
        for answer in (client.get("/"), client.get("/health"), client.post("/predict")):
            assert expected.items() <= answer.headers.items()
            assert len(answer.headers["x-request-id"]) == 32


def test_each_request_gets_an_id_of_its_own_unless_it_sends_one(sample: None) -> None:
    def request_id(sent: str | None) -> str:
        headers = {} if sent is None else {"X-Request-ID": sent}
        return client.get("/health", headers=headers).headers["x-request-id"]

    with TestClient(app) as client:
        assert len({request_id(None) for _ in range(3)}) == 3
        for usable in ("!", "~" * 128):
            assert request_id(usable) == usable
        for other in ("", "x" * 129, "a b", "a\tb"):
            assert len(request_id(other)) == 32


def test_a_browser_may_send_what_the_page_sends_from_an_allowed_origin(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    with TestClient(app) as client:
        answer = client.options("/predict", headers=asked | {"Origin": "https://a.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-methods"] == "GET, POST"
        assert answer.headers["access-control-allow-headers"] == "x-api-key"
        asked["Access-Control-Request-Method"] = "DELETE"
        answer = client.options("/predict", headers=asked | {"Origin": "https://a.example"})
        assert answer.status_code == 400


def call(*scopes: dict[str, Any]) -> list[dict[str, Any]]:
    """What the application sends for these scopes."""
    sent: list[dict[str, Any]] = []
    received = []

    async def receive() -> dict[str, Any]:
        received.append(1)
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        for scope in scopes:
            await app(scope, receive, send)

    asyncio.run(run())
    assert len(received) == len(scopes)
    return sent


def test_a_wrong_setting_or_folder_stops_the_start_in_one_line(
    sample: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAX_QUEUE", "0")
    (message,) = call({"type": "lifespan"})
    assert message["type"] == "lifespan.startup.failed"
    assert "MAX_QUEUE" in message["message"]
    monkeypatch.delenv("MAX_QUEUE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "file"))
    (message,) = call({"type": "lifespan"})
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].startswith(f"PROMETHEUS_MULTIPROC_DIR={tmp_path}/file: ")


def test_a_log_line_and_the_metrics_have_the_time_of_a_request(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.25])
    stream = io.StringIO()
    with TestClient(app) as client:
        monkeypatch.setattr(middleware.log.handlers[0], "stream", stream)
        with monkeypatch.context() as patch:
            patch.setattr(middleware, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
            client.get("/health", headers={"X-Request-ID": "mine"})
        metrics = client.get("/metrics").text
    line = json.loads(stream.getvalue().splitlines()[0])
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "event": "request",
        "request_id": "mine",
        "method": "GET",
        "path": "/health",
        "status": 200,
        "ms": 250.0,
    }
    assert 'request_seconds_sum{route="/health"} 0.25' in metrics
    assert 'requests_total{method="GET",route="/health",status="200"} 1.0' in metrics


def test_a_rejected_request_has_the_whole_error_and_is_not_logged_by_itself(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_busy(*_: Any) -> None:
        raise Busy("queue", "it is full", 7)

    stream = io.StringIO()
    with TestClient(app) as client:
        monkeypatch.setattr(Admission, "admit", raise_busy)
        monkeypatch.setattr(middleware.log.handlers[0], "stream", stream)
        for path in ("/predict", "/predict/batch", "/feedback"):
            answer = client.post(path, headers={"X-Request-ID": "mine"})
            message = refused(answer, 429, "busy")
            assert message == "the server is busy: it is full; try again in 7 s"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["content-length"] == str(len(answer.content))
        assert not stream.getvalue()
        refused(client.post("/models"), 405, "bad_request")  # a route without admission


def test_behind_a_prefix_requests_are_admitted_as_without(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_busy(*_: Any) -> None:
        raise Busy("queue", "it is full", 7)

    with TestClient(app, root_path="/digits") as client:
        monkeypatch.setattr(Admission, "admit", raise_busy)
        for path in ("/predict", "/digits/predict", "/digits/predict/"):
            refused(client.post(path), 429, "busy")


def test_an_unexpected_error_is_logged_and_counted_as_500(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise OSError("it is offline")

    stream = io.StringIO()
    with TestClient(app, raise_server_exceptions=False) as client:
        monkeypatch.setattr(middleware.log.handlers[0], "stream", stream)
        monkeypatch.setattr(uploads, "read_picture", fail)
        refused(client.post("/predict", content=b"x"), 500, "internal")
        metrics = client.get("/metrics").text
    assert json.loads(stream.getvalue().splitlines()[0])["code"] == "internal"
    assert 'requests_total{method="POST",route="/predict",status="500"} 1.0' in metrics


def test_log_lines_are_not_written_twice_by_a_second_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware.log, "handlers", [])
    for _ in range(2):
        middleware.log_as_json()
    assert len(middleware.log.handlers) == 1
    assert (middleware.log.level, middleware.log.propagate) == (logging.INFO, False)
    access = logging.getLogger("uvicorn.access")
    assert (access.handlers, access.propagate) == ([], False)


def test_a_request_that_is_rejected_after_its_admission_is_counted_by_the_reason(
    sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_BODIES_BYTES", 1_000)
    with TestClient(app) as client:
        answer = client.post("/predict", content=bytes(2_000))
        assert "the uploads in progress would exceed" in refused(answer, 429, "busy")
        assert answer.headers["retry-after"] == "1"
        metrics = client.get("/metrics").text
    assert 'turned_away_total{why="memory"} 1.0' in metrics
    assert 'requests_total{method="POST",route="/predict",status="429"} 1.0' in metrics


def test_a_websocket_finds_no_route(sample: None) -> None:
    with (
        TestClient(app) as client,
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/predict"),
    ):
        pass
