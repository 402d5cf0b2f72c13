"""The time of a study as it is usually published, beside that of the default command.

python -m benchmarks.published --ours 450          # seconds that `python run.py` took here

The usual procedure trains the network's own layers on all 60,000 images for a number of epochs in
each of a number of trials, with torch.optim.Adam as it comes. Its steps are measured, a few hundred
of them; its total is computed from them, not run. How many trials and epochs it has is an
assumption, as TASK.md does not say: see the options.
"""

from pathlib import Path

import click
import torch

from benchmarks.training import STEPS, usual_loop
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
    memory.keep_freed_memory()  # which helps it
    dataset = data.load("mnist", data_dir)
    speeds = sorted(usual_loop("parallel", dataset, batch_size) for _ in range(rounds))
    speed = speeds[rounds // 2]
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
