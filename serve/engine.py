"""The live models: a new model is loaded while the old one answers, and kept out if it fails."""

import asyncio
import base64
import io
import logging
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mnist import registry
from serve.admission import Admission
from serve.batching import Batcher
from serve.loading import RETRY_S, LoadedModel, Loader, NamedModels
from serve.metrics import Metrics
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.store import StoreCopy

POLL_S = 0.5  # between two checks of the registry, on average: workers rarely load at the same time

log = logging.getLogger("serve")


class Engine:
    """Answers with the current model of the registry, or with a model that a request names.

    It polls the registry: a new current model is loaded and checked while the old one answers, and
    only then replaces it. `refused` maps a role to the model that failed to load, with the reason;
    `reason` says why there is no current model. All attributes belong to the event loop.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.current: LoadedModel | None = None
        self.canary: LoadedModel | None = None
        self.reason = "starting"
        self.refused: dict[str, str] = {}
        self.admission = Admission(settings, metrics)
        self.batcher = Batcher(settings, metrics, self.admission)
        self._canary_name = settings.canary[0] if settings.canary else None
        self._store = _make_store(settings, metrics, self.refused)
        self._loader = Loader(settings, metrics.shared, self._store)
        self._named = NamedModels(self._loader, settings.max_queue / 2)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the current model, then poll the registry."""
        if self._store:
            await self._store.update(self._canary_name)
        await self._check_registry()
        loops = [self._poll_registry(), self.admission.keep_reporting()]
        if self._store:
            loops.append(self._store.keep_updated(self._canary_name))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        tasks = [*self._named.tasks, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.admission.report_rejected()
        self._loader.stop()
        if self._store:
            self._store.stop()
        self.batcher.stop()

    @property
    def folder(self) -> Path:
        """The registry in use."""
        return self._loader.folder

    async def choose_model(self, name: str | None) -> LoadedModel:
        """The named model; without a name the current one or, for its share, the canary.

        Raises registry.UnknownModel if the registry has no such model, another
        registry.RegistryError if there is no current model or the named one cannot be loaded,
        admission.Busy if too many requests wait for models to load.
        """
        if name is not None:
            await self._loader.record(name)  # a removed model is unknown, even if it is loaded
            for model in (self.current, self.canary):
                if model is not None and model.name == name:
                    return model
            return await self._named.get(name)
        if self.canary and self.settings.canary and random.random() < self.settings.canary[1]:
            return self.canary
        if self.current is None:
            raise registry.RegistryError(self.reason)
        return self.current

    async def answer(
        self,
        model: LoadedModel,
        data: bytes,
        filename: str | None,
        top: int = 3,
        view: bool = False,
    ) -> dict[str, Any]:
        """schemas.Answer for the bytes of one picture.

        Raises images.ImageError for the picture, admission.Busy if it waits past the deadline.
        """
        picture, prediction = await self.batcher.classify(data, model)
        answer = {"filename": filename, **model.answer(prediction, top)}
        labels = model.name, answer["prediction"], str(answer["uncertain"]).lower()
        self.metrics.predictions.labels(*labels).inc()
        self.metrics.confidence.labels(model.name).observe(answer["probability"])
        return answer | ({"view": _png_url(picture)} if view else {})

    # --- the registry ---

    async def _poll_registry(self) -> None:
        while True:
            await asyncio.sleep(POLL_S * random.uniform(0.5, 1.5))
            try:
                await self._check_registry()
            except Exception:  # no fault of a registry ends the polling
                log.exception("unexpected error")

    async def _check_registry(self) -> None:
        """Load the current model and the canary if the registry has changed."""
        canary = self._canary_name
        if not await self._loader.changed(canary):
            return
        self._named.forget_errors()
        self._loader.retry_at = math.inf
        self.current = await self._update("current", None, self.current)
        self._loader.needs_preflight = self.current is not None
        if canary is not None:
            self.canary = await self._update("canary", canary, self.canary)
        if self.refused:
            self._loader.retry_at = time.monotonic() + RETRY_S

    async def _update(
        self, role: str, name: str | None, old: LoadedModel | None
    ) -> LoadedModel | None:
        """The model that the registry gives this role, or the old one if that cannot be loaded."""
        try:
            name = (await self._loader.record(name))[0]
            if old is None or old.name != name:
                new = self._named.pop(name) or await self._loader.load(name)
            else:
                new = old
        except Exception as error:  # the server stays up and reports any error
            expected = isinstance(error, registry.RegistryError)
            reason = str(error) if expected else f"the model cannot be used: {error}"
            if not expected:
                log.exception("unexpected error")
            self.refused[role] = f"{name}: {reason}" if name and name not in reason else reason
            if role == "current":
                self.reason = reason
            self.metrics.refused.labels(name or "").inc()
            log.error("refused", extra={"role": role, "model": name, "reason": reason})
            return old
        self.refused.pop(role, None)  # only now: during a retry the reason stays
        if new is not old:
            self._report_swap(role, old, new)
        return new

    def _report_swap(self, role: str, old: LoadedModel | None, new: LoadedModel) -> None:
        fields = {"role": role, "model": new.name, "engine": new.classifier.engine}
        log.info("swapped", extra=fields)
        for model, n in ((old, 0), (new, 1)):
            if model is not None:
                self.metrics.models.labels(model.name, model.classifier.engine, role).set(n)
        if old is not None and role == "current":
            self.metrics.swaps.inc()


def _make_store(
    settings: Settings, metrics: Metrics, refused: dict[str, str]
) -> "StoreCopy | None":
    """The copy of the store that MODELS names, if it is no folder."""
    if not isinstance(settings.models, str):
        return None
    from serve.store import StoreCopy  # most servers read a folder

    return StoreCopy(settings.models, settings.engine, metrics, refused)


def _png_url(picture: np.ndarray) -> str:
    """uint8 (channels, H, W) as a data: URL."""
    stream = io.BytesIO()
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
