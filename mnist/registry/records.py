"""The shape of model_info.json (schema 1): types for readers, and its check.

Keys that every record has are required; records of older versions lack the others. Further keys
are allowed. A record stays a dictionary, as in JSON.
"""

from collections.abc import Mapping
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from mnist.masking import mask_url


class DatasetEntry(TypedDict):
    """What the network and images.normalise need of the data set."""

    name: str
    sha256: str
    size: int
    channels: int
    recipe: str
    mean: float
    std: float
    classes: list[str]
    splits: NotRequired[dict[str, int]]


class ModelEntry(TypedDict):
    """The network."""

    name: str
    parameters: NotRequired[int]


class StudyEntry(TypedDict):
    """The study, and the trial that gave the hyperparameters."""

    name: str
    trial: int
    id: NotRequired[str]
    trials: NotRequired[int]
    worth: NotRequired[dict[str, Any]]


class FileEntry(TypedDict):
    """A file in the registry's folder."""

    file: str
    sha256: str
    bytes: NotRequired[int]


class Errors(TypedDict):
    """The errors of `n` images: of the weights, and of the file that a server runs."""

    errors: int
    n: int
    served_errors: NotRequired[int]


class TestErrors(Errors):
    """The errors of the test split."""

    accuracy: float
    interval95: NotRequired[list[float]]


class Metrics(TypedDict):
    """The scores by split."""

    calibration: Errors
    test: TestErrors
    validation: NotRequired[dict[str, Any]]


class Record(TypedDict):
    """One saved model."""

    created: str
    dataset: DatasetEntry
    model: ModelEntry
    study: StudyEntry
    files: dict[str, FileEntry]  # by kind; "weights" is required
    metrics: Metrics
    quick: bool
    hyperparameters: NotRequired[dict[str, Any]]
    training: NotRequired[dict[str, Any]]
    calibration: NotRequired[dict[str, Any]]
    engines: NotRequired[dict[str, Any]]
    options: NotRequired[dict[str, Any]]
    seed: NotRequired[int]
    golden: NotRequired[str]


class Info(TypedDict):
    """All of model_info.json; `current` names one of `models`, or none."""

    schema: int
    models: dict[str, Record]
    current: str | None


_INFO = TypeAdapter(Info)


def find_fault(info: Mapping[str, Any]) -> str | None:
    """Where `info` has another shape than Info ("models NAME dataset size"); None if nowhere."""
    try:
        _INFO.validate_python(info, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return " ".join(str(part) for part in first["loc"])
    for name, record in info["models"].items():
        if "weights" not in record["files"]:
            return f"models {name} files weights"
    return None


def mask_storage_urls(records: Mapping[str, Record]) -> None:
    """Mask the password of a storage in each record; an older version may have stored it."""
    for record in records.values():
        options = record.get("options", {})
        if isinstance(storage := options.get("storage"), str):
            options["storage"] = mask_url(storage)
