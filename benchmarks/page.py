"""Digits drawn on the page with a mouse: how many are read correctly, and after how long.

python -m benchmarks.page                       # the current model of saved_models; two minutes

Compares the answers with the labels of validation images. (The final model was trained on them,
too.) Each image is thinned to a skeleton, and the skeleton is traced stroke by stroke. Mouse events
in Chromium draw the strokes, with random thickness of the brush, and random size and place of the
digit on the canvas. The latency is from pen up to the last change of the answer.
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
from benchmarks.serving import make_pictures
from mnist import data, registry

SCALE = 8  # of the image before it is thinned, which makes the skeleton smooth
THICKNESS = (10, 34)  # of the brush, in pixels of a canvas of 280
SIZE = (0.35, 0.85)  # longest side of the digit, as a share of the canvas
MIN_STROKE = 0.06  # as a share of the digit; shorter strokes are spurs of the skeleton
STEP = 3  # pixels of the skeleton from one mouse event to the next
QUIET_MS = 150  # without a change of the answer, until it counts as the last one

Point = tuple[float, float]
Stroke = list[Point]

OBSERVE = """() => {
    window.penUp = window.changed = window.pending = 0;
    const real = window.fetch;
    window.fetch = async (path, options) => {
        window.pending += path.startsWith('predict');
        try {
            return await real(path, options);
        } finally {
            window.pending -= path.startsWith('predict');
        }
    };
    addEventListener('pointerup', () => { window.penUp = performance.now(); }, true);
    new MutationObserver(() => { window.changed = performance.now(); })
        .observe(document.getElementById('view'), {attributes: true, attributeFilter: ['src']});
}"""
IS_ANSWERED = f"""() => !window.pending && window.changed > window.penUp
    && performance.now() - window.changed > {QUIET_MS}"""


def trace(image: np.ndarray) -> list[Stroke]:
    """Trace an image uint8 (28, 28), ink is high, as strokes.

    The points (x, y) of the strokes are shares (0..1) of the digit's longest side.
    """
    large = Image.fromarray(image).resize(
        [SCALE * side for side in image.shape], Image.Resampling.BICUBIC
    )
    skeleton = {(int(y), int(x)) for y, x in np.argwhere(skeletonize(np.asarray(large) > 127))}
    paths = list(_follow(skeleton))
    points = np.array([point for path in paths for point in path], float)
    origin, side = points.min(0), max(np.ptp(points, axis=0).max(), 1)
    long_paths = [path for path in paths if len(path) > MIN_STROKE * side] or paths
    return [
        [((x - origin[1]) / side, (y - origin[0]) / side) for y, x in [*path[:-1:STEP], path[-1]]]
        for path in long_paths
    ]


def _follow(skeleton: set[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Order the skeleton's pixels (y, x) in paths.

    A path begins at an end of a line if there is one, and goes straight on at crossings.
    """
    remaining = set(skeleton)

    def find_neighbours(pixel: tuple[int, int]) -> list[tuple[int, int]]:
        y, x = pixel
        offsets = product((-1, 0, 1), (-1, 0, 1))
        return [(y + a, x + b) for a, b in offsets if (a or b) and (y + a, x + b) in remaining]

    while remaining:
        start = min(remaining, key=lambda pixel: (len(find_neighbours(pixel)) != 1, pixel))
        path = [start]
        remaining.remove(start)
        while neighbours := find_neighbours(path[-1]):
            y, x = path[-1]
            earlier_y, earlier_x = path[max(0, len(path) - 6)]
            ahead = 2 * y - earlier_y, 2 * x - earlier_x
            following = min(neighbours, key=lambda pixel: squared_distance(pixel, ahead))
            remaining.remove(following)
            path.append(following)
        yield path


def squared_distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def place(strokes: list[Stroke], rng: random.Random) -> list[Stroke]:
    """Give strokes a random size and place, as shares of the canvas.

    A large or thick digit can reach over the edge, as one drawn by hand does: the ink beyond the
    edge is lost.
    """
    size = rng.uniform(*SIZE)
    room = (1 - size) * 0.9
    left, top = (0.05 + rng.uniform(0, room) for _ in range(2))
    return [[(left + size * x, top + size * y) for x, y in stroke] for stroke in strokes]


def draw(page: Any, strokes: list[Stroke], thickness: int) -> tuple[str, float]:
    """Draw strokes; returns the answer, and the milliseconds from pen up to the answer."""
    page.fill("#brush", str(thickness))
    box = page.locator("#canvas").bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for _, point in pairwise(points):
            page.mouse.move(*point)
        page.mouse.up()
    page.wait_for_function(IS_ANSWERED)
    answer, latency_ms = page.inner_text("#class"), page.evaluate("window.changed - window.penUp")
    page.click("#clear")
    return answer, latency_ms


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--digits", default=100, show_default=True, help="Validation images to draw.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, data_dir: Path | None, digits: int, seed: int) -> None:
    """Draw digits; print how many are read correctly, and the latency."""
    from playwright.sync_api import sync_playwright

    dataset, rng = data.load("mnist", data_dir), random.Random(seed)
    indices = rng.sample(range(len(dataset.validation)), digits)
    request = load.form("/predict", make_pictures(dataset)[0])
    wrong, latencies_ms = [], []
    with servers.server(folder, request) as server, sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#state[data-state=ready]")
        page.evaluate(OBSERVE)
        for i in indices:
            strokes = place(trace(dataset.validation.images[i, 0].numpy()), rng)
            answer, latency_ms = draw(page, strokes, rng.randrange(*THICKNESS, 2))
            label = dataset.classes[dataset.validation.labels[i]]
            latencies_ms.append(latency_ms)
            if answer != label:
                wrong.append(f"{label} as {answer}")
        browser.close()
    name, record = registry.record(folder)
    click.echo(f"{name}: {record['model']['name']}")
    click.echo(f"{digits - len(wrong)} of {digits} right; wrong: {', '.join(wrong) or 'none'}")
    median, worst = statistics.median(latencies_ms), max(latencies_ms)
    click.echo(f"from pen up to the answer: median {median:.0f} ms, worst {worst:.0f} ms")


if __name__ == "__main__":
    main()
