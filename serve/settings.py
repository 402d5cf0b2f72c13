"""Every setting of the server, read from the environment."""

import multiprocessing
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mnist import conformal, registry

Strings = Annotated[tuple[str, ...], NoDecode]
"""In the environment, strings separated by commas, not JSON."""

MAX = 10**12  # of sizes, numbers and ms
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[\w.-]+)(:(?P<port>\d{1,5}))?/*",
    re.IGNORECASE,
)
DEFAULT_PORTS = {"http": 80, "https": 443}  # which browsers leave out
QUOTES = "\"'`\u2018\u2019\u201c\u201d"


class Settings(BaseSettings):
    """MODELS, ENGINE, THREADS and so on; a wrong value stops the start of the server."""

    model_config = SettingsConfigDict(validate_default=False)

    models: Path | str | None = Field(
        None,
        description="registry: a folder, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; by default "
        "saved_models, or a sample while it is empty",
    )
    engine: Literal["auto", "onnx_int8", "onnx", "torch"] = Field(
        "auto", description="what runs a model; auto: the first of the others that can run it"
    )
    threads: int | None = Field(
        # One of several uvicorn workers has a parent process. If each worker used all cores, an
        # overload would block the event loops for seconds, and connections would fail.
        default_factory=lambda: None if multiprocessing.parent_process() is None else 1,
        ge=1,
        le=1024,
        description="inference threads; by default all cores, 1 with several uvicorn workers",
    )
    max_upload_bytes: int = Field(10_000_000, ge=1, le=MAX, description="largest picture, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, le=MAX, description="largest picture, in pixels")
    max_batch_files: int = Field(64, ge=1, le=MAX, description="most pictures in one request")
    max_queue: int = Field(256, ge=1, le=MAX, description="most requests in progress at a time")
    deadline_ms: int = Field(1000, ge=1, le=MAX, description="longest wait for an answer, in ms")
    api_keys: Strings = Field((), description="API keys; if set, POST and /metrics need one")
    cors_origins: Strings = Field((), description="allowed web origins; * for all")
    coverage: float = Field(
        conformal.DEFAULT_COVERAGE,
        gt=0,
        lt=1,
        description="share of pictures whose true class is in `labels`",
    )
    canary: Annotated[tuple[str, float] | None, NoDecode] = Field(
        None, description="NAME:SHARE, a model that answers this share (0..1) of the requests"
    )
    feedback_dir: Path | None = Field(None, description="folder of corrections, if they are kept")
    feedback_max_bytes: int = Field(
        100_000_000, ge=1, le=MAX, description="limit of that folder, in bytes"
    )

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(",") if word.strip())
        if text.startswith("[") and text.endswith("]"):
            raise ValueError("separate the values by commas only, without brackets and quotes")
        if any(word.strip(QUOTES) != word for word in words):
            raise ValueError("leave out the quotation marks; they would be part of the value")
        return words

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: Strings) -> Strings:
        if not all(key.isprintable() for key in keys):
            raise ValueError("a key has a character that no HTTP header can have; leave it out")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _normalise_origins(cls, origins: Strings) -> Strings:
        return tuple(map(_normalise_origin, origins))

    @field_validator("models")
    @classmethod
    def _check_store(cls, models: Path | str | None) -> Path | str | None:
        if not isinstance(models, str):
            return models
        if not re.match(r"\w+:/", models):
            return Path(models)
        from mnist.registry import mirror  # only where there is a URL

        try:
            mirror.check_url(models)
        except registry.RegistryError as error:
            raise ValueError(str(error)) from error
        return models

    @field_validator("models", "feedback_dir")
    @classmethod
    def _expand_folder(cls, path: Path | str | None, info: ValidationInfo) -> Path | str | None:
        if not isinstance(path, Path):
            return path
        try:
            path = path.expanduser()
            nearest = next(folder for folder in (path, *path.parents) if folder.exists())
            if not nearest.is_dir():
                raise ValueError(f"{nearest} is a file; name a folder")
        except RuntimeError as error:
            raise ValueError("the home folder for ~ is unknown; write the whole path") from error
        except OSError as error:
            raise ValueError(f"{error.strerror}; name another folder") from error
        if info.field_name == "feedback_dir" and not os.access(nearest, os.W_OK):
            raise ValueError(f"{nearest} cannot be written to; name another folder")
        return path

    @field_validator("models", "api_keys", "feedback_dir", mode="before")
    @classmethod
    def _reject_empty(cls, text: Any) -> Any:
        if not str(text).strip(" ,"):  # would mean no folder, or no keys
            raise ValueError("it is empty; give it a value or unset it")
        return text

    @field_validator("canary", mode="before")
    @classmethod
    def _parse_canary(cls, text: str) -> tuple[str, float] | None:
        name, _, share = text.partition(":")
        try:
            if registry.NAME.fullmatch(name) and 0 <= float(share) <= 1:
                return name, float(share)
        except ValueError:
            pass
        raise ValueError("it must be a model's name, a colon and a share from 0 to 1")

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        """The value without spaces around it; of all validators here, the last one runs first."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES:
            raise ValueError("leave out the quotation marks; they would be part of the value")
        return text


def _normalise_origin(origin: str) -> str:
    """An origin as browsers send it: in small letters, without a final slash or default port."""
    if origin in ("*", "null"):
        return origin
    match = ORIGIN.fullmatch(origin)
    if match is None or int(match["port"] or 0) > 65535:
        remedy = "an origin has a scheme, a host and no path, as https://example.org:8443"
        if "*" in origin:
            remedy = "patterns are not supported; list each origin, or * for all"
        raise ValueError(f"{origin} is no origin: {remedy}")
    scheme, host = match["scheme"].lower(), match["host"].lower()
    port = f":{int(match['port'])}" if match["port"] else ""
    if port == f":{DEFAULT_PORTS.get(scheme)}":
        port = ""
    try:
        host = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"the host of {origin} is not a domain name") from error
    return f"{scheme}://{host}{port}"


def describe(error: ValidationError) -> str:
    """One line that names each wrong setting, its value unless that is secret, and the reason."""
    lines = []
    for detail in error.errors():
        name, value = "_".join(map(str, detail["loc"])).upper(), str(detail["input"])
        if value and name == "API_KEYS":
            value = "***"
        lines.append(f"{name}={value}: {detail['msg'].removeprefix('Value error, ')}")
    return "".join(char if char.isprintable() else "?" for char in "; ".join(lines))
