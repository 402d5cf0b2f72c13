"""What a person sees of a run: a live table on a terminal, plain lines elsewhere."""

import time
from typing import Any

from optuna.trial import TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from mnist.search import Update
from mnist.training import Progress

PLAIN_EVERY_S = 5.0
ROWS = 10


class Display:
    """Shows a search and a final training on standard error; a context manager.

    On a terminal it is one live table; else a line every PLAIN_EVERY_S seconds and one for each
    trial that ends.
    """

    def __init__(self, trials: int, search_s: float, final_s: float) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )
        self.trials, self.final_s = trials, final_s
        self.prior_s = search_s / trials
        self.done = self.pruned = self.ended = 0
        self.best: tuple[float, int] | None = None
        self.rows: list[list[str]] = []
        self.start = self.last = time.monotonic()

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

    def earlier(self, number: int, state: TrialState, value: float | None) -> None:
        """Count a trial that an earlier run finished."""
        self._count(number, state, value)
        self.ended = 0  # its time was not measured here

    def trial(self, update: Update) -> None:
        """Show an update of the search."""
        if update.state is None and update.progress is not None:
            progress = update.progress
            if progress.accuracy is not None:
                self._seen = f"{progress.accuracy:.2%}"
            if progress.samples and self._running != update.number:
                self._running, self._seen = update.number, ""
            share = progress.samples / progress.total
            self._show([*_words(update), f"{share:4.0%}", self._seen])
            return
        state, value = update.state or TrialState.FAIL, update.value
        self._count(update.number, state, value)
        self._running = -1
        shown = "" if value is None else f"{value:.2%}"
        row = [*_words(update), state.name.lower(), f"{shown} {update.seconds:.0f} s".strip()]
        self.rows = [*self.rows, row][-ROWS:]
        self._show(None, ended=row)

    def final(self, progress: Progress) -> None:
        """Show the final training."""
        left = max(0.0, self.final_s * (1 - progress.samples / progress.total))
        if progress.samples < progress.total / 50:
            self.final_start = time.monotonic()
        share = progress.samples / progress.total
        row = ["final", "", "", "", f"{share:4.0%}", f"loss {progress.loss:.4f}"]
        self._show(row, left_s=left)

    _running, _seen, final_start = -1, "", 0.0

    def _count(self, number: int, state: TrialState, value: float | None) -> None:
        self.ended += 1
        self.done += state in (TrialState.COMPLETE, TrialState.PRUNED)
        self.pruned += state == TrialState.PRUNED
        if state == TrialState.COMPLETE and value is not None:
            self.best = max(self.best or (0.0, 0), (value, -number))

    def _summary(self, left_s: float | None) -> str:
        if left_s is None:
            spent = time.monotonic() - self.start
            each = (spent + 5 * self.prior_s) / (self.ended + 5)  # the plan counts as five trials
            left_s = each * max(0, self.trials - self.done) + self.final_s
        best = f"best {self.best[0]:.2%} (trial {-self.best[1]})" if self.best else "no best yet"
        return (
            f"{self.done}/{self.trials} trials, {self.pruned} pruned, {best}, "
            f"about {duration(left_s)} left"
        )

    def _show(
        self, running: list[str] | None, ended: list[str] | None = None, left_s: float | None = None
    ) -> None:
        if self.live:
            table = Table("trial", "batch", "optimizer", "lr", "state", "accuracy", box=None)
            for row in self.rows + ([running] if running else []):
                table.add_row(*row, style=None if row is running else "dim")
            bar = ProgressBar(total=self.trials, completed=self.done, width=50)
            self.live.update(Group(table, bar, self._summary(left_s)), refresh=True)
        elif ended or time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            words = [word for word in (ended or running or []) if word]
            self.say(f"trial {' '.join(words)} | {self._summary(left_s)}")


def _words(update: Update) -> list[str]:
    params: dict[str, Any] = update.params
    return [
        str(update.number),
        str(params.get("batch_size")),
        str(params.get("optimizer")),
        f"{params.get('lr', 0):.2g}",
    ]


def duration(seconds: float) -> str:
    """In words: "40 s", "7 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def result(outcome: dict[str, Any], folder: str, storage: str, current: bool) -> None:
    """Print the result of a study: search.summary() joined with the saved model's record."""
    console = Console(highlight=False, soft_wrap=True)
    counts, test = outcome["trials"], outcome["metrics"]["test"]
    n = counts["complete"]
    console.print(
        f"study {outcome['study']['name']}: {n} complete, {counts['pruned']} pruned, "
        f"{counts['fail']} failed"
    )
    table = Table("", "trial", "batch", "optimizer", "lr", "validation accuracy", box=None)
    for word in ("best", "first"):
        trial = outcome[word]
        params = trial["params"]
        ended = " (pruned)" if trial["state"] == "pruned" else ""
        table.add_row(
            word,
            str(trial["number"]),
            str(params["batch_size"]),
            params["optimizer"],
            f"{params['lr']:.2g}",
            f"{trial['accuracy']:.2%}{ended}",
        )
    console.print(table)
    shares = outcome["importance"]
    if shares is None:
        console.print(f"importance: withheld, {n} complete trials are too few to tell")
    else:
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"importance: {words} (n = {n} complete trials)")
    low, high = test["interval95"]
    console.print(
        f"test: {test['errors']} errors of {test['n']:,}, accuracy {test['accuracy']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%})"
    )
    name = outcome["name"]
    console.print(f"model: {folder}/{name}.pth" + (", current" if current else ""))
    if not current:
        console.print(f"not current; to serve it: python -m mnist.registry use {name}")
    console.print("next:")
    for command in (
        "uvicorn serve.app:app",
        "curl -F file=@picture.png http://127.0.0.1:8000/predict",
        f"optuna-dashboard {storage}",
    ):
        console.print(f"  {command}")
