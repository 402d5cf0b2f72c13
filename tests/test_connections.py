"""A running server: connections as proxies, scanners, old and careless clients make them."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mnist.registry import SAMPLE
from serve.app import app
from tests.conftest import ROOT
from tests.test_app import drawn_seven, refused, serving

PICTURE = drawn_seven()
HOST = b"Host: x\r\n"
BINARY = [b"\x80\x81\xff", PICTURE, b'{"image": "\xff"}', b'{"image": "\\ud800"}']


def ask(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    """The status and the body of the response."""
    connection.settimeout(20)
    connection.sendall(request)
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


@pytest.mark.parametrize(
    ("line", "head", "status"),
    [
        (b"GET http://example.org/health HTTP/1.1", HOST, 200),
        (b"GET /health HTTP/1.0", b"", 200),
        (b"GET /health HTTP/1.1", HOST + b"X-Forwarded-For: }_|O:21:\xf0\xfd, ,\xff\r\n", 200),
        (b"GET /health HTTP/1.1", HOST + b"X-Forwarded-Proto: \xff://\r\n", 200),
        (b"GET / HTTP/1.1", HOST + b"Range: bytes=" + b"0-1," * 9_000 + b"5-6\r\n", 200),
        (b"GET / HTTP/1.1", HOST + b"Range: bytes=" + b"0-" * 9_000 + b"\r\n", 400),
        (b"GET / HTTP/1.1", HOST + b"Range: bytes=0-9\r\n", 206),
        (b"GET /metrics HTTP/1.1", HOST + b"X-API-Key: \xe9\xff\r\n", 401),
        (b"GET /metrics HTTP/1.1", HOST + "X-API-Key: “schlüssel”\r\n".encode(), 401),
        (b"GET /metrics HTTP/1.1", HOST + "X-API-Key: schlüssel\r\n".encode(), 200),
    ],
    ids=[
        *("absolute", "HTTP/1.0", "forwarded for", "forwarded protocol", "many ranges"),
        *("no ranges", "range", "key of bytes", "key in quotes", "key"),
    ],
)
def test_an_unusual_head_causes_no_error_of_the_server(
    line: bytes,
    head: bytes,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("API_KEYS", "schlüssel")
    with (
        serving(SAMPLE, monkeypatch, "httptools") as address,
        socket.create_connection(address) as connection,
    ):
        assert ask(connection, line + b"\r\n" + head + b"\r\n")[0] == status
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "line", [b"POST /predict HTTP/1.0", b"POST http://127.0.0.1/predict HTTP/1.1"]
)
def test_a_picture_of_an_old_client_or_a_proxy_is_answered(
    line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"%b\r\n%bContent-Length: %d\r\n\r\n" % (line, HOST, len(PICTURE))
    with (
        serving(SAMPLE, monkeypatch, "httptools") as address,
        socket.create_connection(address) as connection,
    ):
        status, body = ask(connection, head + PICTURE)
    assert (status, json.loads(body)["prediction"]) == (200, "7")


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_client_that_waits_for_100_continue_sends_only_what_may_be_read(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = (
        b"POST /predict HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    )
    with serving(SAMPLE, monkeypatch, parser) as address:
        with socket.create_connection(address, 20) as connection:
            connection.sendall(head % len(PICTURE))
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            status, body = ask(connection, PICTURE)
            assert (status, json.loads(body)["prediction"]) == (200, "7")
        with socket.create_connection(address, 20) as connection:
            assert ask(connection, head % 11_000_000)[0] == 413


def test_a_unix_socket_answers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(SAMPLE, monkeypatch, uds=str(tmp_path / "s")) as address,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(address)
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.1\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(PICTURE)
        status, body = ask(connection, head + PICTURE)
    assert (status, json.loads(body)["prediction"]) == (200, "7")


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_client_that_sends_too_much_gets_the_reason(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(SAMPLE, monkeypatch, parser) as address:
        connection = http.client.HTTPConnection(*address, timeout=20)
        for _ in range(2):
            connection.request("POST", "/predict", bytes(20_000_000))
            response = connection.getresponse()
            error = json.loads(response.read())["error"]
            assert (response.status, error["code"]) == (413, "too_large")
        connection.close()


@pytest.mark.parametrize("body", BINARY)
def test_a_binary_body_where_json_is_expected_is_the_client_s_error(body: bytes) -> None:
    with TestClient(app) as client:
        for kind in ("application/json", "multipart/form-data; boundary=x", "image/png"):
            response = client.post("/predict/base64", content=body, headers={"content-type": kind})
            assert "the body is not JSON with a text `image`" in refused(
                response, 400, "bad_request"
            )


def test_an_upload_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    picture = PICTURE + bytes(3_000_000)  # more than libraries keep in memory
    with TestClient(app) as client:
        for path, sent in {
            "/predict": {"files": {"file": picture}},
            "/predict/batch": {"files": [("files", picture)] * 3},
            "/predict/base64": {"json": {"image": base64.b64encode(picture).decode()}},
        }.items():
            options: dict[str, Any] = sent  # type: ignore[assignment]
            assert client.post(path, **options).status_code == 200
            assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_prints_no_traceback(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "uvicorn", "serve.app:app", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"Uvicorn running" in line:
                break
        process.send_signal(number)
        log = process.stderr.read().decode()
    assert "Finished server process" in log
    assert "Traceback" not in log
    assert "Error" not in log


SHORT_UPLOADS = """
import uvicorn
from serve import uploads
uploads.UPLOAD_S = 1
uvicorn.run("serve.app:app", port=0)
"""


def test_a_client_that_sends_nothing_more_does_not_keep_the_server_from_stopping() -> None:
    command = [sys.executable, "-c", SHORT_UPLOADS]
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n"
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, b"")
            start = next(line for line in lines if b"Uvicorn running on" in line)
            port = int(start.split(b"http://127.0.0.1:")[1].split()[0])
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # it expects the picture
                process.send_signal(signal.SIGTERM)
                assert b"the upload took over 1 s" in connection.makefile("rb").read()
            log = process.stderr.read().decode()
        finally:
            process.kill()  # after a failure, it would run for ever
    assert "Finished server process" in log
    assert "Traceback" not in log
