"""mnist.search.runs and workers: resumed runs, kinds of failures, processes that end."""

import functools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist import data, models, optimizers, training
from mnist.data import Dataset
from mnist.search import checkpoints, pace, runs, workers
from mnist.search.checkpoints import QuotaExceeded
from mnist.search.pace import Pace
from mnist.search.runs import Report, Run, RunResult, Setup
from mnist.search.workers import Pool, Worker
from tests.conftest import ROOT, Disk
from tests.gates import until

SETUP = Setup(functools.partial(data.load, "digits"), "cpu", threads=1, report_s=0.0)
PARAMS = {"batch_size": 32, "optimizer": "Adam", "lr": 0.003}
RUN = Run("linear", PARAMS, 2_000, seed=0, rungs=(300, 900))


class Pipe:
    """The worker's end of its pipe, in this process; requests a stop after `stop_after` reports."""

    def __init__(self, stop_after: int = 10**6) -> None:
        self.reports: list[training.Progress] = []
        self.stop_after = stop_after

    def send(self, message: Report) -> None:
        self.reports.append(message.progress)

    def recv(self) -> bool:
        return len(self.reports) > self.stop_after

    def accuracies(self) -> list[tuple[int, float | None]]:
        return [(p.samples, p.accuracy) for p in self.reports if p.accuracy is not None]


class Killed(BaseException):
    pass


RUNS = [(replace(RUN, params=PARAMS | {"optimizer": name}), 20) for name in optimizers.OPTIMIZERS]
FINAL = Run("parallel", PARAMS, 640, seed=0, final=True, outliers=True, bfloat16=True)


@pytest.mark.parametrize(("run", "moment"), [*RUNS, (RUN, 5), (RUN, 45), (FINAL, 7)])
def test_a_killed_run_continues_bit_for_bit(
    digits: Dataset, tmp_path: Path, run: Run, moment: int
) -> None:
    whole = replace(run, weights=tmp_path / "whole.pt")
    reference = Pipe()
    runs.run_safely(whole, digits, SETUP, reference)

    class Killing(Pipe):
        def send(self, message: Report) -> None:
            super().send(message)
            if len(self.reports) == moment:
                raise Killed

    run = replace(run, checkpoint=tmp_path / "run.pt", weights=tmp_path / "killed.pt")
    often = replace(SETUP, checkpoint_s=-1.0)
    first, second = Killing(), Pipe()
    with pytest.raises(Killed):
        runs.run_safely(run, digits, often, first)
    assert run.checkpoint is not None
    assert run.checkpoint.exists()
    torch.manual_seed(99)  # another state, as in another process
    runs.run_safely(run, digits, often, second)
    assert len(second.reports) < len(reference.reports)
    together = {**dict(first.accuracies()), **dict(second.accuracies())}
    assert together == dict(reference.accuracies())
    expected, weights = (
        torch.load(tmp_path / f"{name}.pt")["weights"] for name in ("whole", "killed")
    )
    for name, tensor in expected.items():
        assert torch.equal(tensor, weights[name]), name


def test_between_two_reports_without_an_accuracy_there_is_some_time(digits: Dataset) -> None:
    seldom, often = Pipe(), Pipe()
    runs.run_safely(RUN, digits, replace(SETUP, report_s=3600.0), seldom)
    runs.run_safely(RUN, digits, SETUP, often)
    assert len(often.reports) > 50
    assert len(seldom.reports) == 1 + len(RUN.rungs) + 1  # the first and last are always sent
    assert seldom.accuracies() == often.accuracies()


