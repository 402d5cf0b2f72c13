"""The preflight check of a new model, in another process (serve.preflight_worker).

A check that takes long, fails, or ends its process delays no answer.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist import registry

COMMAND = (sys.executable, "-m", "serve.preflight_worker")
TIMEOUT_S = 120  # for one check
MAX_AGE_S = 5  # of a result that another worker wrote; all poll the registry within a second
IDLE_S = 60  # until an idle process ends; there may be one for each worker, of 70 MB

Arguments = tuple[str, str, int | None, str]
"""Of inference.load: folder, name, threads and engine."""
Result = dict[str, Any]
"""`engine` and `skipped_engines`, or why the model is `refused`; whether `torch` was imported."""
Process = subprocess.Popen[bytes]


class Preflight:
    """Checks models in processes that stay a while for the next check.

    The workers of one server have a folder `shared`: one of them checks a model, and the others
    read its result there. All attributes belong to the event loop.
    """

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._idle: dict[Process, asyncio.TimerHandle] = {}  # the timer ends the process

    def stop(self) -> None:
        """End all idle processes; a busy one ends with the task that waits for it."""
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            _end(process)

    async def check(
        self, folder: Path, name: str, threads: int | None, engine: str
    ) -> tuple[str, dict[str, str]]:
        """The engine that runs the model, and the better ones that do not, each with the reason.

        Raises registry.RegistryError if no engine runs the model, or the process fails or takes
        over TIMEOUT_S.
        """
        arguments = str(folder), name, threads, engine
        if self._shared:
            result = await self._check_once(arguments, self._shared)
        else:
            result = await self._check(arguments)
        if "refused" in result:
            raise registry.RegistryError(result["refused"])
        return result["engine"], result["skipped_engines"]

    async def _check_once(self, arguments: Arguments, shared: Path) -> Result:
        """The result in the shared folder, or a new one, which is written there."""
        from filelock import AsyncFileLock  # at the first swap only, 14 ms

        digest = hashlib.sha256(repr(arguments).encode()).hexdigest()
        cache = shared / f"preflight-{digest[:16]}.json"
        lock = AsyncFileLock(cache.with_suffix(".lock"), timeout=TIMEOUT_S)
        try:
            await lock.acquire()
        except OSError:  # the disk is full, or another worker has the lock for all of TIMEOUT_S
            return await self._check(arguments)
        version = ""
        try:
            with suppress(OSError, ValueError):
                version = await asyncio.to_thread(_version, Path(arguments[0]), arguments[1])
                cached_version, result = json.loads(cache.read_text())
                if cached_version == version and time.time() - cache.stat().st_mtime < MAX_AGE_S:
                    return dict(result)
            result = await self._check(arguments)
            with suppress(OSError):
                cache.write_text(json.dumps([version, result]))
            return result
        finally:
            await lock.release()

    async def _check(self, arguments: Arguments) -> Result:
        name, result = arguments[1], None
        try:
            process = await self._process()
        except OSError as error:  # not the model's fault, so not a result for other workers
            message = f"no process can be started to check model {name}: {error}"
            raise registry.RegistryError(message) from error
        try:
            async with asyncio.timeout(TIMEOUT_S):
                result, output = await asyncio.to_thread(_ask, process, arguments)
        except TimeoutError:
            return {"refused": f"the preflight check of model {name} took over {TIMEOUT_S} s"}
        finally:
            if result and not result.pop("torch"):  # with torch a process takes 500 MB
                self._keep(process)
            else:
                await asyncio.to_thread(_end, process)
        status = process.returncode
        reason = f"the preflight check of model {name} ended its process ({status}) {output}"
        return result or {"refused": reason.strip()}

    async def _process(self) -> Process:
        """An idle process, or a new one."""
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            if process.poll() is None:
                return process
            _end(process)
        # In a thread, not by the event loop: uvloop would copy the page tables of all memory.
        return await asyncio.to_thread(_start)

    def _keep(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        self._idle[process] = loop.call_later(IDLE_S, self._release, process)

    def _release(self, process: Process) -> None:
        del self._idle[process]
        asyncio.get_running_loop().run_in_executor(None, _end, process)


def _start() -> Process:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        COMMAND, 0, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT
    )


def _ask(process: Process, arguments: Arguments) -> tuple[Result | None, str]:
    """The process's result, None if it ended without one, and its last other line of output."""
    output = ""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # the process has ended
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
    for line in process.stdout:
        with suppress(ValueError):  # libraries print, too
            result = json.loads(line)
            if isinstance(result, dict) and "torch" in result:
                return result, output
        output = line.decode(errors="replace").strip() or output
    return None, output


def _end(process: Process) -> None:
    process.kill()
    with process:  # closes its pipes and waits
        pass


def _version(folder: Path, name: str) -> str:
    """The versions of the model's files and of the registry's record."""
    return repr(registry.versions([folder / registry.INFO, *sorted(folder.glob(f"{name}.*"))]))
