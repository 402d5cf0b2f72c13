"""The commands, code and answers in README and docs are what there is."""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest
import uvicorn
from fastapi.testclient import TestClient

from mnist import inference, models, registry
from mnist.job.options import make_command
from serve.app import app
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
DOCS.pop("lab-log.md")  # some of its commands are of other times
ALL = "\n".join([README, (ROOT / "CONTRIBUTING.md").read_text(), *DOCS.values()])


def test_the_commands_of_run_py_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_commands_of_other_modules_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # platformdirs warns without it
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "3.png").symlink_to(ROOT / "docs" / "7.png")
    (tmp_path / "photos").mkdir()
    lines = re.findall(r"python -m ((?:mnist|benchmarks|tests)\.[\w.]+)([^\n#`|>]*)", ALL)
    parsed = set()
    for name, rest in lines:
        place = f"{name}.__main__" if name == "mnist.registry" else name
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError:  # of a benchmark, whose libraries are in requirements-dev.txt
            continue
        commands = [value for value in vars(module).values() if isinstance(value, click.Command)]
        if not commands:  # its arguments are files
            continue
        command = next((c for c in commands if isinstance(c, click.Group)), commands[-1])
        arguments = shlex.split(rest)
        context = command.make_context(name, arguments or ["list"] * (name == "mnist.registry"))
        if isinstance(command, click.Group):
            _, inner, arguments = command.resolve_command(context, arguments or ["list"])
            assert inner is not None
            inner.make_context(name, arguments, parent=context)
        parsed.add(name)
    assert {"mnist.predict", "mnist.registry", "tests.soak", "benchmarks.search"} <= parsed


def test_the_commands_of_uvicorn_parse() -> None:
    lines = re.findall(r"(?:^    |`)uvicorn (serve[^\n#`]*)", ALL, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        uvicorn.main.make_context("uvicorn", shlex.split(line))


def test_named_modules_and_files_exist() -> None:
    for module in re.findall(r"python\s-m\s([\w.]+)", ALL):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"-r ([\w.-]+\.txt)", ALL):
        assert (ROOT / name).exists(), name
    tree = DOCS["how-it-works.md"].split("## Map of the code")[1]
    folder = ""
    for indent, name in re.findall(r"^    ( {0,2})(\S+)", tree, re.MULTILINE):
        folder = folder if indent else name
        assert (ROOT / (folder + name if indent else name)).exists(), name


def test_the_python_example_runs(tmp_path: Path) -> None:
    code = DOCS["search.md"].split("```python\n")[1].split("```")[0]
    # scikit-learn's digits and the smallest network instead: seconds, and no files
    quick = code.replace('load("mnist")', 'load("digits")').replace('"parallel"', '"linear"')
    assert quick.count("digits") == quick.count("linear") == 1
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", quick],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "errors of 64" in process.stdout


def test_the_sample_model_gives_the_example_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.loads(re.findall(r"^    (\{\"filename\".*\})$", README, re.MULTILINE)[0])
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    with TestClient(app) as client, (ROOT / "docs" / "7.png").open("rb") as file:
        server_answer = client.post("/predict?top=2", files={"file": file}).json()
    assert list(answer) == list(server_answer)
    tolerance = inference.TOLERANCE["onnx_int8"]
    assert answer.pop("probabilities") == pytest.approx(
        server_answer.pop("probabilities"), abs=tolerance
    )
    assert answer.pop("probability") == pytest.approx(server_answer["probability"], abs=tolerance)
    assert answer.pop("top")[0] == ["7", pytest.approx(server_answer["probability"], abs=tolerance)]
    assert answer == {key: server_answer[key] for key in answer}
