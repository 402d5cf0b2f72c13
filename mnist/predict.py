"""Predictions in the shell, by a saved model. `python -m mnist.predict --help`"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from mnist import images, inference, registry, shell
from mnist.images.files import describe_left_out, describe_links, list_tree

TOP_CLASSES = 3
MAX_LABELS = 4  # named classes of a prediction set
MAX_PLOTTED = 240  # pictures in a figure; matplotlib limits its height


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file: `picture` uint8 (channels, size, size), as the model sees it;
    `top`, the most likely classes with their probabilities, the predicted one first; `uncertain` if
    the picture does not look like any class; `labels`, the prediction set, None for
    models without calibrated sets."""

    file: Path
    picture: np.ndarray
    top: list[tuple[str, float]]
    uncertain: bool = False
    labels: list[str] | None = None


@dataclass(frozen=True)
class Unreadable:
    """A file without a prediction: a code for scripts, and the reason in words."""

    file: Path
    code: str
    reason: str


def predict_files(
    files: Sequence[Path], folder: Path, name: str | None = None
) -> Iterator[Prediction | Unreadable]:
    """Yield a prediction for each file, in order, by a model of the registry `folder`.

    By default the current model. A folder stands for all pictures in and below it (by their names:
    mnist.images.files). Raises registry.RegistryError where the model is unusable, OSError for a
    folder that cannot be read.
    """
    name, record = registry.record(folder, name)
    classify = inference.load(folder, name)
    for file in files:
        for path in (list_tree(file).pictures or [file]) if file.is_dir() else [file]:
            yield predict_file(path, record["dataset"], classify)


def predict_file(
    file: Path, data: registry.DatasetEntry, classify: inference.Classifier
) -> Prediction | Unreadable:
    """Predict the class of one file; `data` is the record of the model's data set."""
    if file.is_dir():
        return Unreadable(file, "empty", "no picture is in this folder")
    try:
        picture = images.normalise(
            file.read_bytes(), size=data["size"], channels=data["channels"], recipe=data["recipe"]
        )
    except OSError as error:
        return Unreadable(file, "unreadable", error.strerror or str(error))
    except images.ImageError as error:
        return Unreadable(file, error.code, str(error))
    predictions, classes = classify.predict(picture[None]), data["classes"]
    shares = zip(classes, map(float, predictions.probabilities[0]), strict=True)
    top = sorted(shares, key=lambda pair: -pair[1])[:TOP_CLASSES]
    uncertain = bool(predictions.uncertain[0])
    return Prediction(file, picture, top, uncertain, predictions.labels(0, classes))


# --- output


def format_line(prediction: Prediction) -> str:
    """ "3.png  3  99.8%  (3 99.8%, 5 0.1%, 8 0.0%)", and "  not sure" for an uncertain picture or
    an empty set, or "  3 or 8" for a set of several classes."""
    name, share = prediction.top[0]
    likely = ", ".join(f"{name} {share:.1%}" for name, share in prediction.top)
    doubt = ""
    if prediction.uncertain or prediction.labels == []:
        doubt = "  not sure"
    elif len(labels := prediction.labels or []) > 1:
        doubt = f"  {' or '.join(labels) if len(labels) <= MAX_LABELS else 'or others'}"
    return shell.show_controls(f"{prediction.file}  {name}  {share:.1%}  ({likely}){doubt}")


def to_json(prediction: Prediction | Unreadable) -> dict[str, Any]:
    """A prediction as JSON values, with the names of the server's answer."""
    if isinstance(prediction, Unreadable):
        error = {"code": prediction.code, "message": prediction.reason}
        return {"filename": str(prediction.file), "error": error}
    name, share = prediction.top[0]
    entries = {"filename": str(prediction.file), "prediction": name, "probability": share}
    entries |= {"top": prediction.top, "uncertain": prediction.uncertain}
    return entries | {"labels": prediction.labels}


def print_picture(picture: np.ndarray, stream: TextIO) -> None:
    """Print a picture, two pixels per letter, in colours or, if the stream has none, in levels."""
    from rich.color import Color
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = Console(file=stream, soft_wrap=True)
    rows = np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0)
    rows = np.pad(rows, ((0, len(rows) % 2), (0, 0), (0, 0)))
    text = Text()
    for above, below in zip(rows[::2], rows[1::2], strict=True):
        for upper, lower in zip(above, below, strict=True):
            if console.color_system is None:
                text.append(" ▄▀█"[2 * (upper.mean() > 127) + (lower.mean() > 127)])
            else:
                color, back = (Color.from_rgb(*map(int, pixel)) for pixel in (upper, lower))
                text.append("▀", Style(color=color, bgcolor=back))
        text.append("\n")
    console.print(text, end="")


