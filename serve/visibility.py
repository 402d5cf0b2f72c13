"""What GET routes show without an API key, if keys are set: nothing about this machine."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request

PUBLIC = ("created", "dataset", "model", "metrics", "calibration", "quick")  # of a record
PUBLIC_STUDY = ("name", "trial", "trials")
WITHHELD = "withheld; see the log, or send a key as X-API-Key"


def reason(request: Request, text: str) -> str:
    """A reason, which may have paths and messages of libraries."""
    return text if request.state.has_key else WITHHELD


def reasons(request: Request, texts: Mapping[str, str]) -> dict[str, str]:
    """reason() of each."""
    return {key: reason(request, text) for key, text in texts.items()}


def record(request: Request, record: Mapping[str, Any]) -> dict[str, Any]:
    """A model's record; its options, source code, versions and commit need a key."""
    if request.state.has_key:
        return dict(record)
    public = {key: record[key] for key in PUBLIC if key in record}
    study = {key: record["study"][key] for key in PUBLIC_STUDY if key in record["study"]}
    return public | {"study": study}
