"""The result of a study, here and on other machines, and the origin of what is stored."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist import plugins, registry
from mnist.job.options import Options
from mnist.registry.records import mask_storage_urls
from mnist.search import study as studies
from mnist.search.checkpoints import Checkpoints
from mnist.search.members import Member
from mnist.search.storage import StorageError


def select_winner(member: Member, options: Options) -> FrozenTrial | None:
    return member.run_locked(lambda study: studies.select_winner(study, options.confirmed))


def find_result(member: Member, options: Options) -> dict[str, Any] | None:
    """The name and record of the model saved from the study's winner; None where there is none.

    The model may be in another machine's registry; the study then has a copy of the record.
    """
    best = select_winner(member, options)
    if best is None:
        return None
    local = registry.read(options.output)["models"]
    remote = member.run_locked(lambda study: study.user_attrs.get("result", {}))
    mask_storage_urls(remote)
    for name, record in [*reversed(local.items()), *remote.items()]:
        study = record["study"]
        is_winner = (study.get("id"), study.get("trial")) == (member.study_id, best.number)
        final_epochs = record.get("options", {}).get("final_epochs")
        if is_winner and options.final_epochs in (None, final_epochs):
            return record | {"name": name}
    return None


def publish_result(member: Member, result: dict[str, Any]) -> None:
    """Store the result with the study, for members on other machines."""
    entry = {result["name"]: {key: value for key, value in result.items() if key != "name"}}

    def change(study: optuna.Study) -> None:
        if list(study.user_attrs.get("result", {})) != list(entry):
            study.set_user_attr("result", entry)

    member.run_locked(change)


def find_place(options: Options, name: str) -> str:
    """Where a model is: "current" or "saved" in this registry, or "elsewhere": on the machine that
    finished the study. Raises registry.RegistryError where its weights are missing or altered."""
    local = registry.read(options.output)
    if name not in local["models"]:
        return "elsewhere"
    registry.file(options.output, name)  # verifies the weights
    return "current" if local["current"] == name else "saved"


def save_forecasts(member: Member, seconds: float, forecasts: list[tuple[float, float]]) -> None:
    """Store a command's forecasts and duration with the study, for benchmarks.forecasts."""
    timing = {"seconds": round(seconds, 1), "forecasts": forecasts}
    with contextlib.suppress(StorageError):  # the model is already saved
        member.run_locked(lambda study: study.set_user_attr("time", timing))


def remove_stale_files(member: Member, options: Options, checkpoints: Checkpoints) -> None:
    """Remove checkpoints of finished trials; of a finished study all checkpoints, except those of
    trials that wait for a larger --trials."""
    files = checkpoints.files()  # before the trials: files of later trials are not listed
    trials = member.run_locked(lambda study: study.get_trials(deepcopy=False))
    needed = {checkpoints.trial(t.number) for t in trials if not t.state.is_finished()}
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    finished = find_result(member, options) is not None and not running
    checkpoints.remove(files, needed, finished)


def describe_origin(options: Options) -> dict[str, Any]:
    """How a study or a model was made: options, plugins, seed, versions, commit."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "optuna")}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "options": options.record(),
        "imports": {path.name: plugins.read_source(path) for path in options.import_},
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
