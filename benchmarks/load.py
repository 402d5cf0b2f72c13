"""Requests to a server from outside, and how they were answered. `python -m benchmarks.load`

It runs in a process of its own, so that it can be kept on one core.
"""

import itertools
import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

HEAD = re.compile(rb"HTTP/1\.1 (\d{3}).*?\r\ncontent-length: (\d+)\r\n", re.I | re.S)
MOST_CONNECTIONS = 1000  # of an open loop
PATIENCE_S = 10.0  # for one answer
Row = tuple[float, float, int, int]  # due, seconds, status and tries, of Found


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


class Connection:
    """One kept-alive connection, opened again where the server closed it."""

    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self._port, self._selector = port, selector
        self._socket: socket.socket | None = None
        self._asked = False

    def ask(self, request: bytes, due: float) -> Row | None:
        """A row only where the request cannot be sent."""
        self._request, self.due, self._tries = request, due, 0
        return self._send()

    def read(self) -> Row | None:
        """A row where what came ends an answer, or none will come."""
        assert self._socket is not None
        try:
            data = self._socket.recv(65_536)
        except OSError:
            data = b""
        if not data or not self._asked:  # of an idle connection it can only be the end
            return self._lost()
        self._came += data
        head, end, body = self._came.partition(b"\r\n\r\n")
        found = HEAD.match(head + end) if end else None
        if found is None or len(body) < int(found[2]):
            return None
        if b"connection: close" in head.lower():
            self.close()
        return self._row(int(found[1]))

    def give_up(self) -> Row:
        self.close()
        return self._row(-1)

    def close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _send(self) -> Row | None:
        self._asked, self._came, self._tries = True, b"", self._tries + 1
        try:
            if self._socket is None:
                self._socket = socket.create_connection(("127.0.0.1", self._port), PATIENCE_S)
                self._selector.register(self._socket, selectors.EVENT_READ, self)
            self._socket.sendall(self._request)
        except TimeoutError:
            return self.give_up()
        except OSError:
            return self._lost()
        return None

    def _lost(self) -> Row | None:
        self.close()
        if not self._asked:  # it was idle
            return None
        if self._came:
            return self._row(-1)
        return self._send() if self._tries == 1 else self._row(0)

    def _row(self, status: int) -> Row:
        self._asked = False
        return self.due, time.perf_counter() - self.due, status, self._tries


class Clients:
    """Connections that are asked without waiting for an answer; `found` has all that came of it.

    To connect and to send may block, which on loopback is done at once. Plain sockets: asyncio's
    tasks, futures and time-outs took a processor longer, which the server has to share.
    """

    def __init__(self, port: int) -> None:
        self._port, self._selector = port, selectors.DefaultSelector()
        self._asked: dict[Connection, None] = {}  # who was asked first is first
        self._free: list[Connection] = []
        self.found: list[Row] = []

    def __len__(self) -> int:
        """How many were asked and are not free again."""
        return len(self._asked) + len(self._free)

    def open(self) -> Connection:
        return Connection(self._port, self._selector)

    def ask(self, connection: Connection, request: bytes, due: float) -> None:
        self._asked[connection] = None
        self._note(connection, connection.ask(request, due))

    def free(self, seconds: float) -> list[Connection]:
        """Those that have their answer, or will have none; waits for one, at most so long."""
        for key, _ in self._selector.select(0 if self._free else min(seconds, PATIENCE_S / 10)):
            self._note(key.data, key.data.read())
        patient = time.perf_counter() - PATIENCE_S
        while self._asked and (first := next(iter(self._asked))).due < patient:
            self._note(first, first.give_up())
        free, self._free = self._free, []
        return free

    def _note(self, connection: Connection, row: Row | None) -> None:
        if row is not None:
            self.found.append(row)
            del self._asked[connection]
            self._free.append(connection)


def closed(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> list[Row]:
    """Each connection asks again as soon as it was answered.

    They are opened one after the other, which does not count: of those that come at once, one
    worker may accept all.
    """
    clients, opened = Clients(port), []
    for _ in range(connections):
        clients.ask(clients.open(), requests[0], time.perf_counter())
        while clients:
            opened += clients.free(PATIENCE_S)
    clients.found.clear()
    end, turn = time.perf_counter() + seconds, itertools.cycle(requests)
    for connection in opened:
        clients.ask(connection, next(turn), time.perf_counter())
    while clients:
        for connection in clients.free(PATIENCE_S):
            if (now := time.perf_counter()) < end:
                clients.ask(connection, next(turn), now)
    return clients.found


def open_(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> list[Row]:
    """Requests come at random at this rate, whether or not the earlier ones were answered.

    Until SIGTERM, or for so many seconds.
    """
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    clients, idle = Clients(port), []
    chance, turn, due = random.Random(0), itertools.cycle(requests), time.perf_counter()
    end = due + seconds
    while (more := due < end and not stopped) or clients:
        idle += clients.free(due - time.perf_counter() if more else PATIENCE_S)
        while due <= time.perf_counter() and due < end and not stopped:
            if idle or len(clients) < MOST_CONNECTIONS:
                clients.ask(idle.pop() if idle else clients.open(), next(turn), due)
            else:
                clients.found.append((due, 0.0, -1, 1))
            due += chance.expovariate(rate)
    return clients.found


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
    start = time.perf_counter()
    found = (
        open_(port, bodies, rate, seconds) if rate else closed(port, bodies, connections, seconds)
    )
    json.dump([time.perf_counter() - start, found], sys.stdout)


if __name__ == "__main__":
    main()
