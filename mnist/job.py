"""What one command works on: a study, its data and its plan, and what has come of it."""

import contextlib
import importlib.metadata
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from mnist import budget, data, folding, models, registry, search
from mnist import study as studies
from mnist.members import Member
from mnist.options import Options
from mnist.space import Space
from mnist.workers import Run, available_cores

TINY_LR = 1e-8  # with which a machine is measured: no step of it diverges
ABANDONED_S = 600  # writing a checkpoint takes seconds


@dataclass(frozen=True)
class Job:
    """What one command works on."""

    options: Options
    member: Member
    dataset: data.Dataset
    space: Space
    device: torch.device
    plan: budget.Plan
    trials: int
    confirmed: int  # so many of the best trials are confirmed on fresh seeds
    work: budget.Workload
    start: float
    latest: float

    @property
    def study(self) -> optuna.Study:
        return self.member.study

    @property
    def folder(self) -> Path:
        """For the checkpoints of this study; sweep() removes what no longer matters."""
        return self.options.artifacts / f"{self.study.study_name}-{self.member.study_id[:8]}"

    def in_time(self, otherwise: str) -> None:
        """Raises search.Unfinished once --timeout is over."""
        if time.monotonic() > self.latest:
            raise search.Unfinished(f"--timeout: {otherwise}")


def network(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """A new network for the data, in its training form unless --plain."""
    model = models.build(options.model, dataset.channels, dataset.size, len(dataset.classes))
    return (model if options.plain else folding.training_form(model)).to(device)


def speed_run(options: Options, params: dict[str, Any]) -> Run:
    """A few steps by all cores, to measure how fast they are."""
    params = params | {"lr": TINY_LR}
    return Run(
        options.model, params, 0, 0, measure=True, plain=options.plain, threads=available_cores()
    )


def winner(job: Job) -> FrozenTrial | None:
    return job.member.run_locked(lambda study: studies.select_winner(study, job.confirmed))


def result(job: Job) -> dict[str, Any] | None:
    """Name and record of the model that was saved from the study's winner, if there is one.

    It may be in the registry of another machine: then the study itself has its record.
    """
    best, asked = winner(job), job.options.final_epochs
    if best is None:
        return None
    here = registry.read(job.options.output)["models"]
    elsewhere = job.member.run_locked(lambda study: study.user_attrs.get("result", {}))
    for name, record in [*reversed(here.items()), *elsewhere.items()]:
        about = record["study"]
        same = (about.get("id"), about.get("trial")) == (job.member.study_id, best.number)
        if same and asked in (None, record.get("options", {}).get("final_epochs")):
            return record | {"name": name}
    return None


def replaced(job: Job) -> bool:
    """Whether another member finishes the study by now, or has finished it: this one was silent."""
    return not job.member.become_leader() or result(job) is not None


def publish(job: Job, done: dict[str, Any]) -> None:
    """Let members on other machines know the result."""
    entry = {done["name"]: {key: value for key, value in done.items() if key != "name"}}

    def change(study: optuna.Study) -> None:
        if list(study.user_attrs.get("result", {})) != list(entry):
            study.set_user_attr("result", entry)

    job.member.run_locked(change)


def sweep(job: Job) -> None:
    """Remove checkpoints that no longer matter; where the study is finished, these are all but
    those of trials that wait for a larger --trials."""
    paths = list(job.folder.glob("*"))  # first: what others begin from now on is not among them
    trials = job.member.run_locked(lambda study: study.get_trials(deepcopy=False))
    wanted = {f"trial-{trial.number}.pt" for trial in trials if not trial.state.is_finished()}
    over = result(job) is not None and all(trial.state != TrialState.RUNNING for trial in trials)
    for path in paths:
        with contextlib.suppress(OSError):  # it is gone, or no file of ours
            killed = path.suffix == ".tmp" and time.time() - path.stat().st_mtime > ABANDONED_S
            if path.name not in wanted and (over or killed or path.name.startswith("trial-")):
                path.unlink()
    if over:
        with contextlib.suppress(OSError):  # one is wanted, or the folder is gone
            job.folder.rmdir()


def origin(options: Options) -> dict[str, Any]:
    """What else produced a study or a model: options, plugins, seed, versions, commit."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "optuna")}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "options": options.record(),
        "imports": {path.name: path.read_text() for path in options.import_},
        "seed": options.seed,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this code, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
