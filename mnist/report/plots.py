"""The figures of a study and its model; imports matplotlib only when it draws."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from mnist.scores import Floats, Labels, reliability_bins

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

VALUE_LABEL = "validation accuracy"
MAX_COLOURS = 128  # enough for a figure, with a third of the bytes
MAX_NAME_LENGTH = 14  # letters of a class name in a figure
INK, BLUE, ORANGE, RED, GREY, PALE = (
    "#2b3138",
    "#2f6fa8",
    "#d1691c",
    "#b3261e",
    "#98a1ab",
    "#e4e7eb",
)
WIDTH, HEIGHT = 5.2, 3.4  # inches; text of 9 points is readable on a phone
STYLE: Any = {
    "figure.figsize": (WIDTH, HEIGHT),
    "savefig.dpi": 180,
    "font.size": 9,
    "text.color": INK,
}


def plot_study(study: "optuna.Study", winner: int, with_importance: bool) -> dict[str, bytes]:
    """The figures history, curves, slice and parallel, and importance if wanted, as PNG files."""
    size = (WIDTH / 2 * max(2, len(study.trials[winner].params)), HEIGHT)
    pictures = {
        "history": render_png(lambda: plot_history(study)),
        "curves": render_png(lambda: plot_curves(study, winner)),
        "slice": render_png(lambda: plot_slices(study)),
        "parallel": render_png(lambda: plot_parallel(study), size),
    }
    if not with_importance:
        return pictures
    return pictures | {"importance": render_png(lambda: plot_importance(study))}


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
        f"{true}: {true_share:.1%}\nread as {read}: {read_share:.1%}"
        for true, read, true_share, read_share in list_mistakes(
            names, probabilities[at], labels[at]
        )
    ]
    colours = MAX_COLOURS if images.shape[1] == 1 else None
    return pictures | {"mistakes": render_png(lambda: plot_grid(images, captions), colours=colours)}


def render_png(
    draw: Callable[[], "Figure"],
    size: tuple[float, float] | None = None,
    colours: int | None = MAX_COLOURS,
) -> bytes:
    """Draw a figure without a screen, as PNG with at most so many colours (None: all).

    `size` is in inches. Matplotlib's settings are restored afterwards.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, file = io.BytesIO(), io.BytesIO()
    style = STYLE | ({"figure.figsize": size} if size else {})
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Optuna's plots are experimental, and the axis limits of a single trial are equal.
        warnings.simplefilter("ignore")
        try:
            draw().savefig(drawn, bbox_inches="tight", pil_kwargs={"compress_level": 1})
        finally:
            pyplot.close("all")
    picture = Image.open(drawn).convert("RGB")
    if colours:
        picture = picture.quantize(colours, dither=Image.Dither.NONE)
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


# --- figures of a study


def plot_history(study: "optuna.Study") -> "Figure":
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_optimization_history(study, target_name=VALUE_LABEL)
    pruned = _list_pruned(study)
    axes.scatter(
        [n for n, *_ in pruned], [value for _, value, _ in pruned], **_cross_style("pruned")
    )
    axes.xaxis.set_major_locator(_make_integer_locator())
    handles, _ = axes.get_legend_handles_labels()
    labels = ("complete", "best so far", "pruned")
    _style_axes(axes).legend(handles, labels, loc="best", frameon=False, fontsize=9)
    axes.set_xlabel("trial")
    _format_percent(axes)
    return axes.figure


def plot_curves(study: "optuna.Study", winner: int) -> "Figure":
    """The intermediate values of each trial as a line; pruned trials end with a cross."""
    from matplotlib import pyplot

    styles = {"COMPLETE": ("complete", BLUE), "PRUNED": ("pruned", GREY), "FAIL": ("failed", RED)}
    figure, axes = pyplot.subplots()
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in styles or not trial.intermediate_values:
            continue
        label, color = styles[trial.state.name]
        if trial.number == winner:
            label, color = f"trial {winner}, the best", ORANGE
        samples, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        width = 2.2 if trial.number == winner else 1
        axes.plot(samples, values, color=color, linewidth=width, zorder=width, label=label)
        marker = "o" if trial.state.name == "COMPLETE" else "x"
        axes.plot(samples[-1:], values[-1:], marker, color=color, markersize=4.5, zorder=width)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), loc="best", frameon=False)
    axes.set(xlabel="training images seen", ylabel=VALUE_LABEL)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _format_percent(_style_axes(axes))
    return figure


