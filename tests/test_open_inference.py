"""serve/open_inference.py and tensors.py: answers as those of /predict, as tensors."""

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from mnist import registry
from serve.app import app
from serve.tensors import HEADER
from tests.conftest import ROOT
from tests.test_app import drawn_seven, png

PICTURES = [drawn_seven(), (ROOT / "docs" / "7.png").read_bytes()]
URL = "/v2/models/current/infer"
BLANK = png(np.full((30, 30), 255, np.uint8))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("MAX_BATCH_FILES", "3")
    monkeypatch.setenv("MAX_UPLOAD_BYTES", "20000")
    with TestClient(app) as client:
        yield client


def as_json(*pictures: bytes, **others: Any) -> dict[str, Any]:
    data = [base64.b64encode(picture).decode() for picture in pictures]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    return {"inputs": [tensor], **others}


def as_binary(*pictures: bytes, size: int | None = None, **others: Any) -> dict[str, Any]:
    """The keywords of a POST; `size` is another length than that of the tensor."""
    tensor = b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)
    parameters = {"binary_data_size": len(tensor) if size is None else size}
    entry = {"name": "image", "datatype": "BYTES", "shape": [len(pictures)]}
    text = json.dumps({"inputs": [entry | {"parameters": parameters}], **others}).encode()
    return {"content": text + tensor, "headers": {HEADER: str(len(text))}}


def outputs(content: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: output for output in content["outputs"]}


def check(tensors: dict[str, list[Any]], answers: list[dict[str, Any]]) -> None:
    """Compare the elements of all outputs with the answers of /predict."""
    assert tensors["prediction"] == [answer["prediction"] for answer in answers]
    assert tensors["probability"] == [answer["probability"] for answer in answers]
    assert tensors["uncertain"] == [answer["uncertain"] for answer in answers]
    probabilities = [value for answer in answers for value in answer["probabilities"].values()]
    assert tensors["probabilities"] == probabilities
    labels = [name in answer["labels"] for answer in answers for name in answer["probabilities"]]
    assert tensors["labels"] == labels


def test_json_and_binary_tensors_have_the_answers_of_predict(client: TestClient) -> None:
    answers = [client.post("/predict", content=picture).json() for picture in PICTURES]
    response = client.post(URL, json=as_json(*PICTURES, id="mine"))
    content = response.json()
    assert (content["model_name"], content["id"]) == (answers[0]["model"], "mine")
    check({name: output["data"] for name, output in outputs(content).items()}, answers)
    shapes = {name: output["shape"] for name, output in outputs(content).items()}
    assert (shapes["prediction"], shapes["probabilities"]) == ([2], [2, 10])

    request = as_binary(*PICTURES, parameters={"binary_data_output": True})
    response = client.post(URL, **request)
    length = int(response.headers[HEADER])
    content, blob = json.loads(response.content[:length]), response.content[length:]
    read: dict[str, list[Any]] = {}
    for name, output in outputs(content).items():
        size = output["parameters"]["binary_data_size"]
        part, blob = blob[:size], blob[size:]
        if output["datatype"] == "BYTES":
            assert part == b"\1\0\0\x007" * 2
            read[name] = ["7", "7"]
        else:
            dtype = {"FP32": "<f4", "BOOL": "?"}[output["datatype"]]
            read[name] = np.frombuffer(part, dtype).tolist()
    assert blob == b""
    check(read, answers)


def test_only_the_outputs_that_are_asked_for_are_sent_each_in_its_form(client: TestClient) -> None:
    wanted = [
        {"name": "uncertain", "parameters": {"binary_data": True}},
        {"name": "prediction", "parameters": {"binary_data": False}},
    ]
    response = client.post(URL, **as_binary(PICTURES[0], outputs=wanted))
    length = int(response.headers[HEADER])
    uncertain, prediction = json.loads(response.content[:length])["outputs"]
    assert uncertain["parameters"] == {"binary_data_size": 1}
    assert response.content[length:] == b"\0"
    assert prediction == {"name": "prediction", "datatype": "BYTES", "shape": [1], "data": ["7"]}


