"""Starts servers in other processes, this one and its peers; measures their start and memory."""

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

START_TIMEOUT_S, STOP_TIMEOUT_S = 60, 10
OURS = ("-m", "uvicorn", "serve.app:app", "--log-level", "warning")


@dataclass
class Server:
    """A server whose first response came `ready_s` after the start of its process."""

    process: subprocess.Popen[bytes]
    port: int
    ready_s: float

    def memory_mb(self) -> list[float]:
        """Resident memory of each process, the parent first."""
        return [_resident_mb(pid) for pid in list_processes(self.process.pid)]


@contextmanager
def server(
    folder: Path | None,
    request: bytes,
    command: Sequence[str] = OURS,
    port: int = 0,
    **settings: str,
) -> Iterator[Server]:
    """Start a server for the models in `folder`; yields when it answers `request` with status 200.

    Without a folder, the server uses its default registry. The command is python COMMAND --port
    PORT, with the settings in its environment. Port 0 stands for a free one. Raises RuntimeError
    if the server ends or does not answer within START_TIMEOUT_S.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
    # With bytecode files, a second start does not compile.
    variables = {"PYTHONDONTWRITEBYTECODE": ""}
    if folder is not None:
        variables["MODELS"] = str(folder.resolve())
    environment: Mapping[str, str] = os.environ | variables | settings
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while not answers(port, request):
            if process.poll() is not None or time.perf_counter() - start > START_TIMEOUT_S:
                raise RuntimeError(f"python {' '.join(command)} has ended, or gives no answer")
            time.sleep(0.005)
        yield Server(process, port, time.perf_counter() - start)
    finally:
        pids = list_processes(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        for pid in pids:  # LitServe's processes outlive their parent
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def make_command(workers: int) -> Sequence[str]:
    """Make the command of this server with a number of uvicorn workers."""
    return OURS if workers == 1 else (*OURS, "--workers", str(workers))


def answers(port: int, request: bytes) -> bool:
    """Whether the response to the request has status 200."""
    try:
        return bool(fetch(port, request))
    except (OSError, http.client.HTTPException):
        return False


def fetch(port: int, request: bytes) -> dict[str, Any]:
    """Send a request, head and body; returns the JSON of a response with status 200, else {}."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return json.load(response) if response.status == 200 else {}


def list_processes(pid: int) -> list[int]:
    """List the ids of a process and of all its descendants."""
    pids = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                pids += list_processes(int(child))
    except OSError:
        return pids
    return pids


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    kib = next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    return kib * 1024 / 1e6
