"""Overload: requests answered within the deadline at three times the peak, and the peak afterwards.

python -m benchmarks.overload                   # the current model of saved_models; a minute

Compares the rate of answers with that of a peak (16 clients) just before.
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from benchmarks import load, servers
from benchmarks.serving import make_pictures, write_requests
from mnist import data

DEADLINE_S = 1.0  # the default of DEADLINE_MS
CLIENTS = 16  # of the peak


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seconds", default=10.0, show_default=True, help="Of each of three measurements.")
@click.option("--times", default=3.0, show_default=True, help="Offered load, in peaks.")
@click.option("--workers", default=1, show_default=True, help="uvicorn workers.")
def main(folder: Path, data_dir: Path | None, seconds: float, times: float, workers: int) -> None:
    """Measure the peak, offer a multiple of it, measure the peak again."""
    dataset = data.load("mnist", data_dir)
    requests = [load.form("/predict", picture) for picture in make_pictures(dataset)]
    with (
        tempfile.TemporaryDirectory() as temporary,
        servers.server(folder, requests[0], servers.make_command(workers)) as server,
    ):
        files = write_requests(Path(temporary) / "requests", requests)
        load.Load(server.port, files, 2.0, connections=CLIENTS).wait()  # warm-up
        before = load.Load(server.port, files, seconds, connections=CLIENTS).wait()
        overload = load.Load(server.port, files, seconds, rate=times * before.rate).wait()
        after = load.Load(server.port, files, seconds, connections=CLIENTS).wait()
    print_peak(f"peak, {CLIENTS} clients", before)
    print_overload(overload, before.rate)
    print_peak("afterwards", after)


def print_peak(label: str, results: load.Results) -> None:
    p99 = results.percentile_ms(99)
    click.echo(f"{label}: {results.rate:.0f} a second, p99 {p99:.1f} ms")


def print_overload(results: load.Results, peak_rate: float) -> None:
    """Print the offered rate, that of answers within the deadline, and the other responses."""
    total = len(results.statuses)
    offered_rate = total / np.ptp(results.due)
    duration_s = float(np.ptp(results.due + results.seconds))  # from first to last response
    rate = int((results.latencies() <= DEADLINE_S).sum()) / duration_s
    p50, p99 = results.percentile_ms(50), results.percentile_ms(99)
    rejected = results.count(429)
    others = total - results.count(200) - rejected
    click.echo(
        f"offered {offered_rate:.0f} a second: {rate:.0f} answered within {DEADLINE_S} s "
        f"({rate / peak_rate:.0%} of the peak; p50 {p50:.0f} ms, p99 {p99:.0f} ms), "
        f"{rejected} of {total} got 429, {others} anything else"
    )


if __name__ == "__main__":
    main()
