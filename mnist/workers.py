"""Training processes: each carries out one run after the other, with reports and checkpoints."""

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

DEATHS = 3  # of a run's process without a new checkpoint in between, then it has failed
# Least time between two reports without an accuracy: who reads them needs a processor, too. With 64
# of them in 1.5 s a worker did 2,200 images a second instead of 2,900 (two cores of Zen 5).
REPORT_S = 0.25
CHECKPOINT_S = 30.0  # at most one checkpoint in so many seconds; `parallel` with Adam takes 340 MB


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
    measure: bool = False  # just the speed of a few steps
    plain: bool = False  # the network's own layers, not its training form
    bfloat16: bool = False
    threads: int | None = None
    micro_batch: int | None = None
    checkpoint: Path | None = None
    weights: Path | None = None  # where the state dict is wanted, of the training form
    deaths: int = 0  # of its processes, one after the other, since the checkpoint of time `mark`
    mark: int = 0

    def again(self, ended: "Ended") -> "Run | None":
        """The same run as it may be tried again, where that can help."""
        if ended.failure == "memory" and self.micro_batch is None:
            return replace(self, micro_batch=max(1, self.params["batch_size"] // 4))
        if ended.failure != "died":
            return None
        path = self.checkpoint
        mark = path.stat().st_mtime_ns if path and path.exists() else 0
        deaths = 1 if mark != self.mark else self.deaths + 1
        return replace(self, deaths=deaths, mark=mark) if deaths < DEATHS else None


@dataclass(frozen=True)
class Report:
    """Where a run stands; the worker waits for the answer (True: stop) if it has an accuracy."""

    progress: training.Progress


@dataclass(frozen=True)
class Ended:
    """A run is over: `accuracy` after all of it, or images a second, or why it failed."""

    accuracy: float | None = None
    images_per_s: float | None = None
    stopped: bool = False
    failure: str | None = None  # nan, memory, disk, error, died
    reason: str = ""


@dataclass(frozen=True)
class Setup:
    """How a worker gets its data, and where it trains."""

    load: Callable[[], Dataset]
    device: str
    threads: int
    quota: int | None = None  # bytes that all checkpoints may take, while one replaces another
    checkpoint_s: float = CHECKPOINT_S
    report_s: float = REPORT_S
    place: int = 0  # among the workers of its pool
    imports: tuple[Path, ...] = ()  # plugins that define the network or the data


class Worker:
    """One training process, seen from the command that started it."""

    def __init__(self, context: Any, setup: Setup) -> None:
        self.setup, self.busy = setup, False
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, setup), daemon=True)
        with signals_blocked():
            self.process.start()
        end.close()

    def spoilt(self, ended: Ended) -> bool:
        return ended.failure is not None and self.setup.device.startswith("cuda")

    def start(self, run: Run) -> None:
        self.busy = True
        with contextlib.suppress(OSError):  # it died: then that is its next message
            self.pipe.send(run)

    def answer(self, stop: bool) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(stop)

    def receive(self) -> Report | Ended:
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            message = Ended(failure="died", reason=_death(self.process.exitcode))
        if isinstance(message, Ended):
            self.busy = False
        return message

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start here never see Ctrl-C: the command decides, and kills them."""
    signs = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signs)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(code: int | None) -> str:
    name = signal.Signals(-code).name if code and code < 0 else f"exit status {code}"
    return f"its process ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class Pool:
    """`n` workers; one that died is replaced. A context manager that leaves no process behind."""

    def __init__(self, n: int, setup: Setup) -> None:
        self._context = _forkserver(setup.threads)
        self.setups = [replace(setup, device=_place(setup.device, i), place=i) for i in range(n)]
        self.workers: list[Worker] = []

    def __enter__(self) -> "Pool":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End all workers, which frees their memory; others take their places when wanted."""
        for worker in self.workers:
            worker.process.kill()
        for worker in list(self.workers):
            self.discard(worker)

    def _start(self) -> None:
        """As many workers as there should be, each in the place of one that is gone."""
        taken = {worker.setup for worker in self.workers}
        for setup in self.setups:
            if setup not in taken:
                self.workers.append(Worker(self._context, setup))

    def idle(self) -> list[Worker]:
        self._start()
        return [worker for worker in self.workers if not worker.busy]

    def messages(self, timeout: float) -> Iterator[tuple[Worker, Report | Ended]]:
        """What the busy workers say within `timeout` seconds."""
        busy = {worker.pipe: worker for worker in self.workers if worker.busy}
        for pipe in pipes.wait(list(busy), timeout) if busy else []:
            worker = busy[pipe]
            message = worker.receive()
            # After a failure on a GPU, its memory and its context are not to be trusted.
            if isinstance(message, Ended) and (message.failure == "died" or worker.spoilt(message)):
                self.discard(worker)
            yield worker, message

    def discard(self, worker: Worker) -> None:
        """End a worker, whatever it does; another one takes its place when one is wanted."""
        worker.kill()
        if worker in self.workers:
            self.workers.remove(worker)


