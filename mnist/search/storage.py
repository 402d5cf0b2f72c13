"""The study's database: connections, and a study that several processes share."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import optuna
import tenacity
from sqlalchemy import create_engine
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError

from mnist.search import existing, locks, urls
from mnist.search.urls import StudyError, unusable_storage
from mnist.shell import first_line

SQLITE_TIMEOUT_S = 60  # how long SQLite waits for another process's statement
# Time after which PostgreSQL ends an idle transaction or a wait for a lock; less than
# liveness.GRACE_PERIOD_S, so that a trial is free before another member claims it.
TRANSACTION_TIMEOUT_S = 30.0
RETRY_S = 180.0  # duration of retries after a lost database connection
MAX_RETRY_WAIT_S = 10.0
OPEN_RETRY_S = 30.0  # duration of retries while a database does not accept connections
# Texts of errors from a server that is starting or stopping, or of a stalled process; a wrong
# password has none of them.
TRANSIENT_ERRORS = (
    *("refused", "starting up", "shutting down"),
    *("transaction timeout", "lock timeout"),
)
MIN_ATTEMPTS = 3  # the process may be suspended in its first attempt for longer than the retries
CONNECTION_ERRORS = (OperationalError, InterfaceError, InternalError)
# SQLite's errors that end without a change of the study: of a full or failing disk, or a lock.
PASSING_ERRORS = ("is full", "is locked", "disk I/O error")
REMOVED = re.compile(r"no such table|(relation|database) .* does not exist")

T = TypeVar("T")


class StorageError(RuntimeError):
    """The database failed during the command; `passing` if the same command may continue later."""

    def __init__(self, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


class StudyGone(StorageError):
    """The study or its database was removed during the command, for this `reason`."""

    def __init__(self, name: str, storage: str, reason: str) -> None:
        super().__init__(
            f"study {name} is gone from {storage}: {reason}; this command starts a new one, "
            "--study NAME continues a renamed one"
        )
        self.reason = reason


STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError, StorageError)


class SharedStudy:
    """A study that this process reads and changes only under a lock, as others do the same."""

    def __init__(self, storage: str, name: str) -> None:
        """Open or create the study. Raises StudyError."""
        urls.check(storage)
        self.url, self.name = storage, name
        self.file = urls.sqlite_file(storage)
        self.folder = self.file.parent if self.file else Path(tempfile.gettempdir())  # of locks
        if not self.folder.is_dir():  # creating the lock file would create the folder
            raise unusable_storage(storage, f"there is no folder {self.folder}")
        # Not from the URL: several URLs may name one database server.
        key = hashlib.sha256(f"{self.file or ''} {name}".encode()).hexdigest()[:12]
        self.prefix = f".study-{key}"
        try:
            self.engine = create_engine(urls.parse(storage), **engine_kwargs(storage))
            self.lock = locks.make_lock(self.engine, self.folder / f"{self.prefix}.lock")
            self.study = self._open(storage, name)
        except (OSError, ImportError, *STORAGE_ERRORS) as error:
            raise unusable_storage(storage, str(error.__cause__ or error)) from error
        self.storage = self.study._storage
        self.id: str = self.study.user_attrs["id"]

    def _open(self, storage: str, name: str) -> optuna.Study:
        """Open the study; retries while the server is starting."""

        def open_locked() -> optuna.Study:
            # Creates the database's tables, which all studies share.
            with locks.make_lock(self.engine, self.folder / ".study-open.lock")():
                return open_study(storage, name)

        def is_transient(error: BaseException) -> bool:
            return self.file is None and any(words in str(error) for words in TRANSIENT_ERRORS)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_fixed(1),
            stop=_stop_after(OPEN_RETRY_S),
            reraise=True,
        )(open_locked)

    def run_locked(self, action: Callable[[optuna.Study], T]) -> T:
        """Call `action` with the study under its lock, to read or change it.

        Retries for RETRY_S while the database server is lost. Raises StudyGone, StorageError.
        """

        def act() -> T:
            self._check_file()
            with self.lock():
                self._check_identity()
                return action(self.study)

        def is_connection_lost(error: BaseException) -> bool:
            # InternalError: the server ended the session of a process that stalled under the lock.
            cause = _find_cause(error, CONNECTION_ERRORS)
            return self.file is None and cause is not None and not REMOVED.search(str(cause))

        with self._explain_errors():
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_connection_lost),
                wait=tenacity.wait_random_exponential(max=MAX_RETRY_WAIT_S),
                stop=_stop_after(RETRY_S),
                reraise=True,
            )(act)

    @contextlib.contextmanager
    def locked(self) -> Iterator[optuna.Study]:
        """The study under its lock, without retries. Raises StudyGone, StorageError."""
        with self._explain_errors():
            self._check_file()
            with self.lock():
                self._check_identity()
                yield self.study

    def _check_identity(self) -> None:
        """Raise StudyGone where the study was deleted. A newer study may have the same name and, in
        SQLite, the same number."""
        if self.study.user_attrs.get("id") != self.id:
            raise self._gone("it was deleted or renamed")

    def _check_file(self) -> None:
        """Raise StudyGone where the database file was removed: SQLite would create an empty file,
        and the lock would create its folder."""
        if self.file and not self.file.exists():
            raise self._gone(f"the file {self.file} was removed")

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Raise StudyGone for errors after a removal, StorageError for errors of the database."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            if reason := self._find_removal():
                raise self._gone(reason) from error
            if not isinstance(error, STORAGE_ERRORS):
                raise
            cause = _root_cause(error)
            passing = any(text in str(cause) for text in PASSING_ERRORS) or (
                self.file is None and _find_cause(error, CONNECTION_ERRORS) is not None
            )
            text = urls.scrub(first_line(cause), self.url)
            raise StorageError(f"{urls.mask_url_secrets(self.url)}: {text}", passing) from error

    def _find_removal(self) -> str | None:
        """Why the study no longer exists; None where it does, or where the database fails."""
        try:
            self._check_file()
            if self.file:  # an open connection still reads a file that was replaced
                self.storage.remove_session()
                self.storage._backend.engine.dispose()  # type: ignore[attr-defined]
            self._check_identity()
        except StudyGone as gone:
            return gone.reason
        except KeyError:
            return "it was deleted or renamed"
        except STORAGE_ERRORS as error:
            if REMOVED.search(str(_root_cause(error))):
                return "its database was removed or emptied"
        return None

    def _gone(self, reason: str) -> StudyGone:
        return StudyGone(self.name, urls.mask_url_secrets(self.url), reason)

    def close(self) -> None:
        self.storage.remove_session()
        for engine in (self.engine, self.storage._backend.engine):  # type: ignore[attr-defined]
            engine.dispose()


def _stop_after(seconds: float) -> tenacity.stop.stop_base:
    attempts = tenacity.stop_after_attempt(MIN_ATTEMPTS)
    return tenacity.stop_all(tenacity.stop_after_delay(seconds), attempts)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _find_cause(error: BaseException | None, kinds: tuple[type[Exception], ...]) -> Any:
    """The first error of these kinds in the chain of causes, or None."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def open_study(storage: str, name: str) -> optuna.Study:
    """Create or continue a study. Raises StudyError where the storage or the study is unusable."""
    try:
        # Optuna takes braces for a template; in this form of the URL they are encoded.
        url = urls.parse(storage).render_as_string(hide_password=False)
        database = optuna.storages.RDBStorage(url, engine_kwargs(storage))
        study = optuna.create_study(
            storage=database, study_name=name, direction="maximize", load_if_exists=True
        )
        existing.check(study)
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid4().hex)
    except StudyError:
        raise
    except Exception as error:
        if "with the table schema" in str(error):
            raise other_schema(storage) from error
        raise unusable_storage(storage, str(_root_cause(error))) from error
    return study


