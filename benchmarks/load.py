"""Requests to a server from outside, and how they were answered. `python -m benchmarks.load`

It runs in a process of its own, so that it can be kept on one core.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop

HEAD = re.compile(rb"HTTP/1\.1 (\d{3}).*?\r\ncontent-length: (\d+)\r\n", re.I | re.S)
MOST_CONNECTIONS = 1000  # of an open loop
PATIENCE_S = 10.0  # for one answer


@dataclass(frozen=True)
class Found:
    """What came of one stage: when each request was due, by time.perf_counter(), which is the same
    for all processes; the seconds its answer took, its status, and how often it was tried.

    Status 0: the connection was closed before any byte of an answer; -1: later, or it took too
    long. A request with status 0 is tried once more, as clients may with such a one.
    """

    due: np.ndarray
    seconds: np.ndarray
    statuses: np.ndarray
    tries: np.ndarray
    length_s: float

    def between(self, start: float, end: float) -> "Found":
        """Only what was due then."""
        rows = (start <= self.due) & (self.due < end)
        columns = (self.due, self.seconds, self.statuses, self.tries)
        return Found(*(column[rows] for column in columns), end - start)

    def of(self, status: int = 200) -> np.ndarray:
        return self.seconds[self.statuses == status]

    def count(self, status: int = 200) -> int:
        return int((self.statuses == status).sum())

    @property
    def rate(self) -> float:
        """Right answers a second."""
        return self.count() / self.length_s

    def ms(self, percent: float) -> float:
        good = self.of()
        return float(np.percentile(good, percent)) * 1000 if len(good) else float("nan")


class Wire(asyncio.Protocol):
    """One TCP connection; `answer` becomes the status of what was last asked."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self.open = transport, True
        self.came, self.answer = b"", asyncio.get_running_loop().create_future()

    def ask(self, request: bytes) -> None:
        self.came, self.answer = b"", asyncio.get_running_loop().create_future()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.came += data
        head, end, body = self.came.partition(b"\r\n\r\n")
        found = HEAD.match(head + end) if end else None
        if found is not None and len(body) >= int(found[2]):
            if b"connection: close" in head.lower():
                self.close()
            self._answered(int(found[1]))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._answered(-1 if self.came else 0)

    def close(self) -> None:
        self.open = False
        self._transport.close()

    def _answered(self, status: int) -> None:
        if not self.answer.done():
            self.answer.set_result(status)


class Connection:
    """One kept-alive connection, opened again where the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wire: Wire | None = None

    async def ask(self, request: bytes, due: float) -> tuple[float, float, int, int]:
        """A row of Found."""
        status, tries = await self._ask(request), 1
        if not status:
            status, tries = await self._ask(request), 2
        return due, time.perf_counter() - due, status, tries

    async def _ask(self, request: bytes) -> int:
        try:
            async with asyncio.timeout(PATIENCE_S):
                if self._wire is None or not self._wire.open:
                    loop = asyncio.get_running_loop()
                    _, self._wire = await loop.create_connection(Wire, "127.0.0.1", self._port)
                self._wire.ask(request)
                return await self._wire.answer
        except TimeoutError:
            self.close()
            return -1
        except OSError:  # no connection
            return 0

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()


async def closed(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> list:
    """Each connection asks again as soon as it was answered.

    They are opened one after the other: of those that come at once, one worker may accept all.
    """
    found, opened = [], [Connection(port) for _ in range(connections)]
    for connection in opened:
        await connection.ask(requests[0], time.perf_counter())
    end = time.perf_counter() + seconds

    async def one(i: int, connection: Connection) -> None:
        while (start := time.perf_counter()) < end:
            found.append(await connection.ask(requests[i % len(requests)], start))
            i += 1
        connection.close()

    await asyncio.gather(*(one(7 * i, each) for i, each in enumerate(opened)))
    return found


async def open_(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> list:
    """Requests come at random at this rate, whether or not the earlier ones were answered.

    Until SIGTERM, or for so many seconds.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    found: list[tuple[float, float, int, int]] = []
    idle: list[Connection] = []
    chance, tasks, at, i = random.Random(0), set(), time.perf_counter(), 0
    end = at + seconds

    async def one(due: float, request: bytes) -> None:
        connection = idle.pop() if idle else Connection(port)
        found.append(await connection.ask(request, due))
        idle.append(connection)

    while at < end and not stop.is_set():
        at, i = at + chance.expovariate(rate), i + 1
        await asyncio.sleep(at - time.perf_counter())
        if len(tasks) < MOST_CONNECTIONS:
            task = asyncio.create_task(one(at, requests[i % len(requests)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            found.append((at, 0.0, -1, 1))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return found


def request(path: str, picture: bytes, kind: str = "image/png") -> bytes:
    """A POST with the picture as its body."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return head.encode() + f"Content-Length: {len(picture)}\r\n\r\n".encode() + picture


def form(path: str, picture: bytes, field: str = "file") -> bytes:
    """A POST with the picture in a multipart form, as a browser or curl sends it."""
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="x.png"'
    start = f"--XX\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n".encode()
    return request(path, start + picture + b"\r\n--XX--\r\n", "multipart/form-data; boundary=XX")


class Load:
    """A stage that runs in another process; found() waits for its end."""

    def __init__(
        self,
        port: int,
        requests: Path,
        seconds: float,
        *,
        connections: int | None = None,
        rate: float | None = None,
    ) -> None:
        how = ["--rate", str(rate)] if rate else ["--connections", str(connections)]
        command = [sys.executable, "-m", "benchmarks.load", str(port), str(requests), str(seconds)]
        self._process = subprocess.Popen([*command, *how], stdout=subprocess.PIPE)

    def stop(self) -> None:
        """No more requests of an open loop."""
        self._process.terminate()

    def found(self) -> Found:
        output = self._process.communicate()[0]
        length_s, rows = json.loads(output)
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        return Found(*columns, length_s)


@click.command()
@click.argument("port", type=int)
@click.argument("requests", type=click.Path(path_type=Path))
@click.argument("seconds", type=float)
@click.option("--connections", type=int, default=1)
@click.option("--rate", type=float)
def main(port: int, requests: Path, seconds: float, connections: int, rate: float | None) -> None:
    """Send the requests in the folder REQUESTS, one a file, to PORT, for so many SECONDS."""
    if hasattr(os, "sched_setaffinity"):  # the last core; a server may use it, too
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    bodies = [path.read_bytes() for path in sorted(requests.iterdir())]
    stage = (
        open_(port, bodies, rate, seconds) if rate else closed(port, bodies, connections, seconds)
    )
    start = time.perf_counter()
    found = uvloop.run(stage)
    json.dump([time.perf_counter() - start, found], sys.stdout)


if __name__ == "__main__":
    main()
