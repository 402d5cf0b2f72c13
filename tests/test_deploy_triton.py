"""The routes of the Open Inference Protocol with Triton's client, in JSON and binary."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mnist import registry
from tests.conftest import ROOT
from tests.test_app import drawn_seven, serving
from tests.test_open_inference import PICTURES

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore")]
triton = pytest.importorskip("tritonclient.http", reason="it is in deploy/requirements-test.txt")
from tritonclient.utils import InferenceServerException  # noqa: E402

HEADERS = {"X-API-Key": "secret"}  # the client changes the dictionary that it gets


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setenv("API_KEYS", "secret")
    with serving(registry.SAMPLE, monkeypatch) as address:
        yield address


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[Any]:
    with triton.InferenceServerClient("{}:{}".format(*address)) as client:
        yield client


def make_input(pictures: list[bytes]) -> Any:
    tensor = triton.InferInput("image", [len(pictures)], "BYTES")
    tensor.set_data_from_numpy(np.array(pictures, object))
    return tensor


def make_json_input(pictures: list[bytes]) -> Any:
    import base64

    tensor = triton.InferInput("image", [len(pictures)], "BYTES")
    texts = np.array([base64.b64encode(picture) for picture in pictures], object)
    tensor.set_data_from_numpy(texts, binary_data=False)
    return tensor


def predict(address: tuple[str, int], picture: bytes) -> dict[str, Any]:
    import http.client
    import json

    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", "/predict", picture, HEADERS)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_the_client_finds_the_server_and_its_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("current")
    assert not client.is_model_ready("20000101-000000")
    name = registry.record(registry.SAMPLE)[0]
    metadata = client.get_model_metadata("current")
    assert metadata == client.get_model_metadata(name)
    assert metadata["name"] == name
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("binary_output", [None, True, False])
@pytest.mark.parametrize("make", [make_input, make_json_input])
def test_the_client_gets_the_answers_of_predict(
    client: Any, address: tuple[str, int], make: Any, binary_output: bool | None
) -> None:
    answers = [predict(address, picture) for picture in PICTURES]
    names = ("prediction", "probability", "probabilities", "uncertain", "labels")
    outputs = None
    if binary_output is not None:
        outputs = [triton.InferRequestedOutput(name, binary_output) for name in names]
    result = client.infer(
        "current", [make(PICTURES)], outputs=outputs, request_id="mine", headers={**HEADERS}
    )
    response = result.get_response()
    assert (response["model_name"], response["id"]) == (answers[0]["model"], "mine")
    predictions = [
        value.decode() if isinstance(value, bytes) else value
        for value in result.as_numpy("prediction")
    ]
    assert predictions == [answer["prediction"] for answer in answers]
    expected = np.array([[*answer["probabilities"].values()] for answer in answers], np.float32)
    assert np.array_equal(result.as_numpy("probabilities"), expected)
    probability = np.array([answer["probability"] for answer in answers], np.float32)
    assert np.array_equal(result.as_numpy("probability"), probability)
    assert result.as_numpy("uncertain").tolist() == [answer["uncertain"] for answer in answers]
    labels = [[name in answer["labels"] for name in answer["probabilities"]] for answer in answers]
    assert result.as_numpy("labels").tolist() == labels


def test_the_documented_example_has_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(
        r"```python\n(client = tritonclient.*?)\n([^\n]*)  # ([^\n]*)\n```",
        (ROOT / "docs/serving.md").read_text(),
        re.DOTALL,
    )
    assert found
    code, expression, answer = found.groups()
    assert "127.0.0.1:8000" in code
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec("import numpy, tritonclient.http", names)
    with serving(registry.SAMPLE, monkeypatch) as address:
        exec(code.replace("127.0.0.1:8000", "{}:{}".format(*address)), names)
        assert eval(expression, names).tolist() == ast.literal_eval(answer)
        names["client"].close()


@pytest.mark.parametrize(
    ("picture", "headers", "status", "words"),
    [
        (b"x", HEADERS, "415", "cannot be read as a picture"),
        (drawn_seven(), {}, "401", "X-API-Key"),
    ],
)
def test_the_client_shows_the_message_of_an_error(
    client: Any, picture: bytes, headers: dict[str, str], status: str, words: str
) -> None:
    with pytest.raises(InferenceServerException) as error:
        client.infer("current", [make_input([picture])], headers={**headers})
    assert error.value.status() == status
    assert isinstance(error.value.message(), str)
    assert words in error.value.message()
