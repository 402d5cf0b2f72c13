"""The live models: loaded while the old ones answer, swapped without a pause, kept on errors."""

import asyncio
import base64
import io
import logging
import math
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mnist import images, inference, registry
from serve.admission import Admission, Busy
from serve.batching import Batcher
from serve.metrics import Metrics
from serve.preflight import Preflight
from serve.settings import Settings

NAMED_MODELS = 3  # kept in memory; `parallel` takes 30 MB in int8, 113 in torch
POLL_S = 0.5  # between two checks of the registry, on average: workers seldom load at once
RETRY_S = 60.0  # until a model that failed to load is loaded again: a disk may have been offline

log = logging.getLogger("serve")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that can answer; any thread may call it."""

    name: str
    record: registry.Record
    classifier: inference.Classifier
    max_pixels: int
    is_sample: bool = False  # the sample model of the repository

    def is_small(self, data: bytes) -> bool:
        return images.is_small(data)

    def normalise(self, data: bytes) -> np.ndarray:
        """A raw picture -> uint8 (channels, size, size); raises images.ImageError."""
        dataset = self.record["dataset"]
        return images.normalise(
            data,
            size=dataset["size"],
            channels=dataset["channels"],
            recipe=dataset["recipe"],
            max_pixels=self.max_pixels,
        )

    def classify(self, pictures: np.ndarray) -> list[tuple[list[float], bool]]:
        """The probabilities of each picture, and whether it is uncertain."""
        probabilities, uncertain = self.classifier.read(pictures)
        return list(zip(probabilities.tolist(), uncertain.tolist(), strict=True))

    def answer(self, probabilities: list[float], uncertain: bool, top: int) -> dict[str, Any]:
        """schemas.Answer without `filename` and `view`."""
        classes, study = self.record["dataset"]["classes"], self.record["study"]
        ranked = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
        prediction, probability = ranked[0]
        return {
            "prediction": prediction,
            "probability": probability,
            "probabilities": dict(zip(classes, probabilities, strict=True)),
            "top": ranked[:top],
            "uncertain": uncertain,
            "model": self.name,
            "study": study["name"],
            "trial": study["trial"],
        }


class Engine:
    """Answers with the current model of the registry, or with a model that a request names.

    It polls the registry: a new current model is loaded and checked while the old one answers, and
    only then replaces it. `refused` has, by role, the model that failed to, with the reason;
    `reason` says why there is no current model.

    Attributes belong to the event loop, unless a comment names another thread.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.current: LoadedModel | None = None
        self.canary: LoadedModel | None = None
        self.reason = "starting"
        self.refused: dict[str, str] = {}
        self.admission = Admission(settings, metrics)
        self.batcher = Batcher(settings, metrics, self.admission)
        self._named: dict[str, LoadedModel] = {}  # by name, least recently used first
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}  # by name, for all that await it
        self._load_errors: dict[str, registry.RegistryError] = {}  # by name, until the next retry
        self._load_lock = asyncio.Lock()  # one named model at a time
        self._awaiting_load = 0  # requests
        # The loader thread writes these three; any thread reads `folder`, the registry in use.
        self.folder = settings.models or registry.FOLDER
        self._watched = [self.folder / registry.INFO]
        self._versions: list[tuple[int, ...] | None] = []
        self._retry_at = math.inf  # of time.monotonic(); the loader thread reads it
        self._loader = ThreadPoolExecutor(1, "loader")
        self._named_loader = ThreadPoolExecutor(1, "named")  # a swap waits for no named model
        self._preflight = Preflight(metrics.shared)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the current model, then poll the registry."""
        await self._check_registry()
        loops = (self._poll_registry, self.admission.keep_reporting)
        self._tasks = [asyncio.create_task(loop()) for loop in loops]

    async def stop(self) -> None:
        tasks = [*self._loading.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._preflight.stop()
        self.admission.report_rejected()
        self._loader.shutdown()
        self._named_loader.shutdown()
        self.batcher.stop()

    async def choose_model(self, name: str | None) -> LoadedModel:
        """The named model; without a name the current one or, for its share, the canary.

        Raises registry.UnknownModel if the registry has no such model, another
        registry.RegistryError if there is no current model or the named one cannot be loaded,
        admission.Busy if too many requests wait for models to load.
        """
        if name is not None:
            return await self._named_model(name)
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
        picture, (probabilities, uncertain) = await self.batcher.classify(data, model)
        answer = {"filename": filename, **model.answer(probabilities, uncertain, top)}
        labels = model.name, answer["prediction"], str(answer["uncertain"]).lower()
        self.metrics.predictions.labels(*labels).inc()
        self.metrics.confidence.labels(model.name).observe(answer["probability"])
        return answer | ({"view": _png_url(picture)} if view else {})

    async def _named_model(self, name: str) -> LoadedModel:
        # A model that was removed is unknown, even if it is still loaded.
        await _run_in(self._loader, registry.record, self.folder, name)
        for model in (self.current, self.canary):
            if model is not None and model.name == name:
                return model
        if name in self._named:
            self._named[name] = self._named.pop(name)
            return self._named[name]
        if name in self._load_errors:
            raise registry.RegistryError(str(self._load_errors[name]))
        if self._awaiting_load > self.settings.max_queue / 2:
            raise Busy("loading", f"it loads {name}")
        task = self._loading.get(name)
        if task is None:
            self._loading[name] = task = asyncio.create_task(self._load_named(name))
            task.add_done_callback(lambda task: self._end_loading(name, task))
        self._awaiting_load += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._awaiting_load -= 1

    def _end_loading(self, name: str, task: asyncio.Task[LoadedModel]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # marks it as retrieved, even if no request awaits the task any more

    # --- loading ---

    async def _poll_registry(self) -> None:
        while True:
            await asyncio.sleep(POLL_S * random.uniform(0.5, 1.5))
            try:
                await self._check_registry()
            except Exception:  # no fault of a registry ends the polling
                log.exception("unexpected error")

    async def _check_registry(self) -> None:
        """Load the current model and the canary if the registry has changed."""
        canary = self.settings.canary[0] if self.settings.canary else None
        if not await _run_in(self._loader, self._registry_changed, canary):
            return
        self._load_errors, self._retry_at = {}, math.inf
        self.current = await self._update("current", None, self.current)
        if canary is not None:
            self.canary = await self._update("canary", canary, self.canary)
        if self.refused:
            self._retry_at = time.monotonic() + RETRY_S

    def _registry_changed(self, canary: str | None) -> bool:
        """Whether its record or a file of the current model or the canary changed, or a retry is
        due. Runs in the loader thread.
        """
        if registry.versions(self._watched) == self._versions and time.monotonic() < self._retry_at:
            return False
        self.folder = self.settings.models or registry.FOLDER
        self._watched = [self.folder / registry.INFO]
        with suppress(registry.RegistryError):
            folder = self.folder = self.settings.models or registry.default_folder()
            info = registry.read(folder)
            names = {info["current"], canary} & {*info["models"]}
            files = [file for name in names for file in info["models"][name]["files"].values()]
            self._watched += [folder / file["file"] for file in files]
        self._versions = registry.versions(self._watched)
        return True

    async def _update(
        self, role: str, name: str | None, old: LoadedModel | None
    ) -> LoadedModel | None:
        """The model that the registry gives this role, or the old one if that cannot be loaded."""
        try:
            name = (await _run_in(self._loader, registry.record, self.folder, name))[0]
            if old is None or old.name != name:
                new = self._named.pop(name, None) or await self._load(self._loader, name)
            else:
                new = old
        except Exception as error:  # the server stays up and reports any error
            expected = isinstance(error, registry.RegistryError)
            reason = str(error) if expected else f"the model cannot be used: {error!r}"
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

    async def _load_named(self, name: str) -> LoadedModel:
        """Load a model that is not current nor canary; an error is kept until the next retry."""
        async with self._load_lock:
            try:
                model = await self._load(self._named_loader, name)
            except registry.RegistryError as error:
                self._load_errors[name] = error
                self._retry_at = min(self._retry_at, time.monotonic() + RETRY_S)
                raise
        self._named[name] = model
        while len(self._named) > NAMED_MODELS:
            self._named.pop(next(iter(self._named)))
        return model

    async def _load(self, executor: ThreadPoolExecutor, name: str) -> LoadedModel:
        settings, folder = self.settings, self.folder
        threads = settings.threads
        engine: str = settings.engine
        skipped_engines = None
        checked = self.current is not None
        if checked:  # a slow or failing load must not affect the model that answers
            engine, skipped_engines = await self._preflight.check(folder, name, threads, engine)
        classifier = await _run_in(executor, inference.load, folder, name, threads, engine, checked)
        if skipped_engines is not None:
            classifier = replace(classifier, passed_over=skipped_engines)
        record = (await _run_in(executor, registry.record, folder, name))[1]
        is_sample = folder == registry.SAMPLE
        return LoadedModel(name, record, classifier, settings.max_pixels, is_sample)


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *args)


def _png_url(picture: np.ndarray) -> str:
    """uint8 (channels, H, W) as a data: URL."""
    stream = io.BytesIO()
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
