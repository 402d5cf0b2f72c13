"""New models are tried by another process (serve.trial) than the one that answers.

What takes long there, fails, or brings it down, holds up no answer.
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

COMMAND = (sys.executable, "-m", "serve.trial")
LONGEST_S = 120
RECENT_S = 5  # workers look at the registry within a second of each other
IDLE_S = 60  # that a process stays, of each worker that has tried a model; it takes 70 MB

Asked = tuple[str, str, int | None, str]
"""Folder, name, threads and engine, as inference.load takes them."""
Answer = dict[str, Any]
"""What the process says: `engine` and `passed_over`, or why it is `refused`; whether it has
`torch` in memory."""
Process = subprocess.Popen[bytes]


class Trials:
    """Has models tried by processes that stay a while for the next ones.

    The workers of one server have a folder `shared`: one tries a model, and the others take from
    there what it found.
    """

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._idle: dict[Process, asyncio.TimerHandle] = {}  # and what ends them

    def stop(self) -> None:
        """No process stays; one at work ends with whoever waits for it."""
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            _end(process)

    async def which_engine(
        self, folder: Path, name: str, threads: int | None, engine: str
    ) -> tuple[str, dict[str, str]]:
        """The engine that runs the model, and why better ones do not, as inference.load finds it.

        Raises registry.RegistryError where no engine runs the model, or the process fails or takes
        over LONGEST_S.
        """
        asked = str(folder), name, threads, engine
        found = await (self._once(asked, self._shared) if self._shared else self._try(asked))
        if "refused" in found:
            raise registry.RegistryError(found["refused"])
        return found["engine"], found["passed_over"]

    async def _once(self, asked: Asked, shared: Path) -> Answer:
        from filelock import AsyncFileLock  # at the first swap only, 14 ms

        digest = hashlib.sha256(repr(asked).encode()).hexdigest()
        known = shared / f"trial-{digest[:16]}.json"
        lock = AsyncFileLock(known.with_suffix(".lock"), timeout=LONGEST_S)
        try:
            await lock.acquire()
        except OSError:  # no room for it, or another one has it for as long as it may
            return await self._try(asked)
        version = ""
        try:
            with suppress(OSError, ValueError):
                version = await asyncio.to_thread(_version, Path(asked[0]), asked[1])
                of, found = json.loads(known.read_text())
                if of == version and time.time() - known.stat().st_mtime < RECENT_S:
                    return dict(found)
            found = await self._try(asked)
            with suppress(OSError):
                known.write_text(json.dumps([version, found]))
            return found
        finally:
            await lock.release()

    async def _try(self, asked: Asked) -> Answer:
        name, found = asked[1], None
        try:
            process = await self._process()
        except OSError as error:  # that is no fault of the model's, and no answer for others
            raise registry.RegistryError(f"no process can try model {name}: {error}") from error
        try:
            async with asyncio.timeout(LONGEST_S):
                found, said = await asyncio.to_thread(_ask, process, asked)
        except TimeoutError:
            return {"refused": f"to try model {name} took over {LONGEST_S} s"}
        finally:
            if found and not found.pop("torch"):  # with it a process takes 500 MB
                self._keep(process)
            else:
                await asyncio.to_thread(_end, process)
        ended = f"to try model {name} ended a process ({process.returncode}) {said}"
        return found or {"refused": ended.strip()}

    async def _process(self) -> Process:
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            if process.poll() is None:
                return process
            _end(process)
        # Not by the event loop: uvloop copies the tables of all memory, which stops it for a while.
        return await asyncio.to_thread(_start)

    def _keep(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        self._idle[process] = loop.call_later(IDLE_S, self._leave, process)

    def _leave(self, process: Process) -> None:
        del self._idle[process]
        asyncio.get_running_loop().run_in_executor(None, _end, process)


def _start() -> Process:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        COMMAND, 0, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT
    )


def _ask(process: Process, asked: Asked) -> tuple[Answer | None, str]:
    """Its answer, none where it ended without one, and the last other line that it said."""
    said = ""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it has ended
        process.stdin.write(json.dumps(asked).encode() + b"\n")
    for line in process.stdout:
        with suppress(ValueError):  # what libraries print is among it
            found = json.loads(line)
            if isinstance(found, dict) and "torch" in found:
                return found, said
        said = line.decode(errors="replace").strip() or said
    return None, said


def _end(process: Process) -> None:
    process.kill()
    with process:  # closes its pipes, waits
        pass


def _version(folder: Path, name: str) -> str:
    """Of the model's files and the registry's record."""
    return repr(registry.versions([folder / registry.INFO, *sorted(folder.glob(f"{name}.*"))]))
