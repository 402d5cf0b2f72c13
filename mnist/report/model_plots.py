"""The figures of a model; imports matplotlib only when it draws."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mnist.report.plots import (
    BLUE,
    GREY,
    HEIGHT,
    INK,
    MAX_COLOURS,
    WIDTH,
    format_percent,
    import_matplotlib,
    render_png,
    style_axes,
)
from mnist.scores import Floats, Labels, reliability_bins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAME_LENGTH = 14  # letters of a class name in a figure


def plot_model(classes: Sequence[str], predictions: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    """The figures confusion, calibration and, if there are any, mistakes, as PNG files.

    `predictions` are the arrays of release.evaluate(): `probabilities` (N, classes) float32,
    `labels` (N,) int64, and of the worst mistakes the indices `mistakes` (M,) int64 and `images`
    (M, channels, size, size) uint8.
    """
    probabilities, labels = predictions["probabilities"], predictions["labels"]
    names = printable_names(classes)
    pictures = {
        "confusion": render_png(lambda: plot_confusion(names, probabilities.argmax(1), labels)),
        "calibration": render_png(lambda: plot_calibration(probabilities, labels)),
    }
    if not len(predictions.get("mistakes", ())):
        return pictures
    at, images = predictions["mistakes"], predictions["images"]
    captions = [
        f"{true}: {true_share:.1%}\npredicted {read}: {read_share:.1%}"
        for true, read, true_share, read_share in list_mistakes(
            names, probabilities[at], labels[at]
        )
    ]
    colours = MAX_COLOURS if images.shape[1] == 1 else None
    return pictures | {"mistakes": render_png(lambda: plot_grid(images, captions), colours=colours)}


def printable_names(classes: Sequence[str]) -> list[str]:
    """Shortened class names; a number where the font lacks a letter."""
    import_matplotlib()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))

    def to_printable(i: int, name: str) -> str:
        if not all(font.get_char_index(ord(letter)) for letter in name):
            return f"#{i}"
        short = name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"
        return short.replace("$", r"\$")  # matplotlib reads text between two $ as mathematics

    return [to_printable(i, name) for i, name in enumerate(classes)]


def list_mistakes(
    names: Sequence[str], probabilities: Floats, labels: Labels
) -> list[tuple[str, str, float, float]]:
    """For each mistake the true class, the predicted class, and the probabilities of both."""
    return [
        (names[true], names[read], float(row[true]), float(row[read]))
        for row, true, read in zip(probabilities, labels, probabilities.argmax(1), strict=True)
    ]


def plot_confusion(names: Sequence[str], predicted: Labels, labels: Labels) -> "Figure":
    """The confusion matrix, true classes in rows, with mistakes in another colour."""
    from matplotlib import pyplot
    from sklearn.metrics import confusion_matrix

    n = len(names)
    counts = confusion_matrix(labels, predicted, labels=range(n))
    right = np.eye(n, dtype=bool)
    wrong = np.where(right, 0, counts)
    side = max(WIDTH - 0.6, 0.23 * n + 0.8)
    figure, axes = pyplot.subplots(figsize=(side, side))
    axes.imshow(np.where(right, 1.0, np.nan), cmap="Blues", vmin=0, vmax=7)
    axes.imshow(np.where(wrong, wrong, np.nan), cmap="Oranges", vmin=-wrong.max() / 4)
    for row, column in np.argwhere(counts):
        dark = wrong[row, column] > 0.6 * wrong.max()
        settings: Any = {"fontsize": 8 if n <= 12 else 6, "color": "white" if dark else INK}
        axes.text(column, row, counts[row, column], ha="center", va="center", **settings)
    rotation = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(n), names, rotation=rotation, fontsize=8 if n <= 26 else 7)
    axes.set_yticks(range(n), names, fontsize=8 if n <= 26 else 7)
    axes.set(xlabel="predicted class", ylabel="true class")
    style_axes(axes).grid(visible=False)
    return figure


def plot_calibration(probabilities: Floats, labels: Labels) -> "Figure":
    """Accuracy by confidence, with Wilson's 95 % interval; below, the number of images."""
    from matplotlib import pyplot

    bins = reliability_bins(probabilities, labels)
    figure, (axes, counts) = pyplot.subplots(
        2, sharex=True, figsize=(WIDTH, HEIGHT + 0.8), height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect calibration")
    intervals = [
        binomtest(round(accuracy * n), int(n)).proportion_ci(0.95, method="wilson")
        for n, _, accuracy in bins
    ]
    for (_, confidence, _), (low, high) in zip(bins, intervals, strict=True):
        axes.plot([confidence, confidence], [low, high], color=BLUE, linewidth=1, alpha=0.6)
    axes.plot(
        bins[:, 1], bins[:, 2], "o", color=BLUE, markersize=4, label="accuracy, 95 % interval"
    )
    axes.legend(loc="lower right", frameon=False)
    axes.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    counts.bar(bins[:, 1], bins[:, 0], width=0.02, color=BLUE)
    counts.set(xlabel="confidence", ylabel="images", yscale="log")
    for panel in (axes, counts):
        style_axes(panel)
    format_percent(axes)
    counts.yaxis.set_major_formatter("{x:,.0f}")
    counts.xaxis.set_major_formatter(axes.yaxis.get_major_formatter())
    return figure


def plot_grid(images: NDArray[np.uint8], captions: Sequence[str]) -> "Figure":
    """A grid of images (N, 1 or 3, H, W), N > 0, as the model sees them, with captions above."""
    from matplotlib import pyplot

    lines = [line for caption in captions for line in caption.splitlines()]
    max_columns = 4 if max(map(len, lines)) <= 18 else 3
    columns, rows = min(max_columns, len(images)), math.ceil(len(images) / max_columns)
    side = WIDTH / max_columns
    cell_height = 1.1 + 0.17 * len(lines) / len(captions) / side  # with the caption; unit: width
    figure, axes = pyplot.subplots(figsize=(side * columns, side * rows * cell_height))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns, -(i // columns) * cell_height
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(x, x + 0.9, y, y + 0.9))
        axes.text(x + 0.45, y + 0.95, caption, fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(-0.05, columns - 0.05), ylim=(-(rows - 1) * cell_height, cell_height))
    axes.axis("off")
    return figure
