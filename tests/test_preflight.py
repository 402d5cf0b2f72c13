"""serve/preflight.py: one check for all workers, in processes that stay for the next check."""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mnist import registry
from serve import preflight
from serve.preflight import Preflight
from tests.conftest import ROOT

GOOD = '{"engine": "onnx", "skipped_engines": {}, "torch": false}'
BAD = '{"refused": "no", "torch": false}'


def use_fake_worker(monkeypatch: pytest.MonkeyPatch, log: Path, result: str) -> None:
    """Check models in a process that writes this result, and a character of the log for each."""
    code = "import sys\nfor line in sys.stdin:\n"
    code += f"    open({str(log)!r}, 'a').write('.'); print({result!r}, flush=True)"
    monkeypatch.setattr(preflight, "COMMAND", (sys.executable, "-c", code))
    log.write_text("")


def test_one_of_several_workers_checks_a_model_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    (tmp_path / registry.INFO).touch()
    monkeypatch.setattr(preflight, "MAX_AGE_S", 3600)

    def check(result: str, name: str) -> tuple[list[str], int]:
        """What three workers get for a model with this result, and the number of checks."""
        use_fake_worker(monkeypatch, log, result)

        async def check_by_three() -> list[Any]:
            workers = [Preflight(tmp_path) for _ in range(3)]
            checks = (worker.check(tmp_path, name, 1, "auto") for worker in workers)
            results = await asyncio.gather(*checks, return_exceptions=True)
            for worker in workers:
                worker.stop()
            return results

        return [str(outcome) for outcome in asyncio.run(check_by_three())], len(log.read_text())

    assert check(BAD, "bad") == (["no"] * 3, 1)
    assert check(GOOD, "new") == (["('onnx', {})"] * 3, 1)
    assert check(GOOD, "new")[1] == 0
    (tmp_path / "new.onnx").touch()  # the model is another one
    assert check(GOOD, "new")[1] == 1
    for path in tmp_path.glob("preflight-*.json"):
        path.write_text("[")  # by a worker that was killed
    assert check(GOOD, "new")[1] == 1
    monkeypatch.setattr(preflight, "MAX_AGE_S", 0)
    assert check(GOOD, "new")[1] == 3


def test_a_process_stays_for_a_while_for_the_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, pids = tmp_path / "log", []

    async def check_twice(result: str) -> None:
        use_fake_worker(monkeypatch, log, result)
        worker = Preflight(None)
        for idle_s in (3600, 0.1):
            monkeypatch.setattr(preflight, "IDLE_S", idle_s)
            with pytest.raises(registry.RegistryError) if "refused" in result else nullcontext():
                await worker.check(tmp_path, "new", 1, "auto")
            pids.append([process.pid for process in worker._idle])
        async with asyncio.timeout(60):
            while worker._idle:
                await asyncio.sleep(0.01)

    for result in (GOOD, BAD):
        asyncio.run(check_twice(result))
        first, second = pids[-2:]
        assert first == second
        assert len(first) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(first[0], 0)
        asyncio.run(check_twice(result.replace("false", "true")))
        assert pids[-2:] == [[], []]


def test_the_process_says_whether_it_imported_torch(saved: Path) -> None:
    name = registry.record(saved)[0]
    checks = [[str(saved), name, 1, engine] for engine in ("onnx", "torch", "onnx")]
    lines = "".join(json.dumps(check) + "\n" for check in checks)
    process = subprocess.run(
        preflight.COMMAND, input=lines, capture_output=True, text=True, cwd=ROOT
    )
    results = [json.loads(line) for line in process.stdout.splitlines() if line]
    assert [result["engine"] for result in results] == ["onnx", "torch", "onnx"]
    assert [result["torch"] for result in results] == [False, True, True]


def test_a_process_that_ends_at_once_refuses_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "COMMAND", ("false",))
    for _ in range(5):  # it may end before or after the check is sent
        with pytest.raises(registry.RegistryError, match=r"ended its process \(1\)"):
            asyncio.run(Preflight(None).check(tmp_path, "new", 1, "auto"))


def test_the_output_of_libraries_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_worker(monkeypatch, tmp_path / "log", "{'a': 1}\n{}\n[1]\n" + GOOD)
    worker = Preflight(None)
    assert asyncio.run(worker.check(tmp_path, "new", 1, "auto")) == ("onnx", {})
    worker.stop()
