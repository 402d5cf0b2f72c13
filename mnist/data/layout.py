"""The layout of a folder data set: which of its folders are parts, and which are classes."""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mnist.data.download import DataError
from mnist.images.files import describe_left_out, join_names, list_folder, list_tree

# Names of parts, in any case, as published data sets have them.
PART_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}

Labelled = list[tuple[Path, int]]
"""Files, and the indices of their classes."""


@dataclass(frozen=True)
class Part:
    """The class folders in `root`: `classes` maps each name, sorted and in NFC, to its folders.

    A class has several folders if their names differ only in their Unicode form.
    """

    root: Path
    classes: dict[str, list[Path]]

    def list_pictures(self) -> Labelled:
        """The files right in the class folders that are pictures by their names."""
        return [
            (file, label)
            for label, folders in enumerate(self.classes.values())
            for folder in folders
            for file in list_folder(folder).pictures
        ]

    def describe_ignored(self) -> list[str]:
        """Notes about files and folders that are ignored because of their names or their place."""
        own = list_folder(self.root)
        inner = [list_folder(folder) for folders in self.classes.values() for folder in folders]
        left_out = [path for listing in (own, *inner) for path in listing.left_out]
        misplaced = {
            "files next to the class folders": own.pictures,
            "folders in class folders": [path for listing in inner for path in listing.folders],
        }
        notes = [
            f"{self.root}: {kind} are not read: {self.join_paths(paths)}"
            for kind, paths in misplaced.items()
            if paths
        ]
        return notes + describe_left_out(self.root, left_out)

    def join_paths(self, paths: list[Path]) -> str:
        """Some of the paths, from the root on."""
        return join_names([str(path.relative_to(self.root)) for path in paths])

    def check_counts(self, labels: list[int], minimum: int) -> None:
        """Raise DataError if a class has fewer than `minimum` of the labels."""
        counts = Counter(labels)
        fewest = min(range(len(self.classes)), key=lambda label: counts[label])
        name, n = list(self.classes)[fewest], counts[fewest]
        if n >= minimum:
            return
        folder = self.classes[name][0]
        trees = [list_tree(path) for path in self.classes[name]]
        deeper = [path for tree in trees for path in tree.pictures]
        others = [path for tree in trees for path in tree.left_out]
        if deeper and not n:
            raise DataError(
                f"class {name!r} has 0 pictures directly in its folder, but {len(deeper)} in "
                f"folders below it ({self.join_paths(deeper[:1])}); put them into {folder}"
            )
        endings = (
            f" ({len(others)} files have other endings, such as {self.join_paths(others[:1])})"
        )
        remedy = (
            f"move that folder out of {self.root}" if deeper or others else "remove that folder"
        )
        raise DataError(
            f"class {name!r} has {n} pictures{endings if others else ''}; at least {minimum} are "
            f"needed: add some to {folder}, or {remedy}"
        )


def find_parts(path: Path) -> tuple[Part, Part | None, list[str]]:
    """The part with the training pictures, the test part or None, and notes.

    If `path` has folders for training and test (PART_NAMES) with the same classes in each, these
    are the parts; otherwise the folders in `path` are the classes. Raises DataError.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    folders = {part: _find_part_folders(path, part) for part in PART_NAMES}
    trains, tests = folders["train"], folders["test"]
    for alike in (trains, tests):
        if len(alike) > 1:
            names = " and ".join(f"{folder.name}/" for folder in alike)
            raise DataError(
                f"{path} has {names}, both with classes; keep one of them, and give the other a "
                "different name"
            )
    if bool(trains) != bool(tests) or (folders["validation"] and not trains):
        raise DataError(_describe_missing(path, folders))
    root = trains[0] if trains else path
    train = Part(root, _list_classes(root))
    _check_classes(train)
    if not tests:
        return train, None, []
    test = Part(tests[0], _list_classes(tests[0]))
    both = f"{train.root.name}/ and {test.root.name}/"
    if unmatched := set(train.classes) ^ set(test.classes):
        names = ", ".join(sorted(unmatched))
        raise DataError(f"{path}: {both} must have the same classes; only one has {names}")
    unused = [folder.name for folder in list_folder(path).folders]
    unused = [name for name in unused if name not in (train.root.name, test.root.name)]
    notes = [f"{path}: only {both} are used, not {join_names(unused)}"] if unused else []
    return train, test, notes


def _find_part_folders(path: Path, part: str) -> list[Path]:
    return [
        folder
        for folder in list_folder(path).folders
        if folder.name.lower() in PART_NAMES[part] and list_folder(folder).folders
    ]


def _describe_missing(path: Path, folders: dict[str, list[Path]]) -> str:
    """An error for parts of which the one for training or test is missing."""
    present = [folder for part in folders.values() for folder in part]
    missing = "test" if folders["train"] else "train"
    others = [folder for folder in present if folder not in folders["train"]]
    is_renamed = others and missing == "test"
    remedy = f"rename {others[0].name}/ to {missing}/" if is_renamed else f"add {missing}/"
    return (
        f"{path} has a {present[0].name}/ with classes but no {missing}/ with the same ones; "
        f"{remedy}, rename another folder to {missing}/, or move the class folders directly into "
        f"{path}"
    )


def _list_classes(root: Path) -> dict[str, list[Path]]:
    """The class folders in `root` by their names, as in Part."""
    classes: dict[str, list[Path]] = {}
    for folder in list_folder(root).folders:
        if "\ufffd" in os.fsencode(folder.name).decode(errors="replace"):
            raise DataError(
                f"{root}: the folder {folder.name!r} has a name that is not UTF-8; rename it"
            )
        if any(unicodedata.category(letter) == "Cc" for letter in folder.name):
            raise DataError(
                f"{root}: the folder {folder.name!r} has a control character in its name; rename it"
            )
        classes.setdefault(unicodedata.normalize("NFC", folder.name), []).append(folder)
    return dict(sorted(classes.items()))


def _check_classes(part: Part) -> None:
    """Raise DataError for fewer than two classes."""
    root = part.root
    if not part.classes:
        example = root / "cat" / "1.png"
        remedy = f"put the pictures of each class into one, such as {example}"
        raise DataError(f"{root} has no class folders; {remedy}")
    if len(part.classes) == 1:
        ((name, (inner, *_)),) = part.classes.items()
        hint = f"; are the classes those in {inner}?" if len(list_folder(inner).folders) > 1 else ""
        raise DataError(f"{root} has only one class, {name!r}; at least two are needed{hint}")
