"""How much N training processes do in the time of one that has all the cores.

python -m benchmarks.workers                         # parallel, then cnn; 1, 2 and 4 workers
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

RUNS = 4  # at once or one after the other


def seconds(
    load: functools.partial[data.Dataset], network: str, workers: int, samples: int
) -> float:
    """For RUNS runs of so many images each; the start of the processes does not count."""
    setup = Setup(load, "cpu", max(1, training_threads() // workers))

    def runs(n: int) -> dict[int, Run]:
        return {i: Run(network, FIRST_PARAMS, n, seed=i) for i in range(RUNS)}

    with Pool(workers, setup) as pool:
        list(execute_runs(pool, runs(FIRST_PARAMS["batch_size"])))
        start = time.perf_counter()
        list(execute_runs(pool, runs(samples)))
        return time.perf_counter() - start


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--repeat", default=3, show_default=True)
def main(data_dir: Path | None, repeat: int) -> None:
    """Print the median times and their ratios to one worker's."""
    load = functools.partial(data.load, "mnist", data_dir, None, 500)
    click.echo(f"{training_threads()} cores; {RUNS} runs, median of {repeat}")
    for network, samples in (("parallel", 660), ("cnn", 6_600)):
        found: dict[int, list[float]] = {1: [], 2: [], 4: []}
        for _ in range(repeat):
            for workers, times in found.items():
                times.append(seconds(load, network, workers, samples))
        one = sorted(found[1])[repeat // 2]
        for workers, times in found.items():
            median = sorted(times)[repeat // 2]
            spread = f"{min(times):.1f} to {max(times):.1f}"
            click.echo(
                f"{network:9} {workers} workers  {median:5.1f} s ({spread})  "
                f"{RUNS * samples / median:6.0f} images/s  ratio {median / one:.2f}"
            )


if __name__ == "__main__":
    main()
