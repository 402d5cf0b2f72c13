"""deploy/nginx/serve.conf in a real nginx, with a self-signed certificate, on loopback."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mnist import registry
from tests.conftest import ROOT
from tests.gates import until

pytestmark = pytest.mark.deploy

PICTURE = (ROOT / "docs/7.png").read_bytes()
FRAME = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  include {folder}/serve.conf;
}}
"""


class Site(NamedTuple):
    """The ports of nginx and of the server, the certificate, and the server's process."""

    tls: int
    plain: int
    context: ssl.SSLContext
    server: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def reachable(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """nginx in front of a server that admits one request at a time."""
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt-get install nginx-light openssl")
    tls, plain = free_port(), free_port()
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*command, "-nodes", *names, *files], check=True, capture_output=True)
    text = (ROOT / "deploy/nginx/serve.conf").read_text()
    for old, new in {
        "listen 443": f"listen 127.0.0.1:{tls}",
        "127.0.0.1:8000": f"127.0.0.1:{plain}",
        "/etc/nginx/tls/": f"{tmp_path}/",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "serve.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(FRAME.format(folder=tmp_path))
    variables = {"MODELS": str(registry.SAMPLE), "MAX_QUEUE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "serve.app:app", "--port", str(plain)],
        cwd=ROOT, env=os.environ | variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
    try:
        until(lambda: reachable(tls) and reachable(plain), "nginx and the server listen")
        context = ssl.create_default_context(cafile=str(tmp_path / "tls.crt"))
        yield Site(tls, plain, context, server)
    finally:
        for process in (nginx, server):
            process.terminate()
            process.wait()


def ask(connection: http.client.HTTPConnection, *request: Any) -> tuple[int, Any]:
    """The status and the answer, from a connection of its own."""
    with contextlib.closing(connection):
        connection.request(*request)
        response = connection.getresponse()
        text = response.read()
    return response.status, json.loads(text) if text.startswith(b"{") else text


def by_tls(site: Site) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("localhost", site.tls, context=site.context)


def begin_upload(connection: http.client.HTTPConnection) -> None:
    """Send the head of a request and half of its picture."""
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(len(PICTURE)))
    connection.endheaders(PICTURE[: len(PICTURE) // 2])


def test_a_slow_upload_does_not_occupy_the_server(site: Site) -> None:
    request = ("POST", "/predict", PICTURE, {"Content-Type": "image/png"})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.plain)) as slow:
        begin_upload(slow)  # without nginx, it takes the only place
        until(lambda: ask(by_tls(site), *request)[0] == 429, "the upload occupies the server")
    until(lambda: ask(by_tls(site), *request)[0] == 200, "the server is free again")
    with contextlib.closing(by_tls(site)) as slow:
        begin_upload(slow)
        for _ in range(20):
            status, answer = ask(by_tls(site), *request)
            assert (status, answer["prediction"]) == (200, "7")
        slow.send(PICTURE[len(PICTURE) // 2 :])
        response = slow.getresponse()
        assert (response.status, json.load(response)["prediction"]) == (200, "7")


def test_errors_of_nginx_have_the_form_of_the_server_s(site: Site) -> None:
    head = {"Content-Type": "image/png", "Content-Length": str(15 * 2**20)}
    status, answer = ask(by_tls(site), "POST", "/predict", b"", head)
    assert (status, answer["error"]["code"]) == (413, "too_large")
    for path in ("/metrics", "/metrics/", "/metrics//"):
        assert ask(by_tls(site), "GET", path)[0] == 404
    assert ask(by_tls(site), "GET", "/ready")[1]["status"] == "ready"
    site.server.terminate()
    site.server.wait()
    status, answer = ask(by_tls(site), "GET", "/ready")
    assert (status, answer["error"]["code"]) == (503, "no_server")
