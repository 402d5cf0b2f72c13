"""Pictures from the shell, read by a saved model. `python -m mnist.predict --help`"""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from mnist import images, inference, plots, registry

ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TOP = 3
MOST_PLOTTED = 240  # a picture of more would be taller than matplotlib draws


@dataclass(frozen=True)
class Answer:
    """What one file is: `picture` uint8 (channels, size, size), as the model saw it; `top` are
    the most likely classes with their probabilities, the first one is the answer; `uncertain` if
    the picture does not look like any class."""

    file: Path
    picture: np.ndarray
    top: list[tuple[str, float]]
    uncertain: bool = False


@dataclass(frozen=True)
class Unreadable:
    """A file without an answer: a code for scripts, and the reason in words."""

    file: Path
    code: str
    reason: str


def answers(
    files: Sequence[Path], folder: Path, name: str | None = None
) -> Iterator[Answer | Unreadable]:
    """One answer for each file, in order, by one model of the registry `folder`.

    The current model by default. A folder stands for all pictures in and below it. Raises
    registry.RegistryError where the model cannot be used.
    """
    name, record = registry.record(folder, name)
    classify = inference.load(folder, name)
    for file in files:
        for path in pictures(file) if file.is_dir() else [file]:
            yield answer(path, record["dataset"], classify)


def pictures(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, sorted, by their endings; the folder itself if
    there are none."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS) or [folder]


def answer(file: Path, data: dict[str, Any], classify: inference.Classifier) -> Answer | Unreadable:
    """`data` is the record of the model's data set."""
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
    (probabilities,), (uncertain,) = classify.read(picture[None])
    shares = zip(data["classes"], map(float, probabilities), strict=True)
    top = sorted(shares, key=lambda pair: -pair[1])[:TOP]
    return Answer(file, picture, top, bool(uncertain))


# --- what is shown


def line(answer: Answer) -> str:
    """ "3.png  3  99.8%  (3 99.8%, 5 0.1%, 8 0.0%)", and "  not sure" where it is uncertain."""
    found, share = answer.top[0]
    likely = ", ".join(f"{name} {share:.1%}" for name, share in answer.top)
    doubt = "  not sure" if answer.uncertain else ""
    return f"{answer.file}  {found}  {share:.1%}  ({likely}){doubt}"


def entry(answer: Answer | Unreadable) -> dict[str, Any]:
    """As JSON values, with the names that the server's answer has."""
    if isinstance(answer, Unreadable):
        error = {"code": answer.code, "message": answer.reason}
        return {"filename": str(answer.file), "error": error}
    found, share = answer.top[0]
    about = {"filename": str(answer.file), "prediction": found, "probability": share}
    return about | {"top": answer.top, "uncertain": answer.uncertain}


def show(picture: np.ndarray, stream: TextIO) -> None:
    """Two pixels a letter, in the terminal's colours; in black and white where it has none."""
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


def plot(found: Sequence[Answer], file: Path) -> None:
    """A PNG file with all pictures, as the model saw them, and their answers."""
    names = plots.written([answer.file.name for answer in found])
    classes = plots.written([answer.top[0][0] for answer in found])
    captions = [
        f"{name}\n{read}: {'not sure' if answer.uncertain else f'{answer.top[0][1]:.1%}'}"
        for name, read, answer in zip(names, classes, found, strict=True)
    ]
    shown = np.stack([answer.picture for answer in found])
    file.write_bytes(plots.png(lambda: plots.grid(shown, captions), colours=None))


# --- python -m mnist.predict


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    envvar="MODELS",
    help="The registry. [default: saved_models, or a sample while it has no model]",
)
@click.option("--model", help="One of its models. [default: the current one]")
@click.option("--show", "shown", is_flag=True, help="Each picture in the terminal, as it is read.")
@click.option("--plot", "file", type=click.Path(path_type=Path), help="A PNG file of them all.")
@click.option("--json", "as_json", is_flag=True, help="The answers as JSON.")
def main(
    files: tuple[Path, ...],
    models: Path | None,
    model: str | None,
    shown: bool,
    file: Path | None,
    as_json: bool,
) -> int:
    """Say what pictures show: files, or folders of them.

    Prints each file with its class, its probability, and the three most likely classes. Exit
    status 1 if one of them could not be read.
    """
    if file and file.suffix.lower() != ".png":
        raise click.BadParameter(f"{file} does not end in .png", param_hint="--plot")
    if file and not file.parent.is_dir():
        raise click.BadParameter(f"there is no folder {file.parent}", param_hint="--plot")
    everything: list[Answer | Unreadable] = []
    for found in answers(files, models or default_registry(), model):
        everything.append(found)
        if isinstance(found, Unreadable):
            complain(f"{found.file}: {found.reason}")
            continue
        if shown:
            show(found.picture, sys.stderr if as_json else sys.stdout)
        if not as_json:
            click.echo(line(found))
    read = [found for found in everything if isinstance(found, Answer)]
    if as_json:
        click.echo(json.dumps([entry(found) for found in everything], ensure_ascii=False))
    if file and read:
        plot(read[:MOST_PLOTTED], file)
    if file and len(read) > MOST_PLOTTED:
        complain(f"{file}: only the first {MOST_PLOTTED} pictures are in it")
    return int(len(read) < len(everything))


def default_registry() -> Path:
    """The registry that is used where none is named; says so if it is the sample."""
    folder = registry.default_folder()
    if folder == registry.SAMPLE:
        complain(registry.SAMPLE_NOTE)
    return folder


def complain(message: str) -> None:
    click.echo(f"predict: {message}", err=True)


def run_cli(arguments: list[str]) -> int:
    """The whole command; every expected failure is one line on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # whatever a file is called
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main.main(arguments, "python -m mnist.predict", standalone_mode=False)
    except click.ClickException as error:
        complain(error.format_message())
    except registry.RegistryError as error:
        complain(str(error))
    except BrokenPipeError:  # as `| head` leaves it: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # --plot
        complain(f"{error.filename or 'output'}: {error.strerror}")
        return 1
    except (KeyboardInterrupt, click.Abort):
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
