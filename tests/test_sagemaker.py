"""serve/sagemaker.py and deploy/sagemaker/serve: what SageMaker calls in a container."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from benchmarks import load, servers
from mnist import registry
from serve.app import app
from tests.conftest import ROOT
from tests.gates import until
from tests.test_app import drawn_seven, refused

PICTURE = drawn_seven()


def test_invocations_are_answered_as_predict_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("MAX_UPLOAD_BYTES", "1000")
    with TestClient(app) as client:
        assert client.get("/ping").json() == {"status": "ready"}
        answer = client.post("/predict", content=PICTURE).json()
        for kind in ("image/png", "application/x-image", "application/octet-stream"):
            headers = {"Content-Type": kind}
            assert client.post("/invocations", content=PICTURE, headers=headers).json() == answer
        text = base64.b64encode(PICTURE).decode()
        assert client.post("/invocations", json={"image": text}).json() == answer
        refused(client.post("/invocations", content=b"x"), 415, "not_an_image")
        refused(client.post("/invocations", content=b"x" * 1001), 413, "too_large")
        refused(client.post("/invocations", content=b""), 422, "missing_file")
        refused(client.post("/invocations", json={"x": 1}), 400, "bad_request")
        refused(client.post("/invocations?model=x", content=PICTURE), 404, "unknown_model")


def test_the_container_s_command_serves_the_models_that_sagemaker_unpacked(
    tmp_path: Path,
) -> None:
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        for path in registry.SAMPLE.iterdir():
            archive.add(path, path.name)
    shutil.unpack_archive(tmp_path / "model.tar.gz", tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = ROOT / "deploy" / "sagemaker" / "serve"
    assert "--host 0.0.0.0 --port 8080" in script.read_text()
    assert os.access(script, os.X_OK)
    options = ["--host", "127.0.0.1", "--port", str(port)]  # the last ones count
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        [script, *options],
        cwd=ROOT,
        env=os.environ | {"MODELS": str(tmp_path / "model"), "PATH": paths},
        stderr=subprocess.DEVNULL,
    )
    try:
        request = load.request("/invocations", PICTURE)
        until(lambda: servers.answers(port, request), "it answers")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping") as response:
            assert json.load(response) == {"status": "ready"}
    finally:
        process.terminate()
        process.wait()
