"""Gates hold processes at chosen steps, so that kills and stops do not depend on the clock."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 8  # bytes of a line with the id of the process that took a step
POLL_S = 0.005
LONG_S = 600.0  # a step that takes longer hangs, even on a slow machine


def until(true: Callable[[], Any], what: str, seconds: float = LONG_S) -> None:
    """Return as soon as the condition is true; raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"after {seconds:.0f} s this is still not true: {what}"
        time.sleep(0.02)


class Gate:
    """Steps that processes take one after the other; steps beyond the last allowed one wait.

    A gate is open until allow() is called. Its state is two files, which outlive the processes: the
    step of a process that is killed while it waits does not count.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._steps, self._last = folder / f"{name}.steps", folder / f"{name}.last"

    def step(self) -> None:
        """Take a step in a process under test; returns once the step is allowed."""
        with self._steps.open("ab", buffering=0) as steps:
            steps.write(f"{os.getpid():{WIDTH - 1}}\n".encode())
            number = steps.tell() // WIDTH  # of this line, even if other processes write too
        while number > self.last():
            time.sleep(POLL_S)

    def count(self) -> int:
        """The number of steps taken, including those of processes that wait or were killed."""
        return self._steps.stat().st_size // WIDTH if self._steps.exists() else 0

    def last(self) -> float:
        """The number of the last step that is allowed."""
        try:
            return int(self._last.read_text())
        except FileNotFoundError:
            return float("inf")

    def allow(self, steps: int) -> None:
        """Allow a number of further steps, waiting ones first; then the gate closes."""
        count = self.count()
        last = int(min(self.last(), count))
        for pid in self._pids(last, count):
            if alive(pid):
                if not steps:
                    break
                steps -= 1
            last += 1
        else:
            last += steps
        new = self._last.with_suffix(".new")
        new.write_text(str(last))
        new.replace(self._last)

    def open(self) -> None:
        """Allow every step."""
        self._last.unlink(missing_ok=True)

    def passed(self) -> bool:
        """Whether all allowed steps were taken."""
        return self.count() >= self.last()

    def held(self) -> list[int]:
        """The processes that wait."""
        count = self.count()
        return [pid for pid in self._pids(int(min(self.last(), count)), count) if alive(pid)]

    def _pids(self, last: int, count: int) -> list[int]:
        """The processes of the steps after the last allowed one, up to `count`."""
        if count == last:
            return []
        lines = self._steps.read_bytes()[last * WIDTH : count * WIDTH]
        return [int(line) for line in lines.split()]


class Gates:
    """The gates of a machine's commands and their workers, with their files in the folder."""

    def __init__(self, folder: Path, host: str = "") -> None:
        prefix = f"gate-{host}-"
        self.reports = Gate(folder, f"{prefix}reports")  # and checkpoints before their rename
        self.runs = Gate(folder, f"{prefix}runs")  # finished runs before their result is sent
        self.final = Gate(folder, f"{prefix}final")  # reports and checkpoints of the final training
        self.saving = Gate(folder, f"{prefix}saving")  # before the evaluation and after its saving
        self.statements = Gate(folder, f"{prefix}statements")  # of the command's transactions
        self.losses = Gate(folder, f"{prefix}losses")  # failed statements and connections

    def open(self) -> None:
        for gate in (self.reports, self.runs, self.final, self.saving, self.statements):
            gate.open()

    def held(self) -> list[int]:
        """Workers that are held within a run, or at its end before they send the result."""
        return self.reports.held() + self.runs.held()

    def hold(
        self,
        runs: int,
        reports: int,
        statements: int | None = None,
        is_running: Callable[[], bool] = lambda: True,
    ) -> None:
        """Let `runs` runs end and `reports` reports follow; then a worker is held in its run.

        With `statements`, the command is held in a transaction after that many statements, unless
        another run ends first. `is_running` raises when the command has ended.
        """
        self.statements.open()
        self.runs.allow(runs)
        self.reports.open()
        until(lambda: is_running() and self.runs.passed(), f"{runs} runs are over")
        if statements is None:
            self.reports.allow(reports)
        else:
            self.statements.allow(statements)
        until(lambda: is_running() and (self.held() or self.statements.held()), "somebody is held")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
