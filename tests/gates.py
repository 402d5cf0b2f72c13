"""Gates hold processes at chosen steps, so that what is done to them does not go by the clock."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 8  # bytes of a line that says which process took a step
POLL_S = 0.005
LONG_S = 600.0  # what takes so long hangs, however slow the machine


def until(true: Callable[[], Any], what: str, seconds: float = LONG_S) -> None:
    """Return as soon as it is so; raises AssertionError where that hangs."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"after {seconds:.0f} s it is still not so: {what}"
        time.sleep(0.02)


class Gate:
    """Steps that processes take one after the other; those beyond the last allowed one wait.

    A gate is open until something is allowed. Its state is two files, which outlive the processes:
    whoever is killed while it waits has taken no step that counts.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._steps, self._last = folder / f"{name}.steps", folder / f"{name}.last"

    def step(self) -> None:
        """Take a step, in a process that may be held: returns once the step is allowed."""
        with self._steps.open("ab", buffering=0) as steps:
            steps.write(f"{os.getpid():{WIDTH - 1}}\n".encode())
            number = steps.tell() // WIDTH  # of this very line, whoever writes beside
        while number > self.last():
            time.sleep(POLL_S)

    def count(self) -> int:
        """Steps taken, and those that wait or were killed while they did."""
        return self._steps.stat().st_size // WIDTH if self._steps.exists() else 0

    def last(self) -> float:
        """The number of the last step that is allowed."""
        try:
            return int(self._last.read_text())
        except FileNotFoundError:
            return float("inf")

    def allow(self, steps: int) -> None:
        """Allow so many steps from now on, those that wait before others; then the gate closes."""
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
        """Whether all steps that are allowed were taken."""
        return self.count() >= self.last()

    def held(self) -> list[int]:
        """Processes that wait."""
        count = self.count()
        return [pid for pid in self._pids(int(min(self.last(), count)), count) if alive(pid)]

    def _pids(self, last: int, count: int) -> list[int]:
        """Who took the steps after the last one, up to `count`."""
        if count == last:
            return []
        lines = self._steps.read_bytes()[last * WIDTH : count * WIDTH]
        return [int(line) for line in lines.split()]


class Gates:
    """The gates of one machine's commands and of their workers; the files are in the folder."""

    def __init__(self, folder: Path, host: str = "") -> None:
        prefix = f"gate-{host}-"
        self.reports = Gate(folder, f"{prefix}reports")  # and checkpoints, written but not in place
        self.runs = Gate(folder, f"{prefix}runs")  # that are over, but not told; the final one not
        self.final = Gate(folder, f"{prefix}final")  # reports and checkpoints of the final training
        self.saving = Gate(folder, f"{prefix}saving")  # before the evaluation, and after it is kept
        self.statements = Gate(folder, f"{prefix}statements")  # of the command, in a transaction
        self.losses = Gate(folder, f"{prefix}losses")  # statements and connections that failed

    def open(self) -> None:
        for gate in (self.reports, self.runs, self.final, self.saving, self.statements):
            gate.open()

    def held(self) -> list[int]:
        """Workers that are held in the middle of a run, or at its end before that is told."""
        return self.reports.held() + self.runs.held()

    def hold(
        self,
        runs: int,
        reports: int,
        statements: int | None = None,
        going: Callable[[], bool] = lambda: True,
    ) -> None:
        """Let so many runs end, then so many reports be given: a worker is held in its run then.

        With `statements` it is the command that is held, in a transaction after so many of them,
        if no other run ends before. `going` raises where there is nobody to be held any more.
        """
        self.statements.open()
        self.runs.allow(runs)
        self.reports.open()
        until(lambda: going() and self.runs.passed(), f"{runs} runs are over")
        if statements is None:
            self.reports.allow(reports)
        else:
            self.statements.allow(statements)
        until(lambda: going() and (self.held() or self.statements.held()), "somebody is held")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
