"""What the server counts, for Prometheus; right with several uvicorn workers, too."""

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
if not os.environ.get(_DIRECTORY):
    os.environ.pop(_DIRECTORY, None)  # for prometheus_client an empty one is one, too
_OURS = "serve-metrics-"
_parent = multiprocessing.parent_process()
if _parent is not None:  # one of several workers of one uvicorn
    # They share their parent's authkey, and nobody else does.
    _shared = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
    _name = f"{_OURS}{_parent.pid}-{_shared}"
    os.environ.setdefault(_DIRECTORY, str(Path(tempfile.gettempdir()) / _name))

# It reads that variable when it is imported.
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: E402
from prometheus_client import multiprocess as workers  # noqa: E402
from prometheus_client.exposition import generate_latest  # noqa: E402

TIMES_S = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0)
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
PICTURES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self.shared: Path | None = None  # a folder of all workers, if there are several
        if directory := os.environ.get(_DIRECTORY):
            self.shared = Path(directory)
            self.shared.mkdir(parents=True, exist_ok=True)
            _clear(self.shared)
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "requests", "Answered requests", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "request_seconds", "From the request's head to its answer", ["route"],
            buckets=TIMES_S, registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "turned_away", "Requests rejected with 429", ["why"], registry=registry
        )
        self.waiting = Gauge(
            "queue_pictures", "Pictures that wait for the model",
            registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self.batches = Histogram(
            "batch_pictures", "Pictures classified together", buckets=PICTURES, registry=registry
        )
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
            "prediction_probability", "Probability of the class answered", ["model"],
            buckets=SHARES, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Of all workers, in Prometheus's text format."""
        if self.shared is None:
            return generate_latest(self._registry)
        for path in self.shared.glob("gauge_live*.db"):
            if not _alive(int(path.stem.rpartition("_")[2])):
                workers.mark_process_dead(int(path.stem.rpartition("_")[2]))
        together = CollectorRegistry()
        workers.MultiProcessCollector(together)
        return generate_latest(together)

    def close(self) -> None:
        """What this process alone had, such as its queue, no longer counts."""
        if self.shared:
            workers.mark_process_dead(os.getpid())


def _clear(shared: Path) -> None:
    """Delete what servers have left that were ended, if `shared` is one of such folders."""
    if not shared.name.startswith(_OURS):
        return
    for left in shared.parent.glob(f"{_OURS}*-*"):
        pid = left.name.removeprefix(_OURS).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Not so for a worker that was killed, nor for a number that no process can have."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