def test_dropout_continues_bit_for_bit_too(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropping(models.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.dropout(images, 0.5, self.training))

    monkeypatch.setitem(models.NETWORKS, "dropping", Dropping)
    outcomes = []
    for stop in (10**6, 40):
        torch.manual_seed(0)
        model = models.build("dropping", 1, 28, 10)
        fit = functools.partial(
            training.fit, dataset=digits, train=digits.train, samples=2_000, **PARAMS
        )
        state = None
        for i, progress in enumerate(fit(model)):
            assert progress.state is not None
            if i == stop:
                stream = tmp_path / "state.pt"
                torch.save(progress.state(), stream)
                state = torch.load(stream)
                break
        if state:
            torch.manual_seed(5)
            model = models.build("dropping", 1, 28, 10)
            list(fit(model, resume=state))
        outcomes.append(model.output.weight.detach())  # type: ignore[union-attr]
    assert torch.equal(*outcomes)


def test_a_micro_batch_takes_the_same_steps(digits: Dataset) -> None:
    outcomes = []
    for micro_batch in (None, 8):
        pipe = Pipe()
        runs.run_safely(replace(RUN, micro_batch=micro_batch), digits, SETUP, pipe)
        outcomes.append([progress.loss for progress in pipe.reports])
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-3)


