"""Pictures and answers as tensors of the Open Inference Protocol, version 2.

The input `image` has datatype BYTES and shape [N]: N picture files, in JSON in base64. A body may
have binary tensors after its JSON; then a header has the length of the JSON.
https://github.com/kserve/open-inference-protocol
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError

from mnist import registry
from serve.errors import ApiError, bad_request, quote
from serve.uploads import decode_base64

HEADER = "Inference-Header-Content-Length"
INPUT = {"name": "image", "datatype": "BYTES", "shape": [-1]}
REMEDY = "send each picture file in base64, as an element of `data`"
Parameters = dict[str, bool | int | float | str]


class _Input(BaseModel):
    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=1)]
    parameters: Parameters = {}
    data: list[str] | None = None


class _Output(BaseModel):
    name: str
    parameters: Parameters = {}


class _Body(BaseModel):
    id: str | None = None
    parameters: Parameters = {}
    inputs: Annotated[list[_Input], Field(min_length=1, max_length=1)]
    outputs: list[_Output] = []


@dataclass(frozen=True)
class InferRequest:
    """The pictures of a request, and what is asked for: no `outputs` for all of them."""

    id: str | None
    pictures: Sequence[bytes]
    outputs: Mapping[str, bool]  # whether each is sent as binary
    is_binary: bool  # for outputs that are not listed


def parse(body: bytes, header: str | None, max_pictures: int) -> InferRequest:
    """`header` is the value of HEADER. Raises ApiError."""
    size = len(body)
    if header is not None:
        if not header.isascii() or not header.isdecimal() or int(header) > len(body):
            raise bad_request(f"{HEADER} is {quote(header)}; the body has {len(body)} bytes")
        size = int(header)
    try:
        content = _Body.model_validate_json(body[:size])
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise bad_request(f"the JSON of the request: {place} {detail['msg']}") from error
    image_input = content.inputs[0]
    if image_input.shape[0] > max_pictures:
        message = (
            f"the input has {image_input.shape[0]} pictures, over {max_pictures} (MAX_BATCH_FILES)"
        )
        raise ApiError(413, "too_many_files", message)
    default = content.parameters.get("binary_data_output") is True
    outputs = {}
    for output in content.outputs:
        if "classification" in output.parameters:
            raise bad_request("`classification` is not supported; ask for `prediction`")
        outputs[output.name] = output.parameters.get("binary_data", default) is True
    pictures = _read_pictures(image_input, body[size:])
    if len(pictures) != image_input.shape[0]:
        raise bad_request(
            f"the shape is {image_input.shape}, but {len(pictures)} pictures were sent"
        )
    return InferRequest(content.id, pictures, outputs, default)


def _read_pictures(image_input: _Input, binary: bytes) -> list[bytes]:
    size = image_input.parameters.get("binary_data_size")
    if size is None:
        if binary:
            text = f"{len(binary)} bytes follow the JSON, but the input has no `binary_data_size`"
            raise bad_request(text)
        if image_input.data is None:
            raise bad_request(f"the input has no `data`; {REMEDY}")
        return [decode_base64(text, "an element of `data`", REMEDY) for text in image_input.data]
    if size != len(binary):
        raise bad_request(f"binary_data_size is {size}, but {len(binary)} bytes follow the JSON")
    pictures, start = [], 0
    while start < len(binary):  # four bytes of length, then the element
        end = start + 4 + int.from_bytes(binary[start : start + 4], "little")
        if end > len(binary) or start + 4 > len(binary):
            raise bad_request("the binary tensor ends within an element")
        pictures.append(binary[start + 4 : end])
        start = end
    return pictures


def describe_outputs(record: registry.Record) -> list[dict[str, Any]]:
    """The outputs of a model: names, datatypes and shapes, in the protocol's form."""
    classes = len(record["dataset"]["classes"])
    outputs = [
        {"name": "prediction", "datatype": "BYTES", "shape": [-1]},
        {"name": "probability", "datatype": "FP32", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
        {"name": "uncertain", "datatype": "BOOL", "shape": [-1]},
    ]
    if record.get("calibration", {}).get("prediction_sets"):
        outputs.append({"name": "labels", "datatype": "BOOL", "shape": [-1, classes]})
    return outputs


def respond(
    request: InferRequest, name: str, record: registry.Record, answers: Sequence[dict[str, Any]]
) -> Response:
    """The response for the answers (schemas.Answer); raises ApiError for an unknown output."""
    known = {output["name"]: output for output in describe_outputs(record)}
    requested_outputs = request.outputs or dict.fromkeys(known, request.is_binary)
    if unknown := requested_outputs.keys() - known.keys():
        raise bad_request(
            f"there is no output {quote(min(unknown))}; the outputs are {', '.join(known)}"
        )
    outputs, blobs = [], []
    for output, is_binary in requested_outputs.items():
        values = _values(output, answers)
        entry = known[output] | {"shape": [len(answers), *known[output]["shape"][1:]]}
        if is_binary:
            blobs.append(_to_bytes(values, entry["datatype"]))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = values
        outputs.append(entry)
    content: dict[str, Any] = {"model_name": name, "outputs": outputs}
    if request.id is not None:
        content["id"] = request.id
    if not blobs:
        return JSONResponse(content)
    text = json.dumps(content).encode()
    headers = {HEADER: str(len(text))}
    return Response(b"".join([text, *blobs]), 200, headers, "application/octet-stream")


def _values(output: str, answers: Sequence[dict[str, Any]]) -> list[Any]:
    """The elements of an output, in row-major order."""
    if output == "probabilities":
        return [value for answer in answers for value in answer["probabilities"].values()]
    if output == "labels":
        rows = [(answer["probabilities"], answer["labels"] or ()) for answer in answers]
        return [name in labels for names, labels in rows for name in names]
    return [answer[output] for answer in answers]


def _to_bytes(values: list[Any], datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [value.encode(errors="surrogateescape") for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.array(values, "<f4" if datatype == "FP32" else "?").tobytes()
