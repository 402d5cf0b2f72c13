"""A new model is first loaded by another process.

python -m serve.trial FOLDER NAME ENGINE [THREADS]

What takes long there, fails, or brings it down, does not touch the process that answers.
"""

import os

if __name__ == "__main__":
    # Who answers goes first, also before the imports below, which are most of the work. On a busy
    # machine, too, a model can be replaced.
    os.nice(10)

import hashlib
import json
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from mnist import inference, registry

COMMAND = (sys.executable, "-m", "serve.trial")
LONGEST_S = 120
RECENT_S = 5  # workers look at the registry within half a second of each other

Found = tuple[str, dict[str, str]]
"""The engine that runs a model, as inference.load finds it, and why better ones do not."""


async def which_engine(
    folder: Path, name: str, threads: int | None, engine: str, shared: Path | None
) -> Found:
    """What another process finds, which ends with whoever waits for it.

    The workers of one server have a folder `shared`: one tries a model, and if it can be run, the
    others take that from there; one that is refused they try as well, one after the other. Raises
    registry.RegistryError where no engine runs it, or the process fails or takes over LONGEST_S.
    """
    arguments = [str(folder), name, engine, *([] if threads is None else [str(threads)])]
    if shared is None:
        return await _found(name, arguments)
    from filelock import AsyncFileLock  # at the first swap only, 14 ms

    known = shared / f"trial-{hashlib.sha256(repr(arguments).encode()).hexdigest()[:16]}.json"
    with suppress(OSError):  # no room for the lock, or another one has it for as long as it may
        async with AsyncFileLock(known.with_suffix(".lock"), timeout=LONGEST_S):
            with suppress(OSError, ValueError):
                if time.time() - known.stat().st_mtime < RECENT_S:
                    run_by, passed_over = json.loads(known.read_text())
                    return run_by, passed_over
            found = await _found(name, arguments)
            with suppress(OSError):
                known.write_text(json.dumps(found))
            return found
    return await _found(name, arguments)


async def _found(name: str, arguments: list[str]) -> Found:
    import asyncio  # who asks has it; the process that tries starts a fifth faster without

    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *arguments, env=environment, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        raise registry.RegistryError(f"no process can try model {name}: {error}") from error
    try:
        async with asyncio.timeout(LONGEST_S):
            output, complaints = await process.communicate()
        found = json.loads(output)
    except TimeoutError as error:
        message = f"to try model {name} took over {LONGEST_S} s"
        raise registry.RegistryError(message) from error
    except ValueError as error:  # it came to no end
        last = complaints.decode(errors="replace").strip().rpartition("\n")[2]
        message = f"to try model {name} ended a process ({process.returncode}) {last}"
        raise registry.RegistryError(message.strip()) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "refused" in found:
        raise registry.RegistryError(found["refused"])
    return found["engine"], found["passed_over"]


def main(folder: str, name: str, engine: str, threads: str | None = None) -> None:
    """Print the engine, or why there is none, as JSON."""
    signal.alarm(LONGEST_S)  # should who asked be gone
    with suppress(OSError):  # where memory runs out, this process ends, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of it
    try:
        run = inference.load(Path(folder), name, int(threads) if threads else None, engine)
        found = {"engine": run.engine, "passed_over": dict(run.passed_over)}
    except registry.RegistryError as error:
        found = {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked is told
        traceback.print_exc()
        found = {"refused": f"the model cannot be used: {error!r}"}
    os.write(answer, json.dumps(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
