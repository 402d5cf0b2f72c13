"""Progress and results in the terminal: a live table, or plain lines without a terminal."""

import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from optuna.trial import TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from mnist.job.clock import Clock
from mnist.job.options import Options
from mnist.report.text import describe_confirmation, format_value
from mnist.search.budget import Plan, estimate_remaining_s, estimate_search_s, estimate_training_s
from mnist.search.loop import Update
from mnist.search.storage import StorageError
from mnist.search.study import FINISHED
from mnist.search.summary import MIN_TRIALS_FOR_IMPORTANCE
from mnist.search.urls import mask_url_secrets
from mnist.shell import first_line
from mnist.training import Progress

PLAIN_INTERVAL_S = 10.0
FORECAST_INTERVAL_S = 5.0  # between recorded forecasts
MAX_FAILURES = 3  # failed trials whose reasons are printed; the report lists all
MAX_ROWS = 10  # trials in the table


class Display:
    """Shows a search and a final training on standard error; a context manager.

    On a terminal it is a live table, otherwise at most one line in PLAIN_INTERVAL_S seconds.
    `names` are the hyperparameters, `clock` is that of the command. `forecasts` records pairs of
    seconds since the command's start and seconds left by the forecast.
    """

    def __init__(self, trials: int, plan: Plan, names: Iterable[str], clock: Clock) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )
        self.trials, self.plan, self.names = trials, plan, tuple(names)
        self.done = self.pruned = self.ended_here = 0
        self.best: tuple[float, int] | None = None
        self.rows: list[list[str]] = []
        self.running: dict[int, list[str]] = {}
        self.accuracies: dict[int, str] = {}  # the last report of each running trial
        self.last_wait = ""
        self.clock, self.start = clock, time.monotonic()
        self.last_line = self.start - PLAIN_INTERVAL_S
        self.started: dict[str, tuple[float, float]] = {}  # training -> its start here: time, share
        self.forecasts: list[tuple[float, float]] = []

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(text, soft_wrap=True)

    def add_finished(self, state: TrialState, number: int, value: float | None) -> None:
        """Count a finished trial."""
        self.done += 1
        self.pruned += state == TrialState.PRUNED
        if state == TrialState.COMPLETE and value is not None:
            self.best = max(self.best or (0.0, 0), (value, -number))

    def show_update(self, update: Update) -> None:
        """Show an update of the search."""
        number, params = update.number, update.params
        if number is None or params is None:
            self._render(None, self._estimate_search_s())
        elif update.progress:
            progress = update.progress
            if progress.accuracy is not None:
                self.accuracies[number] = f"{progress.accuracy:.2%}"
            share = f"{progress.samples / progress.total:.0%}"
            row = [
                *self._make_row(f"trial {number}", params),
                share,
                self.accuracies.get(number, ""),
            ]
            self.running[number] = row
            self._render(row, self._estimate_search_s())
        elif update.state:
            self.accuracies.pop(number, None)
            self.running.pop(number, None)
            self.ended_here += 1
            if update.state in FINISHED:
                self.add_finished(update.state, number, update.value)
            value = "" if update.value is None else f"{update.value:.2%}"
            state = update.state.name.lower()
            row = [
                *self._make_row(f"trial {number}", params),
                state,
                value,
                f"{update.seconds:.0f} s",
            ]
            self.rows = [*self.rows, row][-MAX_ROWS:]
            self._render(row, self._estimate_search_s(), is_end=True)

    def show_confirmation(self, done: int, total: int) -> None:
        """Show the number of finished runs on fresh seeds."""
        confirm_s = self.plan.confirm_s * (1 - done / total)
        expected_s = estimate_remaining_s(self.plan, 0.0, confirm_s, self.clock.elapsed_s)
        self._render([*self._make_row("confirming"), f"{done} of {total}", ""], expected_s)

    def show_waiting(self, text: str) -> None:
        """Print once what the command waits for."""
        if text != self.last_wait:
            self.last_wait = text
            self.print_line(f"{text}; waiting for it")

    def show_training(
        self, label: str, progress: Progress, expected_s: float, after_s: float
    ) -> None:
        """Show a training outside the search.

        It takes `expected_s` in all, and the steps after the training take `after_s`.
        """
        now, share = time.monotonic(), progress.samples / progress.total
        start, share_before = self.started.setdefault(label, (now, share))
        remaining = 1 - share_before  # share of the run after the checkpoint that it resumed from
        completed = (share - share_before) / remaining if remaining else 1.0
        training_s = estimate_training_s(expected_s * remaining, completed, now - start)
        row = [*self._make_row(label), f"{share:.0%}", f"loss {progress.loss:.3f}"]
        self._render(row, training_s + after_s)

    def _make_row(self, label: str, params: Mapping[str, Any] | None = None) -> list[str]:
        return [label, *(format_value((params or {}).get(name, "")) for name in self.names)]

    def _estimate_search_s(self) -> float:
        remaining, elapsed_s = self.trials - self.done, time.monotonic() - self.start
        search_s = estimate_search_s(self.plan, remaining, self.ended_here, elapsed_s)
        return estimate_remaining_s(self.plan, search_s, self.plan.confirm_s, self.clock.elapsed_s)

    def _render(self, row: list[str] | None, expected_s: float, is_end: bool = False) -> None:
        elapsed_s = self.clock.elapsed_s
        expected_s = min(expected_s, self.clock.remaining_s)
        if not self.forecasts or elapsed_s > self.forecasts[-1][0] + FORECAST_INTERVAL_S:
            self.forecasts.append((round(elapsed_s, 1), round(expected_s, 1)))
        best = f"best {self.best[0]:.2%} (trial {-self.best[1]})" if self.best else "no best yet"
        summary = (
            f"{self.done} of {self.trials} trials, {self.pruned} pruned, {best}, "
            f"about {format_duration(expected_s)} left"
        )
        if self.live:
            names = [name.removesuffix("_size") for name in self.names]
            table = Table("", *names, "state", "accuracy", "time", box=None)
            for cells in self.rows:
                table.add_row(*cells, style="dim")
            rows = self.running.values() or ([row] if row and not is_end else [])
            for cells in rows:
                table.add_row(*cells)
            bar = ProgressBar(total=self.trials, completed=self.done, width=60)
            self.live.update(Group(table, summary, bar), refresh=True)
        elif row and time.monotonic() - self.last_line > PLAIN_INTERVAL_S:
            self.last_line = time.monotonic()
            self.print_line(f"{' '.join(word for word in row if word)} | {summary}")


