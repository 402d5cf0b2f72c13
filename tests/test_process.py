"""mnist/process.py; and no process of the project writes into the home folder."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import load, servers
from mnist import inference, process, registry
from mnist.process import available_cores, extend_environment
from mnist.search.workers import training_threads
from serve.batching import Batcher
from tests.conftest import ROOT, empty_home
from tests.test_app import png
from tests.test_batching import run

MAX = "max 100000"
PICTURE = png(np.eye(28, dtype=np.uint8) * 255)
LIBRARY = """
import sys
from pathlib import Path
from mnist import inference
inference.load(Path(sys.argv[1]))
"""


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler would let this process use 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def make_proc(folder: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A process's folder in /proc, and files of control groups in folder/sys, a mount point."""
    for name, text in files.items():
        file = folder / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (folder / "cgroup").write_text(f"{cgroup}\n")
    (folder / "mountinfo").write_text(mounts.replace("SYS", str(folder / "sys")) + "\n")
    return folder


# A file system of no interest, without a source; cgroup v2; cgroup v1.
OTHER = "22 1 8:1 / / rw shared:1 - tmpfs  rw\n"
V2 = OTHER + "35 31 0:30 / SYS rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = OTHER + "33 31 0:29 {} SYS/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "34 31 0:31 / SYS/memory rw - cgroup cgroup rw,memory"
V1_GROUPS = "4:memory:/\n1:cpu,cpuacct:/docker/x/inner\n0::/"


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("group", "quotas", "cores"),
    [
        ("/", {"cpu.max": "200000 100000"}, 2),  # a container's own namespace
        ("/", {"cpu.max": MAX}, 64),
        ("/", {"other": ""}, 64),  # the root of a machine has no quota
        ("/", {"cpu.max": "150000 100000"}, 2),
        ("/", {"cpu.max": "25000 50000"}, 1),
        ("/", {"cpu.max": "9000000 100000"}, 64),  # more than the affinity
        ("/a/b", {"a/b/cpu.max": MAX, "a/cpu.max": "300000 100000"}, 3),
        ("/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": MAX, "cpu.max": MAX}, 3),
        ("/a/b", {"a/b/cpu.max": "300000 100000", "cpu.max": "100000 50000"}, 2),
        ("/a/b", {"a/b/cpu.max": "100000 50000", "cpu.max": "300000 100000"}, 2),
        ("/a", {"b/cpu.max": "100000 100000"}, 64),  # another process's
        ("/../b", {"b/cpu.max": "100000 100000", "cpu.max": "200000 100000"}, 2),
    ],
)
def test_the_smallest_quota_around_the_process_limits_its_cores(
    tmp_path: Path, group: str, quotas: dict[str, str], cores: int
) -> None:
    assert available_cores(make_proc(tmp_path, f"0::{group}", V2, quotas)) == cores


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize("root", ["/", "/docker/x"])
@pytest.mark.parametrize(
    ("outer", "inner", "cores"), [(-1, -1, 64), (200_000, -1, 2), (-1, 150_000, 2), (300_000, 1, 1)]
)
def test_quotas_of_the_first_version_limit_the_cores(
    tmp_path: Path, root: str, outer: int, inner: int, cores: int
) -> None:
    container = "cpu/docker/x" if root == "/" else "cpu"  # what of the machine is mounted
    files = {
        f"{container}/cpu.cfs_quota_us": str(outer),
        f"{container}/cpu.cfs_period_us": "100000",
        f"{container}/inner/cpu.cfs_quota_us": str(inner),
        f"{container}/inner/cpu.cfs_period_us": "100000",
        "memory/cpu.cfs_quota_us": "100000",
        "memory/cpu.cfs_period_us": "100000",
    }
    proc = make_proc(tmp_path, V1_GROUPS, V1.format(root), files)
    assert available_cores(proc) == cores


def machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limits", "memory"),
    [
        ({"memory.max": "536870912"}, 512 * 2**20),
        ({"memory.max": "max"}, None),
        ({"other": ""}, None),
        ({"a/memory.max": "max", "memory.max": "1048576"}, 2**20),
        ({"a/memory.max": "1048576", "memory.max": "2097152"}, 2**20),
        ({"memory.max": str(2**60)}, None),  # more than the machine has
    ],
)
def test_the_smallest_memory_limit_around_the_process_counts(
    tmp_path: Path, limits: dict[str, str], memory: int | None
) -> None:
    proc = make_proc(tmp_path, "0::/a", V2, limits)
    assert process.total_memory(proc) == (memory or machine_memory())


