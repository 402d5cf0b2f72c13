"""serve/uploads.py: pictures in base64, and bodies that are none."""

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient

from mnist.registry import SAMPLE
from serve.app import app
from tests.test_app import png, refused

page = np.random.default_rng(0).integers(200, 256, (40, 40), np.uint8)  # has + and / in base64
page[10:14, 10:30], page[10:35, 26:30] = 0, 0
PICTURE = png(page)
TEXT = base64.b64encode(PICTURE).decode()
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
        (b"{", "the body is no such JSON; send {"),
        (b"\xff", "the body is no such JSON; send {"),
        (b'{"image": 7}', "the body is no such JSON; send {"),
        (b'{"image": "?"}', "`image` is no base64; send {"),
        (b'{"image": "\xc3\xa9AAA"}', "`image` is no base64; send {"),
        (b'{"image": "AAAAA"}', "`image` is no base64; send {"),
    ],
)
def test_a_body_without_base64_gets_the_remedy(body: bytes, words: str, client: TestClient) -> None:
    message = refused(client.post("/predict/base64", content=body), 400, "bad_request")
    assert words in message
