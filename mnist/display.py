"""What a person sees of a run: a live table on a terminal, plain lines elsewhere."""

import shlex
import statistics
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

from mnist.budget import Plan, left_s, search_left_s, training_left_s
from mnist.search import Update
from mnist.study import BASELINES, FINISHED
from mnist.training import Progress

PLAIN_EVERY_S = 10.0
FORECAST_EVERY_S = 5.0  # of those that are kept
MOST_FAILURES = 3  # whose reasons are printed; the report has all
ROWS = 10


class Display:
    """Shows a search and a final training on standard error; a context manager.

    On a terminal it is one live table; else at most one line in PLAIN_EVERY_S seconds. `names` are
    the hyperparameters; `start` is when the command began, by time.monotonic(). `forecasts` keeps
    what was announced: seconds since `start`, and seconds that were left then.
    """

    def __init__(self, trials: int, plan: Plan, names: Iterable[str], start: float) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )
        self.trials, self.plan, self.names = trials, plan, tuple(names)
        self.done = self.pruned = self.timed = 0
        self.best: tuple[float, int] | None = None
        self.rows: list[list[str]] = []
        self.running: dict[int, list[str]] = {}
        self.accuracy: dict[int, str] = {}  # that a running trial reported last
        self.said = ""
        self.command_start, self.start = start, time.monotonic()
        self.last = self.start - PLAIN_EVERY_S
        self.started: dict[str, tuple[float, float]] = {}  # what: at what time, and share of it
        self.forecasts: list[tuple[float, float]] = []

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def earlier(self, state: TrialState, number: int, value: float | None) -> None:
        """Count a trial that an earlier run finished."""
        self.done += 1
        self.pruned += state == TrialState.PRUNED
        if state == TrialState.COMPLETE and value is not None:
            self.best = max(self.best or (0.0, 0), (value, -number))

    def trial(self, update: Update) -> None:
        """Show an update of the search."""
        number, params = update.number, update.params
        if number is None or params is None:
            self._show(None, self._search_left_s())
        elif update.progress:
            progress = update.progress
            if progress.accuracy is not None:
                self.accuracy[number] = f"{progress.accuracy:.2%}"
            share = f"{progress.samples / progress.total:.0%}"
            row = [*self._row(number, params), share, self.accuracy.get(number, "")]
            self.running[number] = row
            self._show(row, self._search_left_s())
        elif update.state:
            self.accuracy.pop(number, None)
            self.running.pop(number, None)
            self.timed += 1
            if update.state in FINISHED:
                self.earlier(update.state, number, update.value)
            value = "" if update.value is None else f"{update.value:.2%}"
            state = update.state.name.lower()
            row = [*self._row(number, params), state, value, f"{update.seconds:.0f} s"]
            self.rows = [*self.rows, row][-ROWS:]
            self._show(row, self._search_left_s(), ended=True)

    def confirmation(self, done: int, total: int) -> None:
        """Show how many runs on fresh seeds are done."""
        passed_s = time.monotonic() - self.command_start
        expected_s = left_s(self.plan, 0.0, self.plan.confirm_s * (1 - done / total), passed_s)
        self._show([*self._row("confirming"), f"{done} of {total}", ""], expected_s)

    def waiting(self, text: str) -> None:
        """Say once what is being waited for."""
        if text != self.said:
            self.said = text
            self.say(f"{text}; waiting for it")

    def training(self, what: str, progress: Progress, expected_s: float, after_s: float) -> None:
        """Show a training that is no trial, of which all of it is expected to take `expected_s`,
        and what comes after it `after_s`."""
        now, share = time.monotonic(), progress.samples / progress.total
        start, before = self.started.setdefault(what, (now, share))
        rest = 1 - before  # of the run, after the checkpoint with which it began here
        done = (share - before) / rest if rest else 1.0
        training_s = training_left_s(expected_s * rest, done, now - start)
        row = [*self._row(what), f"{share:.0%}", f"loss {progress.loss:.3f}"]
        self._show(row, training_s + after_s)

    def _row(self, first: int | str, params: Mapping[str, Any] | None = None) -> list[str]:
        return [str(first), *(_value((params or {}).get(name, "")) for name in self.names)]

    def _search_left_s(self) -> float:
        now, todo = time.monotonic(), self.trials - self.done
        search_s = search_left_s(self.plan, todo, self.timed, now - self.start)
        return left_s(self.plan, search_s, self.plan.confirm_s, now - self.command_start)

    def _show(self, row: list[str] | None, expected_s: float, ended: bool = False) -> None:
        passed_s = time.monotonic() - self.command_start
        if not self.forecasts or passed_s > self.forecasts[-1][0] + FORECAST_EVERY_S:
            self.forecasts.append((round(passed_s, 1), round(expected_s, 1)))
        best = f"best {self.best[0]:.2%} (trial {-self.best[1]})" if self.best else "no best yet"
        summary = (
            f"{self.done} of {self.trials} trials, {self.pruned} pruned, {best}, "
            f"about {duration(expected_s)} left"
        )
        if self.live:
            names = [name.removesuffix("_size") for name in self.names]
            table = Table("trial", *names, "state", "accuracy", "time", box=None)
            for each in self.rows:
                table.add_row(*each, style="dim")
            current = self.running.values() or ([row] if row and not ended else [])
            for each in current:
                table.add_row(*each)
            bar = ProgressBar(total=self.trials, completed=self.done, width=60)
            self.live.update(Group(table, summary, bar), refresh=True)
        elif row and time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            self.say(f"trial {' '.join(word for word in row if word)} | {summary}")


