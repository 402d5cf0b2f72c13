"""A load generator: HTTP requests to a server, with the latency and status of each.

python -m benchmarks.load PORT REQUESTS SECONDS       # takes SECONDS; prints JSON

The benchmarks of the server start it with the class Load, in a process of its own, which is pinned
to one core.
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

RESPONSE_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}).*?\r\ncontent-length: (\d+)\r\n", re.I | re.S)
MAX_CONNECTIONS = 1000  # of an open loop
TIMEOUT_S = 10.0  # for a response
Row = tuple[float, float, int, int]  # due, seconds, status and tries, as in Results


@dataclass(frozen=True)
class Results:
    """The N requests of a stage of `duration_s` seconds, as arrays (N,).

    `due`: when the request should be sent, by time.perf_counter(), which is the same for all
    processes. `seconds`: from then to the response. `statuses`: of the response; 0 if the
    connection was closed before any byte of a response, -1 if it was closed later, or after
    TIMEOUT_S. `tries`: a request whose status would be 0 is sent once more, as HTTP allows.
    """

    due: np.ndarray
    seconds: np.ndarray
    statuses: np.ndarray
    tries: np.ndarray
    duration_s: float

    def select(self, start: float, end: float) -> "Results":
        """Select the requests that were due from start to end."""
        rows = (start <= self.due) & (self.due < end)
        columns = (self.due, self.seconds, self.statuses, self.tries)
        return Results(*(column[rows] for column in columns), end - start)

    def latencies(self, status: int = 200) -> np.ndarray:
        """The seconds of the requests with this status."""
        return self.seconds[self.statuses == status]

    def count(self, status: int = 200) -> int:
        """Count the requests with this status."""
        return int((self.statuses == status).sum())

    @property
    def rate(self) -> float:
        """Responses with status 200 per second."""
        return self.count() / self.duration_s

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies with status 200; nan if there are none."""
        latencies = self.latencies()
        return float(np.percentile(latencies, percent)) * 1000 if len(latencies) else float("nan")


class Connection:
    """One keep-alive connection, opened again after the server closed it."""

    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self._port, self._selector = port, selector
        self._socket: socket.socket | None = None
        self._waiting = False  # for a response

    def send(self, request: bytes, due: float) -> Row | None:
        """Send the request; returns a row only if it cannot be sent."""
        self._request, self.due, self._tries = request, due, 0
        return self._send()

    def read(self) -> Row | None:
        """Read what has arrived; returns a row if the response is complete or cannot come."""
        assert self._socket is not None
        try:
            data = self._socket.recv(65_536)
        except OSError:
            data = b""
        if not data or not self._waiting:  # an idle connection can only end
            return self._handle_close()
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        match = RESPONSE_HEAD.match(head + end) if end else None
        if match is None or len(body) < int(match[2]):
            return None
        if b"connection: close" in head.lower():
            self.close()
        return self._row(int(match[1]))

    def time_out(self) -> Row:
        """Give up waiting for the response."""
        self.close()
        return self._row(-1)

    def close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _send(self) -> Row | None:
        self._waiting, self._received, self._tries = True, b"", self._tries + 1
        try:
            if self._socket is None:
                self._socket = socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S)
                self._selector.register(self._socket, selectors.EVENT_READ, self)
            self._socket.sendall(self._request)
        except TimeoutError:
            return self.time_out()
        except OSError:
            return self._handle_close()
        return None

    def _handle_close(self) -> Row | None:
        self.close()
        if not self._waiting:
            return None
        if self._received:
            return self._row(-1)
        return self._send() if self._tries == 1 else self._row(0)

    def _row(self, status: int) -> Row:
        self._waiting = False
        return self.due, time.perf_counter() - self.due, status, self._tries


class Clients:
    """Connections that send without waiting for a response; `rows` has the results.

    connect() and send() block, but not for long on loopback. Plain sockets, because asyncio's
    tasks, futures and timeouts took more CPU time, which the server has to share.
    """

    def __init__(self, port: int) -> None:
        self._port, self._selector = port, selectors.DefaultSelector()
        self._waiting: dict[Connection, None] = {}  # in the order of their requests
        self._free: list[Connection] = []  # has its response; not yet returned by wait()
        self.rows: list[Row] = []

    def __len__(self) -> int:
        """The number of connections that wait for a response, or that wait() has yet to return."""
        return len(self._waiting) + len(self._free)

    def open(self) -> Connection:
        return Connection(self._port, self._selector)

    def send(self, connection: Connection, request: bytes, due: float) -> None:
        self._waiting[connection] = None
        self._record(connection, connection.send(request, due))

    def wait(self, seconds: float) -> list[Connection]:
        """Wait at most these seconds for a response; returns the connections that are free."""
        for key, _ in self._selector.select(0 if self._free else min(seconds, TIMEOUT_S / 10)):
            connection = key.data
            self._record(connection, connection.read())
        oldest_due = time.perf_counter() - TIMEOUT_S
        while self._waiting and (oldest := next(iter(self._waiting))).due < oldest_due:
            self._record(oldest, oldest.time_out())
        free, self._free = self._free, []
        return free

    def _record(self, connection: Connection, row: Row | None) -> None:
        if row is not None:
            self.rows.append(row)
            del self._waiting[connection]
            self._free.append(connection)


