"""The schemas of requests and responses, for OpenAPI."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

NAME = "20261121-120301"


class Answer(BaseModel):
    """The model's answer for one picture."""

    filename: str | None = Field(examples=["3.png"])
    prediction: str = Field(examples=["3"])
    probability: float = Field(examples=[0.998])
    probabilities: dict[str, float] = Field(examples=[{"3": 0.998, "8": 0.002}])
    top: list[Annotated[list[str | float], Field(min_length=2, max_length=2)]] = Field(
        examples=[[["3", 0.998], ["8", 0.002]]]
    )
    uncertain: bool = Field(description="the picture does not look like any class")
    labels: list[str] | None = Field(
        description="the prediction set: classes that contain the true one with a probability of "
        "COVERAGE, the most likely one first; null for models without calibrated sets",
        examples=[["3"]],
    )
    model: str = Field(examples=[NAME])
    study: str = Field(examples=["mnist-parallel"])
    trial: int = Field(examples=[17])
    view: str | None = Field(None, description="with view=true: the model's input, a data: URL")


class ErrorDetail(BaseModel):
    code: str = Field(examples=["not_an_image"])
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ErrorText(BaseModel):
    """The body of an error in the form of the Open Inference Protocol."""

    error: str
    code: str = Field(examples=["not_an_image"])
    request_id: str


class BatchError(BaseModel):
    """The error of one picture of a batch, in place of its answer."""

    filename: str | None
    error: ErrorDetail


class Batch(BaseModel):
    results: list[Answer | BatchError]


class Base64(BaseModel):
    """A picture in base64, with or without the prefix `data:image/png;base64,`."""

    model_config = ConfigDict(extra="allow")

    image: str = Field(json_schema_extra={"format": "byte"})


class Ready(BaseModel):
    status: str = Field(examples=["ready"])
    model: str = Field(examples=[NAME])
    engine: str = Field(examples=["onnx_int8"])
    passed_over: dict[str, str] = Field(
        {}, description="better engines that cannot run it, and why"
    )
    coverage: float | None = Field(
        None, description="of `labels`, where the model has too few calibration images for COVERAGE"
    )
    canary: str | None = Field(None, description="the model that answers the share of CANARY")
    refused: dict[str, str] = Field({}, description="models that could not take over, and why")
    sample: str | None = Field(None, description="a note, while the sample model is in use")
    feedback: bool = Field(False, description="whether POST /feedback keeps corrections")


class Unavailable(BaseModel):
    status: str = Field(examples=["unavailable"])
    reason: str
    refused: dict[str, str] = {}


class ModelSummary(BaseModel):
    name: str = Field(examples=[NAME])
    dataset: str = Field(examples=["mnist"])
    network: str = Field(examples=["parallel"])
    test_accuracy: float = Field(examples=[0.9942])
    created: str = Field(examples=["2026-11-21T12:03:01Z"])


class Models(BaseModel):
    current: str | None = Field(examples=[NAME])
    models: list[ModelSummary]


class Correction(BaseModel):
    """A correction that was stored."""

    label: str = Field(examples=["7"])


def error_responses(
    *statuses: int, model: type[BaseModel] = ErrorResponse
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these statuses, each with an ErrorResponse as its body.

    They refer to the model, which one route has to have as the model of a response: FastAPI would
    build it again for each route and status, which took 2 % of the start.
    """
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": CODES[status], "content": content} for status in statuses}


CODES = {
    400: "bad_request: a form, JSON or parameter that cannot be read",
    401: "unauthorised: keys are set, none or a wrong one in X-API-Key",
    404: "unknown_model: no saved model has this name",
    413: "too_large, too_many_pixels, too_many_files, full: over a limit",
    415: "not_an_image: no decoder can read it, or it ends early",
    422: "blank: nothing is drawn; missing_file: nothing was sent",
    429: "busy: the queue is full or the deadline cannot be met; see Retry-After",
    503: "no_model: nothing to answer with; not_kept: a correction could not be written",
}


PICTURE_ERRORS = error_responses(400, 401, 404, 413, 415, 422, 429, 503)


def body(media_type: str, schema: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    """A request body of this media type, or of one of `others`, each with its schema."""
    by_type = {media_type: schema} | others
    content = {media_type: {"schema": schema} for media_type, schema in by_type.items()}
    return {"requestBody": {"required": True, "content": content}}


def form(**fields: dict[str, Any]) -> dict[str, Any]:
    """A multipart form with these fields."""
    return {"type": "object", "required": list(fields), "properties": fields}


PICTURE = {"type": "string", "format": "binary"}
ONE_PICTURE = body(
    "multipart/form-data",
    form(file=PICTURE),
    **{"application/octet-stream": PICTURE, "image/*": PICTURE},
)
INVOCATION = body(
    "image/*",
    PICTURE,
    **{"application/octet-stream": PICTURE, "application/json": Base64.model_json_schema()},
)
INFERENCE = body(
    "application/json",
    {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name", "datatype", "shape", "data"],
                    "properties": {
                        "name": {"const": "image"},
                        "datatype": {"const": "BYTES"},
                        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                        "data": {"type": "array", "items": {"type": "string", "format": "byte"}},
                    },
                },
            },
            "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        },
    },
)
SEVERAL_PICTURES = body(
    "multipart/form-data", form(files={"type": "array", "minItems": 1, "items": PICTURE})
)
CLASS = {"type": "string", "format": "class", "description": "one of the model's classes"}
CORRECTION_FORM = body("multipart/form-data", form(file=PICTURE, label=CLASS))
NAME_PARAMETER = {  # FastAPI's own parameter would add a 422 that no name can cause
    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
}
