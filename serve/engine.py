"""The live models: loaded beside what answers, swapped without a pause, kept where that fails."""

import asyncio
import base64
import io
import logging
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnist import images, inference, registry
from serve.batches import Batches, Busy
from serve.metrics import Metrics
from serve.settings import Settings

LOADED = 3  # models asked for by name that are kept; `parallel` takes 30 MB in int8, 113 in torch
WATCH_S = 0.5  # how often the registry is looked at
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
    model where there is none.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.current: Model | None = None
        self.canary: Model | None = None
        self.reason = "starting"
        self.refused: dict[str, str] = {}
        self._loaded: dict[str, Model] = {}  # by name, the last one used at the end
        self._paths = [settings.models / registry.INFO]
        self._seen: list[tuple[int, ...] | None] = []
        self._again = math.inf  # when to look, even where nothing has changed
        self._bodies = 0
        self._loader = ThreadPoolExecutor(1, "loader")
        self._named_loader = ThreadPoolExecutor(1, "named")  # a swap waits for no other model
        self._batches = Batches(settings, metrics)
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the current model, and from then on each new one."""
        await self._run(self._loader, self._look)
        self._watch = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        if self._watch:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        self._loader.shutdown()
        self._named_loader.shutdown()
        self._batches.stop()

    def admit(self) -> None:
        """One more request is under way, until leave().

        Raises batches.Busy where it cannot be answered in time.
        """
        self._batches.admit()

    def leave(self) -> None:
        self._batches.leave()

    def hold(self, state: dict[str, Any], size: int) -> None:
        """So many more bytes of the body of the request with this state are in memory.

        Raises batches.Busy where all bodies would be over BODIES_BYTES.
        """
        if self._bodies + size > BODIES_BYTES:
            raise Busy("memory", "the server is busy: large uploads; try again in 1 s", 1)
        self._bodies += size
        state["held"] = state.get("held", 0) + size

    def release(self, state: dict[str, Any]) -> None:
        """The request was answered."""
        self._bodies -= state.pop("held", 0)

    async def model(self, name: str | None) -> Model:
        """The named model; without a name the current one, or for its share of requests the canary.

        Raises registry.UnknownModel where `name` names none, another registry.RegistryError where
        there is no model, or the model cannot be loaded.
        """
        if name is not None:
            return await self._run(self._named_loader, self._named, name)
        if self.canary and self.settings.canary and random.random() < self.settings.canary[1]:
            return self.canary
        if self.current is None:
            raise registry.RegistryError(self.reason)
        return self.current

    async def answer(
        self, model: Model, data: bytes, filename: str | None, top: int = 3, view: bool = False
    ) -> dict[str, Any]:
        """CONTRACT's answer for one picture's bytes.

        Raises images.ImageError for the picture, batches.Busy where it would take too long.
        """
        picture, (shares, uncertain) = await self._batches.classify(data, model)
        answer = {"filename": filename, **model.answer(shares, uncertain, top)}
        labels = model.name, answer["prediction"], str(answer["uncertain"]).lower()
        self.metrics.predictions.labels(*labels).inc()
        self.metrics.confidence.labels(model.name).observe(answer["probability"])
        return answer | ({"view": _png(picture)} if view else {})

    # --- in the loading threads ---

    async def _run(self, loader: ThreadPoolExecutor, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(loader, function, *args)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self._run(self._loader, self._look)
            except Exception:  # nothing that is wrong with a registry ends the looking
                log.exception("unforeseen")

    def _look(self) -> None:
        """Where the registry changed, load what is to answer; whatever fails, go on as before."""
        seen = [_state(path) for path in self._paths]
        if seen == self._seen and time.monotonic() < self._again:
            return
        canary = self.settings.canary[0] if self.settings.canary else None
        self._paths = self._files(canary)
        self._seen = [_state(path) for path in self._paths]
        self.refused = {}
        self.current = self._renew("current", None, self.current)
        if canary is not None:
            self.canary = self._renew("canary", canary, self.canary)
        self._again = time.monotonic() + AGAIN_S if self.refused else math.inf

    def _files(self, canary: str | None) -> list[Path]:
        """What tells of a change: the registry's record, and the files of who is to answer."""
        folder = self.settings.models
        paths = [folder / registry.INFO]
        with suppress(registry.RegistryError):
            info = registry.read(folder)
            named = [info["models"][name] for name in {info["current"], canary} & {*info["models"]}]
            paths += [folder / file["file"] for each in named for file in each["files"].values()]
        return paths

    def _renew(self, role: str, name: str | None, old: Model | None) -> Model | None:
        """The model that is to have this role, or the old one where it cannot be had."""
        try:
            name = registry.record(self.settings.models, name)[0]
            if old is not None and old.name == name:
                return old
            new = self._load(name)
        except Exception as error:  # whatever it is, the server lives and says so
            known = isinstance(error, registry.RegistryError)
            reason = str(error) if known else f"the model cannot be used: {error!r}"
            if not known:
                log.exception("unforeseen")
            self.refused[role] = f"{name}: {reason}" if name and name not in reason else reason
            self.reason = reason
            self.metrics.refused.labels(name or "").inc()
            log.error("refused", extra={"role": role, "model": name, "reason": reason})
            return old
        self._tell(role, old, new)
        return new

    def _tell(self, role: str, old: Model | None, new: Model) -> None:
        log.info("swapped", extra={"role": role, "model": new.name, "engine": new.run.engine})
        for model, n in ((old, 0), (new, 1)):
            if model is not None:
                self.metrics.models.labels(model.name, model.run.engine, role).set(n)
        if old is not None and role == "current":
            self.metrics.swaps.inc()

    def _named(self, name: str) -> Model:
        registry.record(self.settings.models, name)  # it may have been removed since it was loaded
        for live in (self.current, self.canary):
            if live is not None and live.name == name:
                return live
        self._loaded[name] = model = self._loaded.pop(name, None) or self._load(name)
        while len(self._loaded) > LOADED:
            self._loaded.pop(next(iter(self._loaded)))
        return model

    def _load(self, name: str) -> Model:
        settings = self.settings
        run = inference.load(settings.models, name, settings.threads, settings.engine)
        return Model(name, registry.record(settings.models, name)[1], run, settings.max_pixels)


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _png(picture: np.ndarray) -> str:
    """uint8 (channels, H, W) as a data URL."""
    stream = io.BytesIO()
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
