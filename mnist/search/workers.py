"""Worker processes: each executes runs one after the other, with reports and checkpoints."""

import contextlib
import errno
import io
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection as pipes
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock

from mnist import folding, models, plugins, training
from mnist.data import Dataset

MAX_DEATHS = 3  # of a run's processes without a new checkpoint in between; then the run has failed
# Least time between two reports without an accuracy, as reading them takes processor time: with 64
# reports in 1.5 s, a worker did 2,200 images per second instead of 2,900 (two cores of Zen 5).
REPORT_INTERVAL_S = 0.25
# oneDNN keeps compiled operations for each batch size that it has seen, by default 1,024 of them: 8
# MB for each trial. Training and evaluation of `parallel` need between 32 and 64.
ONEDNN_SETTINGS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
CHECKPOINT_INTERVAL_S = 30.0  # least time between checkpoints; `parallel` with Adam takes 340 MB


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one worker trains: a trial, a confirmation, or the final model."""

    network: str
    params: dict[str, Any]
    samples: int
    seed: int
    rungs: tuple[int, ...] = ()
    final: bool = False  # on training and validation images together
    measure: bool = False  # only measure the speed of a few steps
    plain: bool = False  # the network's own layers, not its training form
    bfloat16: bool = False
    threads: int | None = None
    micro_batch: int | None = None
    checkpoint: Path | None = None
    weights: Path | None = None  # file for the final state dict of the training form
    deaths: int = 0  # consecutive deaths of its processes since the checkpoint of time `mark`
    mark: int = 0

    def retry(self, result: "RunResult") -> "Run | None":
        """The run to execute next after `result`; None where a retry cannot help."""
        if result.failure == "memory" and self.micro_batch is None:
            return replace(self, micro_batch=max(1, self.params["batch_size"] // 4))
        if result.failure != "died":
            return None
        path = self.checkpoint
        modified = path.stat().st_mtime_ns if path and path.exists() else 0
        deaths = 1 if modified != self.mark else self.deaths + 1
        return replace(self, deaths=deaths, mark=modified) if deaths < MAX_DEATHS else None


@dataclass(frozen=True)
class Report:
    """Progress of a run; where it has an accuracy, the worker waits for a reply (True: stop)."""

    progress: training.Progress


@dataclass(frozen=True)
class RunResult:
    """The end of a run: its accuracy, its speed, or why it failed."""

    accuracy: float | None = None
    images_per_s: float | None = None
    stopped: bool = False  # by a reply
    failure: str | None = None  # nan, memory, disk, error, died
    reason: str = ""


@dataclass(frozen=True)
class Setup:
    """How a worker loads its data, and where it trains."""

    load: Callable[[], Dataset]
    device: str
    threads: int
    quota: int | None = None  # bytes for all checkpoints, including one that is being replaced
    checkpoint_s: float = CHECKPOINT_INTERVAL_S
    report_s: float = REPORT_INTERVAL_S
    index: int = 0  # among the workers of its pool
    imports: tuple[Path, ...] = ()  # plugins that define the network or the data


class Worker:
    """A worker process, seen from the command that started it."""

    def __init__(self, context: Any, setup: Setup) -> None:
        self.setup, self.busy = setup, False
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve_runs, args=(child_pipe, setup), daemon=True)
        with block_signals():
            self.process.start()
        child_pipe.close()

    def is_unusable(self, result: RunResult) -> bool:
        """Whether the worker cannot go on: after a failure on a GPU, its memory and context may be
        damaged."""
        return result.failure is not None and self.setup.device.startswith("cuda")

    def start(self, run: Run) -> None:
        self.busy = True
        with contextlib.suppress(OSError):  # the process died, which receive() reports
            self.pipe.send(run)

    def reply(self, stop: bool) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(stop)

    def receive(self) -> Report | RunResult:
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            message = RunResult(failure="died", reason=_describe_exit(self.process.exitcode))
        if isinstance(message, RunResult):
            self.busy = False
        return message

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Processes that start in this block never see Ctrl-C: the command kills them."""
    signals = {signal.SIGINT, signal.SIGTERM}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _describe_exit(code: int | None) -> str:
    name = signal.Signals(-code).name if code and code < 0 else f"exit status {code}"
    return f"its process ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class Pool:
    """`n` workers; a dead one is replaced. A context manager that leaves no process behind."""

    def __init__(self, n: int, setup: Setup) -> None:
        self._context = _start_forkserver(setup.threads)
        self.setups = [
            replace(setup, device=_choose_device(setup.device, i), index=i) for i in range(n)
        ]
        self.workers: list[Worker] = []

    def __enter__(self) -> "Pool":
        self._start_missing()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_workers()

    def stop_workers(self) -> None:
        """Kill all workers, which frees their memory; idle_workers() starts new ones."""
        for worker in self.workers:
            worker.process.kill()
        for worker in list(self.workers):
            self.discard(worker)

    def _start_missing(self) -> None:
        """Start a worker for each setup that has none."""
        running = {worker.setup for worker in self.workers}
        for setup in self.setups:
            if setup not in running:
                self.workers.append(Worker(self._context, setup))

    def idle_workers(self) -> list[Worker]:
        self._start_missing()
        return [worker for worker in self.workers if not worker.busy]

    def receive_messages(self, timeout: float) -> Iterator[tuple[Worker, Report | RunResult]]:
        """Messages of busy workers, after at most `timeout` seconds without one."""
        busy = {worker.pipe: worker for worker in self.workers if worker.busy}
        for pipe in pipes.wait(list(busy), timeout) if busy else []:
            worker = busy[pipe]
            message = worker.receive()
            if isinstance(message, RunResult) and (
                message.failure == "died" or worker.is_unusable(message)
            ):
                self.discard(worker)
            yield worker, message

    def discard(self, worker: Worker) -> None:
        """Kill a worker, whatever it does; idle_workers() starts a new one."""
        worker.kill()
        if worker in self.workers:
            self.workers.remove(worker)