def format_duration(seconds: float) -> str:
    """ "40 s", "7 min" """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def print_result(outcome: dict[str, Any], options: Options, place: str) -> None:
    """Print the result of a study: summary.summarise() joined with the saved model's record.

    `place`: see results.find_place().
    """
    folder = str(options.output)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    _print_study(console, outcome)
    for text in describe_confirmation(outcome):
        console.print(text)
    _print_errors(console, outcome)
    name = outcome["name"]
    if place == "elsewhere":
        console.print(
            f"model: {name}, not in {folder}: on the machine that finished the study, or removed; "
            "--study NAME makes another one"
        )
        return
    console.print(f"model: {folder}/{name}.pth" + (", current" if place == "current" else ""))
    if Path(folder, f"{name}.report.html").exists():
        console.print(f"report: {folder}/{name}.report.html, to be opened in a browser")
    is_default = folder == "saved_models"
    option = "" if is_default else f"--folder {shlex.quote(folder)} "
    activate = [] if place == "current" else [f"python -m mnist.registry {option}use {name}"]
    if activate:
        console.print("it is not the current model; the first of these commands makes it current")
    console.print("next:")
    for command in (
        *activate,
        ("" if is_default else f"MODELS={shlex.quote(folder)} ") + "uvicorn serve.app:app",
        "curl -F file=@picture.png http://127.0.0.1:8000/predict",
        f"optuna-dashboard {shlex.quote(mask_url_secrets(options.storage))} "
        f"--artifact-dir {shlex.quote(str(options.artifacts))}",
    ):
        console.print(f"  {command}")


def _print_study(console: Console, outcome: dict[str, Any]) -> None:
    """Print the trials: counts, failures, the best one compared with the first, importances."""
    counts = outcome["trials"]
    n = counts["complete"]
    console.print(
        f"study {outcome['study']['name']}: {n} complete, {counts['pruned']} pruned, "
        f"{counts['fail']} failed"
    )
    for number, reason in list(outcome["failures"].items())[:MAX_FAILURES]:
        console.print(f"trial {number} failed: {reason}")
    names = list(outcome["best"]["params"])
    table = Table("", "trial", *names, "validation accuracy", box=None)
    for label in ("best", "first"):
        trial = outcome[label]
        note = " (pruned)" if trial["state"] == "pruned" else ""
        values = [format_value(trial["params"][name]) for name in names]
        table.add_row(label, str(trial["number"]), *values, f"{trial['accuracy']:.2%}{note}")
    console.print(table)
    shares = outcome["importance"]
    if shares is None:
        few = n < MIN_TRIALS_FOR_IMPORTANCE
        reason = "the complete trials are too alike"
        if few:
            reason = f"fewer than {MIN_TRIALS_FOR_IMPORTANCE} complete trials"
        console.print(f"importance: not computed, {reason} (n = {n})")
    else:
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"importance: {text} (n = {n} complete trials)")


def _print_errors(console: Console, outcome: dict[str, Any]) -> None:
    """Print the errors on the test split, of the weights and as they are served."""
    test = outcome["metrics"]["test"]
    low, high = test["interval95"]
    console.print(
        f"test: {test['errors']} errors of {test['n']:,}, accuracy {test['accuracy']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%})"
    )
    engine = outcome.get("engines", {}).get("served", "torch")  # old records have none
    if engine != "torch":
        console.print(f"as served, in {engine}: {test['served_errors']} errors")


def full_message(error: Exception) -> str:
    """The whole message of an error."""
    return error.format_message() if isinstance(error, click.ClickException) else str(error)


def root_cause(error: BaseException) -> str:
    """The first line of an error's root cause, such as "database or disk is full"."""
    while error.__cause__ is not None and not isinstance(error, StorageError):
        error = error.__cause__  # a StorageError has the text of its cause, without secrets
    return first_line(error)
