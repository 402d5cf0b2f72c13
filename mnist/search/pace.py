"""The length of a training that has to end at a given time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

ADJUST_FROM = 0.1  # share of the least length, after which the length follows the speed
# Least and most length, as shares of the one that a speed measurement suggests.
LEAST_SHARE, MOST_SHARE = 0.75, 1.5


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
    def around(cls, samples: int, least: int, most: int, deadline: float) -> "Pace":
        """The bounds of a training that is expected to have `samples` images.

        It may have at most `most`, and `least` where as many are expected.
        """
        low = max(round(LEAST_SHARE * samples), min(least, samples))
        return cls(deadline, low, min(round(MOST_SHARE * samples), most))

    def start(self) -> Callable[[int, int], int]:
        """The `adjust_total` of training.fit(); its first call starts the speed measurement."""
        first: tuple[int, float] | None = None

        def adjust_total(seen: int, total: int) -> int:
            nonlocal first
            now = time.monotonic()
            first = first or (seen, now)
            images, seconds = seen - first[0], now - first[1]
            if images < ADJUST_FROM * self.least:
                return total
            expected = seen + int(images / seconds * (self.deadline - now))
            # After a pause of the machine, the learning rate does not fall to zero at once.
            shortest = max(self.least, seen + (total - seen) // 2)
            return min(max(expected, shortest), self.most)

        return adjust_total
