"""Loading models from the registry, in threads of their own."""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mnist import images, inference, registry
from serve.admission import Busy
from serve.preflight import Preflight
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.store import StoreCopy

NAMED_MODELS = 3  # kept in memory; `parallel` takes 30 MB in int8, 113 in torch
RETRY_S = 60.0  # until a model that failed to load is loaded again: a disk may have been offline


class Prediction(NamedTuple):
    """The prediction of a model for one picture: see inference.Predictions."""

    probabilities: list[float]
    uncertain: bool
    labels: list[str] | None


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

    def classify(self, pictures: np.ndarray) -> list[Prediction]:
        predictions, classes = self.classifier.predict(pictures), self.record["dataset"]["classes"]
        rows = zip(predictions.probabilities.tolist(), predictions.uncertain.tolist(), strict=True)
        return [Prediction(*row, predictions.labels(i, classes)) for i, row in enumerate(rows)]

    def answer(self, prediction: Prediction, top: int) -> dict[str, Any]:
        """schemas.Answer without `filename` and `view`."""
        probabilities = prediction.probabilities
        classes, study = self.record["dataset"]["classes"], self.record["study"]
        ranked = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
        predicted_class, probability = ranked[0]
        return {
            "prediction": predicted_class,
            "probability": probability,
            "probabilities": dict(zip(classes, probabilities, strict=True)),
            "top": ranked[:top],
            "uncertain": prediction.uncertain,
            "labels": prediction.labels,
            "model": self.name,
            "study": study["name"],
            "trial": study["trial"],
        }


class Loader:
    """Detects changes of the registry, or of the copy of a `store`, and loads its models."""

    def __init__(
        self, settings: Settings, shared: Path | None, store: "StoreCopy | None" = None
    ) -> None:
        self._settings, self._store = settings, store
        models = settings.models
        self._configured_folder = (
            store.folder if store else models if isinstance(models, Path) else None
        )
        self._preflight = Preflight(shared)
        self._executor = ThreadPoolExecutor(1, "loader")
        self._named_executor = ThreadPoolExecutor(1, "named")  # a swap waits for no named model
        # Written by the event loop.
        self.needs_preflight = False  # set once a model answers, which no load may affect
        self.retry_at = math.inf  # of time.monotonic(); the loader thread reads it
        # Written by the loader thread; any thread reads `folder`, the registry in use.
        self.folder = self._configured_folder or registry.FOLDER
        self._watched = [self.folder / registry.INFO]
        self._versions: list[tuple[int, ...] | None] = []

    def stop(self) -> None:
        self._preflight.stop()
        self._executor.shutdown()
        self._named_executor.shutdown()

    async def changed(self, canary: str | None) -> bool:
        """Whether the registry's record or a file of the current model or the canary has changed,
        or a retry is due.
        """
        return await _run_in(self._executor, self._changed, canary)

    async def record(self, name: str | None) -> tuple[str, registry.Record]:
        """registry.record of the registry in use."""
        return await _run_in(self._executor, self._record, name)

    async def load(self, name: str) -> LoadedModel:
        """Raises registry.RegistryError if no engine can run the model."""
        return await self._load(self._executor, name)

    async def load_named(self, name: str) -> LoadedModel:
        """The same in a thread of its own."""
        return await self._load(self._named_executor, name)

    def _record(self, name: str | None) -> tuple[str, registry.Record]:
        if name is None and self._store and registry.read(self.folder)["current"] is None:
            reason = self._store.reason or "its record names none; make one current and upload it"
            text = f"no current model from MODELS={self._settings.models}: {reason}"
            raise registry.RegistryError(text)
        if name is None and self._configured_folder and not registry.read(self.folder)["models"]:
            folder = self.folder
            remedy = f"`python run.py --output {folder}` saves one; or unset MODELS"
            if other := next(folder.glob(f"*/{registry.INFO}"), None):
                remedy = f"did you mean {other.parent}?"
            raise registry.RegistryError(f"no current model in MODELS={folder}; {remedy}")
        return registry.record(self.folder, name)

    def _changed(self, canary: str | None) -> bool:
        if registry.versions(self._watched) == self._versions and time.monotonic() < self.retry_at:
            return False
        self.folder = self._configured_folder or registry.FOLDER
        self._watched = [self.folder / registry.INFO]
        with suppress(registry.RegistryError):
            folder = self.folder = self._configured_folder or registry.default_folder()
            info = registry.read(folder)
            records = [
                info["models"][name] for name in info["models"] if name in (info["current"], canary)
            ]
            files = [file for record in records for file in record["files"].values()]
            self._watched += [folder / file["file"] for file in files]
        self._versions = registry.versions(self._watched)
        return True

    async def _load(self, executor: ThreadPoolExecutor, name: str) -> LoadedModel:
        settings, folder, preflighted = self._settings, self.folder, self.needs_preflight
        threads = settings.threads
        engine: str = settings.engine
        skipped_engines = None
        if self._store:
            await self._store.fetch(name)
        if preflighted:
            engine, skipped_engines = await self._preflight.check(folder, name, threads, engine)
        arguments = folder, name, threads, engine, preflighted, settings.coverage
        classifier = await _run_in(executor, inference.load, *arguments)
        if skipped_engines is not None:
            classifier = replace(classifier, skipped_engines=skipped_engines)
        record = (await _run_in(executor, registry.record, folder, name))[1]
        is_sample = folder == registry.SAMPLE
        return LoadedModel(name, record, classifier, settings.max_pixels, is_sample)


class NamedModels:
    """The models that requests name, loaded on demand; the last NAMED_MODELS stay.

    All attributes belong to the event loop.
    """

    def __init__(self, loader: Loader, max_waiting: float) -> None:
        self._loader, self._max_waiting = loader, max_waiting
        self._models: dict[str, LoadedModel] = {}  # least recently used first
        self._tasks: dict[str, asyncio.Task[LoadedModel]] = {}  # one for all requests that await it
        self._errors: dict[str, registry.RegistryError] = {}  # until the next change or retry
        self._lock = asyncio.Lock()  # one model is loaded at a time
        self._waiting = 0  # requests that await a task

    @property
    def tasks(self) -> list[asyncio.Task[LoadedModel]]:
        return [*self._tasks.values()]

    def forget_errors(self) -> None:
        self._errors = {}

    def pop(self, name: str) -> LoadedModel | None:
        """Remove the model, if it is loaded."""
        return self._models.pop(name, None)

    async def get(self, name: str) -> LoadedModel:
        """Raises registry.RegistryError if the model cannot be loaded, Busy if too many requests
        wait for models.
        """
        if name in self._models:
            self._models[name] = self._models.pop(name)
            return self._models[name]
        if name in self._errors:
            raise registry.RegistryError(str(self._errors[name]))
        if self._waiting > self._max_waiting:
            raise Busy("loading", f"it is loading {name}")
        task = self._tasks.get(name)
        if task is None:
            self._tasks[name] = task = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda task: self._end(name, task))
        self._waiting += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting -= 1

    def _end(self, name: str, task: asyncio.Task[LoadedModel]) -> None:
        del self._tasks[name]
        if not task.cancelled():
            task.exception()  # marks it as retrieved, even if no request awaits the task any more

    async def _load(self, name: str) -> LoadedModel:
        async with self._lock:
            try:
                model = await self._loader.load_named(name)
            except registry.RegistryError as error:
                self._errors[name] = error
                self._loader.retry_at = min(self._loader.retry_at, time.monotonic() + RETRY_S)
                raise
        self._models[name] = model
        while len(self._models) > NAMED_MODELS:
            self._models.pop(next(iter(self._models)))
        return model


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *args)
