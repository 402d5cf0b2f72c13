"""The program of a SageMaker training job: run.py with SageMaker's folders and hyperparameters.

A hyperparameter of the job is an option of run.py ("trials": 64, "quick": true), or one entry of
the search space ("lr": 0.001, "batch_size": "int:32:256:log").
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mnist import disk  # noqa: E402
from mnist.job.options import Options  # noqa: E402
from mnist.search.space import HYPERPARAMETERS  # noqa: E402

OPTIONS = {field.name for field in dataclasses.fields(Options)}

# SageMaker copies this folder to S3 all the time, and back before a job that was interrupted.
CHECKPOINTS = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml")) / "checkpoints"
SNAPSHOT_INTERVAL_S = 15.0


def make_options(hyperparameters: dict[str, Any], channel: str | None) -> list[str]:
    """The options of run.py for a job's hyperparameters and for the folder of its channel `train`.

    The channel has the files of the data set that the job names, else a folder for each class.
    """
    options = []
    for name, value in hyperparameters.items():
        for item in value if isinstance(value, list) else [value]:
            if name in HYPERPARAMETERS.keys() - OPTIONS:
                options += ["--param", f"{name}={item}"]
            elif item is True:
                options.append(f"--{name.replace('_', '-')}")
            elif item is not False:
                options += [f"--{name.replace('_', '-')}", str(item)]
    if channel and "dataset" in hyperparameters:
        options += ["--data-dir", channel]
    elif channel:
        options += ["--dataset", f"folder:{channel}"]
    return options


def save_study(database: Path) -> None:
    """Copy the study to the checkpoints, as it is between two transactions.

    The database itself is elsewhere: SageMaker would copy it in the middle of a transaction.
    """
    if not database.exists():
        return
    copy = database.with_suffix(".copy")
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    disk.replace_file(CHECKPOINTS / "db.sqlite3", copy.read_bytes())


def train(options: list[str], folder: Path) -> list[dict[str, Any]] | int:
    """Run run.py with its study in `folder`, continued from the checkpoints if they have one.

    Returns the result of each study, or its exit code if that is not 0.
    """
    database, output = folder / "db.sqlite3", folder / "result.json"
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(CHECKPOINTS / database.name, database)
    command = [sys.executable, str(ROOT / "run.py"), *options, "--json"]
    command += ["--storage", f"sqlite:///{database}", "--artifacts", str(CHECKPOINTS / "artifacts")]
    command += ["--output", str(CHECKPOINTS / "saved_models")]
    with (
        output.open("wb") as stream,
        forward_signals(subprocess.Popen(command, stdout=stream)) as p,
    ):
        while p.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(SNAPSHOT_INTERVAL_S)
            save_study(database)
    if p.returncode:
        return p.returncode
    results = json.loads(output.read_text())
    return results if isinstance(results, list) else [results]


@contextlib.contextmanager
def forward_signals(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Forward SIGTERM, by which SageMaker announces the end: run.py then requeues its trial."""
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    with process:
        yield process


def main() -> int:
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    hyperparameters = json.loads(os.environ.get("SM_HPS", "{}"))
    options = make_options(hyperparameters, os.environ.get("SM_CHANNEL_TRAIN"))
    with tempfile.TemporaryDirectory() as folder:
        results = train(options, Path(folder))
    if isinstance(results, int):
        return results
    models = Path(os.environ["SM_MODEL_DIR"])  # becomes model.tar.gz
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(CHECKPOINTS / "saved_models", models, ignore=hidden, dirs_exist_ok=True)
    for result in results:
        accuracy = result["metrics"]["validation"]["mean"]
        print(f"validation_accuracy={accuracy:.6f};", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