def available_cores() -> int:
    """Cores that this process may use, by OMP_NUM_THREADS or the scheduler."""
    if setting := os.environ.get("OMP_NUM_THREADS", ""):
        return int(setting) if setting.isdigit() and int(setting) else 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_forkserver(threads: int) -> Any:
    """Start the process that forks workers: it has imported torch but never used it.

    So workers start fast. A fork of the command itself would not be safe, as it copies locks that
    other threads hold. The first pool starts the server, once.
    """
    root, inherited = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    resource_tracker.ensure_running()  # first, as its start unblocks the signals
    # Python 3.11 does not pass sys.path on, and silently skips modules that it cannot import.
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **ONEDNN_SETTINGS}
    with extend_environment(**environment), block_signals():
        if sys.platform == "darwin":  # Metal does not survive a fork
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        preload = ["mnist.search.workers", "torch._dynamo"]  # optimizers need both
        context.set_forkserver_preload(preload)
        forkserver.ensure_running()
        return context


@contextlib.contextmanager
def extend_environment(**values: str) -> Iterator[None]:
    """Set environment variables for processes that start in this block."""
    saved = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _choose_device(device: str, i: int) -> str:
    return f"cuda:{i % torch.cuda.device_count()}" if device == "cuda" else device


# --- in the worker process


def _serve_runs(pipe: Any, setup: Setup) -> None:
    """Execute runs until the command that started this process is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(setup.threads)
    dataset = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            run = pipe.recv()
            try:
                if dataset is None:
                    for path in setup.imports:
                        plugins.load(path)
                    dataset = setup.load().to(torch.device(setup.device))
                    training.keep_freed_memory()  # after loading: it must not keep that memory
            except Exception as error:  # noqa: BLE001 - e.g. missing files, a busy device
                pipe.send(RunResult(failure="error", reason=_describe_error(error)))
            else:
                pipe.send(run_safely(run, dataset, setup, pipe))
                training.return_freed_memory()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipes.wait([parent.sentinel])
    os._exit(1)


def run_safely(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> RunResult:
    """Execute a run; each kind of failure becomes a RunResult."""
    try:
        if run.measure:
            return measure_speed(run, dataset, setup)
        return train(run, dataset, setup, pipe)
    except training.Diverged as error:
        return RunResult(failure="nan", reason=str(error))
    except QuotaExceeded as error:
        return RunResult(failure="disk", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a plugin's network may raise anything
        disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        phrases = ("out of memory", "allocate memory")
        out_of_memory = out_of_memory or any(phrase in str(error) for phrase in phrases)
        failure = "disk" if disk_full else "memory" if out_of_memory else "error"
        return RunResult(failure=failure, reason=_describe_error(error))


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class QuotaExceeded(Exception):
    """The weights of a run do not fit under --disk-quota."""


def build_network(run: Run, dataset: Dataset) -> torch.nn.Module:
    """A new network in the form that the run trains."""
    torch.manual_seed(run.seed)
    model = models.build(run.network, dataset.channels, dataset.size, len(dataset.classes))
    if not run.plain:
        model = folding.training_form(model)
    model.to(dataset.train.labels.device)
    if not plugins.is_from_plugin(models.NETWORKS[run.network]):  # a plugin may depend on the order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def measure_speed(run: Run, dataset: Dataset, setup: Setup) -> RunResult:
    """Measure the speed of the run's steps."""
    torch.set_num_threads(run.threads or setup.threads)
    settings: dict[str, Any] = {"bfloat16": run.bfloat16, "micro_batch": run.micro_batch}
    speed = training.measure_speed(build_network(run, dataset), dataset, **run.params, **settings)
    return RunResult(images_per_s=speed)


