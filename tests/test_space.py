"""mnist.search.space: search spaces, and errors in their entries."""

import inspect
from pathlib import Path

import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from mnist import training
from mnist.search import space


def test_every_hyperparameter_is_a_parameter_of_fit() -> None:
    assert set(space.HYPERPARAMETERS) <= set(inspect.signature(training.fit).parameters)
    for named_space in space.SPACES.values():
        assert set(named_space) <= set(space.HYPERPARAMETERS)


def test_an_entry_is_a_range_a_choice_or_a_value() -> None:
    entries = [
        *("lr=float:1e-4:1e-2:log", "batch_size=int:16:64"),
        *("optimizer=choice:Adam,SGD", "augmentation=0"),
    ]
    assert space.read_space("default", entries) == {
        "batch_size": IntDistribution(16, 64),
        "optimizer": CategoricalDistribution(("Adam", "SGD")),
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "augmentation": CategoricalDistribution((0.0,)),
    }


def test_a_file_is_a_whole_space(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text('lr = "float:1e-4:1e-2:log"\noptimizer = ["Adam", "AdamW"]\ndropout = 0.2\n')
    assert space.read_space(str(file), ["dropout=float:0:0.5"]) == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "optimizer": CategoricalDistribution(("Adam", "AdamW")),
        "dropout": FloatDistribution(0, 0.5),
    }


def test_dropout_is_searched_only_where_there_is_some() -> None:
    assert "dropout" in space.read_space("wide", dropout=True)
    assert "dropout" not in space.read_space("wide", dropout=False)
    assert not {"augment", "mirror"} & set(space.read_space("wide"))
    assert {"augment", "mirror"} <= set(space.read_space("wide", pictures=True))
    assert "mirror" not in space.read_space("wide", pictures=True, mirror=False)
    with pytest.raises(space.SpaceError, match="dropout: the network has no dropout layer"):
        space.read_space("default", ["dropout=0.5"], dropout=False)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("lr", "'lr' is not NAME=SPEC"),
        ("speed=1", "speed: no such hyperparameter; known: batch_size, optimizer"),
        ("lr=float:1:0.1", "lr: 'float:1:0.1': LOW is above HIGH"),
        ("weight_decay=float:0:0.1:log", "weight_decay: 'float:0:0.1:log': log needs LOW above 0"),
        ("lr=float:1e-5:100", "lr: 100 is not in 1e-08 to 10"),
        ("lr=int:1:2", "lr: 'int:1:2' does not fit; float:LOW:HIGH[:log] does"),
        ("batch_size=float:1:2", "batch_size: 'float:1:2' does not fit; int:LOW:HIGH[:log] does"),
        ("batch_size=1.5", "batch_size: '1.5' is not a whole number"),
        ("lr=nan", "lr: nan is not in"),
        ("lr=float:1e-5", "lr: 'float:1e-5' does not fit"),
        ("lr=float:1e-5:1:lug", "lr: 'float:1e-5:1:lug' does not fit"),
        ("optimizer=choice:Adam,Adan", "optimizer: 'Adan' is not one of Adam, AdamW"),
        ("optimizer=float:1:2", "optimizer: 'float:1:2' does not fit; choice:A,B does"),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(entry: str, words: str) -> None:
    with pytest.raises(space.SpaceError) as caught:
        space.read_space("default", [entry])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(space.SpaceError, match=r"wild: neither a space \(default, wide\) nor a"):
        space.read_space("wild")
    broken = tmp_path / "broken.toml"
    broken.write_text("lr = []")
    with pytest.raises(space.SpaceError, match="lr: the list is empty"):
        space.read_space(str(broken))
    for content in ("lr = ", "\x00\xff", ""):
        broken.write_text(content, "latin-1")
        with pytest.raises(space.SpaceError, match=r"broken\.toml") as caught:
            space.read_space(str(broken))
        assert "\n" not in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark_and_have_windows_lines(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_bytes(b'\xef\xbb\xbflr = "0.01"\r\noptimizer = ["Adam"]\r\n')
    assert set(space.read_space(str(file))) == {"lr", "optimizer"}


@pytest.mark.parametrize(
    ("entries", "trials", "combinations"),
    [
        (["batch_size=64", "lr=0.01", "optimizer=Adam"], 2, "one combination for 2 trials"),
        (["batch_size=64", "lr=0.01", "optimizer=Adam"], 1, None),
        (["batch_size=int:1:5", "lr=float:0.1:0.1"], 16, "15 combinations for 16 trials"),
        (["batch_size=int:1:5", "lr=float:0.1:0.1"], 15, None),
        (["batch_size=64", "optimizer=Adam"], 10**6, None),
    ],
)
def test_a_space_with_fewer_combinations_than_trials_causes_a_warning(
    entries: list[str], trials: int, combinations: str | None
) -> None:
    note = space.describe_repeats(space.read_space("default", entries), trials)
    assert note is None if combinations is None else combinations in str(note)


def test_params_outside_a_space_are_left_out() -> None:
    narrow = space.read_space("default", ["lr=float:0.001:0.1", "batch_size=64"])
    first = {"batch_size": 33, "optimizer": "Adam", "lr": 0.00039, "momentum": 0.9}
    assert space.filter_params(narrow, first) == {"optimizer": "Adam"}
    assert space.filter_params(narrow, first | {"lr": 0.01, "batch_size": 64}) == {
        "optimizer": "Adam",
        "lr": 0.01,
        "batch_size": 64,
    }
