"""mnist.report: a page that opens offline, figures in the dashboard, their maths."""

import base64
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta
from optuna.trial import TrialState, create_trial
from PIL import Image

from mnist import data, registry
from mnist.report import model_plots, page, plots
from mnist.search.space import DEFAULT
from tests.conftest import DIGITS, ROOT, SHORT, Command

ODD = ["<b>bold</b>", "$a$", "お", "a class with a very long name", "{{ 7 }}"]


def make_study(states: str) -> optuna.Study:
    """Make a study with a trial for each letter: complete, pruned, failed or waiting.

    Trial 0 must be complete.
    """
    state_names = dict(zip("cpfw", ("COMPLETE", "PRUNED", "FAIL", "WAITING"), strict=True))
    study, rng = optuna.create_study(direction="maximize"), random.Random(0)
    study.set_user_attr("plan", {"trial_samples": 900})
    for letter in states:
        params = {
            "batch_size": rng.randint(32, 256),
            "optimizer": rng.choice(["Adam", "RMSprop", "SGD"]),
            "lr": 10 ** rng.uniform(-5, -1),
        }
        values = {150: rng.random(), 450: rng.random()} if letter in "cp" else {}
        trial = create_trial(
            state=TrialState[state_names[letter]],
            value=rng.random() if letter in "cp" else None,
            params={} if letter == "w" else params,
            distributions={} if letter == "w" else DEFAULT,
            intermediate_values=values,
            user_attrs={"fail_reason": "nan: the loss is nan"} if letter == "f" else {},
        )
        study.add_trial(trial)
    return study