def _value(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def words(params: dict[str, Any]) -> str:
    """ "batch_size 33, optimizer Adam, lr 0.00039" """
    return ", ".join(f"{name} {_value(value)}" for name, value in params.items())


def on_fresh_seeds(record: dict[str, Any]) -> list[str]:
    """How the winner's hyperparameters do there; nothing where they were not confirmed."""
    confirmed, text = record["metrics"]["validation"], worth(record)
    if confirmed["std"] is None:
        return []
    mean, deviation, n = (confirmed[key] for key in ("mean", "std", "seeds"))
    line = f"confirmed: {mean:.2%} ± {deviation:.2%} on fresh seeds (n = {n})"
    return [line, text] if text else [line]


def worth(record: dict[str, Any]) -> str | None:
    """What the search was worth, in errors on fresh seeds; None where a record does not say."""
    study = record["study"].get("worth", {})
    if not {"winner", *BASELINES} <= set(study):
        return None
    n = record["dataset"]["splits"]["validation"]
    winner, first, median = (
        round(n * (1 - statistics.fmean(study[name]["accuracies"])))
        for name in ("winner", *BASELINES)
    )
    return (
        f"on the same fresh seeds the winner makes {winner} errors of {n:,} validation images, "
        f"the first trial {first}, the median trial {median}"
    )


def duration(seconds: float) -> str:
    """In words: "40 s", "7 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def result(outcome: dict[str, Any], folder: str, storage: str, artifacts: str, place: str) -> None:
    """Print the result of a study: study.summary() joined with the saved model's record.

    `place` says whether the model is "current" or just "saved" in the registry `folder`, or
    "elsewhere": on the machine that finished the study.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    counts, test = outcome["trials"], outcome["metrics"]["test"]
    n = counts["complete"]
    console.print(
        f"study {outcome['study']['name']}: {n} complete, {counts['pruned']} pruned, "
        f"{counts['fail']} failed"
    )
    for number, reason in list(outcome["failures"].items())[:MOST_FAILURES]:
        console.print(f"trial {number} failed: {reason}")
    names = list(outcome["best"]["params"])
    table = Table("", "trial", *names, "validation accuracy", box=None)
    for word in ("best", "first"):
        trial = outcome[word]
        ended = " (pruned)" if trial["state"] == "pruned" else ""
        values = [_value(trial["params"][name]) for name in names]
        table.add_row(word, str(trial["number"]), *values, f"{trial['accuracy']:.2%}{ended}")
    console.print(table)
    shares = outcome["importance"]
    if shares is None:
        console.print(f"importance: withheld, too few complete trials (n = {n})")
    else:
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"importance: {words} (n = {n} complete trials)")
    for text in on_fresh_seeds(outcome):
        console.print(text)
    low, high = test["interval95"]
    console.print(
        f"test: {test['errors']} errors of {test['n']:,}, accuracy {test['accuracy']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%})"
    )
    engine = outcome.get("engines", {}).get("served", "torch")  # old records have none
    if engine != "torch":
        console.print(f"as it is served, in {engine}: {test['served_errors']} errors")
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
    default = folder == "saved_models"
    where = "" if default else f"--folder {shlex.quote(folder)} "
    use = [] if place == "current" else [f"python -m mnist.registry {where}use {name}"]
    if use:
        console.print("it is not the current model; the first of these makes it so")
    console.print("next:")
    for command in (
        *use,
        ("" if default else f"MODELS={shlex.quote(folder)} ") + "uvicorn serve.app:app",
        "curl -F file=@picture.png http://127.0.0.1:8000/predict",
        f"optuna-dashboard {shlex.quote(storage)} --artifact-dir {shlex.quote(artifacts)}",
    ):
        console.print(f"  {command}")


def said(error: Exception) -> str:
    """What a person is told of it, in full."""
    return error.format_message() if isinstance(error, click.ClickException) else str(error)


def reason(error: BaseException) -> str:
    """The first line of what is at the bottom of it: "database or disk is full"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
