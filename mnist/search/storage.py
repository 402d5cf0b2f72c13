"""The study's database: URLs, connections, and a study that several processes share."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import optuna
import tenacity
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError

from mnist.search import locks

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
STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError)  # a full disk, a lost server

T = TypeVar("T")


class StudyError(RuntimeError):
    """A study that this command cannot open or continue."""


class SharedStudy:
    """A study that this process reads and changes only under a lock, as others do the same."""

    def __init__(self, storage: str, name: str) -> None:
        """Open or create the study. Raises StudyError."""
        file = sqlite_file(storage)
        self.folder = file.parent if file else Path(tempfile.gettempdir())  # of lock files
        if not self.folder.is_dir():  # creating the lock file would create the folder
            raise unusable_storage(storage, f"there is no folder {self.folder}")
        # Not from the URL: one database server has many spellings.
        key = hashlib.sha256(f"{file or ''} {name}".encode()).hexdigest()[:12]
        self.prefix = f".study-{key}"
        self._is_remote = file is None
        try:
            self.engine = create_engine(storage, **engine_kwargs(storage))
            self.lock = locks.make_lock(self.engine, self.folder / f"{self.prefix}.lock")
            self.study = self._open(storage, name)
        except (OSError, ImportError, *STORAGE_ERRORS) as error:
            raise unusable_storage(storage, str(error.__cause__ or error)) from error
        self.storage = self.study._storage

    def _open(self, storage: str, name: str) -> optuna.Study:
        """Open the study; retries while the server is starting."""

        def open_locked() -> optuna.Study:
            # Creates the database's tables, which all studies share.
            with locks.make_lock(self.engine, self.folder / ".study-open.lock")():
                return open_study(storage, name)

        def is_transient(error: BaseException) -> bool:
            return self._is_remote and any(words in str(error) for words in TRANSIENT_ERRORS)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_fixed(1),
            stop=_stop_after(OPEN_RETRY_S),
            reraise=True,
        )(open_locked)

    def run_locked(self, action: Callable[[optuna.Study], T]) -> T:
        """Call `action` with the study under its lock, to read or change it.

        Retries for RETRY_S while the database server is lost; other errors are raised at once.
        """

        def act() -> T:
            with self.lock():
                return action(self.study)

        def is_connection_lost(error: BaseException) -> bool:
            # InternalError: the server ended the session of a process that stalled under the lock.
            kinds = OperationalError | InterfaceError | InternalError
            while error is not None and not isinstance(error, kinds):
                error = error.__cause__  # type: ignore[assignment]
            return self._is_remote and error is not None

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_connection_lost),
            wait=tenacity.wait_random_exponential(max=MAX_RETRY_WAIT_S),
            stop=_stop_after(RETRY_S),
            reraise=True,
        )(act)

    def close(self) -> None:
        self.storage.remove_session()
        for engine in (self.engine, self.storage._backend.engine):  # type: ignore[attr-defined]
            engine.dispose()


def _stop_after(seconds: float) -> tenacity.stop.stop_base:
    attempts = tenacity.stop_after_attempt(MIN_ATTEMPTS)
    return tenacity.stop_all(tenacity.stop_after_delay(seconds), attempts)


def open_study(storage: str, name: str) -> optuna.Study:
    """Create or continue a study. Raises StudyError where the storage cannot be used."""
    try:
        database = optuna.storages.RDBStorage(storage, engine_kwargs(storage))
        study = optuna.create_study(
            storage=database, study_name=name, direction="maximize", load_if_exists=True
        )
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid4().hex)
    except (*STORAGE_ERRORS, ImportError, ValueError) as error:
        raise unusable_storage(storage, str(getattr(error, "orig", None) or error)) from error
    return study


def without_password(storage: str) -> str:
    """The storage's URL without its password, for output and records."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return storage


def engine_kwargs(storage: str) -> dict[str, Any]:
    """Arguments of SQLAlchemy's engine for a storage; raises StudyError for a malformed URL."""
    try:
        kind = make_url(storage).get_backend_name()
    except SQLAlchemyError as error:
        raise unusable_storage(storage, str(error)) from error
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


def unusable_storage(storage: str, reason: str) -> StudyError:
    """The one-line error for a storage that cannot be opened."""
    return StudyError(
        f"--storage {without_password(storage)!r} cannot be opened: "
        f"{reason.strip().splitlines()[0]}; a URL such as sqlite:///db.sqlite3 is wanted"
    )


def sqlite_file(storage: str) -> Path | None:
    """The file of an SQLite database; None for other storages."""
    try:
        url = make_url(storage)
    except SQLAlchemyError:
        return None
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).resolve() if is_file else None