def test_the_metadata_describe_what_is_taken_and_given(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    name = client.get("/ready").json()["model"]
    about = client.get("/v2/models/current").json()
    assert about == client.get(f"/v2/models/{name}").json()
    assert (about["name"], about["inputs"][0]["datatype"]) == (name, "BYTES")
    given = outputs(client.post(URL, json=as_json(PICTURES[0])).json())
    described = outputs(about)
    assert given.keys() == described.keys()
    for key, output in described.items():
        assert given[key]["datatype"] == output["datatype"]
        assert given[key]["shape"][1:] == output["shape"][1:]
    assert client.get("/v2/models/current/ready").json() == {"name": name, "ready": True}


@pytest.mark.parametrize(
    ("request_", "status", "code", "words"),
    [
        ({"content": b"x"}, 400, "bad_request", "JSON"),
        ({"json": as_json()}, 400, "bad_request", "inputs.0.shape"),
        ({"json": {"inputs": []}}, 400, "bad_request", "inputs"),
        ({"json": as_json(PICTURES[0], outputs=[{"name": "x"}])}, 400, "bad_request", "no output"),
        ({"json": as_json(b"x")}, 415, "not_an_image", ""),
        ({"json": as_json(BLANK)}, 422, "blank", ""),
        ({"json": as_json(PICTURES[0], b"")}, 422, "missing_file", "element of `image`"),
        ({"json": as_json(b"x" * 20_001)}, 413, "too_large", "20000 bytes"),
        ({"json": as_json(*PICTURES * 2)}, 413, "too_many_files", "MAX_BATCH_FILES"),
        ({"content": b"x" * 200_000}, 413, "too_large", ""),
        (as_binary(PICTURES[0], size=7), 400, "bad_request", "binary_data_size is 7"),
        ({"content": b"{}", "headers": {HEADER: "3"}}, 400, "bad_request", "the body has 2 bytes"),
        ({"content": b"{}", "headers": {HEADER: "-1"}}, 400, "bad_request", "-1"),
    ],
)
def test_errors_have_the_status_of_predict_and_a_text(
    client: TestClient, request_: dict[str, Any], status: int, code: str, words: str
) -> None:
    response = client.post(URL, **request_)
    content = response.json()
    assert (response.status_code, content["code"]) == (status, code)
    assert words in content["error"]
    assert content["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("lost", [1, 3, 100])
def test_a_binary_tensor_that_ends_early_is_refused(client: TestClient, lost: int) -> None:
    good = as_binary(PICTURES[0])
    size = len(good["content"]) - int(good["headers"][HEADER])
    cut = as_binary(PICTURES[0], size=size - lost)
    response = client.post(URL, content=cut["content"][:-lost], headers=cut["headers"])
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert "ends within an element" in response.json()["error"]


def test_the_shape_counts_the_pictures(client: TestClient) -> None:
    request = as_json(*PICTURES)
    request["inputs"][0]["shape"] = [1]
    assert "2 pictures were sent" in client.post(URL, json=request).json()["error"]


@pytest.mark.parametrize("path", ["", "/ready", "/infer"])
def test_an_unknown_model_is_not_found(client: TestClient, path: str) -> None:
    url = f"/v2/models/x{path}"
    response = client.post(url, json={}) if path == "/infer" else client.get(url)
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")


def test_keys_and_admission_hold_as_for_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("API_KEYS", "secret")
    with TestClient(app) as client:
        for url in (URL, "/invocations"):
            assert client.post(url, json={}).status_code == 401
        headers = {"X-API-Key": "secret"}
        assert client.post(URL, json=as_json(PICTURES[0]), headers=headers).status_code == 200
        assert client.get("/v2/models/current").status_code == 200
        client.app.state.engine.admission.requests = 256  # type: ignore[attr-defined]
        for url in (URL, "/invocations"):
            busy = client.post(url, content=b"x", headers=headers)
            assert (busy.status_code, int(busy.headers["retry-after"]) > 0) == (429, True)
        client.app.state.engine.admission.requests = 0  # type: ignore[attr-defined]
    assert "MAX_QUEUE" in str(busy.json())


def test_without_a_model_nothing_is_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path_factory.mktemp("empty")))
    with TestClient(app) as client:
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/models/current", "/v2/models/current/ready", "/ping"):
            response = client.get(path)
            assert response.status_code == 503
            assert "no current model" in str(response.json()["error"])
        assert client.post(URL, json=as_json(PICTURES[0])).json()["code"] == "no_model"
