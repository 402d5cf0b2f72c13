"""The metrics of the server, for Prometheus, also with several uvicorn workers."""

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
if _directory := os.environ.get(_VARIABLE):
    os.environ[_VARIABLE] = os.path.expanduser(_directory)  # noqa: PTH111 - raises nothing
else:
    os.environ.pop(_VARIABLE, None)  # prometheus_client would use an empty name, too
_PREFIX = "serve-metrics-"
_parent = multiprocessing.parent_process()
_no_temporary_folder = False
if _parent is not None and _VARIABLE not in os.environ:  # one of several workers of one uvicorn
    # Only the workers of one parent share its authkey.
    _shared = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
    _name = f"{_PREFIX}{_parent.pid}-{_shared}"
    try:
        os.environ[_VARIABLE] = str(Path(tempfile.gettempdir()) / _name)
    except FileNotFoundError:  # raised later, by shared_folder(): here it would be a traceback
        _no_temporary_folder = True

# prometheus_client reads the variable when it is imported.
from prometheus_client import (  # noqa: E402
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    multiprocess,
)
from prometheus_client.exposition import generate_latest  # noqa: E402

SECONDS_BUCKETS = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0)
PROBABILITY_BUCKETS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)


class MetricsError(RuntimeError):
    """The workers cannot share their metrics; the message says what to do."""


def shared_folder() -> Path | None:
    """The folder of the metrics of all workers, if there are several; it is made if missing.

    Raises MetricsError if it cannot be written to.
    """
    directory = os.environ.get(_VARIABLE)
    remedy = f"set {_VARIABLE} to a folder that can be written to, or use one worker"
    if _no_temporary_folder:
        raise MetricsError(f"no temporary folder can be written to; {remedy}")
    if not directory:
        return None
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MetricsError(f"{_VARIABLE}={folder}: {error.strerror}; {remedy}") from error
    return folder


class Metrics:
    """The metrics of one process; any thread may change them."""

    def __init__(self) -> None:
        """Raises MetricsError."""
        self.shared = shared_folder()
        if self.shared:
            _delete_stale(self.shared)
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "requests", "Answered requests", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "request_seconds", "From the head of the request to its response", ["route"],
            buckets=SECONDS_BUCKETS, registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "turned_away", "Requests rejected with 429", ["why"], registry=registry
        )
        self.waiting = Gauge(
            "queue_pictures", "Pictures that wait for the model",
            registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self.batches = Histogram(
            "batch_pictures", "Pictures classified together",
            buckets=BATCH_BUCKETS, registry=registry,
        )  # fmt: skip
        self.models = Gauge(
            "model_in_use", "Processes that answer with this model",
            ["model", "engine", "role"], registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self.swaps = Counter("model_swaps", "Changes of the current model", registry=registry)
        self.refused = Counter(
            "models_refused", "Models that could not be loaded", ["model"], registry=registry
        )
        self.predictions = Counter(
            "predictions", "Answers", ["model", "prediction", "uncertain"], registry=registry
        )
        self.confidence = Histogram(
            "prediction_probability", "Probability of the predicted class", ["model"],
            buckets=PROBABILITY_BUCKETS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """The metrics of all workers, in the text format of Prometheus."""
        if self.shared is None:
            return generate_latest(self._registry)
        for path in self.shared.glob("gauge_live*.db"):
            if not _is_alive(int(path.stem.rpartition("_")[2])):
                multiprocess.mark_process_dead(int(path.stem.rpartition("_")[2]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)

    def close(self) -> None:
        """Remove the gauges of this process, such as the length of its queue."""
        if self.shared:
            multiprocess.mark_process_dead(os.getpid())


def _delete_stale(shared: Path) -> None:
    """Delete the folders of servers that have ended, if `shared` is a folder with such a name."""
    if not shared.name.startswith(_PREFIX):
        return
    for folder in shared.parent.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """False also for a number that no process can have."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
