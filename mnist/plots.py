"""The pictures that explain a study and its model; matplotlib is imported only then."""

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

VALUE = "validation accuracy"
COLOURS = 128  # enough for a drawing, in a third of the bytes
LONGEST = 14  # letters of a class's name in a picture
INK, BLUE, ORANGE, RED, GREY, PALE = (
    "#2b3138",
    "#2f6fa8",
    "#d1691c",
    "#b3261e",
    "#98a1ab",
    "#e4e7eb",
)
WIDTH, HEIGHT = 5.2, 3.4  # inches, in which letters of 9 points can be read on a telephone
STYLE: Any = {
    "figure.figsize": (WIDTH, HEIGHT),
    "savefig.dpi": 180,
    "font.size": 9,
    "text.color": INK,
}


def of_study(study: "optuna.Study", winner: int, shares: bool) -> dict[str, bytes]:
    """history, curves, slice and parallel; with `shares` also the importance."""
    wide = (WIDTH / 2 * max(2, len(study.trials[winner].params)), HEIGHT)
    pictures = {
        "history": png(lambda: history(study)),
        "curves": png(lambda: curves(study, winner)),
        "slice": png(lambda: slices(study)),
        "parallel": png(lambda: parallel(study), wide),
    }
    return pictures | ({"importance": png(lambda: importance(study))} if shares else {})


def of_model(classes: Sequence[str], kept: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    """confusion, calibration and, if there are any, mistakes.

    `kept` are the arrays that release.evaluate() keeps: `probabilities` (N, classes) float32,
    `labels` (N,) int64, and of the worst mistakes `mistakes` (M,) int64 and `images`
    (M, channels, size, size) uint8.
    """
    probabilities, labels = kept["probabilities"], kept["labels"]
    names = written(classes)
    pictures = {
        "confusion": png(lambda: confusion(names, probabilities.argmax(1), labels)),
        "calibration": png(lambda: calibration(probabilities, labels)),
    }
    if not len(kept.get("mistakes", ())):
        return pictures
    at = kept["mistakes"]
    captions = [
        f"{true}: {share:.1%}\nread as {read}: {more:.1%}"
        for true, read, share, more in told_wrong(names, probabilities[at], labels[at])
    ]
    colours = COLOURS if kept["images"].shape[1] == 1 else None
    return pictures | {"mistakes": png(lambda: grid(kept["images"], captions), colours=colours)}


def png(
    draw: Callable[[], "Figure"],
    size: tuple[float, float] | None = None,
    colours: int | None = COLOURS,
) -> bytes:
    """A picture of so many colours (None: all), drawn without a screen.

    `size` is in inches. Matplotlib is then as it was before.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, file = io.BytesIO(), io.BytesIO()
    style = STYLE | ({"figure.figsize": size} if size else {})
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Optuna's plots are called experimental, and limits of a single trial are equal.
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


# --- of a study


def history(study: "optuna.Study") -> "Figure":
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_optimization_history(study, target_name=VALUE)
    pruned = _pruned(study)
    axes.scatter([n for n, *_ in pruned], [value for _, value, _ in pruned], **_cross("pruned"))
    axes.xaxis.set_major_locator(_whole())
    handles, _ = axes.get_legend_handles_labels()
    labels = ("complete", "best so far", "pruned")
    _calm(axes).legend(handles, labels, loc="best", frameon=False, fontsize=9)
    axes.set_xlabel("trial")
    _percent(axes)
    return axes.figure


def curves(study: "optuna.Study", winner: int) -> "Figure":
    """All that trials reported on the way, a line each; those pruned end with a cross."""
    from matplotlib import pyplot

    looks = {"COMPLETE": ("complete", BLUE), "PRUNED": ("pruned", GREY), "FAIL": ("failed", RED)}
    figure, axes = pyplot.subplots()
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in looks or not trial.intermediate_values:
            continue
        label, color = looks[trial.state.name]
        if trial.number == winner:
            label, color = f"trial {winner}, the best", ORANGE
        samples, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        thick = 2.2 if trial.number == winner else 1
        axes.plot(samples, values, color=color, linewidth=thick, zorder=thick, label=label)
        end = "o" if trial.state.name == "COMPLETE" else "x"
        axes.plot(samples[-1:], values[-1:], end, color=color, markersize=4.5, zorder=thick)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.legend(once.values(), once.keys(), loc="best", frameon=False)
    axes.set(xlabel="training images seen", ylabel=VALUE)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _percent(_calm(axes))
    return figure


def slices(study: "optuna.Study") -> "Figure":
    """Accuracy by each hyperparameter; crosses are pruned trials at their last report."""
    from optuna.visualization import matplotlib as plots

    every: Any = np.atleast_1d(np.asarray(plots.plot_slice(study, target_name=VALUE)))
    pruned = _pruned(study)
    for axes in every:
        name = axes.get_xlabel()
        points = [(params[name], value) for _, value, params in pruned if name in params]
        xs = [repr(x) if isinstance(x, str | bool) else x for x, _ in points]  # as Optuna has them
        axes.scatter(xs, [value for _, value in points], **_cross("pruned"))
        axes.collections[0].set_cmap("viridis")
        axes.margins(0.08)
        axes.autoscale(axis="both")
        _numbers(_calm(axes).xaxis)
    _percent(every[0])
    bar = every[-1].collections[0].colorbar  # of all of them
    bar.set_label("trial", color=INK, fontsize=9)
    bar.locator = _whole()
    bar.ax.tick_params(colors=INK, labelsize=8)
    figure = every[0].figure
    figure.suptitle("")
    return figure


def parallel(study: "optuna.Study") -> "Figure":
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_parallel_coordinate(study, target_name=VALUE)
    axes.set_title("")
    lines = axes.collections[0]
    lines.set(cmap="viridis_r", linewidth=1.4, alpha=0.8)
    lines.colorbar.ax.set_visible(False)  # the first axis says the same
    for each in axes.figure.axes:
        _numbers(each.yaxis)
        each.tick_params(labelsize=8)
    _percent(axes)
    pyplot.setp(axes.get_xticklabels(), rotation=0)
    axes.tick_params(axis="x", pad=8, length=0)
    return axes.figure


def importance(study: "optuna.Study") -> "Figure":
    from matplotlib.ticker import PercentFormatter
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_param_importances(study)
    axes.set(xlabel="share of what moves the accuracy", ylabel="")
    axes.set_title("", loc="left")
    axes.get_legend().remove()
    for bar in axes.patches:
        bar.set_color(BLUE)
    _calm(axes).xaxis.set_major_formatter(PercentFormatter(1))
    return axes.figure


def _pruned(study: "optuna.Study") -> list[tuple[int, float, dict[str, Any]]]:
    """Number, last report and hyperparameters of each pruned trial; Optuna's plots omit them."""
    trials = study.get_trials(deepcopy=False)
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    return [(t.number, t.value, t.params) for t in pruned if t.value is not None]


def _cross(label: str) -> dict[str, Any]:
    return {"marker": "x", "s": 16, "color": GREY, "linewidths": 1, "label": label}


def _whole() -> Any:
    """For an axis of trial numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def _calm(axes: "Axes") -> "Axes":
    """White, with a light grid: Optuna draws in a style of its own."""
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


def _numbers(axis: "Axis") -> None:
    """Plain numbers, not too many, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    within = (1.0,) if high > 50 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=within))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """ "1e-4", "0.05", "200" """
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.01 else f"{value:g}"


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1))


