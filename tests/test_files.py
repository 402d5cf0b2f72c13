"""mnist.images.files: one rule for which files of a folder are pictures."""

from pathlib import Path

from mnist.images.files import describe_left_out, describe_links, list_folder, list_tree

PICTURES = ["1.png", "2.JPG", "3.jfif", "4.jpe", "5.pnm", "6.pgm", "7.TIFF"]
SYSTEM = [".DS_Store", "._1.png", ".hidden.png", "Desktop.ini", "Thumbs.db", "thumbs.db"]
SYSTEM_FOLDERS = [".ipynb_checkpoints", "@eaDir", "__MACOSX"]
OTHERS = ["README", "labels.csv"]


def fill(root: Path) -> Path:
    for name in (*PICTURES, *SYSTEM, *OTHERS):
        (root / name).write_bytes(b"x")
    for name in (*SYSTEM_FOLDERS, "shots.png", "deep"):
        (root / name).mkdir()
        (root / name / "inner.png").write_bytes(b"x")
    return root


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_pictures_folders_and_other_files_are_separated(tmp_path: Path) -> None:
    pictures, folders, left_out = list_folder(fill(tmp_path))
    assert names(pictures, tmp_path) == PICTURES
    assert names(folders, tmp_path) == ["deep", "shots.png"]
    assert names(left_out, tmp_path) == sorted([*SYSTEM, *SYSTEM_FOLDERS, *OTHERS])


def test_a_tree_has_the_pictures_of_its_folders(tmp_path: Path) -> None:
    pictures, folders, left_out = list_tree(fill(tmp_path))
    assert names(pictures, tmp_path) == sorted([*PICTURES, "deep/inner.png", "shots.png/inner.png"])
    assert names(folders, tmp_path) == ["deep", "shots.png"]
    assert len(left_out) == len([*SYSTEM, *SYSTEM_FOLDERS, *OTHERS])


def test_links_to_nowhere_and_in_circles_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert list_tree(tmp_path).pictures == []
    (note,) = describe_links(tmp_path, list_tree(tmp_path).folders)
    assert note == f"{tmp_path}: links to folders are not followed: circle"
    (tmp_path / "circle").unlink()
    assert describe_links(tmp_path, list_tree(tmp_path).folders) == []


def test_left_out_files_are_counted_and_named_in_a_line(tmp_path: Path) -> None:
    (note,) = describe_left_out(tmp_path, list_tree(fill(tmp_path)).left_out)
    assert note == (
        f"{tmp_path}: 11 left out, as their names are not those of pictures: .DS_Store, ._1.png, "
        ".hidden.png, .ipynb_checkpoints, @eaDir and 6 more"
    )
    assert describe_left_out(tmp_path, []) == []
    (note,) = describe_left_out(tmp_path, [tmp_path / "two\nlines"])
    assert note.endswith(r": 'two\nlines'")