def make_predictions(
    classes: int, channels: int = 1, n: int = 60, predicted: int | None = None
) -> dict[str, Any]:
    """Make a predictions file; with `predicted`, all images are read as that class."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    probabilities = rng.dirichlet(np.ones(classes), n).astype(np.float32)
    if predicted is not None:
        probabilities = np.eye(classes, dtype=np.float32)[np.full(n, predicted)]
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)[:24]
    images = rng.integers(0, 256, (len(wrong), channels, 28, 28), np.uint8)
    return {"probabilities": probabilities, "labels": labels, "mistakes": wrong, "images": images}


def record(classes: list[str], channels: int = 1, trial: int = 0) -> dict[str, Any]:
    scores = {name: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3} for name in classes}
    test = {"errors": 40, "n": 60, "accuracy": 1 / 3, "interval95": [0.2, 0.5]}
    splits = {"train": 900, "validation": 90, "calibration": 45, "test": 60}
    return {
        "created": "2026-11-21T12:03:01Z",
        "dataset": {"name": "made-up", "classes": classes, "size": 28, "channels": channels}
        | {"splits": splits},
        "model": {"name": "linear", "parameters": 7850},
        "study": {"name": "made-up-linear", "trial": trial, "trials": 9},
        "metrics": {
            "validation": {"mean": 0.5, "std": None, "seeds": 1},
            "test": test | {"per_class": scores},
        },
        "options": {"sampler": "tpe", "pruner": "halving"},
        "quick": False,
        "versions": {"python": "3.11.7"},
        "seed": 0,
        "commit": None,
    }


def extract_pictures(html: str) -> list[Image.Image]:
    encoded_pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(encoded))) for encoded in encoded_pictures]


@pytest.mark.parametrize(
    ("states", "classes", "channels", "predicted"),
    [
        pytest.param("c", ["0", "1"], 1, None, id="one trial, two classes"),
        pytest.param("cc", ["0", "1", "2"], 3, None, id="colour, nothing pruned"),
        pytest.param("cpppp", ODD, 1, None, id="odd names, only the first trial complete"),
        pytest.param("cfpwfc", [f"class {i}" for i in range(47)], 1, None, id="47 classes"),
        pytest.param("cpcf", list("0123456789"), 1, 3, id="one class predicted for all"),
    ],
)
def test_the_page_shows_any_study_and_model(
    states: str, classes: list[str], channels: int, predicted: int | None
) -> None:
    arrays = make_predictions(len(classes), channels, predicted=predicted)
    html = page.render_page(
        page.draw(make_study(states), "20261121-120301", record(classes, channels), arrays)
    )
    assert "40 of 60 test images are misclassified: the accuracy is 33.33%" in html
    assert f"{states.count('c')} trials were completed, {states.count('p')} pruned" in html
    assert ("<li>2 \N{MULTIPLICATION SIGN} nan: the loss is nan" in html) == (
        states.count("f") == 2
    )
    assert "drawn from" in html
    assert "32 to 256, on a log scale" in html
    pictures = extract_pictures(html)
    assert len(pictures) == 7
    assert all(min(picture.size) > 200 for picture in pictures)
    assert len(re.findall(r' alt="[^"]{20,}"', html)) == len(pictures)
    assert html.count("<td>0.2500</td>") == len(classes)
    assert "<script" not in html
    assert not re.search(r"https?://|<b>bold", html)


@pytest.mark.usefixtures("blank_pictures")
def test_importance_is_withheld_below_ten_complete_trials() -> None:
    few = page.draw(make_study("c" * 9 + "pp"), "x", record(["0", "1"]), make_predictions(2))
    enough = page.draw(make_study("c" * 10), "x", record(["0", "1"]), make_predictions(2))
    assert "importance" not in few.study_figures
    assert "Withheld: with 9 complete trials" in page.render_page(few)
    assert "importance" in enough.study_figures
    assert "Withheld" not in page.render_page(enough)


def stretched(*accuracies: float) -> Any:
    """An axis of these accuracies, and the labels of its ticks."""
    axes = Figure().subplots()
    axes.plot(accuracies, "o")
    plots.stretch_accuracy(axes)
    return axes, [label.get_text() for label in axes.get_yticklabels()]


def test_accuracies_near_100_per_cent_are_as_far_apart_as_those_near_chance() -> None:
    axes, labels = stretched(0.1, 0.5, 0.9, 0.99, 1.0, 0.0)
    heights = axes.transAxes.inverted().transform(
        axes.transData.transform([(0, y) for y in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)])
    )[:, 1]
    assert heights[0] > 0.03
    assert heights[-1] < 0.97
    assert heights[3] - heights[2] == pytest.approx(heights[2] - heights[1], rel=1e-3)
    assert heights[4] - heights[3] > 0.8 * (heights[3] - heights[2])
    assert labels == ["100%", "99.9%", "99.5%", "98%", "90%", "50%", "10%", "2%", "0%"]


def test_accuracies_that_are_alike_keep_a_linear_axis() -> None:
    axes, _ = stretched(0.971, 0.975, 0.979)
    assert axes.get_yscale() == "linear"


def test_importance_is_drawn() -> None:
    assert len(plots.render_png(lambda: plots.plot_importance(make_study("c" * 10)))) > 2_000


@pytest.mark.usefixtures("blank_pictures")
def test_a_model_without_mistakes_says_so() -> None:
    right = make_predictions(2, n=4)
    right |= {"probabilities": np.eye(2, dtype=np.float32)[right["labels"]]}
    right |= {"mistakes": np.empty(0, np.int64), "images": np.empty((0, 1, 28, 28), np.uint8)}
    entry = record(["0", "1"])
    entry["metrics"]["test"] |= {"errors": 0}
    drawn = page.draw(make_study("c"), "x", entry, right)
    assert "mistakes" not in drawn.model_figures
    assert "There are none." in page.render_page(drawn)


def test_the_best_trial_is_compared_with_the_first() -> None:
    best = {"number": 4, "params": {"lr": 0.01}, "accuracy": 0.95, "state": "complete"}
    first = {"number": 0, "params": {"lr": 0.1}, "accuracy": 0.9, "state": "complete"}
    assert page.describe_first(best, first) == (
        "The first trial, with lr 0.1, reached 90.00%: 5.00 points less."
    )
    assert page.describe_first(best, first | {"state": "pruned"}).endswith("was pruned at 90.00%.")
    assert page.describe_first(best, best) == "It was the first trial."
    fresh = {"mean": 0.94, "std": 0.01, "seeds": 2}
    assert page.describe_winner(best, fresh).endswith("On 2 fresh seeds it is 94.00% ± 1.00%.")


def test_names_that_a_font_lacks_are_numbers_and_long_ones_are_cut() -> None:
    assert model_plots.printable_names(ODD) == [
        "<b>bold</b>",
        r"\$a\$",
        "#2",
        "a class with …",
        "{{ 7 }}",
    ]


def test_a_run_imports_nothing_that_draws_before_it_draws() -> None:
    code = (
        "import sys, run, mnist.report.page, mnist.predict; "
        "print({'matplotlib', 'jinja2.environment', 'optuna_dashboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done


def artifacts(folder: Path) -> dict[str, int]:
    """Name and time of change of each attached picture."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "artifacts").iterdir()}


