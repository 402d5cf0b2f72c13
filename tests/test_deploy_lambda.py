"""deploy/lambda/ under Amazon's runtime client and emulator, in the image that is deployed."""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mnist import registry
from serve.app import app
from tests import containers
from tests.emulator import Function, make_event, start_function

pytestmark = pytest.mark.deploy

REQUESTS = 500


@pytest.fixture
def function() -> Iterator[Function]:
    with start_function("--memory", "512m") as function:
        yield function


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    """Pictures of several classes as PNG, and the answer of the server to each."""
    name = registry.record(registry.SAMPLE)[0]
    with np.load(registry.SAMPLE / f"{name}.golden.npz") as golden:
        pictures = golden["images"][:, 0]
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    answers = {}
    with TestClient(app) as client:
        for picture in pictures:
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            headers = {"Content-Type": "image/png"}
            response = client.post("/predict?top=2", content=stream.getvalue(), headers=headers)
            answers[stream.getvalue()] = response.json()
    assert len({answer["prediction"] for answer in answers.values()}) > 5
    return answers


def test_interleaved_pictures_get_their_own_answers_of_one_model(
    function: Function, answers: dict[bytes, Any]
) -> None:
    pictures = [*answers]
    for i in range(REQUESTS):
        picture = pictures[i % len(pictures)]
        response = function.invoke(make_event("POST", "/predict", picture, "top=2"))
        assert (response["statusCode"], json.loads(response["body"])) == (200, answers[picture])
    assert containers.podman("logs", function.container).count('"swapped"') == 1


def test_a_body_over_the_limit_of_lambda_is_refused_with_the_limit(function: Function) -> None:
    response = function.invoke(make_event("POST", "/predict", bytes(4_600_000)))
    assert response["statusCode"] == 413
    error = json.loads(response["body"])["error"]
    assert error["code"] == "too_large"
    assert "the body is 6.1 MB in base64; the limit of AWS Lambda is 6 MB" in error["message"]
    response = function.invoke(make_event("POST", "/predict", bytes(4_400_000)))
    assert response["statusCode"] == 415  # it reached the server, and is no picture


def test_the_page_and_its_files_are_served(function: Function) -> None:
    for path in ("/", "/static/page.js", "/ready"):
        response = function.invoke(make_event("GET", path, b""))
        assert response["statusCode"] == 200, path