def train(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> RunResult:
    """Train, from the checkpoint if there is one; report progress and save checkpoints."""
    torch.set_num_threads(run.threads or setup.threads)
    model = build_network(run, dataset)
    split = dataset.train + dataset.validation if run.final else dataset.train
    reports = training.fit(
        model,
        dataset,
        split,
        None if run.final else dataset.validation,
        **run.params,
        samples=run.samples,
        validate_at=run.rungs,
        seed=run.seed,
        micro_batch=run.micro_batch,
        bfloat16=run.bfloat16,
        resume=load_checkpoint(run.checkpoint),
    )
    saved_at, accuracy, reported_at = time.monotonic(), None, -math.inf
    for progress in reports:
        is_last = progress.samples == progress.total
        due = time.monotonic() - reported_at > setup.report_s
        if due or is_last or progress.accuracy is not None:
            pipe.send(Report(replace(progress, state=None)))
            reported_at = time.monotonic()
        if progress.accuracy is not None:
            accuracy = progress.accuracy
            if pipe.recv():
                return RunResult(accuracy, stopped=True)
        due = time.monotonic() - saved_at > setup.checkpoint_s
        if run.checkpoint and due and progress.state and not is_last:
            if not save_checkpoint(progress.state(), run.checkpoint, setup.quota):
                log.warning("no room for %s under --disk-quota", run.checkpoint)
            saved_at = time.monotonic()
    if run.weights:
        save_weights(model, run, setup.quota)
    return RunResult(accuracy)


def save_weights(model: torch.nn.Module, run: Run, quota: int | None) -> None:
    """Write the weights that a run was for; raises QuotaExceeded."""
    assert run.weights is not None
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    if not save_checkpoint(state, run.weights, quota):
        if run.checkpoint:  # a finished run does not need it
            run.checkpoint.unlink(missing_ok=True)
        if not save_checkpoint(state, run.weights, quota):
            raise QuotaExceeded(f"no room for {run.weights} under --disk-quota")


def save_checkpoint(state: dict[str, Any], path: Path, quota: int | None = None) -> bool:
    """Write tensors to a file by rename, in place of its old content; returns whether it did.

    It does not where the folder above `path.parent`, which has the artifacts of all studies, would
    exceed `quota` bytes while both old and new content exist.
    """
    content = io.BytesIO()
    torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    # With a quota, only one process writes at a time: two must not count on the same space.
    with contextlib.nullcontext() if quota is None else FileLock(path.parent / ".lock"):
        size = content.getbuffer().nbytes
        if quota is not None:
            for stale in path.parent.glob(".*.tmp"):  # of killed processes
                stale.unlink(missing_ok=True)
            if folder_bytes(path.parent.parent) + size > quota:
                return False
        try:
            with temporary.open("wb") as stream:
                stream.write(content.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in the folder and below."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it
            total += path.stat().st_size
    return total


def load_checkpoint(path: Path | None) -> dict[str, Any] | None:
    """The tensors that save_checkpoint() wrote; None where there are none or they are damaged."""
    if path is None or not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file may raise anything
        log.warning("checkpoint %s cannot be read (%s); beginning again", path, error)
        return None
