"""serve/engine.py: new models take over without a pause, bad ones never."""

import asyncio
import base64
import io
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mnist import inference, registry
from serve import engine, preflight
from serve.admission import Busy
from serve.app import app
from serve.loading import RETRY_S, LoadedModel, NamedModels, Prediction
from serve.metrics import Metrics
from serve.settings import Settings
from tests.test_app import png
from tests.test_inference import change, other_golden


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the registry, which the server polls every 20 ms."""
    folder = Path(shutil.copytree(saved, tmp_path / "registry"))
    monkeypatch.setenv("MODELS", str(folder))
    monkeypatch.setattr(engine, "POLL_S", 0.02)
    return folder


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def save_copy(folder: Path, promote: str = "always") -> str:
    """Save the current model once more; returns the new name."""
    name, record = registry.record(folder)
    files = {
        kind: (file["file"].removeprefix(name), (folder / file["file"]).read_bytes())
        for kind, file in record["files"].items()
    }
    return registry.save(folder, files, record, promote)


def publish(staging: Path, folder: Path, name: str) -> None:
    """Copy a model, then move model_info.json, from one registry to another."""
    for path in staging.glob(f"{name}.*"):
        shutil.copy(path, folder)
    (staging / registry.INFO).replace(folder / registry.INFO)


def until(client: TestClient, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The answer of /ready as soon as it meets the condition."""
    end = time.monotonic() + 120
    while not condition(answer := client.get("/ready").json()):
        assert time.monotonic() < end, answer
        time.sleep(0.01)
    return answer


def test_a_new_current_model_takes_over_by_itself(client: TestClient, folder: Path) -> None:
    old = client.get("/ready").json()["model"]
    new = save_copy(folder)
    until(client, lambda ready: ready["model"] == new)
    registry.use(folder, old)
    until(client, lambda ready: ready["model"] == old)
    metrics = client.get("/metrics").text
    for name, n in ((old, 1), (new, 0)):
        labels = f'engine="onnx_int8",model="{name}",role="current"'
        assert f"model_in_use{{{labels}}} {n}.0" in metrics
    assert "model_swaps_total 2.0" in metrics


def test_all_golden_inputs_are_checked_at_the_start_and_only_one_after_a_preflight_check(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def passed(*_: Any) -> tuple[str, dict[str, str]]:
        return "onnx_int8", {}

    other_golden(folder, "onnx_int8", first=1)
    with TestClient(app) as client:
        assert client.get("/ready").json()["engine"] == "onnx"
        monkeypatch.setattr(preflight.Preflight, "check", passed)
        new = save_copy(folder)
        assert until(client, lambda ready: ready["model"] == new)["engine"] == "onnx_int8"


def test_a_server_without_a_model_loads_the_first_saved_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path / "registry"))
    monkeypatch.setattr(engine, "POLL_S", 0.02)
    with TestClient(app) as client:
        assert client.get("/ready").status_code == 503
        shutil.copytree(saved, tmp_path / "registry")
        until(client, lambda ready: ready["status"] == "ready")


@pytest.mark.parametrize("harm", ["altered", "missing", "shape", "golden", "record"])
def test_a_bad_new_model_is_refused_and_the_old_one_still_answers(
    client: TestClient, folder: Path, harm: str
) -> None:
    old = client.get("/ready").json()["model"]
    staging = Path(shutil.copytree(folder, folder.parent / "staging"))
    new = save_copy(staging)
    weights, info = f"{new}.int8.onnx", (staging / registry.INFO).read_text()
    good = (staging / weights).read_bytes()
    if harm == "altered":
        (staging / weights).write_bytes(good[:-1] + b"?")
    elif harm == "missing":
        (staging / weights).unlink()
    elif harm == "shape":
        change(staging, lambda entry: entry["dataset"]["classes"].pop())
    elif harm == "golden":
        for kind in ("onnx_int8", "onnx", "torch"):
            other_golden(staging, kind)
    elif harm == "record":
        (staging / registry.INFO).write_text("{")
    publish(staging, folder, new)
    expected = {
        "altered": "was altered",
        "missing": "No such file",
        "shape": "it gives no 9 probabilities",
        "golden": "golden inputs",
        "record": "cannot be read",
    }
    ready = until(client, lambda ready: expected[harm] in str(ready.get("refused")))
    assert ready["model"] == old
    assert "models_refused_total" in client.get("/metrics").text
    if harm == "record":
        (folder / registry.INFO).write_text(info)
        until(client, lambda ready: "refused" not in ready)
    elif harm in ("altered", "missing"):  # once the file is restored, the model is loaded
        (folder / weights).write_bytes(good)
        until(client, lambda ready: ready["model"] == new)


