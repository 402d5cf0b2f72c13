"""The style of all figures, and the figures of a study; imports matplotlib only when it draws."""

import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mnist.process import extend_environment

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

VALUE_LABEL = "validation accuracy"
MAX_COLOURS = 128  # enough for a figure, with a third of the bytes
INK, BLUE, ORANGE, RED, GREY, PALE = (
    "#2b3138",
    "#2f6fa8",
    "#d1691c",
    "#b3261e",
    "#98a1ab",
    "#e4e7eb",
)
WIDTH, HEIGHT = 5.2, 3.4  # inches; text of 9 points is readable on a phone
ACCURACY_TICKS = (1, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.5, 0.3, 0.1, 0.02, 0)
MIN_TICK_DISTANCE = 0.06  # share of the axis
ODDS_OFFSET = 0.0005  # so that shares of 0 and 1 have log odds
STYLE: Any = {
    "figure.figsize": (WIDTH, HEIGHT),
    "savefig.dpi": 180,
    "font.size": 9,
    "text.color": INK,
}


def plot_study(study: "optuna.Study", winner: int, with_importance: bool) -> dict[str, bytes]:
    """The figures history, curves, slice, parallel and, if asked for, importance, as PNG files."""
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


def render_png(
    draw: Callable[[], "Figure"],
    size: tuple[float, float] | None = None,
    colours: int | None = MAX_COLOURS,
) -> bytes:
    """Draw a figure without a screen, as PNG with at most `colours` colours (None: all).

    `size` is in inches. Matplotlib's settings are restored afterwards.
    """
    import_matplotlib()
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


@functools.cache
def import_matplotlib() -> None:
    """Import matplotlib with its own fonts and settings, so that all machines draw the same.

    A usual import writes the list of the machine's fonts into the home folder.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        extend_environment(MPLCONFIGDIR=folder, MPL_IGNORE_SYSTEM_FONTS="1"),
    ):
        import matplotlib.font_manager  # noqa: F401


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
    style_axes(axes).legend(handles, labels, loc="best", frameon=False, fontsize=9)
    axes.set_xlabel("trial")
    stretch_accuracy(axes)
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
    stretch_accuracy(style_axes(axes))
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
        _format_log_axis(style_axes(axes).xaxis)
    stretch_accuracy(panels[0])
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
    format_percent(axes)
    pyplot.setp(axes.get_xticklabels(), rotation=0)
    axes.tick_params(axis="x", pad=8, length=0)
    return axes.figure


def plot_importance(study: "optuna.Study") -> "Figure":
    from matplotlib.ticker import PercentFormatter
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_param_importances(study)
    axes.set(xlabel="importance for the accuracy", ylabel="")
    axes.set_title("", loc="left")
    axes.get_legend().remove()
    for bar in axes.patches:
        bar.set_color(BLUE)
    style_axes(axes).xaxis.set_major_formatter(PercentFormatter(1))
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


def style_axes(axes: "Axes") -> "Axes":
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


def stretch_accuracy(axes: "Axes") -> None:
    """Scale the y axis by log odds, as good trials differ by a per cent and bad ones by many.

    An axis with fewer than three of ACCURACY_TICKS stays linear.
    """
    format_percent(axes)
    low, high = axes.dataLim.intervaly
    if sum(low <= tick <= high for tick in ACCURACY_TICKS) >= 3:
        axes.set_yscale("function", functions=(_log_odds, _from_log_odds))
        low, high = axes.get_ylim()
        least = MIN_TICK_DISTANCE * (_log_odds(high) - _log_odds(low))
        ticks: list[float] = []
        for tick in ACCURACY_TICKS:
            is_apart = not ticks or _log_odds(ticks[-1]) - _log_odds(tick) >= least
            if low <= tick <= high and is_apart:
                ticks.append(tick)
        axes.set_yticks(ticks, [f"{100 * tick:g}%" for tick in ticks])


def _log_odds(share: Any) -> Any:
    """Log odds of shares (any shape), also where they are up to ODDS_OFFSET under 0 or over 1."""
    share = np.clip(share, -0.99 * ODDS_OFFSET, 1 + 0.99 * ODDS_OFFSET)
    return np.log((share + ODDS_OFFSET) / (1 - share + ODDS_OFFSET))


def _from_log_odds(log_odds: Any) -> Any:
    odds = np.exp(log_odds)
    return (odds * (1 + ODDS_OFFSET) - ODDS_OFFSET) / (1 + odds)


def format_percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1))
