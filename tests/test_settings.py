"""serve/settings.py: a setting that cannot work stops the start; others are normalised."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from mnist.registry import SAMPLE, mirror
from serve.app import app
from serve.settings import Settings, describe
from tests.conftest import ROOT


def start(*options: str, **environment: str) -> tuple[int, str]:
    """The exit status and standard error of a server that cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "serve.app:app", "--port", "0", *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def refusal(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line about this setting, the only wrong one."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        Settings()
    line = describe(error.value)
    assert line.isprintable()
    assert line.startswith(f"{name}=")
    assert "Error" not in line
    assert "; " not in line.split(": ")[0]
    return line


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_PIXELS", "0"), ("CORS_ORIGINS", "localhost:3000"), ("MODELS", "~x/y")]
)
def test_a_wrong_setting_stops_the_start_with_one_line_that_names_it(name: str, value: str) -> None:
    status, log = start(**{name: value})
    assert status == 3
    assert f"{name}={value}: " in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ENGINE", "tensorflow", "'onnx_int8', 'onnx' or 'torch'"),
        ("THREADS", "0", "greater than or equal to 1"),
        ("THREADS", "100000", "less than or equal to 1024"),
        ("MAX_PIXELS", "many", "valid integer"),
        ("MAX_QUEUE", "9" * 400, "less than or equal to"),
        ("CANARY", "../x:0.5", "a colon and a share"),
        ("CANARY", "20261121-120301:2", "a colon and a share"),
        ("CANARY", "20261121-120301", "a colon and a share"),
        ("API_KEYS", "", "it is empty"),
        ("FEEDBACK_DIR", "", "it is empty"),
        ("MODELS", "'saved_models'", "leave out the quotation marks"),
        ("MODELS", "~no-such-user/models", "write the whole path"),
        ("MODELS", __file__, "is a file; name a folder"),
        ("MODELS", "x" * 300, "File name too long"),
        ("MODELS", "s3://", "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("MODELS", "s3:/bucket", "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("MODELS", "s3://key:secret@bucket", "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("MODELS", "https://bucket.example/models", "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("FEEDBACK_DIR", f"{__file__}/new", "is a file; name a folder"),
        ("CORS_ORIGINS", "localhost:3000", "has a scheme, a host and no path"),
        ("CORS_ORIGINS", "//localhost", "has a scheme, a host and no path"),
        ("CORS_ORIGINS", "https://a.example/app", "a host and no path"),
        ("CORS_ORIGINS", "https://a.example:99999", "as https://example.org:8443"),
        ("CORS_ORIGINS", "https://a.example https://b.example", "has a scheme, a host and no path"),
        ("CORS_ORIGINS", '["http://localhost:3000"]', "separate the values by commas"),
        ("CORS_ORIGINS", '"https://a.example"', "leave out the quotation marks"),
        (
            "CORS_ORIGINS",
            "'https://a.example', 'https://b.example'",
            "leave out the quotation marks",
        ),
        ("CORS_ORIGINS", "https://a.example, https://*.example.org", "list each origin, or *"),
        ("CORS_ORIGINS", "*.example.org", "list each origin, or *"),
        ("CORS_ORIGINS", f"https://{'é' * 70}.example", "is not a domain name"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_one_line(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in refusal(name, value, monkeypatch)


def test_an_object_store_without_its_library_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "find_spec", lambda name: None)
    line = refusal("MODELS", "s3://bucket/models", monkeypatch)
    assert line.endswith(f"object stores need `pip install {mirror.OBSTORE}`")


@pytest.mark.parametrize(
    "keys", ['"secret"', "'secret'", '"secret,other"', '["secret"]', "sec\tret"]
)
def test_a_key_that_no_client_sends_is_refused_and_not_shown(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "secret" not in refusal("API_KEYS", keys, monkeypatch)


@pytest.mark.parametrize(
    ("value", "origin"),
    [
        ("http://localhost:3000/", "http://localhost:3000"),
        ("https://Example.ORG", "https://example.org"),
        ("HTTPS://example.org:443", "https://example.org"),
        ("http://example.org:443", "http://example.org:443"),
        ("https://müller.example", "https://xn--mller-kva.example"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("null", "null"),
        (" * ", "*"),
    ],
)
def test_an_origin_is_allowed_as_browsers_send_it(
    value: str, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(SAMPLE))
    monkeypatch.setenv("CORS_ORIGINS", f"https://other.example, {value}")
    headers = {"Origin": "http://a" if origin == "*" else origin}
    headers["Access-Control-Request-Method"] = "POST"
    with TestClient(app) as client:
        assert client.options("/predict", headers=headers).status_code == 200


def test_a_folder_is_found_from_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", " ~/models\r")
    monkeypatch.setenv("FEEDBACK_DIR", "~/feedback")
    settings = Settings()
    assert (settings.models, settings.feedback_dir) == (tmp_path / "models", tmp_path / "feedback")


def test_a_folder_without_models_gets_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    for remedy in (f"`python run.py --output {tmp_path}`", f"did you mean {tmp_path}/mine?"):
        with TestClient(app) as client:
            answer = client.get("/ready")
        assert answer.status_code == 503
        assert remedy in answer.json()["reason"]
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "model_info.json").touch()


def test_no_file_sets_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MAX_QUEUE=3\n")
    assert Settings().max_queue == 256
