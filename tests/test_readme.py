"""The commands, code and answers in README and docs are what there is."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from mnist import models
from mnist.job.options import make_command
from serve.app import app
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
DOCS.pop("lab-log.md")  # some of its commands are of other times
ALL = "\n".join([README, (ROOT / "CONTRIBUTING.md").read_text(), *DOCS.values()])


def test_run_s_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()  # the folder of pictures
    network = re.search(r"    from torch import nn\n(    .*\n|\n)*", DOCS["your-data.md"])
    assert network
    (tmp_path / "mine.py").write_text(textwrap.dedent(network[0]))
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    commands = re.findall(r"python (run\.py[^\n#`]*)", ALL)
    commands = [line for line in commands if "--help" not in line and "…" not in line]
    assert len(commands) >= 6
    for line in commands:
        name, *options = shlex.split(line)
        make_command(lambda options: None).make_context(name, options)


def test_modules_and_files_it_names_exist() -> None:
    for module in re.findall(r"python\s-m\s([\w.]+)", ALL):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"-r ([\w.-]+\.txt)", ALL):
        assert (ROOT / name).exists(), name
    tree = DOCS["how-it-works.md"].split("## Map of the code")[1]
    folder = ""
    for indent, name in re.findall(r"^    ( {0,2})(\S+)", tree, re.MULTILINE):
        folder = folder if indent else name
        assert (ROOT / (folder + name if indent else name)).exists(), name


def test_the_lines_of_python_run(tmp_path: Path) -> None:
    code = DOCS["search.md"].split("```python\n")[1].split("```")[0]
    # scikit-learn's digits and the smallest network instead: seconds, and no files
    quick = code.replace('load("mnist")', 'load("digits")').replace('"parallel"', '"linear"')
    assert quick.count("digits") == quick.count("linear") == 1
    picture = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(picture).line([(30, 20), (70, 20), (45, 80)], fill=0, width=8)
    picture.save(tmp_path / "3.png")
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", quick],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "errors of 64" in process.stdout


def test_its_answer_is_what_the_server_gives(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.loads(re.findall(r"^    (\{\"filename\".*\})$", README, re.MULTILINE)[0])
    monkeypatch.setenv("MODELS", str(saved))
    picture = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(picture).line([(30, 20), (70, 20), (45, 80)], fill=0, width=8)
    picture.save(saved.parent / "7.png")
    with TestClient(app) as client, (saved.parent / "7.png").open("rb") as file:
        server_answer = client.post("/predict", files={"file": file}).json()
    assert list(answer) == list(server_answer)
    assert list(answer["probabilities"]) == list(server_answer["probabilities"])
    assert (answer["filename"], answer["prediction"]) == ("7.png", "7")
    assert answer["top"][0] == [answer["prediction"], answer["probability"]]
    assert {type(value) for value in answer.values()} == {
        type(value) for value in server_answer.values()
    }