def test_a_model_that_ends_the_process_that_loads_it_does_not_end_the_server(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "COMMAND", (sys.executable, "-c", "import os; os.abort()"))
    old = client.get("/ready").json()["model"]
    save_copy(folder)
    ready = until(client, lambda ready: "ended its process (-6)" in str(ready.get("refused")))
    assert ready["model"] == old


def test_a_model_that_takes_too_long_to_load_is_refused(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "COMMAND", (sys.executable, "-c", "import time; time.sleep(30)"))
    monkeypatch.setattr(preflight, "TIMEOUT_S", 0.1)
    save_copy(folder)
    until(client, lambda ready: "took over 0.1 s" in str(ready.get("refused")))


def test_a_worker_shares_the_result_of_a_preflight_check(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "shared"))
    with TestClient(app) as client:
        new = save_copy(folder)
        until(client, lambda ready: ready["model"] == new)
    assert len([*(tmp_path / "shared").glob("preflight-*.json")]) == 1


def test_after_a_swap_ready_names_the_skipped_engine(client: TestClient, folder: Path) -> None:
    staging = Path(shutil.copytree(folder, folder.parent / "staging"))
    new = save_copy(staging)
    other_golden(staging, "onnx_int8")
    publish(staging, folder, new)
    ready = until(client, lambda ready: ready["model"] == new)
    assert ready["engine"] == "onnx"
    assert "golden inputs" in ready["passed_over"]["onnx_int8"]