def load(folder: Path) -> optuna.Study:
    name = "digits-linear-quick"
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/db.sqlite3")


def list_trial_files(study: optuna.Study, number: int) -> set[str]:
    """List the files that the dashboard shows with a trial."""
    from optuna_dashboard.artifact._backend import list_trial_artifacts

    trial = study.trials[number]
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return {
        artifact["filename"] for artifact in list_trial_artifacts(attrs, trial.system_attrs, trial)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("known_speed")
def test_pictures_are_attached_once_and_replaced_by_those_of_another_model(
    run: Command, tmp_path: Path, digits: data.Dataset
) -> None:
    done = run(*DIGITS, *SHORT, "--trials", "2")
    assert done.returncode == 0, done.stderr
    name, entry = registry.record(tmp_path / "saved_models")
    file_path = tmp_path / "saved_models" / f"{name}.report.html"
    assert f"report: saved_models/{name}.report.html" in done.stdout
    assert len(extract_pictures(file_path.read_text())) == 7
    with np.load(registry.file(tmp_path / "saved_models", name, "predictions")) as file:
        test = digits.open_test()
        assert 0 < len(file["mistakes"]) <= 24
        assert (file["images"] == test.images.numpy()[file["mistakes"]]).all()
        assert (file["probabilities"].argmax(1) != file["labels"])[file["mistakes"]].all()
    made, before = load(tmp_path), artifacts(tmp_path)
    metas = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(made)}
    assert set(metas) == {"history.png", "curves.png", "slice.png", "parallel.png"}
    store = FileSystemArtifactStore(tmp_path / "artifacts")
    download_artifact(
        artifact_store=store, artifact_id=metas["curves.png"], file_path=str(tmp_path / "c.png")
    )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    winner = entry["study"]["trial"]
    model = {"confusion.png", "calibration.png", "mistakes.png"}
    assert list_trial_files(made, winner) == model

    file_path.unlink()
    assert run(*DIGITS, *SHORT, "--trials", "2").stderr == ""
    assert file_path.exists()
    assert artifacts(tmp_path) == before

    more = run(*DIGITS, *SHORT, "--trials", "4", "--final-epochs", "2", "--json")
    last = json.loads(more.stdout)
    assert last["name"] != name
    made, after = load(tmp_path), artifacts(tmp_path)
    assert made.user_attrs["reports"] == [name, last["name"]]
    assert len(get_all_artifact_meta(made)) == 4
    assert all(after[key] > before[key] for key in metas.values())
    assert list_trial_files(made, winner) == list_trial_files(made, last["study"]["trial"]) == model
    from optuna_dashboard import get_note

    note = get_note(made)
    assert "The best batch_size, optimizer and lr for the network linear" in note
    assert f"`saved_models/{last['name']}.report.html`" in note


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures", "known_speed")
def test_a_report_that_cannot_be_made_costs_one_line_and_comes_with_the_next_run(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(page, "draw", broken)
        done = run(*DIGITS, *SHORT)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "run.py: the report could not be made: no ink"
    name, _ = registry.record(tmp_path / "saved_models")
    assert "report:" not in done.stdout
    assert not artifacts(tmp_path)
    assert run(*DIGITS, *SHORT).stderr == ""
    assert (tmp_path / "saved_models" / f"{name}.report.html").exists()
    assert artifacts(tmp_path)


def test_the_report_states_the_gain_over_the_baselines() -> None:
    old = record(["a", "b"])
    assert page.describe_gain(old) is None
    accuracies = {"winner": [0.8, 1.0], "first": [0.5, 0.7], "median": [0.4, 0.4]}
    worth = {name: {"trial": 0, "accuracies": values} for name, values in accuracies.items()}
    new = old | {"study": old["study"] | {"worth": worth}}
    made = page.draw(make_study("cccp"), "name", new, make_predictions(2))
    text = "On the same fresh seeds the winner makes 9 errors of 90 validation images, the first "
    assert f"{text}trial 36, the median trial 54." in page.describe_result(made)
