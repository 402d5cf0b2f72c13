"""Which members of a study are alive: file locks on the same machine, heartbeats between machines.

The study has an entry for each member: its machine, its lock file, and a counter, its `beat`.
"""

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from mnist.search import locks

HEARTBEAT_S = 10.0
GRACE_PERIOD_S = 60.0  # silence after which a member on another machine counts as dead

Entries = dict[str, dict[str, Any]]


class Liveness:
    """One member's sign of life, and its view of the others.

    A living member holds a file lock, which the operating system releases when the process ends,
    and increments its beat. Members on the same machine check the file lock, so a slow member never
    counts as dead. Members on other machines watch the beat, by their own clock, and only while
    they reach the database themselves.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        """`folder` and `prefix` of the study's lock files. Raises OSError."""
        self._folder, self._prefix = folder, prefix
        self._host = locks.host_id(folder)
        self._silence: dict[str, tuple[int, float]] = {}  # id -> last beat, seconds since then
        self._polled_at = time.monotonic()
        self._join()

    def _join(self) -> None:
        self.id = uuid4().hex[:12]
        self.file_lock = FileLock(self._folder / f"{self._prefix}-{self.id}.lock")
        self.file_lock.acquire(timeout=0)

    def leave(self) -> None:
        self.file_lock.release()
        Path(self.file_lock.lock_file).unlink(missing_ok=True)

    def update(self, entries: Entries) -> Entries:
        """The entries with this member's next beat and without dead members.

        A member that others have declared dead joins again, with a new `id`. Called under the
        study's lock.
        """
        now = time.monotonic()
        elapsed, self._polled_at = min(now - self._polled_at, 2 * HEARTBEAT_S), now
        if self.id in self._silence and self.id not in entries:  # declared dead by others
            self.leave()
            self._join()
        beat = entries.get(self.id, {"beat": 0})["beat"] + 1
        self._silence[self.id] = (beat, 0.0)
        lock = Path(self.file_lock.lock_file).name
        others = {
            name: entry
            for name, entry in entries.items()
            if name != self.id and not self._is_dead(name, entry, elapsed)
        }
        return others | {self.id: {"host": self._host, "lock": lock, "beat": beat}}

    def _is_dead(self, name: str, entry: dict[str, Any], elapsed: float) -> bool:
        lock = self._folder / entry["lock"]
        if entry["host"] == self._host and lock.exists():
            return locks.remove_if_free(lock)
        beat, silence = self._silence.get(name, (None, 0.0))
        silence = silence + elapsed if beat == entry["beat"] else 0.0
        self._silence[name] = (entry["beat"], silence)
        return silence > GRACE_PERIOD_S
