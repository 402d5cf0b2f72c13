"""mnist.data.cache: progress while many pictures are read, and the cache."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mnist.data import cache


def test_without_a_terminal_progress_is_plain_lines_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(cache.track_progress([1, 2, 3], "reading")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")  # it was quick
    monkeypatch.setattr(cache, "PLAIN_INTERVAL_S", -1.0)
    assert list(cache.track_progress([1, 2, 3], "reading")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "reading: 0 of 3\nreading: 1 of 3\nreading: 2 of 3\n")


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        cache, "Console", lambda **_: Console(file=stream, force_terminal=True, width=80)
    )
    assert list(cache.track_progress([1, 2, 3], "reading")) == [1, 2, 3]
    assert "100%" in stream.getvalue()


class Counted:
    """Makes images, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> cache.Arrays:
        self.calls += 1
        return np.full((2, 1, 4, 4), self.calls, np.uint8), np.array([0, 1])


def test_the_cache_is_valid_until_files_settings_or_the_recipe_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path, make = tmp_path / "1.png", tmp_path / "cache" / "pictures.npz", Counted()
    file.write_bytes(b"one")

    def read(settings: object = 28) -> int:
        images, labels = cache.load_cached(path, [file], settings, make)
        assert labels.tolist() == [0, 1]
        return int(images.max())

    assert [read(), read()] == [1, 1]
    assert read(settings=32) == 2
    file.write_bytes(b"another")
    assert [read(32), read(32)] == [3, 3]
    os.utime(file, (1, 1))
    assert read(32) == 4
    (tmp_path / "decoding.py").touch()
    monkeypatch.setattr(cache, "_READERS", tmp_path)
    assert read(32) == 5
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_without_a_writable_cache_pictures_are_read_again(tmp_path: Path) -> None:
    make = Counted()
    (tmp_path / "file").touch()
    for _ in range(2):
        cache.load_cached(tmp_path / "file" / "pictures.npz", [], None, make)
    assert make.calls == 2


def test_a_path_is_shown_in_a_terminal_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    assert list(cache.track_progress([1, 2], "reading [/old] :x:")) == [1, 2]
    assert "reading [/old] :x:" in capsys.readouterr().err
