"""Locks between processes, on files or in PostgreSQL, that defer signals."""

import contextlib
import hashlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Engine, text

Lock = Callable[[], contextlib.AbstractContextManager[None]]


def make_lock(engine: Engine, file: Path) -> Lock:
    """A lock between processes: on the file, or on PostgreSQL an advisory lock."""
    if engine.dialect.name != "postgresql":

        @contextlib.contextmanager
        def file_locked() -> Iterator[None]:
            with FileLock(file), defer_signals():  # a new object each time: also excludes threads
                yield

        return file_locked
    key = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big", signed=True)

    @contextlib.contextmanager
    def advisory_locked() -> Iterator[None]:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            with defer_signals():
                yield

    return advisory_locked


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block: within a statement they break connections.

    A second signal raises KeyboardInterrupt at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def defer(number: int, _: Any) -> None:
        if pending:  # the database may hang
            raise KeyboardInterrupt
        pending.append(number)

    handlers = {signum: signal.signal(signum, defer) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if pending:
            signal.raise_signal(pending[0])


def host_id(folder: Path) -> str:
    """An id of this machine for locks in `folder`: equally named containers differ in folders."""
    boot_id, status = Path("/proc/sys/kernel/random/boot_id"), folder.stat()
    parts = [socket.gethostname(), boot_id.read_text() if boot_id.exists() else ""]
    parts += [str(status.st_dev), str(status.st_ino)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def remove_if_free(file: Path) -> bool:
    """Delete a lock file that no process holds; returns whether it did."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    file.unlink(missing_ok=True)
    return True
