"""serve/parameters.py, and paths, headers and bodies that would mislead a client."""

import gzip
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mnist.registry import SAMPLE
from serve.app import app
from tests.test_app import drawn_seven, refused

PICTURE = drawn_seven()
FORM = {"file": ("7.png", PICTURE)}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS", str(SAMPLE))
        patch.setenv("FEEDBACK_DIR", str(tmp_path_factory.mktemp("feedback")))
        with TestClient(app, follow_redirects=False) as client:
            yield client


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/predict?modle=x", '/predict takes no parameter "modle"; did you mean `model`?'),
        ("/predict/base64?MODEL=x", "did you mean `model`?"),
        ("/predict/batch?topk=5", "did you mean `top`?"),
        ("/feedback?top=3", '/feedback takes no parameter "top"; it takes model'),
        ("/predict?api_key=x&top=1", "it takes model, top, view"),
        ("/feedback?label=7", "`label` is a field of the form, not of the URL"),
        ("/predict/base64?image=iVBO", "`image` is a field of the JSON, not of the URL"),
        ("/predict?top=", 'the parameter `top` is ""'),
        ("/predict?top=None", 'the parameter `top` is "None"'),
    ],
)
def test_a_parameter_that_is_not_the_route_s_names_the_right_one(
    url: str, words: str, client: TestClient
) -> None:
    assert words in refused(client.post(url, files=FORM), 400, "bad_request")


@pytest.mark.parametrize("field", ["model", "modle", "Model", "top", "topk", "view"])
def test_a_query_parameter_sent_as_a_field_is_refused(field: str, client: TestClient) -> None:
    sent: list[dict[str, Any]] = [
        {"url": "/predict", "files": FORM, "data": {field: "x"}},
        {"url": "/predict/base64", "json": {"image": "", field: "x"}},
        {"url": "/predict/batch", "files": {"files": FORM["file"]}, "data": {field: "x"}},
    ]
    for request in sent:
        message = refused(client.post(**request), 400, "bad_request")
        assert f'"{field}" has no effect; send it in the URL: {request["url"]}?' in message


def test_other_fields_and_an_empty_model_change_nothing(client: TestClient) -> None:
    expected = client.post("/predict", files=FORM).json()
    fields = {"csrf_token": "x", "label": "7", "submit": "", "x" * 3000: "y"}
    assert client.post("/predict?model=", files=FORM, data=fields).json() == expected
    label = {"label": "7", "top": "1"}  # /feedback has no `top`
    assert client.post("/feedback?model=", files=FORM, data=label).json() == {"label": "7"}


def test_a_path_with_a_final_slash_is_answered_as_without(client: TestClient) -> None:
    for path in ("/predict", "/predict/batch", "/predict/base64", "/feedback"):
        expected, answer = client.post(path), client.post(f"{path}/")
        assert answer.status_code == expected.status_code == (422 if path == "/predict" else 400)
    expected = client.post("/predict?top=1", files=FORM).json()
    assert client.post("/predict//?top=1", files=FORM).json() == expected
    for path in ("/", "/health", "/docs", "/metrics", "/models"):
        assert client.get(f"{path}/").status_code == 200


def test_an_unknown_path_or_method_is_named(client: TestClient) -> None:
    for response in (client.get("/models/%22%0a"), client.post("/predict?model=%22%0a")):
        message = refused(response, 404, "unknown_model")
        assert message == 'there is no model "\\"\\n"; GET /models lists the saved models'
    assert '"//predict"' in refused(client.post("http://testserver//predict"), 404, "not_found")
    assert "takes POST only" in refused(client.get("/predict"), 405, "bad_request")
    assert "takes GET, HEAD only" in refused(client.post("/static/page.js"), 405, "bad_request")


@pytest.mark.parametrize("path", ["/predict", "/predict/base64", "/predict/batch"])
def test_a_compressed_body_gets_the_remedy(path: str, client: TestClient) -> None:
    headers = {"content-encoding": "gzip", "content-type": "multipart/form-data; boundary=x"}
    response = client.post(path, content=gzip.compress(PICTURE), headers=headers)
    assert '"gzip"; send it uncompressed' in refused(response, 400, "bad_request")
    headers["content-encoding"] = "identity"
    response = client.post("/predict", content=PICTURE, headers=headers | {"content-type": ""})
    assert response.status_code == 200


@pytest.mark.parametrize("body", [b'{"image": "iVBO"}', b" \nDATA:image/png;base64,iVBO"])
def test_text_instead_of_a_picture_is_sent_to_the_route_for_text(
    body: bytes, client: TestClient
) -> None:
    message = refused(client.post("/predict", content=body), 415, "not_an_image")
    assert "POST /predict/base64" in message
