"""mnist.data.folders: a folder of pictures as a data set, and what is wrong with one."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist import data, images
from mnist.data import folders
from mnist.search import study as studies
from tests.hostile import png

COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200), "emu": (30, 200, 30)}


def fill(
    root: Path, numbers: dict[str, int], size: tuple[int, int] = (40, 30), colour: bool = True
) -> Path:
    """A folder of noisy little pictures, of a colour for each class, in several formats."""
    random = np.random.default_rng(0)
    for name, n in numbers.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            level = np.array(COLOURS.get(name, (128, 128, 128)))
            noise = random.normal(level, 20, (*size[::-1], 3)).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(noise if colour else noise[..., 0])
            picture.save(root / name / f"{i:03}.{('png', 'jpg', 'webp')[i % 3]}")
    return root


@pytest.fixture(autouse=True)
def _new_process() -> None:
    """Warnings are given once a process."""
    folders._warn.cache_clear()


def load(root: Path, **settings: object) -> data.Dataset:
    """With the cache beside the folder."""
    return data.load(f"folder:{root}", root.parent / "data", **settings)  # type: ignore[arg-type]


def problem(root: Path) -> str:
    with pytest.raises(data.DataError) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_pictures_is_a_data_set_of_its_name(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"dog": 30, "cat": 20, ".hidden": 3})
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    dataset = load(root)
    assert (dataset.name, dataset.classes) == ("folder:pets", ("cat", "dog"))
    assert (dataset.size, dataset.channels, dataset.recipe) == (28, 1, "plain")
    parts = [dataset.train, dataset.validation, dataset.calibration, dataset.open_test()]
    assert sum(map(len, parts)) == 50
    rows = [row.numpy().tobytes() for part in parts for row in part.images]
    assert len(set(rows)) == 50
    for part in parts:
        assert set(part.labels.tolist()) == {0, 1}
    assert len(parts[-1]) == 7  # a seventh


def test_pictures_equal_those_that_the_server_reads_from_the_same_files(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 12, "dog": 12})
    dataset = load(root, image_size=20, color=True)
    assert dataset.train.images.shape[1:] == (3, 20, 20)
    served = {
        images.normalise(path.read_bytes(), size=20, channels=3, recipe="plain").tobytes()
        for path in root.rglob("*.*")
    }
    read = {row.numpy().tobytes() for row in dataset.train.images}
    assert len(read) == len(dataset.train)
    assert read <= served


def test_train_and_test_folders_are_used(tmp_path: Path) -> None:
    fill(tmp_path / "pets" / "train", {"cat": 20, "dog": 15})
    fill(tmp_path / "pets" / "test", {"cat": 2, "dog": 1})
    dataset = load(tmp_path / "pets")
    assert len(dataset.train + dataset.validation + dataset.calibration) == 35
    assert dataset.open_test().labels.tolist() == [0, 0, 1]
    shutil.rmtree(tmp_path / "pets" / "test" / "dog")
    assert "train/ and test/ must have the same classes; only one has dog" in problem(
        tmp_path / "pets"
    )


def test_folders_called_train_and_test_may_be_classes(tmp_path: Path) -> None:
    assert load(fill(tmp_path / "rail", {"train": 12, "test": 12})).classes == ("test", "train")


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("Train", "test")])
def test_parts_may_have_other_names(
    train: str, test: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "pets" / train, {"cat": 20, "dog": 15})
    fill(tmp_path / "pets" / test, {"cat": 2, "dog": 1})
    fill(tmp_path / "pets" / "valid", {"cat": 2, "dog": 2})
    dataset = load(tmp_path / "pets")
    assert len(dataset.train + dataset.validation + dataset.calibration) == 35
    assert dataset.open_test().labels.tolist() == [0, 0, 1]
    assert f"only {train}/ and {test}/ are used, not valid" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("training", "val"), "has a training/ with classes but no test/ with the same ones; "
         "rename val/ to test/"),
        (("train", "validation"), "rename validation/ to test/"),
        (("testing", "valid"), "has a testing/ with classes but no train/ with the same ones"),
        (("train", "training", "test"), "has train/ and training/, both with classes"),
        (("train", "test", "testing"), "has test/ and testing/, both with classes"),
    ],
)  # fmt: skip
def test_ambiguous_parts_are_refused(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in names:
        fill(tmp_path / "pets" / name, {"cat": 10, "dog": 10})
    text = problem(tmp_path / "pets")
    assert words in text
    assert "remove" not in text


def test_a_folder_with_pictures_is_never_to_be_removed(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 10, "dog": 10, "emu/young": 3})
    text = problem(root)
    assert "class 'emu' has 0 pictures directly in its folder" in text
    assert "but 3 in folders below it (emu/young" in text
    assert f"put them into {root / 'emu'}" in text
    shutil.move(root / "emu" / "young" / "000.png", root / "emu")
    text = problem(root)
    assert f"or move that folder out of {root}" in text
    assert "remove" not in text


def test_pictures_without_an_ending_are_no_reason_to_remove_their_folder(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 10, "dog": 10})
    for path in (root / "dog").iterdir():
        path.rename(path.with_suffix(""))
    text = problem(root)
    assert "class 'dog' has 0 pictures (10 files have other endings, such as dog/000); at" in text
    assert "remove" not in text


def test_names_of_classes_are_the_same_in_every_unicode_form(tmp_path: Path) -> None:
    fill(tmp_path / "food" / "train", {"pâté": 20, "plain": 15})
    fill(tmp_path / "food" / "test", {"pa\u0302te\u0301": 2, "plain": 1})
    dataset = load(tmp_path / "food")
    assert dataset.classes == ("plain", "pâté")
    assert dataset.open_test().labels.tolist() == [0, 1, 1]
    fill(tmp_path / "food" / "train", {"pa\u0302te\u0301": 5})
    dataset = load(tmp_path / "food")
    assert len(dataset.train + dataset.validation + dataset.calibration) == 40


def test_the_same_picture_in_two_classes_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "pets", {"cat": 20, "dog": 20, "emu": 20})
    for i in range(3):
        shutil.copy(root / "cat" / f"{3 * i:03}.png", root / "dog" / f"copy{i}.png")
    load(root)
    text = "6 of 63 pictures are in more than one class, with the same pixels, such as "
    assert caplog.text.count(text) == 1
    assert "cat/00" in caplog.text
    assert "and dog/copy" in caplog.text or "such as dog/copy" in caplog.text
    caplog.clear()
    folders._warn.cache_clear()
    load(root)  # from the cache
    assert text in caplog.text


def test_test_pictures_among_the_training_pictures_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "pets"
    fill(root / "train", {"cat": 20, "dog": 20})
    fill(root / "test", {"cat": 3, "dog": 3}, size=(30, 40))
    load(root)
    assert "same pixels" not in caplog.text
    shutil.copy(root / "train" / "cat" / "006.png", root / "test" / "cat" / "seen.png")
    dataset = load(root)
    dataset.open_test()
    text = "1 of 7 test pictures are training pictures, too, with the same pixels, such as "
    assert caplog.text.count(f"{text}test/cat/seen.png and train/cat/006.png") == 1


def test_a_picture_in_both_parts_of_a_random_split_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "pets", {"cat": 20, "dog": 20})
    for file in sorted((root / "cat").glob("*.png")):
        shutil.copy(file, root / "cat" / f"copy-{file.name}")
    load(root)
    assert "test pictures are training pictures, too" in caplog.text
    assert "more than one class" not in caplog.text


def test_a_train_folder_without_a_test_folder_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets" / "train", {"cat": 10, "dog": 10}).parent
    fill(root / "val", {"cat": 10, "dog": 10})
    assert "has a train/ with classes but no test/" in problem(root)


def test_a_class_that_is_renamed_makes_another_study(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 12, "dgo": 12})
    before = studies.fingerprint(load(root), "linear", 100)
    (root / "dgo").rename(root / "dog")
    assert load(root).sha256[:16] == before["data"]
    assert studies.fingerprint(load(root), "linear", 100) != before


def test_names_that_are_not_utf_8_are_read_or_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 12, "dog": 12})
    (root / "cat" / "000.png").rename(root / "cat" / os.fsdecode(b"k\xe4se.png"))
    assert len(load(root).classes) == 2
    (root / "dog").rename(root / os.fsdecode(b"k\xe4se"))
    assert "has a name that is not UTF-8" in problem(root)
    (root / os.fsdecode(b"k\xe4se")).rename(root / "two\nlines")
    assert r"'two\nlines' has a control character in its name" in problem(root)


def test_the_same_pictures_have_the_same_checksum_wherever_they_lie(tmp_path: Path) -> None:
    one = load(fill(tmp_path / "a" / "pets", {"cat": 12, "dog": 12}))
    other = load(fill(tmp_path / "b" / "pets", {"cat": 12, "dog": 12}))
    assert (one.sha256, one.split_sha256) == (other.sha256, other.split_sha256)
    changed = tmp_path / "b" / "pets" / "cat" / "000.png"
    Image.effect_noise((40, 30), 50).save(changed)
    assert load(tmp_path / "b" / "pets").sha256 != one.sha256


def test_pictures_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "pets", {"cat": 12, "dog": 12})
    first = load(root)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a picture was read again")

    monkeypatch.setattr(folders.pictures, "normalise", never)
    assert load(root).sha256 == first.sha256
    with pytest.raises(AssertionError):
        load(root, image_size=20)
    (cache,) = (tmp_path / "data" / "folders").glob("*.npz")
    cache.write_bytes(b"damaged")
    with pytest.raises(AssertionError):
        load(root)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"cat": 3, "dog": 20}, "class 'cat' has 3 pictures; at least 10 are needed: add some to"),
        ({"cat": 20, "dog": 0}, "class 'dog' has 0 pictures"),
        ({"cat": 20}, "has only one class, 'cat'; at least two are needed"),
        ({".cat": 20}, "has no class folders; put the pictures of each class into one"),
    ],
)
def test_an_unusable_folder_gets_one_line(
    numbers: dict[str, int], words: str, tmp_path: Path
) -> None:
    assert words in problem(fill(tmp_path / "pets", numbers))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "pets") == f"there is no folder {tmp_path / 'pets'}"


@pytest.mark.parametrize("color", [False, True])
def test_a_few_unreadable_files_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, color: bool
) -> None:
    root = fill(tmp_path / "pets", {"cat": 20, "dog": 20})
    (root / "cat" / "broken.png").write_bytes(b"no picture")
    (root / "dog" / "blank.png").write_bytes(png(60_000, 60_000, b"")[:-20])
    dataset = load(root, color=color)
    assert len(dataset.train + dataset.validation + dataset.calibration + dataset.open_test()) == 40
    text = (
        "2 of 42 files cannot be used as pictures (1 unreadable, 1 too large), and are left out: "
    )
    assert caplog.text.count(text + "cat/broken.png, dog/blank.png") == 1
    caplog.clear()
    folders._warn.cache_clear()
    load(root, color=color)  # from the cache
    assert text in caplog.text


def test_ignored_files_and_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "outer" / "pets", {"cat": 20, "dog": 20}, colour=False)
    fill(root / "cat", {"young": 2}, colour=False)
    (root / "cat" / "000.png").rename(root / "stray.png")
    data.load(f"folder:{root}", tmp_path)
    assert "files next to the class folders are not read: stray.png" in caplog.text
    assert "folders in class folders are not read: cat/young" in caplog.text
    assert f"are the classes those in {root}?" in problem(root.parent)


def test_files_and_folders_of_the_system_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "pets", {"cat": 20, "dog": 20, "__MACOSX/cat": 3, "@eaDir": 3})
    for name in ("cat/Thumbs.db", "cat/desktop.ini", "dog/._000.png", "dog/notes.txt"):
        (root / name).write_bytes(b"no picture")
    (root / "cat" / "001.jpg").rename(root / "cat" / "001.jfif")
    fill(root / "cat" / "shots.png", {"young": 1})
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train + dataset.validation + dataset.calibration + dataset.open_test()) == 40
    note = "6 left out, as their names are not those of pictures: @eaDir, __MACOSX, "
    assert f"{root}: {note}" in caplog.text
    assert "folders in class folders are not read: cat/shots.png" in caplog.text
    assert "cannot be used" not in caplog.text


def test_a_class_that_is_mostly_unreadable_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"cat": 20, "dog": 20})
    for path in sorted((root / "cat").iterdir())[:11]:
        path.write_bytes(b"damaged")
    text = problem(root)
    assert "class 'cat': 11 of 20 files cannot be used (000.png: these 7 bytes" in text
    assert "repair or remove them" in text


def test_lost_detail_and_colour_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(fill(tmp_path / "small", {"cat": 20, "dog": 20}, colour=False))
    assert caplog.text == ""
    load(fill(tmp_path / "colour", {"cat": 20, "dog": 20}))
    assert "are colourful and are read as grey; --color" in caplog.text
    caplog.clear()
    load(tmp_path / "colour", color=True)
    assert caplog.text == ""
    load(fill(tmp_path / "large", {"cat": 10, "dog": 10}, (150, 90), colour=False))
    assert "typically 150 pixels long and are read at 28" in caplog.text
    assert "a larger --image-size" in caplog.text


def test_a_rare_class_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = load(fill(tmp_path / "pets", {"cat": 200, "dog": 10}, (9, 9), colour=False))
    assert "class 'cat' has 200 pictures, 'dog' only 10" in caplog.text
    for part in (dataset.train, dataset.validation, dataset.calibration, dataset.open_test()):
        assert set(part.labels.tolist()) == {0, 1}


def test_size_and_color_are_refused_for_other_data_sets() -> None:
    for settings in ({"image_size": 20}, {"color": True}):
        with pytest.raises(ValueError, match="are only for folder:PATH, not for digits"):
            data.load("digits", **settings)  # type: ignore[arg-type]
