"""The length of a training that has to end at a given time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

ADJUST_FROM = 0.1  # share of a training, after which its length follows its speed
BOUNDS = 0.75, 1.5  # of the length, as shares of what a speed measurement suggests


@dataclass(frozen=True)
class Pace:
    """The length of a training that ends at `deadline` (time.monotonic()), within two bounds.

    A speed measurement of seconds before the training may be wrong by a third, as the speed of a
    shared machine changes; `least` and `most` images bound what that can do.
    """

    deadline: float
    least: int
    most: int

    @classmethod
    def around(cls, samples: int, most: int, deadline: float) -> "Pace":
        """The bounds of a training that is expected to have `samples` images, at most `most`."""
        low, high = (round(bound * samples) for bound in BOUNDS)
        return cls(deadline, low, min(high, most))

    def start(self) -> Callable[[int, int], int]:
        """The `adjust_total` of training.fit()."""
        first: list[tuple[int, float]] = []

        def adjust_total(seen: int, total: int) -> int:
            now = time.monotonic()
            first.append((seen, now))
            images, seconds = seen - first[0][0], now - first[0][1]
            if images < ADJUST_FROM * self.least:
                return total
            expected = seen + int(images / seconds * (self.deadline - now))
            return min(max(expected, self.least), self.most)

        return adjust_total
