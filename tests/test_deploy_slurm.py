"""deploy/slurm/search.sh on one node: a killed task, the exact number of trials, one model."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mnist import registry
from tests.conftest import DIGITS, ROOT
from tests.gates import Gates, until
from tests.soak import GATED

pytestmark = pytest.mark.deploy

TRIALS = 6
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

Slurm = Callable[..., str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def slurm(tmp_path: Path, postgresql: str) -> Iterator[Slurm]:
    """A function that runs a command of SLURM on a cluster of this machine."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmctld and slurmd need root")
    folder, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    folder.mkdir()
    config, key = folder / "slurm.conf", folder / "munge.key"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=[free_port(), free_port()]))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    names = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid"}
    names |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    munged = [
        "munged",
        "-F",
        "--force",
        *(f"--{key}={folder / name}" for key, name in names.items()),
    ]
    daemons = [munged, ["slurmctld", "-D", "-f", config], ["slurmd", "-D", "-f", config]]
    python = Path(sys.executable).parent
    environment = os.environ | {
        "SLURM_CONF": str(config),
        "STORAGE": postgresql,
        "PATH": f"{python}:{os.environ['PATH']}",
    }

    def call(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{Path(command[0]).name}.out").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command is munged:
                until(lambda: (folder / "munge.socket").exists(), "munged runs")
        until(
            lambda: "idle" in subprocess.getoutput(f"SLURM_CONF={config} sinfo"), "the node is up"
        )
        yield call
        call("scancel", "--user=root")
        until(lambda: not call("squeue", "--noheader"), "no job is left")
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def find_task(pid: int) -> str:
    """The number in the array of the task that a process belongs to."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.partition("=")[::2] for line in variables)["SLURM_ARRAY_TASK_ID"]


def test_a_killed_and_requeued_task_leaves_the_exact_number_of_trials_and_one_model(
    slurm: Slurm, postgresql: str, tmp_path: Path
) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    gates = Gates(tmp_path)
    gates.runs.allow(0)
    options = [*DIGITS, "--trials", str(TRIALS), "--import", str(GATED)]
    job = slurm("sbatch", "--parsable", str(ROOT / "deploy/slurm/search.sh"), *options).strip()

    def states() -> dict[str, str]:
        lines = slurm("scontrol", "-o", "show", "job", job).splitlines()
        parts = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]
        return {part["ArrayTaskId"]: part["JobState"] for part in parts}

    try:
        until(lambda: len(states()) == 3, "all tasks have begun")
        gates.hold(runs=1, reports=3)
        victim = find_task(gates.held()[0])
        slurm("scancel", "--signal=KILL", "--full", f"{job}_{victim}")
        until(lambda: states()[victim] not in ("RUNNING", "COMPLETING"), "the task is killed")
        gates.open()
        slurm("scontrol", "requeue", f"{job}_{victim}")
        slurm("scontrol", "update", f"JobId={job}_{victim}", "StartTime=now")  # SLURM waits 2 min
        until(lambda: set(states().values()) == {"COMPLETED"}, "all tasks are completed")
    finally:
        gates.open()
    storage = optuna.storages.RDBStorage(postgresql)
    trials = optuna.load_study(study_name=None, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(finished) == TRIALS
    assert not any(trial.state == TrialState.RUNNING for trial in trials)
    assert len({str(trial.params) for trial in finished}) == TRIALS  # none was run twice
    (model,) = registry.read(tmp_path / "saved_models")["models"]
    for task in "123":
        text = (tmp_path / f"search-{job}-{task}.log").read_text()
        assert f"model: saved_models/{model}.pth, current" in text, text
