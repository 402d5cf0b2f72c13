"""The live models: loaded beside what answers, swapped without a pause, kept where that fails."""

import asyncio
import base64
import io
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mnist import images, inference, registry
from serve.batching import Batcher, Busy
from serve.metrics import Metrics
from serve.preflight import Preflight
from serve.settings import Settings

LOADED = 3  # models asked for by name that are kept; `parallel` takes 30 MB in int8, 113 in torch
WATCH_S = 0.5  # between two looks at the registry, on average: workers seldom load at once
REPORT_S = 1.0  # between two log lines that count rejected requests
AGAIN_S = 60.0  # until a model that was refused is tried again: a disk may have been away
BODIES_BYTES = 500_000_000  # most that the bodies of all requests may take at a time

log = logging.getLogger("serve")


@dataclass(frozen=True, eq=False)
class Model:
    """A model that can answer."""

    name: str
    record: registry.Record
    run: inference.Classifier
    max_pixels: int
    sample: bool = False  # it came with the repository

    def is_small(self, data: bytes) -> bool:
        return images.is_small(data)

    def normalise(self, data: bytes) -> np.ndarray:
        """A raw picture -> uint8 (channels, size, size); raises images.ImageError."""
        about = self.record["dataset"]
        return images.normalise(
            data,
            size=about["size"],
            channels=about["channels"],
            recipe=about["recipe"],
            max_pixels=self.max_pixels,
        )

    def classify(self, pictures: np.ndarray) -> list[tuple[list[float], bool]]:
        """For each picture its probabilities, and whether it is uncertain."""
        probabilities, uncertain = self.run.read(pictures)
        return list(zip(probabilities.tolist(), uncertain.tolist(), strict=True))

    def answer(self, shares: list[float], uncertain: bool, top: int) -> dict[str, Any]:
        """CONTRACT's answer, but for the picture's own fields."""
        classes, study = self.record["dataset"]["classes"], self.record["study"]
        ranked = sorted(zip(classes, shares, strict=True), key=lambda pair: -pair[1])
        prediction, probability = ranked[0]
        return {
            "prediction": prediction,
            "probability": probability,
            "probabilities": dict(zip(classes, shares, strict=True)),
            "top": ranked[:top],
            "uncertain": uncertain,
            "model": self.name,
            "study": study["name"],
            "trial": study["trial"],
        }


