"""serve/engine.py: new models take over without a pause, bad ones never."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mnist import inference, registry
from serve import engine, preflight
from serve.app import app
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