# --- of a model


def written(classes: Sequence[str]) -> list[str]:
    """Class names as a picture can show them: short; by number where the font lacks a letter."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))

    def write(i: int, name: str) -> str:
        if not all(font.get_char_index(ord(letter)) for letter in name):
            return f"#{i}"
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        return short.replace("$", r"\$")  # between two of them is mathematics

    return [write(i, name) for i, name in enumerate(classes)]


def told_wrong(
    names: Sequence[str], probabilities: Floats, labels: Labels
) -> list[tuple[str, str, float, float]]:
    """Of each mistake what it is, what it is read as, and the probabilities of both."""
    return [
        (names[is_], names[read], float(row[is_]), float(row[read]))
        for row, is_, read in zip(probabilities, labels, probabilities.argmax(1), strict=True)
    ]


def confusion(names: Sequence[str], found: Labels, labels: Labels) -> "Figure":
    """How often each class (rows) is read as which (columns); mistakes stand out by colour."""
    from matplotlib import pyplot
    from sklearn.metrics import confusion_matrix

    n = len(names)
    counts = confusion_matrix(labels, found, labels=range(n))
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
    turned = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(n), names, rotation=turned, fontsize=8 if n <= 26 else 7)
    axes.set_yticks(range(n), names, fontsize=8 if n <= 26 else 7)
    axes.set(xlabel="read as", ylabel="is")
    _calm(axes).grid(visible=False)
    return figure


def calibration(probabilities: Floats, labels: Labels) -> "Figure":
    """Accuracy by confidence, with Wilson's 95 % interval; below, how many images that are."""
    from matplotlib import pyplot

    bins = reliability_bins(probabilities, labels)
    figure, (axes, below) = pyplot.subplots(
        2, sharex=True, figsize=(WIDTH, HEIGHT + 0.8), height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="as it should be")
    intervals = [
        binomtest(round(true * n), int(n)).proportion_ci(0.95, method="wilson")
        for n, _, true in bins
    ]
    for (_, sure, _), (low, high) in zip(bins, intervals, strict=True):
        axes.plot([sure, sure], [low, high], color=BLUE, linewidth=1, alpha=0.6)
    axes.plot(
        bins[:, 1], bins[:, 2], "o", color=BLUE, markersize=4, label="accuracy, 95 % interval"
    )
    axes.legend(loc="lower right", frameon=False)
    axes.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    below.bar(bins[:, 1], bins[:, 0], width=0.02, color=BLUE)
    below.set(xlabel="confidence", ylabel="images", yscale="log")
    for each in (axes, below):
        _calm(each)
    _percent(axes)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.xaxis.set_major_formatter(axes.yaxis.get_major_formatter())
    return figure


def grid(images: NDArray[np.uint8], captions: Sequence[str]) -> "Figure":
    """Images (N, 1 or 3, H, W), N > 0, as the model sees them, each with its caption above."""
    from matplotlib import pyplot

    lines = [line for caption in captions for line in caption.splitlines()]
    most = 4 if max(map(len, lines)) <= 18 else 3
    columns, rows = min(most, len(images)), math.ceil(len(images) / most)
    side = WIDTH / most
    high = 1.1 + 0.17 * len(lines) / len(captions) / side  # of an image with its caption, in widths
    figure, axes = pyplot.subplots(figsize=(side * columns, side * rows * high))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns, -(i // columns) * high
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(x, x + 0.9, y, y + 0.9))
        axes.text(x + 0.45, y + 0.95, caption, fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(-0.05, columns - 0.05), ylim=(-(rows - 1) * high, high))
    axes.axis("off")
    return figure
