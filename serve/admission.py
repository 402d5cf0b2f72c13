"""Admission of requests: the limits of requests in progress, of their wait and of their bodies."""

import asyncio
import logging
import math
from collections import Counter
from typing import Any, Protocol

from serve.metrics import Metrics
from serve.settings import Settings

MAX_WAIT_SHARE = 0.5  # of the deadline may pass in the queue; the rest is for the answer itself
MAX_BODIES_BYTES = 500_000_000  # of the bodies of all requests in memory
REPORT_S = 1.0  # between two log lines that count rejected requests

log = logging.getLogger("serve")


class Busy(Exception):
    """A rejection: the metrics' label `why`, and the seconds after which the client may retry."""

    def __init__(self, why: str, reason: str, wait_s: float = 0) -> None:
        self.why, self.retry_after_s = why, max(1, math.ceil(wait_s))
        super().__init__(f"the server is busy: {reason}; try again in {self.retry_after_s} s")


class Queue(Protocol):
    """What admission needs of the queue before the model."""

    @property
    def waiting(self) -> int:
        """Number of pictures in the queue."""

    @property
    def pace_s(self) -> float:
        """Seconds that the server takes for a picture."""


class Admission:
    """Admits requests within the limits, and counts the admitted and the rejected ones.

    `requests` is the number in progress. All attributes belong to the event loop.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.requests = 0
        self._body_bytes = 0  # of all requests in progress
        self._rejected: Counter[str] = Counter()  # by `why`; not reported yet

    def admit(self, queue: Queue) -> None:
        """Count one more request in progress, until release().

        Called before the body is read, so that the memory of all bodies is bounded. Raises Busy if
        MAX_QUEUE is reached, or the answer would come after DEADLINE_MS.
        """
        waiting, settings = queue.waiting, self._settings
        wait_s = waiting * queue.pace_s
        if max(waiting, self.requests) >= settings.max_queue:
            reason = f"{settings.max_queue} requests are in progress (MAX_QUEUE)"
            raise Busy("queue", reason, wait_s)
        if wait_s > MAX_WAIT_SHARE * settings.deadline_ms / 1000:
            reason = f"no answer within {settings.deadline_ms} ms (DEADLINE_MS)"
            raise Busy("deadline", reason, wait_s)
        self.requests += 1

    def release(self) -> None:
        """The request has ended."""
        self.requests -= 1

    def add_body_bytes(self, state: dict[str, Any], size: int) -> None:
        """Count bytes of the body of the request with this state, until release_body().

        Raises Busy if all bodies would exceed MAX_BODIES_BYTES.
        """
        if self._body_bytes + size > MAX_BODIES_BYTES:
            limit = f"{MAX_BODIES_BYTES // 10**6} MB"
            raise Busy("memory", f"the uploads in progress would exceed {limit}")
        self._body_bytes += size
        state["body_bytes"] = state.get("body_bytes", 0) + size

    def release_body(self, state: dict[str, Any]) -> None:
        """The request has ended."""
        self._body_bytes -= state.pop("body_bytes", 0)

    def count_rejected(self, error: Busy) -> None:
        """Count a rejected request, for report_rejected()."""
        self._rejected[error.why] += 1

    async def keep_reporting(self) -> None:
        """Call report_rejected() every REPORT_S."""
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                self.report_rejected()
            except Exception:  # such as a full disk, for a metric
                log.exception("unexpected error")

    def report_rejected(self) -> None:
        """Write the counts of rejected requests to the log and the metrics."""
        total = self._rejected.total()
        if not total:
            return
        log.warning("rejected", extra={"status": 429, "requests": total})
        self._metrics.requests.labels("POST", "other", 429).inc(total)
        for why, n in self._rejected.items():
            self._metrics.rejected.labels(why).inc(n)
        self._rejected.clear()
