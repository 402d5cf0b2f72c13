"""The types of option values on the command line."""

import re
from pathlib import Path
from typing import Any

import click

from mnist import data, models, plugins
from mnist.search import urls
from mnist.shell import UserPath, expand_home

ALL, AUTO = "all", "auto"  # instead of the name of a network
CANDIDATES = ("parallel", "residual", "compact")  # of AUTO, large ones first


class Duration(click.ParamType):
    """A duration in seconds, or with s, m or h: 90, 90s, 15m, 2h."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a time such as 90s, 15m or 2h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


MIN_QUOTA = 20 * 10**6


class Size(click.ParamType):
    """A size in bytes, or with kB, MB or GB: 500MB, 2GB; at least MIN_QUOTA, for any run to fit."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)B?", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a size such as 500MB or 2GB", param, ctx)
        size = int(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]])
        if size < MIN_QUOTA:
            self.fail(
                f"{value!r} is under {MIN_QUOTA // 10**6}MB, which the smallest run needs",
                param,
                ctx,
            )
        return size


class DatasetName(click.ParamType):
    """A known data set, or folder:PATH; the path becomes absolute, so that workers find it."""

    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if value in data.DATASETS:
            return value
        prefix = data.FOLDER_PREFIX
        path = Path(expand_home(value.removeprefix(prefix)))
        if not value.startswith(prefix) or value == prefix:
            if Path(expand_home(value)).is_dir():
                self.fail(f"{value!r} is a folder; write {prefix}{value}", param, ctx)
            names = ", ".join(data.DATASETS)
            self.fail(f"{value!r} is not a data set; known: {names}, {prefix}PATH", param, ctx)
        if not path.is_dir():
            self.fail(f"{value!r}: there is no folder {path}", param, ctx)
        return f"{prefix}{path.absolute()}"


class StorageURL(click.ParamType):
    """The URL of a database, as urls.normalise() returns it; a malformed one is a StudyError."""

    name = "url"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        urls.check(value)
        return urls.normalise(value)


MAX_STUDY_NAME = 512  # letters; the length of Optuna's column


def check_study_name(name: str) -> None:
    """Raise click.UsageError for a name that the database or a line of output cannot hold."""
    if len(name) > MAX_STUDY_NAME:
        text = f"the study's name has {len(name)} letters, more than {MAX_STUDY_NAME}"
        raise click.UsageError(f"{text}; choose another one with --study")
    if not name.isprintable():
        text = f"the study's name {name!a} has letters that cannot be printed"
        raise click.UsageError(f"{text}; choose another one with --study")


class Folder(UserPath):
    """A local or mounted folder, not a URL."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if "://" in str(value):
            text = f"{value!r} is not a folder; mount the bucket and name its folder"
            self.fail(text, param, ctx)
        return super().convert(value, param, ctx)


class NetworkName(click.ParamType):
    """A known network, AUTO or ALL; looked up late, as --import may add one."""

    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if value not in (*models.NETWORKS, AUTO, ALL):
            names = ", ".join(models.NETWORKS)
            self.fail(f"{value!r} is not a network; known: {names}, {AUTO}, {ALL}", param, ctx)
        return value


def load_plugins(ctx: click.Context, param: click.Parameter, paths: tuple[Path, ...]) -> Any:
    try:
        for path in paths:
            plugins.load(path)
    except plugins.PluginError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    return paths
