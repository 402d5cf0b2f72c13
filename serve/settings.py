"""Every setting of the server, read from the environment."""

import multiprocessing
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mnist import registry

Words = tuple[str, ...]
"""In the environment, words separated by commas."""


class Settings(BaseModel):
    """MODELS, ENGINE, THREADS and so on; a wrong value stops the start of the server."""

    model_config = ConfigDict(extra="forbid")

    models: Path | None = Field(
        None, description="registry folder; by default saved_models, or a sample while it is empty"
    )
    engine: Literal["auto", "onnx_int8", "onnx", "torch"] = Field(
        "auto", description="what runs a model; auto: the first of the others that can run it"
    )
    threads: int | None = Field(
        # One of several uvicorn workers has a parent process. If each worker used all cores, an
        # overload would block the event loops for seconds, and connections would fail.
        default_factory=lambda: None if multiprocessing.parent_process() is None else 1,
        ge=1,
        description="inference threads; by default all cores, 1 with several uvicorn workers",
    )
    max_upload_bytes: int = Field(10_000_000, ge=1, description="largest picture, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, in pixels")
    max_batch_files: int = Field(64, ge=1, description="most pictures in one request")
    max_queue: int = Field(256, ge=1, description="most requests in progress at a time")
    deadline_ms: int = Field(1000, ge=1, description="longest wait for an answer, in ms")
    api_keys: Words = Field((), description="API keys; if set, POST and /metrics need one")
    cors_origins: Words = Field((), description="allowed web origins; * for all")
    canary: tuple[str, float] | None = Field(
        None, description="NAME:SHARE, a model that answers this share (0..1) of the requests"
    )
    feedback_dir: Path | None = Field(None, description="folder of corrections, if they are kept")
    feedback_max_bytes: int = Field(100_000_000, ge=1, description="limit of that folder, in bytes")

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        variables = {name.lower(): text for name, text in os.environ.items()}
        settings = {name: variables[name] for name in cls.model_fields if name in variables}
        return settings | arguments

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())

    @field_validator("models", "api_keys", "feedback_dir", mode="before")
    @classmethod
    def _not_empty(cls, text: Any) -> Any:
        if not str(text).strip(" ,"):  # no folder, or no keys where some were meant
            raise ValueError("it is empty; give it a value or unset it")
        return text

    @field_validator("canary", mode="before")
    @classmethod
    def _canary(cls, text: str) -> tuple[str, float] | None:
        name, _, share = text.partition(":")
        try:
            if registry.NAME.fullmatch(name) and 0 <= float(share) <= 1:
                return name, float(share)
        except ValueError:
            pass
        raise ValueError("it must be a model's name, a colon and a share from 0 to 1")


def describe(error: ValidationError) -> str:
    """One line that names each wrong setting, its value and the reason."""
    return "; ".join(
        f"{'_'.join(map(str, detail['loc'])).upper()}={detail['input']}: {detail['msg']}"
        for detail in error.errors()
    )
