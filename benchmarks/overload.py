"""Three times what the server can bear: how many are answered in time, and how it is afterwards.

python -m benchmarks.overload                   # the current model of saved_models; a minute
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from benchmarks import load, servers
from benchmarks.serving import keep, pictures
from mnist import data

DEADLINE_S = 1.0  # DEADLINE_MS's default


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--times", default=3.0, show_default=True, help="What it bears, so many times.")
@click.option("--workers", default=1, show_default=True, help="uvicorn's.")
def main(folder: Path, data_dir: Path | None, seconds: float, times: float, workers: int) -> None:
    """Measure the peak, offer a multiple of it, measure the peak again."""
    requests = [load.form("/predict", each) for each in pictures(data.load("mnist", data_dir))]
    command = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    with (
        tempfile.TemporaryDirectory() as temporary,
        servers.server(folder, requests[0], command) as server,
    ):
        kept = keep(Path(temporary) / "requests", requests)
        load.Load(server.port, kept, 2.0, connections=16).found()
        before = load.Load(server.port, kept, seconds, connections=16).found()
        over = load.Load(server.port, kept, seconds, rate=times * before.rate).found()
        after = load.Load(server.port, kept, seconds, connections=16).found()
    good = int((over.of(200) <= DEADLINE_S).sum())
    total = len(over.statuses)
    lasted_s = float(
        np.ptp(over.due + over.seconds)
    )  # until the last answer, beyond the last request
    click.echo(f"peak, 16 clients: {before.rate:.0f} a second, p99 {before.ms(99):.1f} ms")
    share, others = good / lasted_s / before.rate, total - over.count(200) - over.count(429)
    click.echo(
        f"offered {total / np.ptp(over.due):.0f} a second: {good / lasted_s:.0f} answered within "
        f"{DEADLINE_S} s ({share:.0%} of the peak; p50 {over.ms(50):.0f} ms, p99 "
        f"{over.ms(99):.0f} ms), {over.count(429)} of {total} got 429, {others} anything else"
    )
    click.echo(f"afterwards: {after.rate:.0f} a second, p99 {after.ms(99):.1f} ms")


if __name__ == "__main__":
    main()