def test_a_run_stops_if_the_reply_to_its_report_says_so(digits: Dataset) -> None:
    pipe = Pipe(stop_after=1)
    result = runs.run_safely(RUN, digits, SETUP, pipe)
    assert isinstance(result, RunResult)
    assert result.stopped
    assert pipe.reports[-1].samples == 320


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframe"),
            "memory",
        ),
        (OSError(28, "No space left on device"), "disk"),
        (training.Diverged("the loss is nan"), "nan"),
        (ZeroDivisionError("division by zero"), "error"),
    ],
)
def test_each_kind_of_failure_is_named_in_one_line(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, error: Exception, failure: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(training, "fit", fail)
    result = runs.run_safely(RUN, digits, SETUP, Pipe())
    assert result.failure == failure
    assert "\n" not in result.reason


def test_memory_is_retried_once_in_smaller_parts_of_the_same_batch() -> None:
    next_run = RUN.retry(RunResult(failure="memory"))
    assert next_run is not None
    assert (next_run.micro_batch, next_run.params) == (8, RUN.params)
    assert next_run.retry(RunResult(failure="memory")) is None
    assert RUN.retry(RunResult(failure="nan")) is None
    for n in range(4, 12):  # batch norms need two images in each part
        small = replace(RUN, params=PARAMS | {"batch_size": n}).retry(RunResult(failure="memory"))
        assert small is not None
        assert small.micro_batch is not None
        parts = torch.empty(n).tensor_split(math.ceil(n / small.micro_batch))
        assert min(map(len, parts)) > 1


def test_three_deaths_without_a_new_checkpoint_are_enough(tmp_path: Path) -> None:
    run: Run | None = replace(RUN, checkpoint=tmp_path / "run.pt")
    died = RunResult(failure="died")
    for _ in range(2):
        assert run is not None
        run = run.retry(died)
    assert run is not None
    assert run.retry(died) is None
    (tmp_path / "run.pt").write_bytes(b"new")
    run = run.retry(died)
    assert run is not None
    assert run.deaths == 1


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_last_one(
    tmp_path: Path, disk_calls: list[Disk]
) -> None:
    path = tmp_path / "run.pt"
    checkpoints.save({"step": 1}, path)
    status = path.stat()
    calls = [Disk(call, status.st_ino, status.st_size) for call in ("sync", "rename")]
    assert disk_calls[:2] == calls
    # Then the folder, which has the new name.
    assert [(call, inode) for call, inode, _ in disk_calls[2:]] == [
        ("sync", tmp_path.stat().st_ino)
    ]


def test_checkpoints_stay_under_the_quota_and_leave_nothing_half_written(tmp_path: Path) -> None:
    folder, state = tmp_path / "artifacts" / "study", {"weights": torch.zeros(10_000)}
    path, left = folder / "one.pt", folder / ".two.pt.1234.tmp"
    folder.mkdir(parents=True)
    left.write_bytes(bytes(50_000))  # of a killed process
    checkpoints.save(state, path, quota=50_000)
    with pytest.raises(QuotaExceeded):  # by old and new content together
        checkpoints.save(state, path, quota=50_000)
    checkpoints.save(state, path, quota=100_000)
    checkpoints.save(state, folder / "two.pt", quota=100_000)
    with pytest.raises(QuotaExceeded):
        checkpoints.save(state, folder.with_name("other") / "three.pt", quota=100_000)
    assert {path.name for path in folder.glob("[!.]*")} == {"one.pt", "two.pt"}
    assert not left.exists()
    assert checkpoints.used_bytes(folder.parent) < 100_000


def test_final_weights_take_the_checkpoint_s_room_where_they_must(
    digits: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts" / "study"
    run = replace(RUN, checkpoint=folder / "run.pt", weights=folder / "weights.pt")
    quota = 120_000  # a checkpoint takes 97 kB, the weights 33 kB
    setup = replace(SETUP, checkpoint_s=-1.0, quota=quota)
    most = []

    class Watching(Pipe):
        def send(self, message: Report) -> None:
            super().send(message)
            most.append(checkpoints.used_bytes(tmp_path / "artifacts"))

    result = runs.run_safely(run, digits, setup, Watching())
    assert result.failure is None
    assert 0 < max(most) <= quota
    assert checkpoints.load(run.weights) is not None
    too_small = replace(setup, quota=10_000)
    run = replace(run, weights=folder / "more.pt")
    result = runs.run_safely(run, digits, too_small, Pipe())
    assert (result.failure, "--disk-quota" in result.reason) == ("disk", True)


def test_a_final_training_gets_the_length_that_its_time_allows(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Pipe):
        """Each report takes as long as `s_per_image` says."""

        s_per_image = 0.0

        def send(self, message: Report) -> None:
            before = self.reports[-1].samples if self.reports else 0
            super().send(message)
            now[0] += (message.progress.samples - before) * self.s_per_image

    lengths = []
    for s_per_image in (0.01, 0.02, 0.2):
        now[0], pipe = 0.0, Slow()
        pipe.s_per_image = s_per_image
        limits = Pace.around(2_000, 1_200, 2_800, deadline=40.0)
        run = replace(RUN, rungs=(), final=True, pace=limits, weights=tmp_path / "weights.pt")
        assert runs.run_safely(run, digits, replace(SETUP, report_s=-1.0), pipe).failure is None
        lengths.append(pipe.reports[-1].samples)
        saved = checkpoints.load(run.weights)
        assert saved is not None
        assert saved["samples"] == lengths[-1]
        assert pipe.reports[0].total == 1_984  # the first images only start the measurement
    assert lengths[0] == pytest.approx(2_800, abs=32)
    assert lengths[1] == pytest.approx(2_000, abs=64)
    assert lengths[2] == pytest.approx(1_500, abs=32)


def test_a_pause_shortens_a_training_by_half_of_the_rest_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    adjust_total = Pace(100.0, 5_000, 20_000).start()
    assert adjust_total(100, 10_000) == 10_000
    now[0] = 50.0
    assert adjust_total(5_000, 10_000) == 9_900  # 98 images per second
    now[0] = 1_000.0
    assert adjust_total(6_000, 9_900) == 7_950
    assert adjust_total(6_100, 7_950) == 7_025


@pytest.mark.parametrize(
    ("samples", "least", "most"),
    [(10_000, 7_500, 12_000), (1_300, 1_200, 1_950), (700, 700, 1_050)],
)
def test_a_training_keeps_its_least_number_of_images(samples: int, least: int, most: int) -> None:
    assert Pace.around(samples, 1_200, 12_000, 5.0) == Pace(5.0, least, most)


def test_with_a_damaged_checkpoint_a_run_starts_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.pt"
    assert checkpoints.load(path) is None
    path.write_bytes(b"not a checkpoint")
    assert checkpoints.load(path) is None
    assert "cannot be read" in caplog.text


def drain(pool: Pool, run: Run) -> RunResult:
    pool.idle_workers()[0].start(run)
    while True:
        for worker, message in pool.receive_messages(1.0):
            if isinstance(message, RunResult):
                return message
            if message.progress.accuracy is not None:
                worker.reply(stop=False)


def test_a_pool_trains_replaces_what_dies_and_leaves_no_process(digits: Dataset) -> None:
    with Pool(1, SETUP) as pool:
        assert torch.tensor(drain(pool, RUN).accuracy) > 0.5
        pool.workers[0].start(replace(RUN, samples=10**8))
        pid = pool.workers[0].process.pid
        os.kill(pid, signal.SIGKILL)
        result: Report | RunResult | None = None
        while not isinstance(result, RunResult):
            result = next((message for _, message in pool.receive_messages(1.0)), None)
        assert (result.failure, "SIGKILL" in result.reason) == ("died", True)
        assert pool.idle_workers()[0].process.pid != pid
        pids = [worker.process.pid for worker in pool.workers]
    assert all(not alive(pid) for pid in [pid, *pids])


def test_a_worker_does_not_import_the_file_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Dataset
) -> None:
    file, main = tmp_path / "command.py", sys.modules["__main__"]
    file.write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.setattr(main, "__file__", str(file), raising=False)
    monkeypatch.setattr(main, "__spec__", None)
    with Pool(1, SETUP) as pool:
        assert drain(pool, RUN).failure is None
    assert not (tmp_path / "imported").exists()
    assert main.__file__ == str(file)


def test_a_pool_that_was_shut_down_leaves_no_process_and_starts_anew(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(1, SETUP) as pool:
        assert drain(pool, RUN).failure is None
        worker = pool.workers[0].process.pid
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        pool.shut_down()
        pool.shut_down()  # a second time does nothing
        assert not alive(worker)
        assert not alive(server)
        # The new server has the environment of the first one.
        monkeypatch.setitem(workers.ONEDNN_SETTINGS, "SEEN_BY_WORKERS", "1")
        assert drain(pool, RUN).failure is None
        environment = Path(f"/proc/{pool.workers[0].process.pid}/environ").read_bytes()
        assert b"SEEN_BY_WORKERS=1" in environment


def test_sockets_have_a_short_path_wherever_the_temporary_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    process: Any = multiprocessing.current_process()
    config = {key: value for key, value in process._config.items() if key != "tempdir"}
    monkeypatch.setattr(process, "_config", config)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    workers._use_short_sockets()
    with Listener(family="AF_UNIX"):  # OSError: AF_UNIX path too long
        assert tempfile.gettempdir() == str(folder)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split(") ")[1][0] != "Z"


@pytest.mark.slow
def test_workers_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    code = f"""
import functools, os, signal
from mnist import data
from mnist.search.runs import Run, Setup
from mnist.search.workers import Pool, Worker
with Pool(2, Setup(functools.partial(data.load, "digits"), "cpu", 1)) as pool:
    for worker in pool.workers:
        worker.start(Run("linear", {PARAMS!r}, 10**7, 0))
    for _ in pool.receive_messages(30):
        pass
    print(*[worker.process.pid for worker in pool.workers], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "start.py"
    script.write_text("if __name__ == '__main__':\n" + code.replace("\n", "\n    "))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    until(lambda: not any(map(alive, pids)), "they are gone", 60)


# --- parts of a pool and of a worker, without processes -------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-signal.SIGKILL, "its process ended by SIGKILL (out of memory?)"),
        (-signal.SIGSEGV, "its process ended by SIGSEGV"),
        (1, "its process ended by exit status 1"),
        (0, "its process ended by exit status 0"),
        (None, "its process ended by exit status None"),
    ],
)
def test_the_end_of_a_process_is_named(code: int | None, text: str) -> None:
    assert workers._describe_exit(code) == text


@pytest.mark.parametrize(
    ("setting", "threads"), [("3", 3), ("0", 1), ("many", 1), ("", 7), (None, 7)]
)
def test_training_has_a_thread_for_each_core_or_as_many_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, threads: int
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert workers.training_threads() == threads


@pytest.mark.parametrize(
    ("device", "devices"), [("cpu", ["cpu"] * 3), ("cuda", ["cuda:0", "cuda:1", "cuda:0"])]
)
def test_the_workers_of_a_pool_share_the_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, devices: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers, "_start_forkserver", lambda threads: threads)
    pool = Pool(3, replace(SETUP, device=device))
    assert [setup.device for setup in pool.setups] == devices
    assert [setup.index for setup in pool.setups] == [0, 1, 2]
    assert pool._context == SETUP.threads


@pytest.mark.parametrize(
    ("device", "failure", "is_unusable"),
    [("cuda:1", "memory", True), ("cuda:1", None, False), ("cpu", "memory", False)],
)
def test_a_worker_is_replaced_after_a_failure_on_a_gpu(
    device: str, failure: str | None, is_unusable: bool
) -> None:
    worker = Worker.__new__(Worker)  # without a process
    worker.setup = replace(SETUP, device=device)
    assert worker.is_unusable(RunResult(failure=failure)) == is_unusable


def test_signals_are_blocked_only_while_a_process_starts() -> None:
    def blocked() -> set[int]:
        return {*signal.pthread_sigmask(signal.SIG_BLOCK, set())}

    before = blocked()
    with workers.block_signals():
        assert blocked() == before | {signal.SIGINT, signal.SIGTERM}
    assert blocked() == before


class RunsOfACommand:
    """The worker's end of its pipe, from which it receives these runs, until the command ends."""

    def __init__(self, *received: Run) -> None:
        self.received, self.sent = list(received), list[Any]()

    def recv(self) -> Run:
        if not self.received:
            raise EOFError
        return self.received.pop(0)

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a worker in this process does: its arguments of run_safely(), and calls of others."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(workers, "_end_with_parent", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(("threads", n)))
    for name in ("keep_freed_memory", "return_freed_memory"):
        monkeypatch.setattr(workers.memory, name, lambda name=name: calls.append((name,)))

    def run_safely(run: Run, *others: Any) -> RunResult:
        calls.append((run, *others))
        return RunResult(accuracy=run.seed / 4)

    monkeypatch.setattr(runs, "run_safely", run_safely)
    return calls


def test_a_worker_loads_its_plugins_and_data_once(
    digits: Dataset, executed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(workers.plugins, "load", loaded.append)
    setup = Setup(
        lambda: loaded.append("data") or digits, "cpu", threads=3, imports=(Path("a"), Path("b"))
    )
    other = replace(RUN, seed=1)
    pipe = RunsOfACommand(RUN, other)
    workers._serve_runs(pipe, setup)
    assert loaded == [Path("a"), Path("b"), "data"]
    assert pipe.sent == [RunResult(accuracy=0.0), RunResult(accuracy=0.25)]
    first, second = (call for call in executed if isinstance(call[0], Run))
    for run, call in ((RUN, first), (other, second)):
        assert (call[0], *call[2:]) == (run, setup, pipe)
        assert torch.equal(call[1].train.labels, digits.train.labels)
    freed = ("return_freed_memory",)
    assert executed == [("threads", 3), ("keep_freed_memory",), first, freed, second, freed]


def test_a_worker_that_cannot_load_its_data_reports_it_and_tries_again(
    digits: Dataset, executed: list[tuple[Any, ...]]
) -> None:
    attempts: list[int] = []

    def load() -> Dataset:
        attempts.append(1)
        if len(attempts) == 1:
            raise FileNotFoundError("no images\nat all")
        return digits

    pipe = RunsOfACommand(RUN, RUN)
    workers._serve_runs(pipe, Setup(load, "cpu", threads=1))
    reason = "FileNotFoundError: no images"
    assert pipe.sent == [RunResult(failure="error", reason=reason), RunResult(accuracy=0.0)]