def run_closed_loop(
    port: int, requests: Sequence[bytes], connections: int, seconds: float
) -> list[Row]:
    """Let each connection send its next request when it has the response to the last one.

    The connections are opened one after the other, before the measurement: if they were opened at
    once, one worker could accept all of them.
    """
    clients, idle = Clients(port), []
    for _ in range(connections):
        clients.send(clients.open(), requests[0], time.perf_counter())
        while clients:
            idle += clients.wait(TIMEOUT_S)
    clients.rows.clear()
    end, queue = time.perf_counter() + seconds, itertools.cycle(requests)
    for connection in idle:
        clients.send(connection, next(queue), time.perf_counter())
    while clients:
        for connection in clients.wait(TIMEOUT_S):
            if (now := time.perf_counter()) < end:
                clients.send(connection, next(queue), now)
    return clients.rows


def run_open_loop(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> list[Row]:
    """Send requests at random times, at a mean rate per second that ignores the responses.

    Ends at SIGTERM, or after `seconds`. Beyond MAX_CONNECTIONS a request is not sent; its status is
    -1.
    """
    stopped: list[int] = []  # the number of the signal
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    clients, idle = Clients(port), []
    rng, queue, due = random.Random(0), itertools.cycle(requests), time.perf_counter()
    end = due + seconds
    while (running := due < end and not stopped) or clients:
        idle += clients.wait(due - time.perf_counter() if running else TIMEOUT_S)
        while due <= time.perf_counter() and due < end and not stopped:
            if idle or len(clients) < MAX_CONNECTIONS:
                clients.send(idle.pop() if idle else clients.open(), next(queue), due)
            else:
                clients.rows.append((due, 0.0, -1, 1))
            due += rng.expovariate(rate)
    return clients.rows


def request(path: str, picture: bytes, content_type: str = "image/png") -> bytes:
    """Make a POST with the picture as its body."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
    return head.encode() + f"Content-Length: {len(picture)}\r\n\r\n".encode() + picture


def form(path: str, picture: bytes, field: str = "file") -> bytes:
    """Make a POST with the picture in a multipart form, as browsers and curl send it."""
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="x.png"'
    start = f"--XX\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n".encode()
    return request(path, start + picture + b"\r\n--XX--\r\n", "multipart/form-data; boundary=XX")


class Load:
    """A stage of load in another process: a closed loop of `connections`, or an open one at `rate`.

    `requests` is a folder with a file for each request.
    """

    def __init__(
        self,
        port: int,
        requests: Path,
        seconds: float,
        *,
        connections: int | None = None,
        rate: float | None = None,
    ) -> None:
        options = ["--rate", str(rate)] if rate else ["--connections", str(connections)]
        command = [sys.executable, "-m", "benchmarks.load", str(port), str(requests), str(seconds)]
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE)

    def stop(self) -> None:
        """Let an open loop send no more requests; it still waits for responses."""
        self._process.terminate()

    def wait(self) -> Results:
        """Wait for the end of the stage; returns its results."""
        output = self._process.communicate()[0]
        duration_s, rows = json.loads(output)
        due, seconds, statuses, tries = (np.array(column) for column in zip(*rows, strict=True))
        return Results(due, seconds, statuses, tries, duration_s)


@click.command()
@click.argument("port", type=int)
@click.argument("requests", type=click.Path(path_type=Path))
@click.argument("seconds", type=float)
@click.option("--connections", type=int, default=1)
@click.option("--rate", type=float)
def main(port: int, requests: Path, seconds: float, connections: int, rate: float | None) -> None:
    """Send the requests in the folder REQUESTS, one a file, to PORT, for SECONDS.

    With --rate it is an open loop at this number of requests per second, otherwise a closed loop.
    """
    if hasattr(os, "sched_setaffinity"):  # the last core; the server may use it, too
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    contents = [path.read_bytes() for path in sorted(requests.iterdir())]
    start = time.perf_counter()
    if rate:
        rows = run_open_loop(port, contents, rate, seconds)
    else:
        rows = run_closed_loop(port, contents, connections, seconds)
    json.dump([time.perf_counter() - start, rows], sys.stdout)


if __name__ == "__main__":
    main()
