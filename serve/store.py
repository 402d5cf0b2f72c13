"""Models from an object store: its registry is copied into a folder while the server answers.

The rest of the server reads the folder only, so a store that is away changes no answer.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mnist.registry import RegistryError
from mnist.registry.mirror import Mirror, StoreError
from serve.metrics import Metrics

POLL_S = 10.0  # between two requests for the store's record, on average; 260,000 a month
RETRY_S = 60.0  # until the files of a refused model are downloaded again

log = logging.getLogger("serve")


class StoreCopy:
    """Keeps the copy in `folder` up to date; a thread of its own waits for the store.

    `refused` of the engine gets the reason while the store's registry is unusable. All attributes
    belong to the event loop.
    """

    def __init__(self, url: str, engine: str, metrics: Metrics, refused: dict[str, str]) -> None:
        runs_torch = engine in ("auto", "torch") and find_spec("torch") is not None
        self._mirror = Mirror(url, unused=() if runs_torch else ("weights",))
        self._executor = ThreadPoolExecutor(1, "store")
        self._metrics, self._refused = metrics, refused
        self.reason = ""  # why the store gives no registry
        self._is_away = False

    @property
    def folder(self) -> Path:
        return self._mirror.folder

    def stop(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    async def keep_updated(self, canary: str | None) -> None:
        """Call update() every POLL_S, or after RETRY_S if a model was refused."""
        while True:
            await asyncio.sleep(
                (RETRY_S if "store" in self._refused else POLL_S) * random.uniform(0.5, 1.5)
            )
            await self.update(canary)

    async def update(self, canary: str | None) -> None:
        """Copy what is new; an error is logged, once while it lasts."""
        try:
            await self._run(self._mirror.update, *filter(None, [canary]))
        except StoreError as error:
            if not self._is_away:
                log.warning("store away", extra={"reason": str(error)})
            self.reason, self._is_away = str(error), True
            return
        except Exception as error:  # the server stays up and reports any error
            if not isinstance(error, RegistryError):
                log.exception("unexpected error")
            self.reason = self._refused["store"] = str(error)
            self._is_away = False
            self._metrics.refused.labels("").inc()
            log.error("refused", extra={"role": "store", "model": None, "reason": str(error)})
            return
        if self._is_away:
            log.info("store back")
        self.reason, self._is_away = "", False
        self._refused.pop("store", None)

    async def fetch(self, name: str) -> None:
        """Copy the files of a model; raises registry.RegistryError if they cannot be had."""
        await self._run(self._mirror.fetch, name)

    async def _run(self, function: Callable[..., Any], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