def engine_kwargs(storage: str) -> dict[str, Any]:
    """Arguments of SQLAlchemy's engine for a storage; raises StudyError for a malformed URL."""
    kind = urls.parse(storage).get_backend_name()
    if kind == "sqlite":
        return {"connect_args": {"timeout": SQLITE_TIMEOUT_S}}
    if kind == "postgresql":  # libpq's parameters, which detect a server that hangs
        timeouts = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5}
        keepalives = {"keepalives_count": 3, "tcp_user_timeout": 30_000}
        events = [(set_transaction_timeout, "connect")]
        return {"pool_pre_ping": True, "connect_args": timeouts | keepalives, "pool_events": events}
    return {"pool_pre_ping": True}


def set_transaction_timeout(connection: Any, _: Any) -> None:
    """Let PostgreSQL end transactions of a new connection that stall for TRANSACTION_TIMEOUT_S.

    A process suspended in a transaction would hold its locks for as long as its machine sleeps.
    """
    with connection.cursor() as cursor:
        for name in ("idle_in_transaction_session_timeout", "lock_timeout"):
            cursor.execute(f"SET {name} = {int(TRANSACTION_TIMEOUT_S * 1000)}")
    connection.commit()


def other_schema(storage: str) -> StudyError:
    """The error for tables of another version of Optuna."""
    return StudyError(
        f"--storage {urls.mask_url_secrets(storage)!r} has tables of another version of Optuna "
        f"than {optuna.__version__}: `optuna storage upgrade --storage URL` converts tables of an "
        "older version; for tables of a newer one, name another database"
    )
