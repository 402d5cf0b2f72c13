"""Forecasts of a command's duration, compared with its real duration.

python -m benchmarks.forecasts                     # studies in sqlite:///db.sqlite3; a second

run.py stores its forecasts and its duration with the study. The error is the largest one after the
first quarter of the run.
"""

from collections.abc import Sequence

import click
import optuna

from mnist.search import budget

Forecasts = Sequence[tuple[float, float]]
"""Pairs of elapsed seconds and forecast remaining seconds, in order."""


def forecast_duration(forecasts: Forecasts, elapsed_s: float) -> float:
    """The duration according to the first forecast after `elapsed_s`, or else the last one."""
    durations = [elapsed + left for elapsed, left in forecasts if elapsed > elapsed_s]
    return durations[0] if durations else sum(forecasts[-1])


def print_row(study: str, seconds: float, forecasts: Forecasts) -> None:
    """Print the duration, the forecasts of it at the start, a quarter and a half, and the error."""
    start = sum(forecasts[0])
    quarter, half = (forecast_duration(forecasts, share * seconds) for share in (0.25, 0.5))
    error = budget.forecast_error(forecasts, seconds)
    click.echo(
        f"{study:24} {seconds:5.0f} s {start:8.0f} s {quarter:6.0f} s {half:6.0f} s {error:6.1%}"
    )


@click.command()
@click.option("--storage", default="sqlite:///db.sqlite3", show_default=True)
def main(storage: str) -> None:
    """Print a row for each study that was finished by one command."""
    click.echo(
        f"{'study':24} {'took':>7} {'announced':>10} {'at 25 %':>8} {'at 50 %':>8} {'error':>6}"
    )
    for summary in optuna.get_all_study_summaries(storage):
        if duration := summary.user_attrs.get("time"):
            print_row(summary.study_name, **duration)


if __name__ == "__main__":
    main()
