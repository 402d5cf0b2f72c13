"""Servers as other processes: ours, and what it is compared with; their start and memory."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S, STOP_S = 60, 10  # longest start of a server, and its longest end
OURS = ("-m", "uvicorn", "serve.app:app", "--log-level", "warning")


@dataclass
class Server:
    """A server that answered; `ready_s` after its process began."""

    process: subprocess.Popen[bytes]
    port: int
    ready_s: float

    def memory_mb(self) -> list[float]:
        """Resident memory of each of its processes, its own first."""
        return [_resident_mb(pid) for pid in below(self.process.pid)]


@contextmanager
def server(
    folder: Path | None, first: bytes, command: Sequence[str] = OURS, port: int = 0, **settings: str
) -> Iterator[Server]:
    """One that answers the request `first` with 200, for models in `folder`.

    Without a folder it uses its default registry. It is started as python COMMAND --port PORT, a
    free one by default, with the settings in its environment.
    """
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    # A server's second start finds its modules compiled, unless the machine forbids to keep that.
    own = {"PYTHONDONTWRITEBYTECODE": ""}
    if folder is not None:
        own["MODELS"] = str(folder.resolve())
    environment: Mapping[str, str] = os.environ | own | settings
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while not answers(port, first):
            if process.poll() is not None or time.perf_counter() - start > START_S:
                raise RuntimeError(f"python {' '.join(command)} has ended, or gives no answer")
            time.sleep(0.005)
        yield Server(process, port, time.perf_counter() - start)
    finally:
        pids = below(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        for pid in pids:  # LitServe's processes stay
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def answers(port: int, request: bytes) -> bool:
    """Whether the server's answer to one request is 200."""
    try:
        return bool(ask(port, request))
    except (OSError, http.client.HTTPException):
        return False


def ask(port: int, request: bytes) -> dict[str, Any]:
    """The JSON that one request, head and body, is answered with; nothing unless that is 200."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return json.load(answer) if answer.status == 200 else {}


def below(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += below(int(child))
    except OSError:
        return found
    return found


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    kib = next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    return kib * 1024 / 1e6
