"""mnist.report.compare: whether two models differ by more than noise."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from mnist import registry
from mnist.report import compare
from tests.test_registry import entry


def make_predictions(wrong: range, n: int = 100) -> bytes:
    """Make the predictions of two classes; the images in `wrong` are misclassified."""
    labels = np.zeros(n, np.int64)
    is_wrong = np.isin(np.arange(n), wrong)
    stream = io.BytesIO()
    probabilities = np.stack([~is_wrong, is_wrong], 1).astype(np.float32)
    np.savez(stream, probabilities=probabilities, labels=labels)
    return stream.getvalue()


def save(folder: Path, wrong: range) -> str:
    files = {"weights": (".pth", b"weights"), "predictions": (".test.npz", make_predictions(wrong))}
    return registry.save(folder, files, entry(), "always")


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (range(10), range(10), 1.0),  # the same images
        (range(10), range(10, 20), 1.0),  # as many others
        (range(0), range(5), 2 / 2**5),  # 0 against 5: both tails of five throws of a coin
        (range(8, 10), range(2, 9), 2 * (1 + 7) / 2**7),  # 1 against 6
    ],
)
def test_the_p_value_is_that_of_a_coin_toss_for_each_image_that_only_one_model_got_wrong(
    tmp_path: Path, one: range, other: range, p: float
) -> None:
    names = save(tmp_path, one), save(tmp_path, other)
    assert compare.mcnemar_p(tmp_path, *names) == pytest.approx(p)


def save_worse_copy(folder: Path, more: int) -> str:
    """Save the current model once more, with `more` test errors added, not as the current one."""
    name, record = registry.record(folder)
    files = {
        kind: (part["file"].removeprefix(name), (folder / part["file"]).read_bytes())
        for kind, part in record["files"].items()
    }
    with np.load(io.BytesIO(files["predictions"][1])) as file:
        parts = dict(file)
    right = np.flatnonzero(parts["probabilities"].argmax(1) == parts["labels"])[:more]
    parts["probabilities"][right] = np.roll(parts["probabilities"][right], 1, 1)
    stream = io.BytesIO()
    np.savez(stream, **parts)
    files["predictions"] = (".test.npz", stream.getvalue())
    test = record["metrics"]["test"]
    test |= {"errors": test["errors"] + more}
    return registry.save(folder, files, record, "never")


@pytest.mark.parametrize(
    ("more", "p", "verdict"),
    [(1, 1.0, "no significant difference (p 1.00)"), (6, 2 / 2**6, "worse (p 0.03)")],
)
def test_a_row_has_the_values_of_the_record_and_a_comparison_with_the_best(
    saved: Path, tmp_path: Path, more: int, p: float, verdict: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    best, record = registry.record(folder)
    worse = save_worse_copy(folder, more)
    rows = compare.compare_models(folder, [worse, best])
    assert [row.name for row in rows] == [best, worse]
    assert [row.p for row in rows] == [None, pytest.approx(p)]
    assert [compare.describe_verdict(row) for row in rows] == ["best", verdict]
    errors = record["metrics"]["test"]["errors"]
    assert [row.errors for row in rows] == [errors, errors + more]
    assert rows[0].parameters == record["model"]["parameters"]
    assert rows[0].bytes == record["files"]["onnx_int8"]["bytes"]
    page = compare.render_page(rows)
    for text in (best, worse, verdict, f"{errors + more} of {rows[0].n}"):
        assert text in page


def test_p_values_are_multiplied_by_the_number_of_comparisons(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    names = [registry.record(folder)[0], save_worse_copy(folder, 6), save_worse_copy(folder, 7)]
    assert [row.p for row in compare.compare_models(folder, names)] == [
        None,
        pytest.approx(2 * 2 / 2**6),
        pytest.approx(2 * 2 / 2**7),
    ]
