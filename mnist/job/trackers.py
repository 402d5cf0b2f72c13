"""Experiment trackers (--track): one class for each, which writes an Entry as a run.

A tracker's package is imported only where its class is instantiated.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import click

CALL_TIMEOUT_S = 10  # of one request to a tracker's server
UPLOAD_TIMEOUT_S = 60  # of the rest of a run's data in Weights & Biases
PROJECT = "mnist"  # in Weights & Biases, unless WANDB_PROJECT names another one
COMPLETED = "logged"  # the file that marks a run of Weights & Biases as completely written
# Nothing but the runs themselves leaves the machine, and nothing disturbs the command's output.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}


@dataclass(frozen=True)
class Entry:
    """A run as a tracker shows it: a trial or the final model.

    `curve` has validation accuracies (0..1) by the number of images seen, `record` is JSON.
    """

    study: str
    study_id: str
    name: str  # unique in its study, as "trial 3"
    state: str  # complete, pruned, fail
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    start: datetime
    end: datetime
    curve: Mapping[int, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same in each command that logs this entry."""
        return re.sub(r"\W+", "-", f"{self.study_id[:12]}-{self.name}")


class Tracker(Protocol):
    """Writes runs to one place. Methods raise whatever the tracker's package raises."""

    def log(self, entry: Entry) -> None:
        """Write the run, unless it is there."""


class MLflow:
    """Runs in MLflow: at MLFLOW_TRACKING_URI, else in mlflow.db and mlruns/ of `folder`."""

    def __init__(self, folder: Path) -> None:
        timeouts = {"TIMEOUT": str(CALL_TIMEOUT_S), "MAX_RETRIES": "1"}
        defaults = {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in timeouts.items()}
        for name, value in (QUIET | defaults).items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it announces each retry
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        self.files_uri = None if uri else (folder.absolute() / "mlruns").as_uri()

    def log(self, entry: Entry) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = self._find_run(entry)
        if run_id is None:
            return
        end = int(entry.end.timestamp() * 1000)
        metrics = [Metric(name, value, end, 0) for name, value in entry.metrics.items()]
        metrics += [Metric("validation_accuracy", y, end, x) for x, y in entry.curve.items()]
        params = [Param(name, str(value)) for name, value in entry.params.items()]
        self.client.log_batch(run_id, metrics, params, [RunTag("state", entry.state)])
        for path in entry.files:
            self.client.log_artifact(run_id, str(path))
        if entry.record:
            self.client.log_dict(run_id, dict(entry.record), "record.json")
        status = {"complete": "FINISHED", "fail": "FAILED"}.get(entry.state, "KILLED")
        self.client.set_terminated(run_id, status, end)

    def _find_run(self, entry: Entry) -> str | None:
        """The id of a new run, or of one that an interrupted command began; None if it is there."""
        experiment = self.client.get_experiment_by_name(entry.study)
        if experiment:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = self.client.create_experiment(entry.study, self.files_uri)
        query = f"tags.entry = '{entry.id}'"
        for run in self.client.search_runs([experiment_id], query, max_results=1):
            return run.info.run_id if run.info.status == "RUNNING" else None
        start = int(entry.start.timestamp() * 1000)
        run = self.client.create_run(experiment_id, start, {"entry": entry.id}, entry.name)
        return run.info.run_id


class WandB:
    """Runs in Weights & Biases; offline, in wandb/ of `folder`, where WANDB_API_KEY is not set."""

    def __init__(self, folder: Path) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import wandb

        has_key = "WANDB_API_KEY" in os.environ
        self.wandb, self.folder = wandb, folder.absolute()
        self.mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self.settings = wandb.Settings(
            silent=True, console="off", disable_git=True, init_timeout=CALL_TIMEOUT_S,
            finish_timeout=UPLOAD_TIMEOUT_S, finish_timeout_raises=True,
            x_disable_stats=True, x_disable_meta=True, disable_code=True,
        )  # fmt: skip

    def log(self, entry: Entry) -> None:
        for earlier in (self.folder / "wandb").glob(f"*run-*-{entry.id}"):
            if (earlier / COMPLETED).exists():
                return
            shutil.rmtree(earlier)  # of an interrupted command
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run = self.wandb.init(
            project=project, group=entry.study, name=entry.name, id=entry.id, resume="allow",
            dir=self.folder, mode=self.mode, config={**entry.params, "state": entry.state},
            reinit="create_new", settings=self.settings,
        )  # fmt: skip
        for images, accuracy in entry.curve.items():
            run.log({"validation_accuracy": accuracy}, step=images)
        run.summary.update(dict(entry.metrics))
        if entry.files:
            artifact = self.wandb.Artifact(entry.id, type="model", metadata=dict(entry.record))
            for path in entry.files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
        place = Path(run.dir).parent
        run.finish(exit_code=int(entry.state == "fail"))
        (place / COMPLETED).touch()


class TensorBoard:
    """A folder of event files for each run, in tensorboard/STUDY/ of `folder`."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter, summary

        self.writer, self.hparams = SummaryWriter, summary.hparams
        self.folder = folder / "tensorboard"

    def log(self, entry: Entry) -> None:
        place = self.folder / entry.study.replace("/", "_")[:60] / entry.id
        partial = place.with_name(f".{place.name}")  # a run is there completely, or not at all
        if place.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        with self.writer(str(partial)) as writer:
            for images, accuracy in entry.curve.items():
                writer.add_scalar("validation_accuracy", accuracy, images)
            for name, value in entry.metrics.items():
                writer.add_scalar(name, value)
            params = {**entry.params, "state": entry.state}
            for summary in self.hparams(params, dict(entry.metrics)):  # add_hparams: another folder
                writer.file_writer.add_summary(summary)
            if entry.record:
                text = json.dumps(entry.record, indent=2, default=str)
                writer.add_text("record", text)
        partial.rename(place)


@dataclass(frozen=True)
class Package:
    """The package of a tracker, and the version that was tested."""

    tracker: type[Any]
    module: str
    requirement: str


TRACKERS = {
    "mlflow": Package(MLflow, "mlflow", "mlflow==3.17.2"),
    "wandb": Package(WandB, "wandb", "wandb==0.31.0"),
    "tensorboard": Package(TensorBoard, "tensorboardX", "tensorboardX==2.6.5"),
}


def check_installed(ctx: click.Context, param: click.Parameter, names: tuple[str, ...]) -> Any:
    """Raise click.BadParameter for a tracker whose package is missing; it is not imported."""
    for name in names:
        package = TRACKERS[name]
        if importlib.util.find_spec(package.module) is None:
            text = f"{name} needs another package: pip install {package.requirement}"
            raise click.BadParameter(text, ctx, param)
    return tuple(dict.fromkeys(names))
