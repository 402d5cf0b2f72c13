"""Images of deploy/Dockerfile, built and run by buildah and podman: as root, without a daemon."""

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

# Kept between runs of the tests: the base and the layers take minutes, and nearly 2 GB.
STORAGE = Path(tempfile.gettempdir()) / "deploy-images"
STORAGE_OPTIONS = ["--storage-driver", "overlay", "--root", f"{STORAGE}/root"]
STORAGE_OPTIONS += ["--runroot", f"{STORAGE}/run"]
# crun and systemd's control groups are not everywhere.
PODMAN = ["podman", *STORAGE_OPTIONS, "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
PODMAN += ["--events-backend", "file"]
BASE = "localhost/base:bookworm"
RESTRICTIONS = ["--network", "host", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
RESTRICTIONS += ["--security-opt", "no-new-privileges"]
RESTRICTIONS += ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]


def require_tools() -> None:
    """Skip the test where a container cannot be built and run."""
    for tool in ("buildah", "podman", "runc", "mmdebstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; Debian has a package of that name")
    if os.getuid() != 0:
        pytest.skip("images are built here as root")


def podman(*arguments: str, check: bool = True) -> str:
    """The output of a podman command, with its standard error."""
    done = subprocess.run(
        [*PODMAN, *arguments],
        cwd=STORAGE,  # where conmon leaves a file named oom
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


@functools.cache
def build(target: str) -> str:
    """Build a stage of deploy/Dockerfile on Debian's Python; the name of the image."""
    require_tools()
    STORAGE.mkdir(exist_ok=True)
    if BASE not in podman("images", "--format", "{{.Repository}}:{{.Tag}}"):
        _import_base()
    image = f"localhost/{target}:test"
    command = ["buildah", *STORAGE_OPTIONS, "bud", "--layers", "--format", "docker"]
    command += ["--network", "host", "--build-arg", f"BASE={BASE}", "--target", target]
    command += ["--tag", image, *_pip_options(), "--file", f"{ROOT}/deploy/Dockerfile", str(ROOT)]
    done = subprocess.run(
        command, env=os.environ | {"BUILDAH_ISOLATION": "chroot"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return image


def size(image: str) -> int:
    """The bytes of an image, with its base."""
    return int(podman("image", "inspect", image, "--format", "{{.Size}}").splitlines()[-1])


def _import_base() -> None:
    archive = STORAGE / "base.tar"
    command = ["mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates"]
    command += ['--aptopt=Acquire::Check-Valid-Until "false"', "bookworm", str(archive)]
    subprocess.run(command, check=True, capture_output=True)
    podman("import", str(archive), BASE)
    archive.unlink()


def _pip_options() -> list[str]:
    """Options of buildah that give pip in a build the settings of pip on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings = dict(re.findall(r"^\S+?\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    names = ("index-url", "find-links", "cert", "default-timeout")
    settings = {name: settings[name] for name in names if name in settings}
    config = STORAGE / "pip.conf"
    config.write_text("\n".join(["[global]", *(f"{a} = {b}" for a, b in settings.items())]))
    local = [path for path in settings.values() if path.startswith("/") and Path(path).exists()]
    mounts = [f"{config}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in local)]
    return [word for mount in mounts for word in ("--volume", mount)]


def free_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def run(image: str, *command: str, options: Sequence[str] = ()) -> Iterator[str]:
    """Start a container with the RESTRICTIONS and these options; its id."""
    output = podman("run", "--detach", *RESTRICTIONS, *options, image, *command)
    container = output.splitlines()[-1]
    try:
        yield container
    finally:
        podman("rm", "--force", "--time", "0", container)


def wait_until_ready(port: int, container: str, path: str = "/ready") -> None:
    """Wait until the server of a container answers 200; fails if the container ends."""
    while True:
        try:
            if request(port, "GET", path)[0] == 200:
                return
        except OSError:
            pass
        status = podman("inspect", container, "--format", "{{.State.Status}}").split()[-1]
        assert status == "running", podman("logs", container)
        time.sleep(0.2)


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body of a response; the body of the request is a picture."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "image/png"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