def plot_predictions(predictions: Sequence[Prediction], file: Path) -> None:
    """Write a PNG file of all pictures, as the model sees them, with their predictions."""
    # Its libraries are not in requirements-serve.txt, which is enough without --plot.
    from mnist.report import model_plots, plots

    names = model_plots.printable_names([prediction.file.name for prediction in predictions])
    classes = model_plots.printable_names([prediction.top[0][0] for prediction in predictions])
    captions = [
        f"{name}\n{read}: {'not sure' if prediction.uncertain else f'{prediction.top[0][1]:.1%}'}"
        for name, read, prediction in zip(names, classes, predictions, strict=True)
    ]
    pictures = np.stack([prediction.picture for prediction in predictions])
    file.write_bytes(
        plots.render_png(lambda: model_plots.plot_grid(pictures, captions), colours=None)
    )


# --- python -m mnist.predict


@click.command()
@click.argument("files", nargs=-1, required=True, type=shell.UserPath(path_type=Path))
@click.option(
    "--models",
    type=shell.UserPath(path_type=Path),
    envvar="MODELS",
    help="The registry. [default: saved_models, or a sample while it has no model]",
)
@click.option("--model", help="Name of a model in the registry. [default: the current one]")
@click.option("--show", is_flag=True, help="Draw the model's inputs in the terminal.")
@click.option(
    "--plot",
    "file",
    type=shell.UserPath(path_type=Path),
    help="Draw the model's inputs into this PNG file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def main(
    files: tuple[Path, ...],
    models: Path | None,
    model: str | None,
    show: bool,
    file: Path | None,
    as_json: bool,
) -> int:
    """Classify pictures: files, or folders of files.

    Prints each file with its class, its probability, and the three most likely classes. Exit
    status 1 if one of them could not be read.
    """
    if file and file.suffix.lower() != ".png":
        raise click.BadParameter(f"{file} does not end in .png", param_hint="--plot")
    if file and not file.parent.is_dir():
        raise click.BadParameter(f"there is no folder {file.parent}", param_hint="--plot")
    print_left_out(files)
    results: list[Prediction | Unreadable] = []
    for result in predict_files(files, models or choose_registry(), model):
        results.append(result)
        if isinstance(result, Unreadable):
            print_error(f"{result.file}: {result.reason}")
            continue
        if show:
            print_picture(result.picture, sys.stderr if as_json else sys.stdout)
        if not as_json:
            click.echo(format_line(result))
    predictions = [result for result in results if isinstance(result, Prediction)]
    if as_json:
        click.echo(json.dumps([to_json(result) for result in results]))  # ASCII, for any output
    if file and predictions:
        plot_predictions(predictions[:MAX_PLOTTED], file)
    if file and len(predictions) > MAX_PLOTTED:
        print_error(f"{file}: only the first {MAX_PLOTTED} pictures are in it")
    return int(len(predictions) < len(results))


def print_left_out(files: Sequence[Path]) -> None:
    """Print a line for each folder with links, or with files that are left out by their names."""
    for folder in filter(Path.is_dir, files):
        _, folders, left_out = list_tree(folder)
        for note in describe_links(folder, folders) + describe_left_out(folder, left_out):
            print_error(note)


def choose_registry() -> Path:
    """The default registry; prints a note if it is the sample."""
    folder = registry.default_folder()
    if folder == registry.SAMPLE:
        print_error(registry.SAMPLE_NOTE)
    return folder


def print_error(message: str) -> None:
    """Print one line, even if the name of a file in it has control characters."""
    click.echo("predict: " + shell.show_controls(message), err=True)


def run_cli(arguments: list[str]) -> int:
    """Run the command; each expected error is one line on standard error and an exit code."""
    shell.accept_any_text()  # file names may have any bytes
    try:
        return main.main(arguments, "python -m mnist.predict", standalone_mode=False)
    except click.ClickException as error:
        print_error(error.format_message())
    except registry.RegistryError as error:
        print_error(str(error))
    except BrokenPipeError:
        shell.discard_output()
        return 1
    except ModuleNotFoundError as error:  # --plot and --show need more than the server
        print_error(f"{error.name} is not installed; `pip install -r requirements.txt` installs it")
        return 1
    except OSError as error:  # --plot
        print_error(f"{error.filename or 'output'}: {error.strerror or error}")
        return 1
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Exception as error:  # noqa: BLE001 - the last resort
        print_error(shell.describe_crash(error))
        return 1
    return 2


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
