"""mnist.predict as a person uses it: answers, pictures in the terminal, errors in one line."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mnist import images, inference, predict, registry
from tests.conftest import ROOT, Done
from tests.test_inference import HEAVY, change

Predict = Callable[..., Done]


@pytest.fixture
def ask(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Predict:
    """`python -m mnist.predict …`, in this process, with the saved model."""
    monkeypatch.setenv("MODELS", str(saved))

    def ask(*arguments: str | Path) -> Done:
        capsys.readouterr()
        return Done(predict.run_cli(list(map(str, arguments))), *capsys.readouterr())

    return ask


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    picture = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(picture).line([(30, 20), (70, 20), (45, 80)], fill=0, width=8)
    picture.save(tmp_path / "7.png")
    return tmp_path / "7.png"


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    return tmp_path / "blank.png"


def test_a_line_says_what_the_model_itself_says(ask: Predict, seven: Path, saved: Path) -> None:
    name, record = registry.record(saved)
    classify = inference.load(saved, name)
    shares = classify(images.normalise(seven.read_bytes())[None])[0]
    best = np.argsort(-shares, kind="stable")[:3]
    likely = ", ".join(f"{record['dataset']['classes'][i]} {shares[i]:.1%}" for i in best)
    done = ask(seven)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{seven}  7  {shares[best[0]]:.1%}  ({likely})")
    assert done.stderr == ""
    assert ask("--model", name, "--models", saved, seven).stdout == done.stdout


def test_an_uncertain_picture_is_marked_not_sure(
    ask: Predict, seven: Path, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    for limit, sets, ending in (
        (-1e9, {}, "%)\n"),
        (0.0, {}, "%)  not sure\n"),
        (-1e9, {"0.999": [1.1, None]}, "%)  not sure\n"),  # an empty set
    ):
        limits = {"uncertain_below": limit, "prediction_sets": sets}
        change(folder, lambda record, to=limits: record["calibration"].update(to))
        assert ask("--models", folder, seven).stdout.endswith(ending)
        (answer,) = json.loads(ask("--models", folder, "--json", seven).stdout)
        assert answer["uncertain"] is (limit == 0)


def test_a_prediction_set_of_several_classes_is_shown(
    ask: Predict, seven: Path, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    (answer,) = json.loads(ask("--models", folder, "--json", seven).stdout)
    first, second, third = answer["top"]
    between = (second[1] + third[1]) / 2
    limits = {"uncertain_below": -1e9, "prediction_sets": {"0.999": [between, None]}}
    change(folder, lambda record: record["calibration"].update(limits))
    (answer,) = json.loads(ask("--models", folder, "--json", seven).stdout)
    assert answer["labels"] == [first[0], second[0]]
    assert ask("--models", folder, seven).stdout.endswith(f"%)  {first[0]} or {second[0]}\n")


def test_json_has_every_file_in_order(ask: Predict, seven: Path, blank: Path) -> None:
    done = ask("--json", "--show", blank, seven)
    first, second = json.loads(done.stdout)
    assert first["filename"] == str(blank)
    assert first["error"]["code"] == "blank"
    assert second["filename"] == str(seven)
    assert second["prediction"] == second["top"][0][0] == "7"
    assert second["probability"] == second["top"][0][1]
    assert len(second["top"]) == 3
    assert done.returncode == 1


def test_an_unreadable_file_gets_a_line_and_the_others_a_prediction(
    ask: Predict, tmp_path: Path, seven: Path, blank: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing.png"
    done = ask(blank, tmp_path / "text.png", missing, tmp_path / "empty", seven)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{seven}  7  ")
    assert done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        *(str(tmp_path / name) for name in ("blank.png", "text.png", "missing.png", "empty"))
    ]
    assert "is blank" in lines[0]
    assert "cannot be read as a picture" in lines[1]
    assert lines[2].endswith("No such file or directory")
    assert lines[3].endswith("no picture is in this folder")


def test_a_name_of_two_lines_gets_one(ask: Predict, tmp_path: Path) -> None:
    (tmp_path / "two\nlines.png").write_text("no picture")
    done = ask(tmp_path)
    assert done.stderr.startswith(rf"predict: {tmp_path}/two\nlines.png: these 10 bytes cannot be")
    assert done.stderr.count("\n") == 1


def test_a_link_to_a_folder_is_named_and_not_followed(
    ask: Predict, tmp_path: Path, seven: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "2024").symlink_to(tmp_path)
    done = ask(tmp_path / "photos", seven)
    assert done.stdout.startswith(f"{seven}  7  ")
    note, empty = done.stderr.splitlines()
    assert note == f"predict: {tmp_path}/photos: links to folders are not followed: 2024"
    assert empty.endswith("no picture is in this folder")


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "\x1b[1A\r", "\x9b2J", "a\nb", "\x7f"])
def test_a_name_does_nothing_to_the_terminal(
    name: str, ask: Predict, tmp_path: Path, seven: Path
) -> None:
    seven.rename(tmp_path / f"{name}.png")
    (tmp_path / f"{name}2.png").write_text("no picture")
    done = ask(tmp_path)
    assert done.stdout.startswith(f"{tmp_path}/{ascii(name)[1:-1]}.png  7  ")
    for output in (done.stdout, done.stderr):
        assert output.endswith("\n")
        assert output[:-1].isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding_of_the_output(
    encoding: str, ask: Predict, tmp_path: Path, seven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["\udcff.png", "été.png", "数 🏆.png"]
    for name in names:
        shutil.copy(seven, tmp_path / name)
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert predict.run_cli(["--json", *(str(tmp_path / name) for name in names)]) == 0
    stream.flush()
    answers = json.loads(stream.buffer.getvalue().decode(encoding))
    assert [Path(answer["filename"]).name for answer in answers] == names


def test_a_folder_stands_for_its_pictures_sorted(ask: Predict, seven: Path) -> None:
    (seven.parent / "c").mkdir()
    for name in ("b.PNG", "a.png", "c/d.png"):
        (seven.parent / name).write_bytes(seven.read_bytes())
    (seven.parent / "notes.txt").write_text("not asked about")
    done = ask(seven.parent)
    assert [Path(line.split("  ")[0]).name for line in done.stdout.splitlines()] == [
        "7.png",
        "a.png",
        "b.PNG",
        "d.png",
    ]
    assert done.returncode == 0


def test_a_folder_s_files_of_the_system_are_left_out_and_counted(ask: Predict, seven: Path) -> None:
    with Image.open(seven) as picture:
        picture.save(seven.parent / "web.jfif", "JPEG")
        picture.save(seven.parent / "scan.pnm", "PPM")
    for name in ("__MACOSX", ".ipynb_checkpoints", "shots.png"):
        (seven.parent / name).mkdir()
    for name in ("._7.png", "__MACOSX/._7.png", ".ipynb_checkpoints/7.png", "Thumbs.db"):
        (seven.parent / name).write_bytes(b"no picture")
    done = ask(seven.parent)
    answered = [line.split("  ")[:2] for line in done.stdout.splitlines()]
    names = ("7.png", "scan.pnm", "web.jfif")
    assert answered == [[str(seven.parent / name), "7"] for name in names]
    assert done.returncode == 0
    assert done.stderr == (
        f"predict: {seven.parent}: 4 left out, as their names are not those of pictures: "
        "._7.png, .ipynb_checkpoints, Thumbs.db, __MACOSX\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'FILES...'"),
        (["--colour", "x.png"], "No such option '--colour'"),
        (["--model", "20200101-000000", "x.png"], "no model '20200101-000000' in"),
        (["--models", "nowhere", "x.png"], "no current model in nowhere"),
    ],
)
def test_wrong_usage_gets_one_line_and_exit_code_2(
    ask: Predict, arguments: list[str], words: str
) -> None:
    done = ask(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("predict: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("channels", [1, 3])
def test_show_draws_two_pixels_a_letter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], channels: int
) -> None:
    picture = np.zeros((channels, 5, 2), np.uint8)
    picture[:, 0, 0] = 255
    picture[0, 1, 0], picture[-1, 1, 1] = 200, 255
    predict.print_picture(picture, sys.stdout)
    plain = capsys.readouterr().out.split("\n")
    assert [len(row) for row in plain] == [2, 2, 2, 0]
    assert plain[0][0] in "▀█"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    predict.print_picture(picture, sys.stdout)
    lower = "200;200;200" if channels == 1 else "200;0;0"
    assert f"\x1b[38;2;255;255;255;48;2;{lower}m▀" in capsys.readouterr().out


def test_plot_is_a_picture_of_all_answers(ask: Predict, seven: Path) -> None:
    done = ask(seven, seven, "--plot", seven.parent / "out.png")
    assert done.returncode == 0, done.stderr
    with Image.open(seven.parent / "out.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 150
    for name, words in (("no/out.png", "there is no folder"), ("out.jpg", "does not end in .png")):
        wrong = ask(seven, "--plot", seven.parent / name)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert words in wrong.stderr


def test_a_closed_output_pipe_prints_no_error(saved: Path, seven: Path) -> None:
    command = [sys.executable, "-m", "mnist.predict", "--models", str(saved)]
    files = [str(seven)] * 200
    with subprocess.Popen(
        [*command, *files], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith(f"{seven}  7  ")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_predictions_need_no_more_than_the_server(seven: Path, saved: Path) -> None:
    code = (
        "import sys; from mnist import predict; predict.run_cli(sys.argv[1:]); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, "--models", str(saved), str(seven)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line, modules = done.stdout.splitlines()
    assert line.startswith(f"{seven}  7  ")
    assert not {*modules.split()} & (HEAVY | {"rich"})


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    ask: Predict, seven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr(predict, "plot_predictions", fail)
    done = ask("--plot", seven.parent / "out.png", seven)
    remedy = "`pip install -r requirements.txt` installs it"
    assert (done.returncode, done.stderr) == (
        1,
        f"predict: matplotlib is not installed; {remedy}\n",
    )
