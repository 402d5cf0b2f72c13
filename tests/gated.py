"""Has run.py and its workers pass the gates of tests/gates.py: for `run.py --import`.

A patch of the command's modules does not reach its workers, which are forked from a server that
has imported mnist.search.workers by itself. Each worker loads an imported file before its data.
"""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from mnist.search import checkpoints, runs
from tests.gates import Gate, Gates

GATES = Gates(Path.cwd(), os.environ.get("SOAK_HOST", ""))
real = runs.run_safely


class Pipe:
    """A worker's pipe, with the gate before each report."""

    def __init__(self, pipe: Any, gate: Gate) -> None:
        self.pipe, self.gate = pipe, gate

    def send(self, report: runs.Report) -> None:
        self.gate.step()
        self.pipe.send(report)

    def recv(self) -> bool:
        return self.pipe.recv()


def before(call: Callable[[int], None], gate: Gate) -> Callable[[int], None]:
    def gated(file: int) -> None:
        gate.step()
        call(file)

    return gated


def run_gated(run: runs.Run, dataset: Any, setup: runs.Setup, pipe: Any) -> runs.RunResult:
    """One run; with reports and a checkpoint whenever there could be one, as it would end before
    the first is due. What only measures the machine's speed passes no gate."""
    if run.checkpoint is None:
        return real(run, dataset, setup, pipe)
    gate = GATES.final if run.final else GATES.reports
    often = replace(setup, checkpoint_s=-1.0, report_s=0.0)
    with mock.patch.object(os, "fsync", before(os.fsync, gate)):  # a file is written, not in place
        result = real(run, dataset, often, Pipe(pipe, gate))
    if not run.final:
        GATES.runs.step()
    return result


def gate_command() -> None:
    """Gates of what is not done by workers: database, evaluation."""
    from sqlalchemy import Engine, event

    from mnist.job.display import Display

    print_line, save = Display.print_line, checkpoints.save

    def print_gated(screen: Display, text: str) -> None:
        print_line(screen, text)
        if text.startswith("evaluating"):
            GATES.saving.step()

    def save_gated(state: dict[str, Any], path: Path, *rest: Any) -> None:
        save(state, path, *rest)
        if path.name.startswith("test-"):
            GATES.saving.step()

    event.listen(Engine, "after_cursor_execute", lambda *_: GATES.statements.step())
    event.listen(Engine, "handle_error", lambda *_: GATES.losses.step())
    mock.patch.object(Display, "print_line", print_gated).start()
    mock.patch.object(checkpoints, "save", save_gated).start()


mock.patch.object(runs, "run_safely", run_gated).start()
if multiprocessing.parent_process() is None:  # else it is a worker, which has none of these
    gate_command()
