"""deploy/Dockerfile: the images are built, run with restrictions, and stopped."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fastapi.testclient import TestClient

from mnist import registry
from serve.app import app
from tests import containers
from tests.conftest import ROOT

pytestmark = pytest.mark.deploy

PICTURE = (ROOT / "docs" / "7.png").read_bytes()
MAX_MB = 340  # beyond the base; OpenCV has 160 of it
MEMORY_MB = 512


class Server(NamedTuple):
    container: str
    port: int


@pytest.fixture
def server() -> Iterator[Server]:
    """The image `serve` in a container of MEMORY_MB, ready to answer on the loopback interface."""
    port = containers.free_port()
    options = ["--memory", f"{MEMORY_MB}m", "--env", "UVICORN_HOST=127.0.0.1"]
    options += ["--env", f"UVICORN_PORT={port}"]
    with containers.run(containers.build("serve"), options=options) as container:
        containers.wait_until_ready(port, container)
        yield Server(container, port)


def test_the_dockerfile_follows_the_rules_of_hadolint() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed; it is in requirements-dev.txt")
    done = subprocess.run(
        ["hadolint", ROOT / "deploy" / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_image_of_the_server_has_what_it_needs_and_no_more() -> None:
    image = containers.build("serve")
    added = containers.size(image) - containers.size(containers.BASE)
    assert added / 1e6 < MAX_MB
    unwanted = ["*.pyc", "*/pip", "*/pip3*", "*/torch", "/app/*.pth", "/app/tests*"]
    tests = " -o ".join(f"-path {name}" for name in unwanted).split()
    command = ["find", "/app", "/venv", "/usr/local", *tests]
    with containers.run(image, *command) as container:
        containers.podman("wait", container)
        assert containers.podman("logs", container) == ""


def test_the_server_answers_within_its_restrictions(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    with TestClient(app) as client:
        direct = client.post("/predict", content=PICTURE, headers={"Content-Type": "image/png"})
    status, body = containers.request(server.port, "POST", "/predict", PICTURE)
    assert (status, json.loads(body)) == (200, direct.json())
    containers.podman("healthcheck", "run", server.container)  # fails if unhealthy
    assert containers.podman("exec", server.container, "id", "-u").split()[-1] == "10001"
    for folder in ("/app", "/venv", "/"):
        refusal = containers.podman("exec", server.container, "touch", f"{folder}/x", check=False)
        assert "Read-only file system" in refusal
    allocate = f"len(b'x' * {MEMORY_MB} * 2**20)"
    command = ["exec", server.container, "python", "-c", allocate]
    containers.podman(*command[:-1], "len(b'x' * 100 * 2**20)")
    with pytest.raises(AssertionError):
        containers.podman(*command)
    assert containers.request(server.port, "POST", "/predict", PICTURE)[0] == 200


def test_sigterm_lets_a_request_in_progress_finish(server: Server) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PICTURE)}\r\n"
    head += "Content-Type: image/png\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # the request is in progress
        containers.podman("kill", "--signal", "TERM", server.container)
        while True:  # until the server takes no more connections
            try:
                socket.create_connection(("127.0.0.1", server.port), 60).close()
            except (ConnectionRefusedError, ConnectionResetError):
                break
        connection.sendall(PICTURE)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
    assert containers.podman("wait", server.container).splitlines()[-1] == "0"
    assert "Application shutdown complete" in containers.podman("logs", server.container)


def test_a_container_without_a_model_is_unhealthy() -> None:
    port = containers.free_port()
    options = ["--env", "UVICORN_HOST=127.0.0.1", "--env", f"UVICORN_PORT={port}"]
    options += ["--env", "MODELS=/app/saved_models"]
    with containers.run(containers.build("serve"), options=options) as container:
        containers.wait_until_ready(port, container, "/health")
        assert containers.request(port, "GET", "/ready")[0] == 503
        with pytest.raises(AssertionError):
            containers.podman("healthcheck", "run", container)


def test_the_server_answers_with_the_model_of_a_search_in_a_container(tmp_path: Path) -> None:
    models = tmp_path / "saved_models"
    models.mkdir()
    os.chown(models, 10001, 10001)
    volume = f"{models}:/app/saved_models"
    command = ["python", "run.py", "--quick", "--dataset", "digits", "--json"]
    command += ["--storage", "sqlite:////tmp/db.sqlite3", "--artifacts", "/tmp/artifacts"]
    options = ["--volume", volume, "--workdir", "/tmp", "--memory", "4g"]
    command[1] = "/app/run.py"
    command += ["--output", "/app/saved_models"]
    with containers.run(containers.build("search"), *command, options=options) as container:
        status = containers.podman("wait", container).splitlines()[-1]
        assert status == "0", containers.podman("logs", container)
    name = registry.record(models)[0]
    port = containers.free_port()
    options = ["--volume", f"{volume}:ro", "--env", "UVICORN_HOST=127.0.0.1"]
    options += ["--env", f"UVICORN_PORT={port}"]
    with containers.run(containers.build("serve"), options=options) as container:
        containers.wait_until_ready(port, container)
        assert json.loads(containers.request(port, "GET", "/ready")[1])["model"] == name


def test_sagemaker_starts_the_image_with_its_own_command() -> None:
    port = containers.free_port()
    command = ["serve", "--host", "127.0.0.1", "--port", str(port)]  # by default any host, 8080
    options = ["--env", "MODELS=serve/sample_model"]
    with containers.run(containers.build("serve"), *command, options=options) as container:
        containers.wait_until_ready(port, container)
        assert containers.request(port, "GET", "/ping")[0] == 200
        status, body = containers.request(port, "POST", "/invocations", PICTURE)
        assert (status, json.loads(body)["prediction"]) == (200, "7")
