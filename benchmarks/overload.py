"""Overload, three times the peak: requests answered within the deadline, and the peak afterwards.

python -m benchmarks.overload                   # the current model of saved_models; a minute
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from benchmarks import load, servers
from benchmarks.serving import pictures, write_requests
from mnist import data

DEADLINE_S = 1.0  # the default of DEADLINE_MS


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--times", default=3.0, show_default=True, help="Offered load, in peaks.")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers.")
def main(folder: Path, data_dir: Path | None, seconds: float, times: float, workers: int) -> None:
    """Measure the peak, offer a multiple of it, measure the peak again."""
    dataset = data.load("mnist", data_dir)
    requests = [load.form("/predict", picture) for picture in pictures(dataset)]
    command = servers.OURS if workers == 1 else (*servers.OURS, "--workers", str(workers))
    with (
        tempfile.TemporaryDirectory() as temporary,
        servers.server(folder, requests[0], command) as server,
    ):
        files = write_requests(Path(temporary) / "requests", requests)
        load.Load(server.port, files, 2.0, connections=16).results()
        before = load.Load(server.port, files, seconds, connections=16).results()
        over = load.Load(server.port, files, seconds, rate=times * before.rate).results()
        after = load.Load(server.port, files, seconds, connections=16).results()
    in_time = int((over.latencies() <= DEADLINE_S).sum())
    total = len(over.statuses)
    length_s = float(np.ptp(over.due + over.seconds))  # from the first response to the last
    click.echo(f"peak, 16 clients: {before.rate:.0f} a second, p99 {before.ms(99):.1f} ms")
    share, others = in_time / length_s / before.rate, total - over.count(200) - over.count(429)
    click.echo(
        f"offered {total / np.ptp(over.due):.0f} a second: {in_time / length_s:.0f} answered "
        f"within {DEADLINE_S} s ({share:.0%} of the peak; p50 {over.ms(50):.0f} ms, p99 "
        f"{over.ms(99):.0f} ms), {over.count(429)} of {total} got 429, {others} anything else"
    )
    click.echo(f"afterwards: {after.rate:.0f} a second, p99 {after.ms(99):.1f} ms")


if __name__ == "__main__":
    main()