def test_a_refused_model_is_loaded_again_after_a_while(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is offline")

    monkeypatch.setattr(engine, "RETRY_S", 0.1)
    load = inference.load
    monkeypatch.setattr(inference, "load", fail)
    new = save_copy(folder)
    until(client, lambda ready: "the disk is offline" in str(ready.get("refused")))
    loading, gate = threading.Event(), threading.Event()
    monkeypatch.setattr(inference, "load", lambda *_: loading.set() or (gate.wait(60) and fail()))
    assert loading.wait(60)
    assert "refused" in client.get("/ready").json()  # during the retry, too
    gate.set()
    monkeypatch.setattr(inference, "load", load)
    until(client, lambda ready: ready["model"] == new and "refused" not in ready)


def named_models(client: TestClient) -> list[str]:
    return [*client.app.state.engine._named._models]  # type: ignore[attr-defined]


def test_a_named_model_is_kept_only_until_it_is_current(client: TestClient, folder: Path) -> None:
    old = client.get("/ready").json()["model"]
    assert client.post(f"/predict?model={old}", content=b"x").status_code == 415
    assert named_models(client) == []
    new = save_copy(folder, "never")
    assert client.post(f"/predict?model={new}", content=b"x").status_code == 415
    assert named_models(client) == [new]
    registry.use(folder, new)
    until(client, lambda ready: ready["model"] == new)
    assert named_models(client) == []


def test_many_requests_for_a_named_model_load_it_once(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []
    check = preflight.Preflight.check

    async def counted(*args: Any) -> Any:
        checks.append(args)
        return await check(*args)

    monkeypatch.setattr(preflight.Preflight, "check", counted)
    new = save_copy(folder, "never")
    with ThreadPoolExecutor(8) as threads:
        requests = [
            threads.submit(client.post, f"/predict?model={new}", content=b"x") for _ in range(16)
        ]
    assert {request.result().status_code for request in requests} == {415}
    assert len(checks) == 1


def test_a_named_model_that_cannot_be_loaded_is_not_loaded_for_each_request(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = save_copy(folder, "never")
    weights = folder / f"{new}.int8.onnx"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"?")
    first = client.post(f"/predict?model={new}", content=b"x")
    assert (first.status_code, first.json()["error"]["code"]) == (503, "no_model")
    assert "was altered" in first.json()["error"]["message"]
    weights.write_bytes(good)
    assert client.post(f"/predict?model={new}", content=b"x").status_code == 503
    save_copy(folder, "never")  # the registry changes
    end = time.monotonic() + 120
    while client.post(f"/predict?model={new}", content=b"x").status_code == 503:
        assert time.monotonic() < end


def test_a_server_that_is_stopped_ends_the_process_of_a_preflight_check(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    pid = tmp_path / "pid"
    with TestClient(app) as client:
        monkeypatch.setattr(preflight, "COMMAND", (sys.executable, "-c", code, str(pid)))
        save_copy(folder)
        until(client, lambda _: pid.exists() and pid.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_canary_answers_its_share_and_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
) -> None:
    new, old = save_copy(folder, "never"), registry.record(folder)[0]
    monkeypatch.setenv("CANARY", f"{new}:0.5")
    picture = png(digits.validation.images[0, 0].numpy())
    with TestClient(app) as client:
        assert client.get("/ready").json()["canary"] == new
        names = [client.post("/predict", content=picture).json()["model"] for _ in range(60)]
        metrics = client.get("/metrics").text
        assert client.post(f"/predict?model={old}", content=picture).json()["model"] == old
    assert 10 < names.count(new) < 50
    lines = [line for line in metrics.splitlines() if line.startswith("predictions_total{")]
    assert any(
        f'model="{new}"' in line and line.endswith(f" {names.count(new)}.0") for line in lines
    )


def test_a_canary_that_cannot_be_loaded_is_refused_and_the_current_model_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "20000101-000000:0.5")
    with TestClient(app) as client:
        ready = client.get("/ready").json()
    assert ready["status"] == "ready"
    assert "no model '20000101-000000'" in ready["refused"]["canary"]


# --- the engine alone, with models that are not loaded from files --------------------------------


def make_model(name: str, classes: tuple[str, ...] = ("a", "b")) -> LoadedModel:
    record: Any = {"dataset": {"classes": classes}, "study": {"name": "study", "trial": 3}}
    return LoadedModel(name, record, SimpleNamespace(engine="onnx"), 1)  # type: ignore[arg-type]


class FakeLoader:
    """In place of serve.loading.Loader; `results` has a model or an error for each name."""

    def __init__(self, *names: str) -> None:
        self.results: dict[str, LoadedModel | Exception] = {
            name: make_model(name) for name in names
        }
        self.current: str | Exception = "one"
        self.has_changed = True
        self.checks = 0
        self.canary: str | None = None  # of the last changed()
        self.loaded: list[tuple[str, bool]] = []  # names, and whether after a preflight check
        self.needs_preflight, self.retry_at, self.folder = False, math.inf, Path("registry")

    async def changed(self, canary: str | None) -> bool:
        self.checks, self.canary = self.checks + 1, canary
        return self.has_changed

    async def record(self, name: str | None) -> tuple[str, Any]:
        name = name or raise_errors(self.current)
        return name, {}

    async def load(self, name: str) -> LoadedModel:
        self.loaded.append((name, self.needs_preflight))
        return raise_errors(self.results[name])

    load_named = load

    def stop(self) -> None:
        self.has_stopped = True


def raise_errors(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def run_engine(scenario: Any, loader: FakeLoader, **settings: Any) -> Any:
    """Run scenario(engine) with this loader; returns its result."""

    async def start_and_stop() -> Any:
        live = engine.Engine(Settings(**settings), Metrics())
        live._loader.stop()
        live._loader = loader  # type: ignore[assignment]
        live._named = NamedModels(loader, 9)  # type: ignore[arg-type]
        try:
            return await scenario(live)
        finally:
            await live.stop()

    return asyncio.run(start_and_stop())


def metric(live: engine.Engine, line: str) -> bool:
    return f"{line}\n" in live.metrics.text().decode()


def test_only_a_model_after_the_first_has_a_preflight_check(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(live: engine.Engine) -> None:
        assert live.reason == "starting"
        await live.start()
        assert live.current is loader.results["one"]
        assert live.folder == loader.folder
        loader.has_changed = False
        await live._check_registry()
        loader.has_changed = True
        await live._check_registry()  # of another model
        assert loader.loaded == [("one", False)]
        loader.current = "two"
        await live._check_registry()
        assert live.current is loader.results["two"]
        assert loader.loaded == [("one", False), ("two", True)]
        for name, n in (("one", 0), ("two", 1)):
            labels = f'engine="onnx",model="{name}",role="current"'
            assert metric(live, f"model_in_use{{{labels}}} {n}.0")
        assert metric(live, "model_swaps_total 1.0")

    loader = FakeLoader("one", "two")
    with caplog.at_level("INFO", "serve"):
        run_engine(scenario, loader)
    swaps = [vars(record) for record in caplog.records if record.message == "swapped"]
    fields = [tuple(swap[key] for key in ("role", "model", "engine")) for swap in swaps]
    assert fields == [("current", "one", "onnx"), ("current", "two", "onnx")]


@pytest.mark.parametrize(
    ("error", "reason", "tracebacks"),
    [
        (registry.RegistryError("its weights were altered"), "two: its weights were altered", 0),
        (registry.RegistryError("two.pth was altered"), "two.pth was altered", 0),
        (OSError("it is offline"), "two: the model cannot be used: it is offline", 1),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused_until_it_can(
    error: Exception, reason: str, tracebacks: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(live: engine.Engine) -> None:
        await live.start()
        loader.current = "two"
        for n in (1, 2):
            before = time.monotonic()
            await live._check_registry()
            assert live.current is loader.results["one"]
            assert live.refused == {"current": reason}
            assert reason.endswith(live.reason)
            assert before + RETRY_S <= loader.retry_at <= time.monotonic() + RETRY_S
            assert metric(live, f'models_refused_total{{model="two"}} {n}.0')
        loader.results["two"] = make_model("two")
        await live._check_registry()
        assert live.current is loader.results["two"]
        assert (live.refused, loader.retry_at) == ({}, math.inf)

    loader = FakeLoader("one")
    loader.results["two"] = error
    run_engine(scenario, loader)
    refusals = [vars(record) for record in caplog.records if record.message == "refused"]
    expected = ("current", "two", "ERROR")
    fields = [tuple(entry[key] for key in ("role", "model", "levelname")) for entry in refusals]
    assert fields == [expected] * 2
    unexpected = [record for record in caplog.records if record.message == "unexpected error"]
    assert len(unexpected) == 2 * tracebacks


def test_without_a_current_model_each_request_gets_the_reason() -> None:
    async def scenario(live: engine.Engine) -> None:
        with pytest.raises(registry.RegistryError, match="starting"):
            await live.choose_model(None)
        await live.start()
        assert live.refused == {"current": "there is none"}
        assert metric(live, 'models_refused_total{model=""} 1.0')
        with pytest.raises(registry.RegistryError, match="there is none"):
            await live.choose_model(None)
        assert not loader.needs_preflight  # no model answers yet

    loader = FakeLoader()
    loader.current = registry.RegistryError("there is none")
    run_engine(scenario, loader)


def test_a_canary_has_its_share_and_its_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(live: engine.Engine) -> None:
        await live.start()
        assert loader.canary == new
        assert "canary" in live.refused
        assert live.reason == "starting"  # there is a current model
        loader.results[new] = make_model(new)
        await live._check_registry()
        assert live.refused == {}
        for draw, name in ((0.0, new), (0.2, new), (0.25, "one"), (0.9, "one")):
            monkeypatch.setattr(engine.random, "random", lambda draw=draw: draw)
            assert (await live.choose_model(None)).name == name
        for name in ("one", new):
            assert await live.choose_model(name) is loader.results[name]
        assert metric(live, f'model_in_use{{engine="onnx",model="{new}",role="canary"}} 1.0')
        assert metric(live, "model_swaps_total 0.0")

    new, loader = "20261130-000000", FakeLoader("one")
    loader.results[new] = registry.RegistryError("its weights were altered")
    run_engine(scenario, loader, canary=f"{new}:0.25")


def test_a_named_model_that_becomes_current_is_not_loaded_again() -> None:
    async def scenario(live: engine.Engine) -> None:
        await live.start()
        named = await live.choose_model("two")
        assert loader.canary is None
        loader.current = "two"
        await live._check_registry()
        assert live.current is named
        assert [name for name, _ in loader.loaded] == ["one", "two"]

    loader = FakeLoader("one", "two")
    run_engine(scenario, loader)


def test_polling_survives_errors_and_ends_with_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(live: engine.Engine) -> list[asyncio.Task[None]]:
        await live.start()
        monkeypatch.setattr(loader, "changed", fail_once)
        while len(calls) < 3:
            await asyncio.sleep(0.001)
        live.admission.count_rejected(Busy("queue", "it is full"))
        return live._tasks

    async def fail_once(_: str | None) -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("it is offline")
        return False

    calls: list[int] = []
    monkeypatch.setattr(engine, "POLL_S", 0.001)
    loader = FakeLoader("one")
    tasks = run_engine(scenario, loader)
    assert len(tasks) == 2
    assert all(task.cancelled() for task in tasks)
    assert loader.has_stopped
    messages = [record.message for record in caplog.records]
    assert messages.count("unexpected error") == 1
    assert messages.count("rejected") == 1  # those that are not reported yet


def test_an_answer_is_counted_by_its_class_with_its_probability() -> None:
    async def scenario(live: engine.Engine) -> dict[str, Any]:
        async def classify(data: bytes, model: LoadedModel) -> Any:
            assert (data, model.name) == (b"picture", "one")
            return picture, Prediction([0.25, 0.75], True, ["b"])

        live.batcher.classify = classify  # type: ignore[method-assign]
        answer = await live.answer(make_model("one"), b"picture", "7.png")
        labels = 'model="one",prediction="b",uncertain="true"'
        assert metric(live, f"predictions_total{{{labels}}} 1.0")
        assert metric(live, 'prediction_probability_sum{model="one"} 0.75')
        view = {"view": engine._png_url(picture)}
        viewed = await live.answer(make_model("one"), b"picture", "7.png", top=1, view=True)
        assert viewed == answer | {"top": answer["top"][:1]} | view
        return answer

    picture = np.zeros((1, 2, 3), np.uint8)
    assert run_engine(scenario, FakeLoader()) == {
        "filename": "7.png",
        "prediction": "b",
        "probability": 0.75,
        "probabilities": {"a": 0.25, "b": 0.75},
        "top": [("b", 0.75), ("a", 0.25)],
        "uncertain": True,
        "labels": ["b"],
        "model": "one",
        "study": "study",
        "trial": 3,
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_shows_the_model_s_input(channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (channels, 5, 4), np.uint8)
    scheme, encoded = engine._png_url(picture).split(",")
    assert scheme == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image).reshape(5, 4, channels), picture.transpose(1, 2, 0))
