"""The state of one command: its study, data and plan, and the study's result."""

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

from mnist import data, folding, models, registry
from mnist.job.options import Options
from mnist.search import budget, loop
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.space import Space
from mnist.search.workers import Run, available_cores

MEASURE_LR = 1e-8  # of speed measurements: no step diverges
STALE_AFTER_S = 600  # age at which a temporary file is abandoned; writing one takes seconds


@dataclass(frozen=True)
class Job:
    """The state of one command."""

    options: Options
    member: Member
    dataset: data.Dataset
    space: Space
    device: torch.device
    plan: budget.Plan
    trials: int
    confirm: int  # number of best trials that are confirmed on fresh seeds
    work: budget.Workload
    start: float
    deadline: float

    @property
    def study(self) -> optuna.Study:
        return self.member.study

    @property
    def folder(self) -> Path:
        """The folder of this study's checkpoints; remove_stale_files() cleans it."""
        return self.options.artifacts / f"{self.study.study_name}-{self.member.study_id[:8]}"

    def check_timeout(self, unfinished: str) -> None:
        """Raise loop.Unfinished after the deadline of --timeout."""
        if time.monotonic() > self.deadline:
            raise loop.Unfinished(f"--timeout: {unfinished}")


def build_network(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """Build a new network for the data, in its training form unless --plain."""
    model = models.build(options.model, dataset.channels, dataset.size, len(dataset.classes))
    return (model if options.plain else folding.training_form(model)).to(device)


def make_speed_run(options: Options, params: dict[str, Any]) -> Run:
    """A run that measures the speed of a few steps on all cores."""
    params = params | {"lr": MEASURE_LR}
    return Run(
        options.model, params, 0, 0, measure=True, plain=options.plain, threads=available_cores()
    )


def select_winner(job: Job) -> FrozenTrial | None:
    return job.member.run_locked(lambda study: studies.select_winner(study, job.confirm))


def find_result(job: Job) -> dict[str, Any] | None:
    """The name and record of the model saved from the study's winner; None where there is none.

    The model may be in another machine's registry; the study then has a copy of the record.
    """
    best, final_epochs = select_winner(job), job.options.final_epochs
    if best is None:
        return None
    local = registry.read(job.options.output)["models"]
    remote = job.member.run_locked(lambda study: study.user_attrs.get("result", {}))
    for name, record in [*reversed(local.items()), *remote.items()]:
        study = record["study"]
        is_winner = (study.get("id"), study.get("trial")) == (job.member.study_id, best.number)
        if is_winner and final_epochs in (None, record.get("options", {}).get("final_epochs")):
            return record | {"name": name}
    return None


def is_replaced(job: Job) -> bool:
    """Whether another member has the lead or has finished the study, as this one was silent."""
    return not job.member.become_leader() or find_result(job) is not None


def publish_result(job: Job, result: dict[str, Any]) -> None:
    """Store the result with the study, for members on other machines."""
    entry = {result["name"]: {key: value for key, value in result.items() if key != "name"}}

    def change(study: optuna.Study) -> None:
        if list(study.user_attrs.get("result", {})) != list(entry):
            study.set_user_attr("result", entry)

    job.member.run_locked(change)


def remove_stale_files(job: Job) -> None:
    """Remove checkpoints of finished trials; of a finished study all checkpoints, except those of
    trials that wait for a larger --trials."""
    paths = list(job.folder.glob("*"))  # before the trials: files of later trials are not listed
    trials = job.member.run_locked(lambda study: study.get_trials(deepcopy=False))
    needed = {f"trial-{trial.number}.pt" for trial in trials if not trial.state.is_finished()}
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    finished = find_result(job) is not None and not running
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it, or it is a folder
            stale = path.suffix == ".tmp" and time.time() - path.stat().st_mtime > STALE_AFTER_S
            if path.name not in needed and (finished or stale or path.name.startswith("trial-")):
                path.unlink()
    if finished:
        with contextlib.suppress(OSError):  # a file is needed, or the folder does not exist
            job.folder.rmdir()


def describe_origin(options: Options) -> dict[str, Any]:
    """How a study or a model was made: options, plugins, seed, versions, commit."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "optuna")}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "options": options.record(),
        "imports": {path.name: path.read_text() for path in options.import_},
        "seed": options.seed,
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The git commit of this code; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