def cores() -> int:
    """That this process may use: as OMP_NUM_THREADS says, or a scheduler allows."""
    if asked := os.environ.get("OMP_NUM_THREADS", ""):
        return int(asked) if asked.isdigit() and int(asked) else 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _forkserver(threads: int) -> Any:
    """Where workers are forked: a process that has imported torch but never used it.

    So they start quickly, and safely, where a fork of this process would take over its threads'
    locks. It is started once, by the first pool.
    """
    root, more = str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, more] if more else [root])
    resource_tracker.ensure_running()  # first: to start it unblocks the signals
    # Python 3.11 does not hand sys.path on, and passes over what it cannot import.
    with environment(OMP_NUM_THREADS=str(threads), PYTHONPATH=path), signals_blocked():
        if sys.platform == "darwin":  # where Metal does not survive a fork
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mnist.workers", "torch._dynamo"])  # for optimizers
        forkserver.ensure_running()
        return context


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """The environment of processes that start here."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _place(device: str, i: int) -> str:
    return f"cuda:{i % torch.cuda.device_count()}" if device == "cuda" else device


# --- in the worker's process


def _serve(pipe: Any, setup: Setup) -> None:
    """Run after run, until the command that started this process is gone."""
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
                    training.keep_freed_memory()  # not what the loading took
            except Exception as error:  # noqa: BLE001 - files that vanished, a device that is taken
                pipe.send(Ended(failure="error", reason=_line(error)))
            else:
                pipe.send(attempt(run, dataset, setup, pipe))
                training.return_freed_memory()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipes.wait([parent.sentinel])
    os._exit(1)


def attempt(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> Ended:
    """One run, with every failure that belongs to it told apart."""
    try:
        if run.measure:
            return measure(run, dataset, setup)
        return train(run, dataset, setup, pipe)
    except training.Diverged as error:
        return Ended(failure="nan", reason=str(error))
    except NoRoom as error:
        return Ended(failure="disk", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a plugin's network may raise anything
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        words = ("out of memory", "allocate memory")
        memory = memory or any(word in str(error) for word in words)
        kind = "disk" if full else "memory" if memory else "error"
        return Ended(failure=kind, reason=_line(error))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class NoRoom(Exception):
    """What a run is for does not fit under --disk-quota."""


def built(run: Run, dataset: Dataset) -> torch.nn.Module:
    """A new network as it is to be trained."""
    torch.manual_seed(run.seed)
    model = models.build(run.network, dataset.channels, dataset.size, len(dataset.classes))
    if not run.plain:
        model = folding.training_form(model)
    model.to(dataset.train.labels.device)
    if not plugins.is_from_plugin(models.NETWORKS[run.network]):  # a plugin may depend on the order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def measure(run: Run, dataset: Dataset, setup: Setup) -> Ended:
    """How fast the run's steps are."""
    torch.set_num_threads(run.threads or setup.threads)
    how: dict[str, Any] = {"bfloat16": run.bfloat16, "micro_batch": run.micro_batch}
    speed = training.measure_speed(built(run, dataset), dataset, **run.params, **how)
    return Ended(images_per_s=speed)


def train(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> Ended:
    """Train from the checkpoint, if there is one; report, and keep checkpoints on the way."""
    torch.set_num_threads(run.threads or setup.threads)
    model = built(run, dataset)
    split = dataset.train + dataset.validation if run.final else dataset.train
    progresses = training.fit(
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
        resume=restore(run.checkpoint),
    )
    saved, accuracy, reported = time.monotonic(), None, -math.inf
    for progress in progresses:
        last = progress.samples == progress.total
        late = time.monotonic() - reported > setup.report_s
        if late or last or progress.accuracy is not None:
            pipe.send(Report(replace(progress, state=None)))
            reported = time.monotonic()
        if progress.accuracy is not None:
            accuracy = progress.accuracy
            if pipe.recv():
                return Ended(accuracy, stopped=True)
        late = time.monotonic() - saved > setup.checkpoint_s
        if run.checkpoint and late and progress.state and not last:
            if not keep(progress.state(), run.checkpoint, setup.quota):
                log.warning("no room for %s under --disk-quota", run.checkpoint)
            saved = time.monotonic()
    if run.weights:
        keep_weights(model, run, setup.quota)
    return Ended(accuracy)


def keep_weights(model: torch.nn.Module, run: Run, quota: int | None) -> None:
    """Write what the run was for; raises NoRoom."""
    assert run.weights is not None
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    if not keep(state, run.weights, quota):
        if run.checkpoint:  # it can go now
            run.checkpoint.unlink(missing_ok=True)
        if not keep(state, run.weights, quota):
            raise NoRoom(f"no room for {run.weights} under --disk-quota")


def keep(state: dict[str, Any], path: Path, quota: int | None = None) -> bool:
    """Write tensors in place of the file's old ones, by rename.

    Not if all that is in the folder above, that of all studies' artifacts, would take more than
    `quota` bytes in the meantime: returns whether it was written.
    """
    content = io.BytesIO()
    torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    # With a quota one process at a time writes, so that two do not take the same room.
    with contextlib.nullcontext() if quota is None else FileLock(path.parent / ".lock"):
        size = content.getbuffer().nbytes
        if quota is not None:
            for left in path.parent.glob(".*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            if used(path.parent.parent) + size > quota:
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


def used(folder: Path) -> int:
    """Bytes that all files in it take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            total += path.stat().st_size
    return total


def restore(path: Path | None) -> dict[str, Any] | None:
    """What keep() wrote; None where there is nothing, or nothing that can be read."""
    if path is None or not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file may raise anything; begin again then
        log.warning("checkpoint %s cannot be read (%s); beginning again", path, error)
        return None
