"""Which files of a folder are pictures: the same for data sets and for predictions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".mpo"}
)
# Names of files of operating systems, in lower case; names with a leading dot count, too.
SYSTEM_NAMES = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini"})
MAX_NAMED = 5  # files that a note names


class Listing(NamedTuple):
    """The entries of a folder, sorted: pictures by their suffix, other folders, and other files."""

    pictures: list[Path]
    folders: list[Path]
    left_out: list[Path]
    """Files that are not pictures, and files and folders of the operating system."""


def list_folder(folder: Path) -> Listing:
    """The entries of a folder, without those below. Raises OSError."""
    listing = Listing([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if _is_of_the_system(entry.name):
                listing.left_out.append(path)
            elif entry.is_dir():
                listing.folders.append(path)
            elif entry.is_file() and path.suffix.lower() in SUFFIXES:
                listing.pictures.append(path)
            else:
                listing.left_out.append(path)
    return listing


def list_tree(folder: Path) -> Listing:
    """The entries in and below a folder; links to folders are not followed. Raises OSError."""
    pictures, folders, left_out = list_folder(folder)
    for inner in list(folders):
        if not inner.is_symlink():
            below = list_tree(inner)
            pictures += below.pictures
            folders += below.folders
            left_out += below.left_out
    return Listing(sorted(pictures), sorted(folders), sorted(left_out))


def describe_left_out(root: Path, paths: Sequence[Path]) -> list[str]:
    """A line that counts the paths that are left out because of their names; [] without paths."""
    if not paths:
        return []
    names = join_names([str(path.relative_to(root)) for path in paths])
    return [f"{root}: {len(paths)} left out, as their names are not those of pictures: {names}"]


def describe_links(root: Path, folders: Sequence[Path]) -> list[str]:
    """A line that names the links among the folders of list_tree(), which does not follow them."""
    links = [str(path.relative_to(root)) for path in folders if path.is_symlink()]
    return [f"{root}: links to folders are not followed: {join_names(links)}"] if links else []


def join_names(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    suffix = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    shown = (name if name.isprintable() else repr(name) for name in sorted(names)[:MAX_NAMED])
    return ", ".join(shown) + suffix


def _is_of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES
