"""mnist.search.locks: one process at a time, and signals that wait for it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, Timeout
from sqlalchemy import create_engine

from mnist.search import locks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_a_file_s_lock_excludes_processes_and_threads(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    lock = locks.make_lock(create_engine("sqlite://"), file)
    with lock(), pytest.raises(Timeout):
        FileLock(file).acquire(timeout=0)
    with lock():  # free again
        pass


class Server:
    """In place of an engine for PostgreSQL: notes statements and the ends of transactions."""

    dialect = SimpleNamespace(name="postgresql")

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def begin(self) -> Iterator["Server"]:
        yield self
        self.calls.append(("commit", None))

    def execute(self, statement: Any, parameters: dict[str, int]) -> None:
        self.calls.append((str(statement), parameters["key"]))


def test_on_a_server_the_lock_s_key_follows_from_the_file_s_name() -> None:
    keys = set()
    for file in ("/a/.study-1.lock", "/b/.study-1.lock", "/a/.study-2.lock", "/a/.study-3.lock"):
        server = Server()
        with locks.make_lock(server, Path(file))():  # type: ignore[arg-type]
            ((statement, key),) = server.calls
            assert statement == "SELECT pg_advisory_xact_lock(:key)"
            assert -(2**63) <= key < 2**63  # PostgreSQL's bigint
            keys.add(key)
        assert server.calls[1:] == [("commit", None)]
    assert len(keys) == 3  # and the same on another machine, by any version of this module:
    assert 955521763120495926 in keys


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The signals that reached this process's own handlers."""
    received: list[int] = []
    before = [
        signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS
    ]
    yield received
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("on_a_server", [False, True])
def test_a_signal_waits_for_the_end_of_the_lock(
    tmp_path: Path, received: list[int], number: int, on_a_server: bool
) -> None:
    engine: Any = Server() if on_a_server else create_engine("sqlite://")
    for _ in range(2):
        received.clear()
        with locks.make_lock(engine, tmp_path / "lock")():
            signal.raise_signal(number)
            assert received == []
        assert received == [number]


def test_without_a_signal_none_is_raised(received: list[int]) -> None:
    with locks.defer_signals():
        pass
    assert received == []


def test_a_second_signal_interrupts_at_once(received: list[int]) -> None:
    after = False
    with contextlib.suppress(KeyboardInterrupt), locks.defer_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        after = True
    assert not after
    assert received == [signal.SIGTERM]


def test_other_threads_leave_signals_alone() -> None:
    handlers = []

    def work() -> None:
        with locks.defer_signals():
            handlers.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == before


def test_a_machine_s_id_is_that_of_its_name_boot_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    host = locks.host_id(here)
    assert len(host) == 12
    assert locks.host_id(here) == host
    assert locks.host_id(other) != host  # in a container of the same name
    monkeypatch.setattr(locks.socket, "gethostname", lambda: "another")  # type: ignore[attr-defined]
    renamed = locks.host_id(here)
    monkeypatch.setattr(Path, "read_text", lambda _: "another boot")
    booted = locks.host_id(here)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # not Linux
    assert len({host, renamed, booted, locks.host_id(here)}) == 4


def test_a_lock_file_is_removed_only_if_it_is_free(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with FileLock(file):
        assert not locks.remove_if_free(file)
        assert file.exists()
    assert locks.remove_if_free(file)
    assert not file.exists()
