"""Every setting of the server, read from the environment."""

import multiprocessing
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mnist import registry

Words = tuple[str, ...]
"""Words with commas between them."""


class Settings(BaseModel):
    """MODELS, ENGINE, THREADS and so on; a value that is out of range stops the start."""

    model_config = ConfigDict(extra="forbid")

    models: Path | None = Field(
        None, description="registry folder; by default saved_models, or a sample while it is empty"
    )
    engine: Literal["auto", "onnx_int8", "onnx", "torch"] = Field(
        "auto", description="what runs a model; auto: the first of the others that can"
    )
    threads: int | None = Field(
        # One of several workers of uvicorn is uvicorn's child. Were each to use all cores, the
        # event loops would stand still for seconds in an overload, and connections fail.
        default_factory=lambda: None if multiprocessing.parent_process() is None else 1,
        ge=1,
        description="inference threads; by default all cores, 1 where uvicorn has several workers",
    )
    max_upload_bytes: int = Field(10_000_000, ge=1, description="largest picture, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, in pixels")
    max_batch_files: int = Field(64, ge=1, description="most pictures in one request")
    max_queue: int = Field(256, ge=1, description="most requests under way at a time")
    deadline_ms: int = Field(1000, ge=1, description="longest wait for an answer, in ms")
    api_keys: Words = Field((), description="keys, one of which POST and /metrics then need")
    cors_origins: Words = Field((), description="web origins that may ask; * for all")
    canary: tuple[str, float] | None = Field(
        None, description="NAME:SHARE, a model that answers this share (0..1) of the requests"
    )
    feedback_dir: Path | None = Field(None, description="where corrections are kept, if at all")
    feedback_max_bytes: int = Field(
        100_000_000, ge=1, description="most that corrections may take, in bytes"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, given: dict[str, Any]) -> dict[str, Any]:
        found = {name.lower(): text for name, text in os.environ.items()}
        return {name: found[name] for name in cls.model_fields if name in found} | given

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _words(cls, text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())

    @field_validator("models", "api_keys", "feedback_dir", mode="before")
    @classmethod
    def _not_empty(cls, text: Any) -> Any:
        if not str(text).strip(" ,"):  # no folder, and no keys where some were meant
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