class Engine:
    """Answers for pictures with the registry's current model, or another one by name.

    It watches the registry: a new current model is loaded and tried while the old one answers, and
    takes over only then. `refused` says which one could not, and why; `reason`, why there is no
    model where there is none. `rejected` counts, for each reason, the rejected requests that
    are not logged yet.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.current: Model | None = None
        self.canary: Model | None = None
        self.reason = "starting"
        self.refused: dict[str, str] = {}
        self.rejected: Counter[str] = Counter()
        self._loaded: dict[str, Model] = {}  # by name, the last one used at the end
        self._loading: dict[str, asyncio.Task[Model]] = {}  # by name, for all that wait for it
        self._failed: dict[str, registry.RegistryError] = {}  # by name, until it is tried again
        self._one = asyncio.Lock()  # loading what was asked for by name
        self._waiting = 0  # requests that wait for that
        self.folder = settings.models or registry.FOLDER  # the registry in use
        self._paths = [self.folder / registry.INFO]
        self._seen: list[tuple[int, ...] | None] = []
        self._again = math.inf  # when to look, even where nothing has changed
        self._bodies = 0
        self._loader = ThreadPoolExecutor(1, "loader")
        self._named_loader = ThreadPoolExecutor(1, "named")  # a swap waits for no other model
        self._preflight = Preflight(metrics.shared)
        self._batcher = Batcher(settings, metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the current model, and from then on each new one."""
        await self._look()
        self._tasks = [
            asyncio.create_task(each()) for each in (self._keep_looking, self._keep_reporting)
        ]

    async def stop(self) -> None:
        tasks = [*self._loading.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._preflight.stop()
        self._report_rejections()
        self._loader.shutdown()
        self._named_loader.shutdown()
        self._batcher.stop()

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                self._report_rejections()
            except Exception:  # no room for a metric, say
                log.exception("unexpected error")

    def _report_rejections(self) -> None:
        total = self.rejected.total()
        if not total:
            return
        log.warning("rejected", extra={"status": 429, "requests": total})
        self.metrics.requests.labels("POST", "other", 429).inc(total)
        for why, n in self.rejected.items():
            self.metrics.rejected.labels(why).inc(n)
        self.rejected.clear()

    @property
    def threads(self) -> int:
        """So many pictures are worked on at a time."""
        return self._batcher.threads

    def admit(self) -> None:
        """Count one more request in progress, until release().

        Raises batching.Busy where it cannot be answered in time.
        """
        self._batcher.admit()

    def release(self) -> None:
        """The request has ended."""
        self._batcher.release()

    def add_body_bytes(self, state: dict[str, Any], size: int) -> None:
        """So many more bytes of the body of the request with this state are in memory.

        Raises batching.Busy where all bodies would be over BODIES_BYTES.
        """
        if self._bodies + size > BODIES_BYTES:
            raise Busy("memory", "the server is busy: large uploads; try again in 1 s", 1)
        self._bodies += size
        state["held"] = state.get("held", 0) + size

    def release_body(self, state: dict[str, Any]) -> None:
        """The request was answered."""
        self._bodies -= state.pop("held", 0)

    async def model(self, name: str | None) -> Model:
        """The named model; without a name the current one, or for its share of requests the canary.

        Raises registry.UnknownModel where `name` names none, another registry.RegistryError where
        there is no model, or the model cannot be loaded; batching.Busy if too many wait for that.
        """
        if name is not None:
            return await self._named(name)
        if self.canary and self.settings.canary and random.random() < self.settings.canary[1]:
            return self.canary
        if self.current is None:
            raise registry.RegistryError(self.reason)
        return self.current

    async def answer(
        self, model: Model, data: bytes, filename: str | None, top: int = 3, view: bool = False
    ) -> dict[str, Any]:
        """CONTRACT's answer for one picture's bytes.

        Raises images.ImageError for the picture, batching.Busy where it would take too long.
        """
        picture, (shares, uncertain) = await self._batcher.classify(data, model)
        answer = {"filename": filename, **model.answer(shares, uncertain, top)}
        labels = model.name, answer["prediction"], str(answer["uncertain"]).lower()
        self.metrics.predictions.labels(*labels).inc()
        self.metrics.confidence.labels(model.name).observe(answer["probability"])
        return answer | ({"view": _png(picture)} if view else {})

    async def _named(self, name: str) -> Model:
        await _in(self._loader, registry.record, self.folder, name)  # it is still there
        for live in (self.current, self.canary):
            if live is not None and live.name == name:
                return live
        if name in self._loaded:
            self._loaded[name] = self._loaded.pop(name)
            return self._loaded[name]
        if name in self._failed:
            raise registry.RegistryError(str(self._failed[name]))
        if self._waiting > self.settings.max_queue / 2:
            raise Busy("loading", f"the server is busy: it loads {name}; try again in 1 s", 1)
        task = self._loading.get(name)
        if task is None:
            self._loading[name] = task = asyncio.create_task(self._load_named(name))
            task.add_done_callback(lambda done: self._loaded_one(name, done))
        self._waiting += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting -= 1

    def _loaded_one(self, name: str, done: asyncio.Task[Model]) -> None:
        del self._loading[name]
        if not done.cancelled():
            done.exception()  # seen, even where nobody waits for it any more

    # --- loading ---

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S * random.uniform(0.5, 1.5))
            try:
                await self._look()
            except Exception:  # nothing that is wrong with a registry ends the looking
                log.exception("unexpected error")

    async def _look(self) -> None:
        """Where the registry changed, load what is to answer; whatever fails, go on as before."""
        canary = self.settings.canary[0] if self.settings.canary else None
        if not await _in(self._loader, self._changed, canary):
            return
        self._failed, self._again = {}, math.inf
        self.current = await self._renew("current", None, self.current)
        if canary is not None:
            self.canary = await self._renew("canary", canary, self.canary)
        if self.refused:
            self._again = time.monotonic() + AGAIN_S

    def _changed(self, canary: str | None) -> bool:
        """Whether the registry's record did, or the files of who is to answer."""
        if registry.versions(self._paths) == self._seen and time.monotonic() < self._again:
            return False
        self.folder = self.settings.models or registry.FOLDER
        self._paths = [self.folder / registry.INFO]
        with suppress(registry.RegistryError):
            folder = self.folder = self.settings.models or registry.default_folder()
            info = registry.read(folder)
            named = [info["models"][name] for name in {info["current"], canary} & {*info["models"]}]
            files = [file["file"] for each in named for file in each["files"].values()]
            self._paths += [folder / file for file in files]
        self._seen = registry.versions(self._paths)
        return True

    async def _renew(self, role: str, name: str | None, old: Model | None) -> Model | None:
        """The model that is to have this role, or the old one where it cannot be had."""
        try:
            name = (await _in(self._loader, registry.record, self.folder, name))[0]
            if old is None or old.name != name:
                new = self._loaded.pop(name, None) or await self._load(self._loader, name)
            else:
                new = old
        except Exception as error:  # whatever it is, the server lives and says so
            known = isinstance(error, registry.RegistryError)
            reason = str(error) if known else f"the model cannot be used: {error!r}"
            if not known:
                log.exception("unexpected error")
            self.refused[role] = f"{name}: {reason}" if name and name not in reason else reason
            if role == "current":
                self.reason = reason
            self.metrics.refused.labels(name or "").inc()
            log.error("refused", extra={"role": role, "model": name, "reason": reason})
            return old
        self.refused.pop(role, None)  # only now: while it is tried again, what is known holds
        if new is not old:
            self._tell(role, old, new)
        return new

    def _tell(self, role: str, old: Model | None, new: Model) -> None:
        log.info("swapped", extra={"role": role, "model": new.name, "engine": new.run.engine})
        for model, n in ((old, 0), (new, 1)):
            if model is not None:
                self.metrics.models.labels(model.name, model.run.engine, role).set(n)
        if old is not None and role == "current":
            self.metrics.swaps.inc()

    async def _load_named(self, name: str) -> Model:
        """One that is neither current nor canary; a failure is remembered for AGAIN_S."""
        async with self._one:
            try:
                model = await self._load(self._named_loader, name)
            except registry.RegistryError as error:
                self._failed[name] = error
                self._again = min(self._again, time.monotonic() + AGAIN_S)
                raise
        self._loaded[name] = model
        while len(self._loaded) > LOADED:
            self._loaded.pop(next(iter(self._loaded)))
        return model

    async def _load(self, loader: ThreadPoolExecutor, name: str) -> Model:
        settings, folder = self.settings, self.folder
        threads = settings.threads
        engine: str = settings.engine
        passed_over = None
        tried = self.current is not None
        if tried:  # what answers is not to wait for what takes long or fails
            engine, passed_over = await self._preflight.check(folder, name, threads, engine)
        run = await _in(loader, inference.load, folder, name, threads, engine, tried)
        if passed_over is not None:
            run = replace(run, passed_over=passed_over)
        record = (await _in(loader, registry.record, folder, name))[1]
        return Model(name, record, run, settings.max_pixels, folder == registry.SAMPLE)


async def _in(loader: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(loader, function, *args)


def _png(picture: np.ndarray) -> str:
    """uint8 (channels, H, W) as a data URL."""
    stream = io.BytesIO()
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
