"""serve/uploads.py: pictures in base64, and bodies that are none."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient

from mnist.registry import SAMPLE
from serve import uploads
from serve.app import app
from tests.test_app import png, refused

page = np.random.default_rng(0).integers(200, 256, (40, 40), np.uint8)  # has + and / in base64
page[10:14, 10:30], page[10:35, 26:30] = 0, 0
PICTURE = png(page)
TEXT = base64.b64encode(PICTURE).decode()
FORM = "multipart/form-data; boundary=x"
assert TEXT.count("+") == 36
assert TEXT.count("/")
assert TEXT.endswith("=")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS", str(SAMPLE))
        with TestClient(app) as client:
            yield client


def in_lines(text: str, length: int, end: str) -> str:
    return end.join(text[i : i + length] for i in range(0, len(text), length))


@pytest.mark.parametrize(
    "image",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        TEXT.replace("+", "-").replace("/", "_").rstrip("="),
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f" \n data:image/png;charset=utf-8;base64,\n {TEXT}\n",
        quote(f"data:image/png;base64,{TEXT}"),
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"\ufeff{TEXT}",
        f"  {TEXT}\t\r\n",
        in_lines(TEXT, 76, "\r\n"),
        in_lines(TEXT, 64, "\n\t  "),
        in_lines(TEXT, 76, " "),
        in_lines(TEXT, 10, " "),
        TEXT.replace("+", " "),
    ],
)
def test_a_picture_in_base64_is_read_in_each_spelling(image: str, client: TestClient) -> None:
    expected = client.post("/predict", content=PICTURE).json()
    assert client.post("/predict/base64", json={"image": image}).json() == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_json_is_read_in_each_encoding(encoding: str, client: TestClient) -> None:
    body = json.dumps({"image": TEXT}).encode(encoding)
    assert client.post("/predict/base64", content=body).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is not JSON with a text `image`; send {"),
        (b"\xff", "the body is not JSON with a text `image`; send {"),
        (b'{"image": 7}', "the body is not JSON with a text `image`; send {"),
        (b'{"image": "?"}', "`image` is not base64; send {"),
        (b'{"image": "\xc3\xa9AAA"}', "`image` is not base64; send {"),
        (b'{"image": "AAAAA"}', "`image` is not base64; send {"),
        (b"iVBORw0KGgo=", "the body is not JSON with a text `image`; send {"),
        (b"--x\r\n\r\niVBORw0KGgo=\r\n--x--", "the body is not JSON with a text `image`; send {"),
    ],
)
def test_a_body_without_base64_gets_the_remedy(body: bytes, words: str, client: TestClient) -> None:
    message = refused(client.post("/predict/base64", content=body), 400, "bad_request")
    assert words in message


@pytest.mark.parametrize("body", [b'{"image": "AAAA"}', b" \n{", b"Data:image/png;base64,AAAA"])
def test_text_as_a_body_gets_the_route_that_takes_it(body: bytes, client: TestClient) -> None:
    message = refused(client.post("/predict", content=body), 415, "not_an_image")
    assert "the body is text; POST /predict/base64 takes pictures as text: send {" in message


@pytest.mark.parametrize(
    ("path", "content_type", "limit", "remedy"),
    [
        ("/predict", "image/png", 10_000_000, "10000000 bytes (MAX_UPLOAD_BYTES)"),
        ("/predict", FORM, 10_010_000, "10000000 bytes (MAX_UPLOAD_BYTES)"),
        ("/predict/base64", "application/json", 13_343_333, "10000000 bytes (MAX_UPLOAD_BYTES)"),
        ("/predict/batch", FORM, 500_000_000, "500000000 bytes; send fewer at a time"),
    ],
)
def test_a_length_over_the_limit_is_refused_whatever_the_body(
    path: str, content_type: str, limit: int, remedy: str, client: TestClient
) -> None:
    headers = {"content-type": content_type, "content-length": str(limit)}
    assert client.post(path, content=b"x", headers=headers).status_code in (400, 415)
    headers["content-length"] = str(limit + 1)
    response = client.post(path, content=b"x", headers=headers)
    assert remedy in refused(response, 413, "too_large")


@pytest.mark.parametrize("content_type", ["image/png", FORM])
def test_an_upload_that_takes_too_long_is_refused(
    content_type: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setattr(uploads, "UPLOAD_S", 0.01)
    headers = [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    assert client.portal is not None
    client.portal.call(app, scope | {"headers": headers}, receive, send)
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert error["message"] == "the upload took over 0.01 s; send a smaller picture"


def test_an_empty_image_gets_the_remedy_of_its_route(client: TestClient) -> None:
    response = client.post("/predict/base64", json={"image": ""})
    message = refused(response, 422, "missing_file")
    assert message == "no picture was sent; send it as `image`, in base64"
