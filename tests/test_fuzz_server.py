"""Random heads, names and settings: each request gets an answer below 500, without a traceback.

FUZZ_EXAMPLES=4000 pytest tests/test_fuzz_server.py  # this many cases of each test; minutes
"""

import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import parse_headers
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from benchmarks import load, servers
from mnist.registry import SAMPLE
from serve.app import app
from serve.settings import Settings, describe
from tests.conftest import ROOT
from tests.gates import until
from tests.test_app import drawn_seven

pytest.importorskip("hypothesis", reason="it is in requirements-dev.txt")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

PICTURE = drawn_seven()
PART = b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
FORM = PART % (b'name="file"; filename="7.png"', PICTURE) + b"--x--\r\n"
LINE = st.binary(max_size=60).map(lambda data: re.sub(rb"[\r\n\0]", b"", data))
TOKENS = st.from_regex(rb"[a-zA-Z0-9_.*-]{1,20}", fullmatch=True)
METHODS = ["POST", "POST", "POST", "GET", "HEAD", "OPTIONS", "PUT"]
PATHS = ["predict", "predict/", "predict/base64", "predict/batch", "feedback", "ready", "models/x"]
QUERIES = st.sampled_from(["", "?top=3", "?model=", "?modle=x", "?view=1&top=-1"]) | st.from_regex(
    r"\?[a-z]{0,9}=[!-\"$-~]{0,20}", fullmatch=True
)
FRAMING = b"content-length", b"transfer-encoding"  # ask() sends the right one
NAMES = (
    b"Content-Type Content-Encoding Upgrade Connection Expect Origin X-API-Key X-Request-ID Host "
    b"Cookie Content-Disposition Accept Access-Control-Request-Method X-Forwarded-For Range"
).split()
CONTENTS = [b"multipart/form-data; boundary=" + boundary for boundary in (b"x", b"", b"\xff")] + (
    b"image/png application/json gzip identity h2c websocket Upgrade keep-alive,Upgrade close * "
    b"100-continue bytes=0-1"
).split()
HEADERS = st.tuples(
    st.sampled_from(NAMES) | TOKENS.filter(lambda name: name.lower() not in FRAMING),
    st.sampled_from(CONTENTS) | LINE,
)
BODIES = (
    st.sampled_from([b"", PICTURE, FORM, FORM[:-9], b'{"image": "', b"\xef\xbb\xbf{}"])
    | st.binary(max_size=300)
    | st.text(max_size=60).map(lambda text: json.dumps({"image": text, text: 1}).encode())
)
KEYS = b"name= filename= name*= filename*= filename*0=".split()
TEXTS = b"file \"file\" files \"label\" model utf-8''%e6%95%b0 idna''%ff ''' \" \"\\\"".split()
QUOTED = LINE.map(lambda line: b'"' + line.replace(b'"', b"") + b'"')
PARAMETERS = st.tuples(st.sampled_from(KEYS) | TOKENS, st.sampled_from(TEXTS) | QUOTED | LINE)
FRAGMENTS = "http:// * . a Example.ORG : / , [ ] \" ' ~ é 3000 0.5 20261129-172538 auto - 1e9"
VALUES = (
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
    | st.lists(st.sampled_from([*FRAGMENTS.split(), " ", "\n"]), max_size=6).map("".join)
    | st.lists(st.from_regex(r"[a-z]+://[a-z.]+(:[0-9]+)?/?", fullmatch=True)).map(",".join)
    | st.integers().map(str)
    | st.just("20261129-172538:0.5")
)


class Errors(logging.Handler):
    """Keeps the records of the server's log that have a traceback, or the level ERROR."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.records.append(f"{record.getMessage()} {record.exc_info}")


@pytest.fixture
def errors() -> Iterator[list[str]]:
    handler, loggers = Errors(), [logging.getLogger(name) for name in (None, "serve")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.records
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """That of a server for all cases of a test; afterwards its log may have no traceback.

    It is another process: Hypothesis notices if a thread uses `random`, as the server does.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve.app:app", "--port", str(port)]
    environment = os.environ | {"MODELS": str(SAMPLE)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    request = load.request("/predict", PICTURE)
    until(lambda: servers.answers(port, request), "the server answers", 60)
    yield port
    process.terminate()
    process.wait(30)
    text = (tmp_path / "log").read_text()
    assert "Finished server process" in text
    assert "Traceback" not in text
    assert "ERROR" not in text


def ask(port: int, head: list[bytes], body: bytes, chunked: bool = False) -> int:
    """The status of the response, after a check that it is complete."""
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    if chunked:
        body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"\r\n".join([*head, framing, b"", body]))
        with connection.makefile("rb") as stream:
            status = 100
            while status == 100:
                status = int(stream.readline().split()[1])
                headers = parse_headers(stream)
            length = int(headers["content-length"])
            assert head[0].startswith(b"HEAD") or len(stream.read(length)) == length
    return status


@fuzz
@given(
    line=st.tuples(st.sampled_from(METHODS), st.sampled_from(PATHS), QUERIES),
    headers=st.lists(HEADERS, max_size=5),
    body=BODIES,
    chunked=st.booleans(),
)
def test_any_head(
    port: int,
    line: tuple[str, str, str],
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    chunked: bool,
) -> None:
    head = ["{} /{}{} HTTP/1.1".format(*line).encode(), b"Host: x"]
    head += [b"%s: %s" % header for header in headers]
    assert ask(port, head, body, chunked) < 500


@fuzz
@given(
    parts=st.lists(st.lists(PARAMETERS.map(b"".join), max_size=4), max_size=3),
    path=st.sampled_from([b"predict", b"predict/batch", b"predict?top=1"]),
)
def test_any_name(port: int, parts: list[list[bytes]], path: bytes) -> None:
    head = [b"POST /%s HTTP/1.1" % path, b"Host: x"]
    head += [b"Content-Type: multipart/form-data; boundary=x"]
    form = b"".join(PART % (b"; ".join(names), PICTURE) for names in parts) + b"--x--\r\n"
    assert ask(port, head, form) < 500


@fuzz
@given(name=st.sampled_from([*Settings.model_fields]), value=VALUES)
def test_any_setting(errors: list[str], name: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS", str(SAMPLE))
        patch.setenv(name.upper(), value)
        try:
            accepted = Settings()
        except ValidationError as error:
            line = describe(error)
            assert line.startswith(f"{name.upper()}=")
            assert line.isprintable()
            return
        if name in ("models", "threads"):  # no model, or up to 1024 threads
            return
        with TestClient(app) as client:
            headers = {"X-API-Key": "".join(accepted.api_keys[:1]).encode()}
            assert client.post("/predict", content=PICTURE, headers=headers).status_code < 500
        assert not errors
