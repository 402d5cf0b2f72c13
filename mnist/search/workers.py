"""Worker processes: each executes runs one after the other."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import connection as pipes
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

import torch

from mnist import memory, plugins
from mnist.process import available_cores, extend_environment
from mnist.search import runs
from mnist.search.runs import Report, Run, RunResult, Setup

# oneDNN keeps compiled operations for each batch size that it has seen, by default 1,024 of them: 8
# MB for each trial. Training and evaluation of `parallel` need between 32 and 64.
ONEDNN_SETTINGS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
# A socket's path has at most 107 bytes on Linux and 103 on macOS, of which multiprocessing uses 32.
MAX_TEMP_PATH, SHORT_TEMP = 70, "/tmp"


class Worker:
    """A worker process, seen from the command that started it."""

    def __init__(self, context: Any, setup: Setup) -> None:
        self.setup, self.busy = setup, False
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve_runs, args=(child_pipe, setup), daemon=True)
        with block_signals(), _hide_main():
            self.process.start()
        child_pipe.close()

    def is_unusable(self, result: RunResult) -> bool:
        """Whether the worker is unusable: after a failure on a GPU, its memory and context may be
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
    """Processes that start in this block ignore Ctrl-C and SIGTERM: the command kills them."""
    signals = {signal.SIGINT, signal.SIGTERM}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _hide_main() -> Iterator[None]:
    """Workers that start in this block do not import the file of the command, which needs more
    libraries than they do."""
    main = sys.modules["__main__"]
    names = ("__file__", "__spec__")
    hidden: dict[str, Any] = {key: vars(main).pop(key) for key in names if key in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _describe_exit(code: int | None) -> str:
    name = signal.Signals(-code).name if code and code < 0 else f"exit status {code}"
    return f"its process ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class Pool:
    """`n` workers; a dead one is replaced. A context manager that leaves no process behind."""

    def __init__(self, n: int, setup: Setup) -> None:
        self._context: Any = _start_forkserver(setup.threads)
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

    def shut_down(self) -> None:
        """Kill all workers and the process that forks them; idle_workers() starts all anew."""
        self.stop_workers()
        if self._context is not None:
            self._context = None
            # No public function ends it before its parent ends. It has 0.3 GB.
            forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def _start_missing(self) -> None:
        """Start a worker for each setup that has none."""
        if self._context is None:
            self._context = _start_forkserver(self.setups[0].threads)
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
        """Kill a worker, even a busy one; idle_workers() starts a new one."""
        worker.kill()
        if worker in self.workers:
            self.workers.remove(worker)


def training_threads() -> int:
    """Threads for training on this machine: OMP_NUM_THREADS, or one for each available core.

    Of a list, such as 4,2 for nested regions, the first number (OpenMP 5.2, section 21.1.2).
    """
    if setting := os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip():
        return int(setting) if setting.isdigit() and int(setting) else 1
    return available_cores()


def _start_forkserver(threads: int) -> Any:
    """Start the process that forks workers: it has imported torch but never used it.

    So workers start fast. A fork of the command itself would not be safe, as it copies locks that
    other threads hold. The first pool starts the server, once.
    """
    _use_short_sockets()
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


def _use_short_sockets() -> None:
    """Let multiprocessing put its sockets into SHORT_TEMP where the path of the temporary folder is
    too long for them, as that of a cluster's job may be."""
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_TEMP_PATH:
        return
    usual, tempfile.tempdir = tempfile.tempdir, SHORT_TEMP
    try:
        util.get_temp_dir()  # creates the folder, which this process uses from then on
    finally:
        tempfile.tempdir = usual


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
                    memory.keep_freed_memory()  # after loading: it must not keep that memory
            except Exception as error:  # noqa: BLE001 - e.g. missing files, a busy device
                pipe.send(RunResult(failure="error", reason=runs.describe_error(error)))
            else:
                pipe.send(runs.run_safely(run, dataset, setup, pipe))
                memory.return_freed_memory()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipes.wait([parent.sentinel])
    os._exit(1)
