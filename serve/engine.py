"""The loaded models, and the one thread in which pictures are decoded and classified."""

import asyncio
import base64
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from mnist import images, inference, registry
from serve.settings import Settings

LOADED = 3  # models kept in memory; `parallel` takes 113 MB in torch


@dataclass(frozen=True)
class Model:
    """A model that can answer."""

    name: str
    record: registry.Record
    classify: inference.Classifier


class Engine:
    """Answers for pictures with the model that was current at the start, or another by name.

    Everything slow runs in one thread, never on the event loop. `reason` says why there is no
    model, where there is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.current: Model | None = None
        self.reason = "starting"
        self._load = lru_cache(LOADED)(self._read)
        self._thread = ThreadPoolExecutor(1, "inference")

    async def start(self) -> None:
        """Load the current model, which tries it on pictures; where that fails, keep the reason."""
        try:
            self.current = await self._run(self._first)
        except registry.RegistryError as error:
            self.reason = str(error)
        except Exception as error:  # whatever it is, the server lives and says so
            logging.getLogger(__name__).exception("the current model cannot be used")
            self.reason = f"the current model cannot be used: {error!r}"

    def stop(self) -> None:
        self._thread.shutdown()

    async def answer(
        self, data: bytes, filename: str | None, name: str | None, top: int, view: bool
    ) -> dict[str, Any]:
        """CONTRACT's answer for one picture's bytes.

        Raises images.ImageError for the picture, registry.UnknownModel where `name` names none,
        another registry.RegistryError where the model cannot answer.
        """
        return await self._run(self._answer, data, filename, name, top, view)

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _first(self) -> Model:
        return self._load(registry.record(self.settings.models)[0])

    def _named(self, name: str) -> Model:
        registry.record(self.settings.models, name)  # it may have been removed since it was loaded
        return self._load(name)

    def _read(self, name: str) -> Model:
        classify = inference.load(
            self.settings.models, name, self.settings.threads, self.settings.engine
        )
        return Model(name, registry.record(self.settings.models, name)[1], classify)

    def _answer(
        self, data: bytes, filename: str | None, name: str | None, top: int, view: bool
    ) -> dict[str, Any]:
        model = self.current if name is None else self._named(name)
        if model is None:
            raise registry.RegistryError(self.reason)
        about, study = model.record["dataset"], model.record["study"]
        picture = images.normalise(
            data,
            size=about["size"],
            channels=about["channels"],
            recipe=about["recipe"],
            max_pixels=self.settings.max_pixels,
        )
        (probabilities,), (uncertain,) = model.classify.read(picture[None])
        shares = [float(share) for share in probabilities]
        ranked = sorted(zip(about["classes"], shares, strict=True), key=lambda pair: -pair[1])
        prediction, probability = ranked[0]
        answer = {
            "filename": filename,
            "prediction": prediction,
            "probability": probability,
            "probabilities": dict(zip(about["classes"], shares, strict=True)),
            "top": ranked[:top],
            "uncertain": bool(uncertain),
            "model": model.name,
            "study": study["name"],
            "trial": study["trial"],
        }
        return answer | ({"view": _png(picture)} if view else {})


def _png(picture: np.ndarray) -> str:
    """uint8 (channels, H, W) as a data URL."""
    stream = io.BytesIO()
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
