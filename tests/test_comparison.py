"""mnist.job.comparison: what --model auto and --augment auto choose, and that it stays chosen."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from mnist.job import comparison
from mnist.job.options import Options
from mnist.search import loop
from mnist.search.members import Member
from tests.conftest import SHORT, Command
from tests.test_folders import fill

Trained = list[tuple[str, bool]]
Choose = Callable[[Options], Options]
LOG_LOSSES = {"parallel": 0.3, "residual": 0.2, "compact": 0.4}
UNUSED: Any = None


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The network of each training, and whether it has mirrored images; mirroring helps."""
    trained: Trained = []

    def train_briefly(options: Options, params: dict[str, Any], *_: Any) -> float:
        mirror = params.get("mirror", 0.5) > 0
        trained.append((options.model, mirror))
        return LOG_LOSSES[options.model] - 0.1 * mirror

    monkeypatch.setattr(comparison, "train_briefly", train_briefly)
    return trained


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=1) as member:
        yield member


@pytest.fixture
def choose(member: Member) -> Choose:
    """comparison.choose for one study."""
    return lambda options: comparison.choose(options, member, UNUSED, torch.device("cpu"))


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options for a folder of pictures in color, which need not be many for a comparison."""
    monkeypatch.setattr(comparison, "MIN_VALIDATION_IMAGES", 1)
    root = fill(tmp_path / "pets", {"cat": 12, "dog": 12})
    return Options(dataset=f"folder:{root}", model="auto", color=True, data_dir=tmp_path / "data")


def test_the_network_of_the_lowest_log_loss_wins_and_then_mirroring_is_compared(
    choose: Choose, pets: Options, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(pets) == replace(pets, model="residual", study="pets-auto")
    assert pets.study_name == "pets-auto"
    networks = [(name, True) for name in ("parallel", "residual", "compact")]
    assert trained == [*networks, ("residual", False), ("residual", True)]
    assert "networks, 15 s each: compact, log-loss 0.300" in capsys.readouterr().err


def test_images_are_not_mirrored_where_that_is_worse(
    choose: Choose, pets: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        comparison, "train_briefly", lambda _, params, *__: params.get("mirror", 0.5)
    )
    assert choose(replace(pets, model="cnn")).param == ("mirror=0",)


def test_a_study_keeps_its_choice(choose: Choose, pets: Options, trained: Trained) -> None:
    chosen = choose(pets)
    trained.clear()
    assert choose(pets) == chosen
    assert trained == []


def test_named_ones_are_not_compared(choose: Choose, pets: Options, trained: Trained) -> None:
    cnn = replace(pets, model="cnn")
    for named in (
        replace(cnn, augment="photo"),
        replace(cnn, param=("lr=0.1", "mirror = 0.2")),
        replace(cnn, param=("augment=none",)),
        replace(cnn, space="wide"),
        replace(cnn, quick=True),
    ):
        assert choose(named) == named
    assert choose(Options()) == Options()  # a data set with a name has a kind
    assert trained == []


def test_a_network_with_too_many_weights_is_no_candidate(
    choose: Choose, pets: Options, trained: Trained
) -> None:
    choose(replace(pets, image_size=96, augment="none"))
    assert [name for name, _ in trained] == ["residual", "compact"]


def test_a_large_folder_is_mirrored_without_a_comparison(
    choose: Choose, pets: Options, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_IMAGES", 10)
    assert choose(replace(pets, model="cnn")).param == ()
    assert trained == []


def test_a_study_from_before_comparisons_goes_on_as_it_was(
    choose: Choose, member: Member, pets: Options, trained: Trained
) -> None:
    member.run_locked(lambda study: study.set_user_attr("plan", {}))
    assert choose(replace(pets, model="cnn")) == replace(pets, model="cnn")
    assert trained == []


def test_few_pictures_are_not_compared(
    choose: Choose,
    pets: Options,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(comparison, "MIN_VALIDATION_IMAGES", 100)
    few = choose(replace(pets, image_size=96))  # too large for `parallel`
    assert (few.model, few.param, trained) == ("residual", ("mirror=0",), [])
    reason = "skipped, as 2 validation images are fewer than 100; chosen:"
    assert capsys.readouterr().err == (
        f"comparing networks: {reason} residual\ncomparing mirrored images: {reason} without\n"
    )


def test_candidates_that_cannot_be_trained_are_left_out(
    choose: Choose,
    pets: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: Options, *_: Any) -> float:
        if options.model == "compact":
            return 1.0
        if options.model == "parallel":
            raise click.UsageError("too large")
        raise loop.RunFailed("MemoryError: made up")

    monkeypatch.setattr(comparison, "train_briefly", fail)
    assert choose(replace(pets, augment="none")).model == "compact"
    printed = capsys.readouterr().err
    assert "parallel, left out: too large" in printed
    assert "residual, left out: MemoryError: made up" in printed


def test_without_any_network_the_remedy_is_named(
    choose: Choose, pets: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise loop.RunFailed("MemoryError: made up")

    monkeypatch.setattr(comparison, "train_briefly", fail)
    with pytest.raises(
        click.UsageError, match="none of parallel, residual, compact can be trained"
    ):
        choose(pets)


def test_a_candidate_that_the_search_space_does_not_suit_is_left_out(
    pets: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = {"residual": (replace(pets, model="residual", param=("dropout=0.2",)), {})}
    chosen = comparison.compare("networks", choice, 100, UNUSED, torch.device("cpu"))
    assert chosen == comparison.Choice(None, {})
    assert (
        "residual, left out: dropout: the network has no dropout layer" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("known_speed", "blank_pictures")
def test_a_study_of_the_chosen_network_is_saved_and_found_again(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "COMPARE_S", 0.2)
    monkeypatch.setattr(comparison, "CANDIDATES", ("linear", "cnn"))  # small ones, for speed
    command = ["--dataset", "digits", "--model", "auto", *SHORT, "--json"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["study"]["name"] == "digits-auto"
    assert result["model"]["name"] in comparison.CANDIDATES
    assert result["options"]["model"] == result["model"]["name"]
    again = run(*command)
    assert json.loads(again.stdout)["name"] == result["name"]
    assert "comparing" not in again.stderr
