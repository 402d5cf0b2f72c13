"""Every setting of the server, read from the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings


class Settings(BaseSettings):
    """MODELS, ENGINE, THREADS and so on; a value that is out of range stops the start."""

    models: Path = Field(Path("saved_models"), description="registry folder")
    engine: Literal["auto", "onnx_int8", "onnx", "torch"] = Field(
        "auto", description="what runs a model; auto: the first of the others that can"
    )
    threads: int | None = Field(None, ge=1, description="inference threads; all cores by default")
    max_upload_bytes: int = Field(10_000_000, ge=1, description="largest request, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, in pixels")
