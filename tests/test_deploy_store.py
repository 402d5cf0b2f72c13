"""serve/store.py and mnist/registry/mirror.py: models from an object store (moto's S3)."""

import http.client
import http.server
import json
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient

from mnist import registry
from serve import engine
from serve import store as store_copy
from serve.app import app
from serve.middleware import log_as_json
from tests.conftest import ROOT
from tests.test_app import drawn_seven, serving
from tests.test_engine import save_copy
from tests.test_inference import other_golden

pytest.importorskip("obstore", reason="it is in deploy/requirements-test.txt")
moto = pytest.importorskip("moto.server", reason="it is in deploy/requirements-test.txt")
boto3 = pytest.importorskip("boto3", reason="it is in deploy/requirements-test.txt")

from mnist.registry import mirror  # noqa: E402

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
URL, PICTURE = "s3://models/digits", drawn_seven()


class Proxy:
    """Stands between the server and the store; `mode` is what happens to a connection."""

    def __init__(self, port: int) -> None:
        self.mode, self.cut_after = "pass", 0  # or "close", "hang", "cut" after so many bytes
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def set(self, mode: str) -> None:
        """Also ends all connections."""
        self.mode = mode
        for connection in [*self._open]:
            end(connection)

    def stop(self) -> None:
        self.set("stop")
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()

    def _accept(self) -> None:
        with self._listener, ThreadPoolExecutor(32) as threads:
            while self.mode != "stop":
                threads.submit(self._handle, self._listener.accept()[0])

    def _handle(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self._open.append(connection)
            if self.mode == "hang":
                connection.recv(1_000_000)
                while connection.recv(1):  # until set()
                    pass
            elif self.mode != "close":
                with socket.create_connection(self._upstream) as upstream:
                    back = threading.Thread(target=self._pump, args=(upstream, connection))
                    back.start()
                    self._pump(connection, upstream)
                    back.join()
            self._open.remove(connection)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := source.recv(1000):
                sent += len(data)
                if self.mode == "cut" and sent > self.cut_after:
                    break
                target.sendall(data)
        end(source)
        end(target)


def end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Store:
    """The registry `folder`, and its upload to the bucket of a moto server behind a proxy."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.proxy = folder, Proxy(port)
        self.port = port
        self.s3 = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        self.s3.create_bucket(Bucket="models")
        self.upload()

    def put(self, name: str, content: bytes | None = None) -> None:
        content = (self.folder / name).read_bytes() if content is None else content
        self.s3.put_object(Bucket="models", Key=f"digits/{name}", Body=content)

    def upload(self, others: dict[str, bytes | None] | None = None) -> None:
        """All files, the record last; of `others` this content instead, or nothing."""
        contents = {
            path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()
        } | (others or {})
        for name in sorted(contents, key=registry.INFO.__eq__):
            if contents[name] is not None:
                self.put(name, contents[name])


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto_port: int) -> Iterator[Store]:
    """A store with the sample model, which the server polls several times a second."""
    store = Store(Path(shutil.copytree(registry.SAMPLE, tmp_path / "registry")), moto_port)
    for name, value in {
        "MODELS": URL,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.proxy.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine, "POLL_S", 0.02)
    monkeypatch.setattr(store_copy, "POLL_S", 0.05)
    monkeypatch.setattr(store_copy, "RETRY_S", 0.2)
    log_as_json()  # caplog attaches itself to the logger only if it is set up before the test
    yield store
    store.proxy.stop()
    store.s3.close()
    post(moto_port, "/moto-api/reset")


def post(port: int, path: str, body: bytes = b"") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def until(condition: Callable[[], Any]) -> Any:
    """The first value that is true."""
    end = time.monotonic() + 600
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


def ready(client: TestClient) -> dict[str, Any]:
    return client.get("/ready").json()


def copied(tmp_path: Path) -> set[str]:
    """The names of the files in the cache."""
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    """The reasons of the log lines of this event."""
    records = [vars(record) for record in caplog.records if record.message == name]
    return [record.get("reason", "") for record in records]


def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time after which a store that hangs counts as away."""
    monkeypatch.setitem(mirror.CLIENT_OPTIONS, "read_timeout", "2s")
    monkeypatch.setattr(mirror, "RETRY_S", 1)


def is_away(caplog: pytest.LogCaptureFixture) -> bool:
    return len(events(caplog, "store away")) > len(events(caplog, "store back"))


def test_a_server_answers_with_the_model_of_a_store_as_with_that_of_a_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(app) as client:
        status = ready(client)
        answer = client.post("/predict", content=PICTURE).json()
        models = client.get("/models").json()
    monkeypatch.setenv("MODELS", str(store.folder))
    with TestClient(app) as client:
        assert client.post("/predict", content=PICTURE).json() == answer
        assert client.get("/models").json() == models
    name = registry.record(store.folder)[0]
    assert status == {"status": "ready", "model": name, "engine": "onnx_int8"}
    assert copied(tmp_path) == {path.name for path in store.folder.iterdir()} | {".lock"}


def test_weights_are_copied_only_for_torch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE", "onnx")
    with TestClient(app) as client:
        assert ready(client)["engine"] == "onnx"
    assert not [name for name in copied(tmp_path) if name.endswith(".pth")]


def test_a_model_that_is_uploaded_takes_over_and_a_removed_one_leaves_the_cache(
    store: Store, tmp_path: Path
) -> None:
    with TestClient(app) as client:
        old = ready(client)["model"]
        new = save_copy(store.folder)
        store.upload()
        until(lambda: ready(client)["model"] == new)
        registry.use(store.folder, old)
        store.upload()
        until(lambda: ready(client)["model"] == old)
        registry.remove(store.folder, new)
        store.upload()
        until(lambda: not [name for name in copied(tmp_path) if name.startswith(new)])
        assert "refused" not in ready(client)


def test_the_documented_commands_upload_a_registry(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("aws") is None:
        pytest.skip("awscli is in deploy/requirements-test.txt")
    lines = (ROOT / "docs/serving.md").read_text().splitlines()
    commands = [line.strip() for line in lines if line.startswith("    aws s3 ")]
    assert len(commands) == 2
    shutil.move(store.folder, tmp_path / "saved_models")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    with TestClient(app) as client:
        new = save_copy(tmp_path / "saved_models")
        for command in commands:
            subprocess.run(
                shlex.split(command.replace("s3://BUCKET/PREFIX", URL)),
                cwd=tmp_path,
                check=True,
                capture_output=True,
            )
        until(lambda: ready(client)["model"] == new)
        assert "refused" not in ready(client)


def test_a_record_that_is_uploaded_before_its_files_waits_for_them(store: Store) -> None:
    with TestClient(app) as client:
        old = ready(client)["model"]
        new = save_copy(store.folder)
        store.put(registry.INFO)
        until(lambda: "NoSuchKey" in ready(client).get("refused", {}).get("store", ""))
        assert ready(client)["model"] == old
        store.upload()
        until(lambda: ready(client)["model"] == new and "refused" not in ready(client))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("truncated", "was altered: it has 100 bytes"),
        ("altered", "was altered"),
        ("missing", "NoSuchKey"),
        ("golden", "golden inputs"),
        ("record", "cannot be read"),
    ],
)
def test_a_bad_model_is_refused_until_it_is_replaced(
    store: Store, caplog: pytest.LogCaptureFixture, harm: str, words: str
) -> None:
    with TestClient(app) as client:
        old = ready(client)["model"]
        new = save_copy(store.folder)
        file = f"{new}.int8.onnx"
        good = (store.folder / file).read_bytes()
        if harm == "golden":
            for kind in ("onnx_int8", "onnx", "torch"):
                other_golden(store.folder, kind)
        bad: dict[str, dict[str, bytes | None]] = {
            "truncated": {file: good[:100]},
            "altered": {file: good[:-1] + b"?"},
            "missing": {file: None},
            "record": {registry.INFO: b"{"},
        }
        store.upload(bad.get(harm))
        until(lambda: words in str(ready(client).get("refused")))
        assert ready(client)["model"] == old
        assert client.post("/predict", content=PICTURE).json()["model"] == old
        if harm == "golden":
            registry.use(store.folder, old)
            new = save_copy(store.folder)
        store.upload()
        until(lambda: ready(client)["model"] == new and "refused" not in ready(client))
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("mode", ["close", "hang"])
def test_a_store_that_goes_away_under_load_fails_no_request(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def load() -> None:
        while not stop.is_set():
            for path in ("/predict", f"/predict?model={old}", f"/predict?model={named}"):
                statuses.append(post(port, path, PICTURE)[0])

    def get_ready() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/ready")
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return content

    def answers_come() -> None:
        n = len(statuses)
        until(lambda: len(statuses) > n + 60)

    named, statuses, stop = save_copy(store.folder, "never"), [], threading.Event()
    store.upload()
    give_up_soon(monkeypatch)
    monkeypatch.setenv("DEADLINE_MS", "600000")  # a slow machine is no fault of the store
    caplog.set_level("INFO", "serve")
    with serving(URL, monkeypatch) as (_, port):  # type: ignore[arg-type]
        status = get_ready()
        old = status["model"]
        with ThreadPoolExecutor(2) as threads:
            running = [threads.submit(load) for _ in range(2)]
            try:
                answers_come()
                for _ in range(2):
                    store.proxy.set(mode)
                    until(lambda: is_away(caplog))
                    answers_come()
                    assert get_ready() == status
                    lines = len(events(caplog, "store away")), len(events(caplog, "store back"))
                    assert lines[0] == lines[1] + 1  # one for each time, not for each attempt
                    store.proxy.set("pass")
                    until(lambda: not is_away(caplog))
                store.proxy.set(mode)
                new = save_copy(store.folder)
                store.upload()
                store.proxy.set("pass")
                until(lambda: get_ready()["model"] == new)
                answers_come()
            finally:
                stop.set()
        for thread in running:
            thread.result()
    assert len(statuses) > 240
    assert set(statuses) == {200}
    away = events(caplog, "store away")
    assert all(line.startswith(f"{URL}/{registry.INFO} cannot be read: ") for line in away)
    assert events(caplog, "refused") == []


@pytest.mark.parametrize("mode", ["close", "hang"])
def test_a_server_starts_from_its_cache_while_the_store_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    with TestClient(app) as client:
        before = ready(client)
    give_up_soon(monkeypatch)
    store.proxy.set(mode)
    with TestClient(app) as client:
        assert ready(client) == before
        assert client.post("/predict", content=PICTURE).status_code == 200
        store.proxy.set("pass")
        new = save_copy(store.folder)
        store.upload()
        until(lambda: ready(client)["model"] == new)


def test_without_store_and_cache_the_reason_is_given_until_the_store_is_back(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.proxy.set("close")
    with TestClient(app) as client:
        reason = ready(client)["reason"]
        assert reason.startswith(
            f"no current model from MODELS={URL}: {URL}/{registry.INFO} cannot"
        )
        answer = client.post("/predict", content=PICTURE)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, reason)
        store.proxy.set("pass")
        until(lambda: ready(client)["status"] == "ready")
    assert len(events(caplog, "store away")) == 1


def test_a_file_that_is_damaged_in_the_cache_is_copied_again(store: Store, tmp_path: Path) -> None:
    with TestClient(app) as client:
        before = ready(client)
    [file] = (tmp_path / "cache").rglob("*.int8.onnx")
    file.write_bytes(file.read_bytes()[:-1])
    (file.parent / ".x.onnx.tmp").touch()  # of a download that was killed
    with TestClient(app) as client:
        assert ready(client) == before
    assert ".x.onnx.tmp" not in copied(tmp_path)


def test_a_connection_that_ends_within_a_file_leaves_no_part_of_it(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(app) as client:
        old = ready(client)["model"]
        new = save_copy(store.folder)
        # More than the record has. An interrupted download goes on where it ended, but only twice.
        store.proxy.cut_after = 20_000
        store.proxy.set("cut")
        store.upload()
        until(lambda: events(caplog, "store away"))
        assert ready(client)["model"] == old
        store.proxy.set("pass")
        until(lambda: ready(client)["model"] == new)
    assert not [name for name in copied(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("no bucket", "NoSuchBucket; upload it, or correct the URL"),
        ("no registry", "NoSuchKey; upload it, or correct the URL"),
        ("wrong key", "InvalidAccessKeyId; check the credentials"),
        ("read-only cache", "set XDG_CACHE_HOME to a folder"),
    ],
)
def test_a_mistake_in_the_settings_gets_one_line(
    store: Store,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
    words: str,
) -> None:
    if problem == "no bucket":
        monkeypatch.setenv("MODELS", "s3://other/digits")
    elif problem == "no registry":
        monkeypatch.setenv("MODELS", "s3://models/other")
    elif problem == "wrong key":
        post(store.port, "/moto-api/reset-auth", b"0")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with TestClient(app) as client:
        reason = ready(client)["reason"]
    assert words in reason
    assert reason.isprintable()
    assert len(events(caplog, "store away")) == 1
    if problem == "wrong key":
        post(store.port, "/moto-api/reset-auth", b"Infinity")


def test_a_named_model_is_copied_when_a_request_names_it(store: Store, tmp_path: Path) -> None:
    names = [save_copy(store.folder, "never") for _ in range(2)]
    store.upload()
    with TestClient(app) as client:
        assert not copied(tmp_path) & {f"{name}.onnx" for name in names}
        path = f"/predict?model={names[0]}"
        assert client.post(path, content=PICTURE).json()["model"] == names[0]
        store.proxy.set("close")
        assert client.post(path, content=PICTURE).status_code == 200
        answer = client.post(f"/predict?model={names[1]}", content=PICTURE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_model")
        assert "cannot be read" in answer.json()["error"]["message"]


def test_a_canary_comes_from_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = save_copy(store.folder, "never")
    store.upload()
    monkeypatch.setenv("CANARY", f"{canary}:1")
    with TestClient(app) as client:
        assert client.post("/predict", content=PICTURE).json()["model"] == canary


def test_a_broken_canary_does_not_keep_back_the_current_model(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, canary = registry.record(store.folder)[0], save_copy(store.folder, "never")
    for path in store.folder.glob(f"{canary}*"):
        path.unlink()
    store.upload()
    monkeypatch.setenv("CANARY", f"{canary}:1")
    with TestClient(app) as client:
        assert client.post("/predict", content=PICTURE).json()["model"] == current


def test_processes_share_one_copy(store: Store, tmp_path: Path) -> None:
    copies = [mirror.Mirror(URL) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(copy.update) for copy in copies]:
            done.result()
    assert copied(tmp_path) == {path.name for path in store.folder.iterdir()} | {".lock"}
    [inode] = {copy.folder.stat().st_ino for copy in copies}
    assert inode


def test_a_model_in_google_s_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a server of files in its place: whether the URL and its ETags are understood."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("ETag", '"1"')
            super().end_headers()

        def do_GET(self) -> None:
            requests.append((unquote(self.path), self.headers["If-None-Match"]))
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    requests: list[tuple[str, str | None]] = []
    shutil.copytree(registry.SAMPLE, tmp_path / "store" / "models" / "digits")
    handler = partial(Files, directory=str(tmp_path / "store"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        account = {
            "gcs_base_url": f"http://127.0.0.1:{server.server_port}",
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELS", "gs://models/digits")
        monkeypatch.setattr(store_copy, "POLL_S", 0.05)
        with TestClient(app) as client:
            assert ready(client)["status"] == "ready"
            until(lambda: ("/models/digits/model_info.json", '"1"') in requests)
        server.shutdown()