def plot_slices(study: "optuna.Study") -> "Figure":
    """Accuracy by each hyperparameter; crosses are pruned trials at their last report."""
    from optuna.visualization import matplotlib as plots

    panels: Any = np.atleast_1d(np.asarray(plots.plot_slice(study, target_name=VALUE_LABEL)))
    pruned = _list_pruned(study)
    for axes in panels:
        name = axes.get_xlabel()
        points = [(params[name], value) for _, value, params in pruned if name in params]
        xs = [
            repr(x) if isinstance(x, str | bool) else x for x, _ in points
        ]  # as Optuna plots them
        axes.scatter(xs, [value for _, value in points], **_cross_style("pruned"))
        axes.collections[0].set_cmap("viridis")
        axes.margins(0.08)
        axes.autoscale(axis="both")
        _format_log_axis(_style_axes(axes).xaxis)
    _format_percent(panels[0])
    bar = panels[-1].collections[0].colorbar  # shared by all panels
    bar.set_label("trial", color=INK, fontsize=9)
    bar.locator = _make_integer_locator()
    bar.ax.tick_params(colors=INK, labelsize=8)
    figure = panels[0].figure
    figure.suptitle("")
    return figure


def plot_parallel(study: "optuna.Study") -> "Figure":
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_parallel_coordinate(study, target_name=VALUE_LABEL)
    axes.set_title("")
    lines = axes.collections[0]
    lines.set(cmap="viridis_r", linewidth=1.4, alpha=0.8)
    lines.colorbar.ax.set_visible(False)  # the first axis shows the same values
    for axis in axes.figure.axes:
        _format_log_axis(axis.yaxis)
        axis.tick_params(labelsize=8)
    _format_percent(axes)
    pyplot.setp(axes.get_xticklabels(), rotation=0)
    axes.tick_params(axis="x", pad=8, length=0)
    return axes.figure


def plot_importance(study: "optuna.Study") -> "Figure":
    from matplotlib.ticker import PercentFormatter
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_param_importances(study)
    axes.set(xlabel="share of what moves the accuracy", ylabel="")
    axes.set_title("", loc="left")
    axes.get_legend().remove()
    for bar in axes.patches:
        bar.set_color(BLUE)
    _style_axes(axes).xaxis.set_major_formatter(PercentFormatter(1))
    return axes.figure


def _list_pruned(study: "optuna.Study") -> list[tuple[int, float, dict[str, Any]]]:
    """Number, last report and hyperparameters of each pruned trial; Optuna's plots omit them."""
    trials = study.get_trials(deepcopy=False)
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    return [(t.number, t.value, t.params) for t in pruned if t.value is not None]


def _cross_style(label: str) -> dict[str, Any]:
    return {"marker": "x", "s": 16, "color": GREY, "linewidths": 1, "label": label}


def _make_integer_locator() -> Any:
    """Ticks for an axis of trial numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def _style_axes(axes: "Axes") -> "Axes":
    """Replace Optuna's style: a white background with a light grid."""
    axes.set_title("")
    axes.set_facecolor("white")
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=GREY)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    return axes


def _format_log_axis(axis: "Axis") -> None:
    """Show few and plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 50 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_formatter(NullFormatter())


def format_number(value: float) -> str:
    """ "1e-4", "0.05", "200" """
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.01 else f"{value:g}"


def _format_percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1))


# --- figures of a model


def printable_names(classes: Sequence[str]) -> list[str]:
    """Shortened class names; a number where the font lacks a letter."""
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
    axes.set(xlabel="read as", ylabel="is")
    _style_axes(axes).grid(visible=False)
    return figure


def plot_calibration(probabilities: Floats, labels: Labels) -> "Figure":
    """Accuracy by confidence, with Wilson's 95 % interval; below, the number of images."""
    from matplotlib import pyplot

    bins = reliability_bins(probabilities, labels)
    figure, (axes, counts) = pyplot.subplots(
        2, sharex=True, figsize=(WIDTH, HEIGHT + 0.8), height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="as it should be")
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
        _style_axes(panel)
    _format_percent(axes)
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
