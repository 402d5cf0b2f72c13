"""Training processes: the speed of 1, 2 and 4 of them that share the cores, for two networks.

python -m benchmarks.workers                         # `parallel` and `cnn` on MNIST; some minutes

Compares images per second with one process that has all the cores.
"""

import functools
import time
from pathlib import Path

import click

from mnist import data
from mnist.search.loop import execute_runs
from mnist.search.runs import Run, Setup
from mnist.search.study import FIRST_PARAMS
from mnist.search.workers import Pool, training_threads

RUNS = 4  # of which as many are trained at a time as there are workers
IMAGES = {"parallel": 660, "cnn": 6_600}  # of a run, by network


def measure_s(
    load: functools.partial[data.Dataset], network: str, workers: int, samples: int
) -> float:
    """Measure the seconds of RUNS runs of `samples` images, after one step of each."""
    setup = Setup(load, "cpu", max(1, training_threads() // workers))

    def make_runs(n: int) -> dict[int, Run]:
        return {i: Run(network, FIRST_PARAMS, n, seed=i) for i in range(RUNS)}

    with Pool(workers, setup) as pool:
        list(execute_runs(pool, make_runs(FIRST_PARAMS["batch_size"])))
        start = time.perf_counter()
        list(execute_runs(pool, make_runs(samples)))
        return time.perf_counter() - start


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--repeat", default=3, show_default=True)
def main(data_dir: Path | None, repeat: int) -> None:
    """Print the median times, and their ratios to that of one worker."""
    load = functools.partial(data.load, "mnist", data_dir, None, 500)
    click.echo(f"{training_threads()} cores; {RUNS} runs, median of {repeat}")
    for network, samples in IMAGES.items():
        times: dict[int, list[float]] = {1: [], 2: [], 4: []}
        for _ in range(repeat):
            for workers, own in times.items():
                own.append(measure_s(load, network, workers, samples))
        one_worker = sorted(times[1])[repeat // 2]
        for workers, own in times.items():
            median = sorted(own)[repeat // 2]
            spread = f"{min(own):.1f} to {max(own):.1f}"
            click.echo(
                f"{network:9} {workers} workers  {median:5.1f} s ({spread})  "
                f"{RUNS * samples / median:6.0f} images/s  ratio {median / one_worker:.2f}"
            )


if __name__ == "__main__":
    main()
