"""Every setting of the server, read from the environment."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings


class Settings(BaseSettings):
    """MODELS, THREADS, MAX_UPLOAD_BYTES, MAX_PIXELS; a value out of range stops the start."""

    models: Path = Field(Path("saved_models"), description="registry folder")
    threads: int | None = Field(None, ge=1, description="inference threads; all cores by default")
    max_upload_bytes: int = Field(10_000_000, ge=1, description="largest request, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, in pixels")
