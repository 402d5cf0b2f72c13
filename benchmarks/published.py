"""The time of a study as it is usually published, compared with that of the default command.

python -m benchmarks.published --ours 450     # seconds that `python run.py` took here; two minutes

In each trial the usual procedure trains the network's own layers on all 60,000 images for some
epochs, with torch.optim.Adam and its defaults. Only a few hundred steps are run and measured; the
total is computed from the median step. The numbers of trials and epochs are assumptions, as TASK.md
does not say them: see the options.
"""

from pathlib import Path

import click
import torch

from benchmarks.training import STEPS, measure_usual_loop
from mnist import data, memory
from mnist.search import workers

IMAGES = 60_000


@click.command()
@click.option("--ours", type=float, required=True, help="Seconds that run.py took here.")
@click.option("--trials", default=20, show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--batch-size", default=33, show_default=True)
@click.option("--rounds", default=25, show_default=True, help=f"Of {STEPS} steps each.")
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(
    ours: float, trials: int, epochs: int, batch_size: int, rounds: int, data_dir: Path | None
) -> None:
    """Measure steps of the usual procedure, and compute its total."""
    torch.set_num_threads(workers.training_threads())
    memory.keep_freed_memory()  # which helps the usual procedure, too
    dataset = data.load("mnist", data_dir)
    speeds = sorted(measure_usual_loop("parallel", dataset, batch_size) for _ in range(rounds))
    speed = speeds[rounds // 2]  # images per second
    epoch_s = IMAGES / speed
    total_s = trials * epochs * epoch_s
    click.echo(
        f"measured: {rounds * STEPS} steps of batch {batch_size}, "
        f"{batch_size / speed * 1000:.0f} ms each "
        f"({speeds[0]:.0f} to {speeds[-1]:.0f} images/s, median {speed:.0f})"
    )
    click.echo(
        f"computed: {epoch_s:.0f} s an epoch, {total_s / 3600:.1f} h for {trials} trials of "
        f"{epochs} epochs; {total_s / ours:.0f} times the {ours:.0f} s of run.py"
    )


if __name__ == "__main__":
    main()
