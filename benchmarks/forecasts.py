"""How well a command told when it would end: what it announced beside what it took.

python -m benchmarks.forecasts                     # every study in sqlite:///db.sqlite3

run.py leaves both with its study. The error is the largest one after the first quarter of the run.
"""

import click
import optuna

from mnist.search import budget


@click.command()
@click.option("--storage", default="sqlite:///db.sqlite3", show_default=True)
def main(storage: str) -> None:
    """Print a line for each study that was finished by one command."""
    click.echo(
        f"{'study':24} {'took':>7} {'announced':>10} {'at 25 %':>8} {'at 50 %':>8} {'error':>6}"
    )
    for summary in optuna.get_all_study_summaries(storage):
        if time_taken := summary.user_attrs.get("time"):
            click.echo(line(summary.study_name, **time_taken))


def line(name: str, seconds: float, forecasts: list[tuple[float, float]]) -> str:
    """The whole time as it was announced at the start, after a quarter and after a half."""
    ends = [passed + left for passed, left in forecasts]

    def announced(share: float) -> float:
        return next(
            (
                end
                for (passed, _), end in zip(forecasts, ends, strict=True)
                if passed > share * seconds
            ),
            ends[-1],
        )

    error = budget.forecast_error(forecasts, seconds)
    return (
        f"{name:24} {seconds:5.0f} s {ends[0]:8.0f} s {announced(0.25):6.0f} s "
        f"{announced(0.5):6.0f} s {error:6.1%}"
    )


if __name__ == "__main__":
    main()
