"""Shared by the command lines: paths with ~, output in any encoding, unexpected errors."""

import io
import os
import re
import sys
import tempfile
import traceback
from typing import Any

import click

from mnist.masking import mask_text


def expand_home(path: str | os.PathLike[str]) -> str:
    """The path with the home folder for ~; a path with an unknown user is unchanged."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises RuntimeError


class UserPath(click.Path):
    """A path, in which ~ is the home folder: a shell does not expand it in `--output=~/models`."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(expand_home(value), param, ctx)


def accept_any_text() -> None:
    """Let a terminal or file that is not UTF-8 show letters that it lacks as \\xe9 and \\u2026."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_controls(text: str) -> str:
    """The text with its control characters as \\n or \\x1b: they would act on a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def discard_output() -> None:
    """Discard further output, as no process reads standard output any more, e.g. after `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_crash(error: BaseException) -> str:
    """One line about an unexpected error, which names a file with the traceback; only the user can
    read that file."""
    text = mask_text("".join(traceback.format_exception(error)))
    reason = mask_text(str(error).strip()).partition("\n")[0]
    line = f"unexpected {type(error).__name__}" + (f": {reason}" if reason else "")
    try:
        file, name = tempfile.mkstemp(prefix="traceback-", suffix=".txt")
        with os.fdopen(file, "wb") as stream:
            stream.write(text.encode(errors="backslashreplace"))
    except OSError:
        return line
    return f"{line}; the traceback is in {name}"