def test_memory_limits_of_the_first_version_count(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": "1048576", "cpu/memory.limit_in_bytes": "1"}
    proc = make_proc(tmp_path, V1_GROUPS, V1.format("/docker/x"), files)
    assert process.total_memory(proc) == 2**20
    assert process.total_memory(tmp_path / "none") == machine_memory()


@pytest.mark.usefixtures("many_cores")
def test_without_control_groups_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available_cores(tmp_path) == 64
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert available_cores(tmp_path) == 8


@pytest.mark.usefixtures("many_cores")
def test_training_and_serving_use_the_available_cores(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("mnist.inference", "mnist.search.workers", "serve.batching"):
        monkeypatch.setattr(f"{module}.available_cores", lambda: 1)
    assert training_threads() == 1

    async def count_batch_threads(queue: Batcher, _: object) -> int:
        return queue.threads

    monkeypatch.delenv("THREADS", raising=False)
    assert run(count_batch_threads) == 1
    file, threads, spinning = registry.file(saved, saved_name(saved), "onnx"), [], []
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, **_: (
            threads.append(options.intra_op_num_threads)
            or spinning.append(options.get_session_config_entry("session.force_spinning_stop"))
            or MagicMock()
        ),
    )
    inference.onnx_runner(file)
    inference.onnx_runner(file, threads=3)
    assert threads == [1, 3]  # numbers, so that ONNX Runtime pins no thread to a core
    assert spinning == ["1", "1"]  # no thread spins until the next request
    before = torch.get_num_threads()
    inference.load(saved, engine="torch")
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 1


def test_openmp_s_setting_limits_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, threads in (("3", 3), ("2,4", 2), (" 2 , 4", 2), ("0", 1), ("x", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
        assert training_threads() == threads


def test_the_environment_is_extended_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with suppress(OSError), extend_environment(SET="a", UNSET="b"):
        monkeypatch.setenv("OTHER", "kept")
        assert (os.environ["SET"], os.environ["UNSET"]) == ("a", "b")
        raise OSError
    assert (os.environ["SET"], os.environ.get("UNSET")) == ("before", None)
    assert os.environ["OTHER"] == "kept"


def test_a_run_writes_nothing_into_the_home_folder(saved: Path) -> None:
    assert not [*(saved.parent / "home").rglob("*")]


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "mnist.predict", "picture.png", "--plot", "out.png", "--models"),
        ("-m", "mnist.registry", "--folder"),
        ("-m", "serve.preflight_worker"),
        ("-c", LIBRARY),
    ],
    ids=["predict", "registry", "preflight", "library"],
)
def test_no_command_writes_into_the_home_folder(
    saved: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURE)
    environment = empty_home(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    last = ["list"] if "mnist.registry" in command else []
    check = json.dumps([str(saved), saved_name(saved), 1, "auto"])
    subprocess.run(
        [sys.executable, *command, str(saved), *last],
        cwd=tmp_path, env=environment, input=check.encode(), capture_output=True, check=True,
    )  # fmt: skip
    assert not [*(tmp_path / "home").rglob("*")]


def saved_name(folder: Path) -> str:
    return json.loads((folder / "model_info.json").read_text())["current"]


def test_the_server_writes_nothing_into_the_home_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", empty_home(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    with servers.server(saved, load.request("/predict", PICTURE)):
        pass
    assert not [*(tmp_path / "home").rglob("*")]


@pytest.mark.slow
def test_the_server_looks_up_no_name(saved: Path, tmp_path: Path) -> None:
    """With telemetry, ONNX Runtime looks up its host some 12 s after the start."""
    trace = tmp_path / "trace"
    strace = ["strace", "-fqq", "-e", "trace=connect", "-o", str(trace)]
    if shutil.which("strace") is None or subprocess.run([*strace, "true"], check=False).returncode:
        pytest.skip("strace is not installed, or may not trace")
    done = subprocess.run(
        [*strace, "timeout", "40", sys.executable, "-m", "uvicorn", "serve.app:app", "--port", "0"],
        cwd=ROOT, env=empty_home(tmp_path / "home") | {"MODELS": str(saved)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Application startup complete" in done.stderr
    assert "Application shutdown complete" in done.stderr
    assert "htons(53)" not in trace.read_text()  # the port of name servers
