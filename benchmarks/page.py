"""Digits by other hands, drawn on the page: how many are read right, and how soon.

python -m benchmarks.page                       # the current model of saved_models; two minutes

Validation images, on which the final model was trained, too, are traced: thinned to a skeleton,
which is followed stroke by stroke. The strokes are replayed in Chromium as a mouse's events, with
the brush's thickness, and the size and place of the digit on the canvas, drawn by chance. The time
is from pen up to the last change of the answer.
"""

import random
import shutil
import statistics
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from skimage.morphology import skeletonize

from benchmarks import load, servers
from benchmarks.serving import pictures
from mnist import data, registry

SCALE = 8  # the skeleton is looked for in an enlarged image: there it is smooth
THICKNESS = (10, 34)  # the brush, of a canvas of 280
SIZE = (0.35, 0.85)  # longest side of the digit, of the canvas
LEAST = 0.06  # shorter strokes, of the digit, are spurs of the skeleton
STEP = 3  # pixels of the skeleton from one event to the next
QUIET_MS = 150  # without a change: the answer is the last one

Point = tuple[float, float]
Stroke = list[Point]

WATCH = """() => {
    window.up = window.changed = window.pending = 0;
    const real = window.fetch;
    window.fetch = async (path, options) => {
        window.pending += path.startsWith('predict');
        try {
            return await real(path, options);
        } finally {
            window.pending -= path.startsWith('predict');
        }
    };
    addEventListener('pointerup', () => { window.up = performance.now(); }, true);
    new MutationObserver(() => { window.changed = performance.now(); })
        .observe(document.getElementById('view'), {attributes: true, attributeFilter: ['src']});
}"""
DONE = f"""() => !window.pending && window.changed > window.up
    && performance.now() - window.changed > {QUIET_MS}"""


def strokes(image: np.ndarray) -> list[Stroke]:
    """uint8 (28, 28), ink high -> strokes of points (x, y), 0..1 of the digit's longest side."""
    large = Image.fromarray(image).resize(
        [SCALE * side for side in image.shape], Image.Resampling.BICUBIC
    )
    left = {(int(y), int(x)) for y, x in np.argwhere(skeletonize(np.asarray(large) > 127))}
    paths = list(_followed(left))
    points = np.array([point for path in paths for point in path], float)
    low, side = points.min(0), max(np.ptp(points, axis=0).max(), 1)
    long = [path for path in paths if len(path) > LEAST * side] or paths
    return [
        [((x - low[1]) / side, (y - low[0]) / side) for y, x in [*path[:-1:STEP], path[-1]]]
        for path in long
    ]


def _followed(left: set[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The skeleton's pixels in order, from an end if there is one, going straight at crossings."""

    def near(point: tuple[int, int]) -> list[tuple[int, int]]:
        y, x = point
        around = product((-1, 0, 1), (-1, 0, 1))
        return [(y + a, x + b) for a, b in around if (a or b) and (y + a, x + b) in left]

    while left:
        start = min(left, key=lambda point: (len(near(point)) != 1, point))
        path = [start]
        left.remove(start)
        while found := near(path[-1]):
            back = path[max(0, len(path) - 6)]
            ahead = [2 * a - b for a, b in zip(path[-1], back, strict=True)]
            following = min(
                found, key=lambda each: (each[0] - ahead[0]) ** 2 + (each[1] - ahead[1]) ** 2
            )
            left.remove(following)
            path.append(following)
        yield path


def place(drawn: list[Stroke], chance: random.Random) -> list[Stroke]:
    """The strokes at a size and place by chance, as shares of the canvas.

    A large or thick one can reach over the edge, as a hand's does: what is out there is lost.
    """
    size = chance.uniform(*SIZE)
    room = (1 - size) * 0.9
    dx, dy = (0.05 + chance.uniform(0, room) for _ in "xy")
    return [[(dx + size * x, dy + size * y) for x, y in stroke] for stroke in drawn]


def replay(page: Any, drawn: list[Stroke], thickness: int) -> tuple[str, float]:
    """Draw it; the answer, and the milliseconds from pen up until it was there."""
    page.fill("#brush", str(thickness))
    box = page.locator("#canvas").bounding_box()
    for stroke in drawn:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for _, point in pairwise(points):
            page.mouse.move(*point)
        page.mouse.up()
    page.wait_for_function(DONE)
    answer, taken = page.inner_text("#class"), page.evaluate("window.changed - window.up")
    page.click("#clear")
    return answer, taken


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--digits", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, data_dir: Path | None, digits: int, seed: int) -> None:
    """Draw so many digits and print what came of them."""
    from playwright.sync_api import sync_playwright

    dataset, chance = data.load("mnist", data_dir), random.Random(seed)
    chosen = chance.sample(range(len(dataset.validation)), digits)
    first = load.form("/predict", pictures(dataset)[0])
    wrong, times = [], []
    with servers.server(folder, first) as server, sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#state[data-state=ready]")
        page.evaluate(WATCH)
        for i in chosen:
            drawn = place(strokes(dataset.validation.images[i, 0].numpy()), chance)
            answer, taken = replay(page, drawn, chance.randrange(*THICKNESS, 2))
            label = dataset.classes[dataset.validation.labels[i]]
            times.append(taken)
            if answer != label:
                wrong.append(f"{label} as {answer}")
        browser.close()
    name, record = registry.record(folder)
    click.echo(f"{name}: {record['model']['name']}")
    click.echo(f"{digits - len(wrong)} of {digits} right; wrong: {', '.join(wrong) or 'none'}")
    p50, worst = statistics.median(times), max(times)
    click.echo(f"from pen up to the answer: median {p50:.0f} ms, worst {worst:.0f} ms")


if __name__ == "__main__":
    main()
