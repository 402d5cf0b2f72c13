"""The time of one command."""

import time
from dataclasses import dataclass
from math import inf

from mnist.search.loop import Unfinished


@dataclass(frozen=True)
class Clock:
    """A command's `start` and the `deadline` of --timeout, by time.monotonic()."""

    start: float
    deadline: float = inf

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    @property
    def remaining_s(self) -> float:
        """Until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self, unfinished: str) -> None:
        """Raise Unfinished after the deadline."""
        if time.monotonic() > self.deadline:
            raise Unfinished(f"--timeout: {unfinished}")
