"""serve/forms.py: multipart forms of all kinds of clients."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from mnist.registry import SAMPLE
from serve.app import app
from tests.test_app import drawn_seven, refused

PICTURE = drawn_seven()
HEADERS = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS", str(SAMPLE))
        with TestClient(app) as client:
            yield client


def form(*parts: tuple[bytes, bytes]) -> bytes:
    """A form of parts, each the parameters of its Content-Disposition and its content."""
    head = b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
    return b"".join(head % part for part in parts) + b"--x--\r\n"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'name="file"; filename="7.png"', "7.png"),
        (b"name=\"file\"; filename*=utf-8''%E6%95%B0.png", "数.png"),
        (b"name=file; filename=7.png; FileName*=UTF-8''%E6%95%B0.png", "数.png"),
        (b"name*=utf-8''file; filename*=iso-8859-1'en'%E9t%E9.png", "été.png"),
        (b"name=\"file\"; filename*=idna''%ff%00.png", "ÿ\0.png"),
        (b'name="file"; filename*=x; filename*0=y', None),
        (b'name="file"; filename="%s"' % "数字.png".encode(), "数字.png"),
        (b'name="file"; filename="\xe9t\xe9\x80.png"', "été€.png"),
        (b'name="file"; filename="\x81\x8d"', "\ufffd\ufffd"),
        (b'name="file"; filename=""', ""),
        (b'name="file"', None),
    ],
)
def test_the_name_of_a_file_has_no_influence(
    disposition: bytes, name: str | None, client: TestClient
) -> None:
    expected = client.post("/predict", content=PICTURE).json() | {"filename": name}
    content = form((disposition, PICTURE))
    assert client.post("/predict", content=content, headers=HEADERS).json() == expected
    content = form((disposition.replace(b"file", b"files", 1), PICTURE))
    batch = client.post("/predict/batch", content=content, headers=HEADERS).json()
    assert batch["results"] == [expected]


@pytest.mark.parametrize(("boundary", "before"), [('"x"', b""), ("x", b"\r\n")])
def test_boundaries_are_read_as_net_and_old_clients_write_them(
    boundary: str, before: bytes, client: TestClient
) -> None:
    content = before + form((b'name="file"; filename="7.png"', PICTURE))
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert client.post("/predict", content=content, headers=headers).json()["prediction"] == "7"


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/predict", form(), "as the field `file`; the form is empty"),
        ("/predict", form((b'name="image"; filename="7.png"', PICTURE)), '; the form has "image"'),
        ("/predict", form((b'name="files[]"', b""), (b'name="\xe9\t"', b"")), '"files[]", "é\\t"'),
        (
            "/predict/batch",
            form((b'name="files[]"; filename="7.png"', PICTURE)),
            'as the field `files`; the form has "files[]"',
        ),
        (
            "/predict/batch",
            form((b'name="file"; filename="7.png"', PICTURE)),
            'as the field `files`; the form has "file"',
        ),
    ],
)
def test_a_form_without_a_picture_names_its_fields(
    path: str, content: bytes, words: str, client: TestClient
) -> None:
    response = client.post(path, content=content, headers=HEADERS)
    assert words in refused(response, 422, "missing_file")


def test_pictures_without_a_file_name_count_as_files(client: TestClient) -> None:
    content = form((b'name="file"', PICTURE), (b'name="file"', PICTURE))
    response = client.post("/predict", content=content, headers=HEADERS)
    assert "/predict/batch" in refused(response, 413, "too_many_files")


@pytest.mark.parametrize(
    ("path", "content_type", "words"),
    [
        ("/predict", "multipart/form-data", "no valid boundary; let the HTTP client set"),
        (
            "/predict",
            "multipart/form-data; boundary=",
            "no valid boundary; let the HTTP client set",
        ),
        (
            "/predict",
            "multipart/form-data; boundary=x",
            "before its last boundary; let the HTTP client create it",
        ),
        ("/predict", "multipart/form-data; boundary=\xe9", "no valid boundary"),
        ("/predict/batch", "image/png", 'not "image/png"; `curl -F files=@7.png` sends one'),
        ("/predict/batch", "", "there is no Content-Type; `curl -F files=@7.png` sends one"),
    ],
)
def test_a_body_that_is_not_a_form_gets_the_remedy(
    path: str, content_type: str, words: str, client: TestClient
) -> None:
    headers = {"content-type": content_type.encode("latin-1")} if content_type else None
    response = client.post(path, content=PICTURE, headers=headers)  # type: ignore[arg-type]
    assert words in refused(response, 400, "bad_request")


def test_a_form_of_lines_without_carriage_returns_gets_the_remedy(client: TestClient) -> None:
    content = form((b'name="file"; filename="7.png"', PICTURE)).replace(b"\r\n", b"\n")
    message = refused(client.post("/predict", content=content, headers=HEADERS), 400, "bad_request")
    assert message.startswith("the form cannot be read: ")
    assert "let the HTTP client create it" in message
