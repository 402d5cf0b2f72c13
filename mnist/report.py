"""A study one can look at: the page NAME.report.html, and its pictures and a note in
optuna-dashboard."""

import base64
import collections
import io
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from mnist import plots, registry
from mnist import study as studies
from mnist.display import describe_gain, format_params
from mnist.members import Member
from mnist.scores import calibration_error

ENDING = ".report.html"

Kept = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Report:
    """What is told of a saved model and of its study, which is a copy; pictures are PNG files."""

    name: str
    record: registry.Record
    study: optuna.Study
    kept: Kept
    of_study: dict[str, bytes]
    of_model: dict[str, bytes]

    @property
    def best(self) -> FrozenTrial:
        return self.study.trials[self.record["study"]["trial"]]


def make(member: Member, name: str, output: Path, artifacts: Path) -> None:
    """Explain a saved model and its study: a page beside the weights, pictures in the dashboard.

    Both are made once; the page again where it is missing. Nothing is done for a model that
    another machine saved: that one has what it takes.
    """
    if name not in registry.read(output)["models"]:
        return
    page, shown = output / f"{name}{ENDING}", member.run_locked(_shown)
    if page.exists() and name in shown:
        return
    with np.load(registry.file(output, name, "predictions")) as file:
        kept = dict(file)
    report = draw(member.run_locked(copy), name, registry.record(output, name)[1], kept)
    registry.put_beside(output, name, ENDING, write(report).encode())
    if name not in shown:
        where = f"Model: `{output / name}.pth`\n\nReport: `{page}`"
        member.run_locked(lambda study: show(study, report, artifacts, where))


def _shown(study: optuna.Study) -> list[str]:
    """The models whose pictures the study has, or had."""
    return study.user_attrs.get("reports", [])


def copy(study: optuna.Study) -> optuna.Study:
    """The study as it is now, in memory, to be looked at for as long as that takes."""
    memory = optuna.storages.InMemoryStorage()
    name = study.study_name
    optuna.copy_study(from_study_name=name, from_storage=study._storage, to_storage=memory)
    return optuna.load_study(study_name=name, storage=memory)


def draw(study: optuna.Study, name: str, record: registry.Record, kept: Kept) -> Report:
    """`kept` are the arrays of the model's predictions file, as release.evaluate() made them."""
    shares = studies.compute_importance(study) is not None
    of_study = plots.of_study(study, record["study"]["trial"], shares)
    of_model = plots.of_model(record["dataset"]["classes"], kept)
    return Report(name, record, study, kept, of_study, of_model)


# --- in words


def asked(report: Report) -> list[str]:
    """What the study was to find, in sentences."""
    record, options = report.record, report.record["options"]
    data, model, splits = record["dataset"], record["model"], record["dataset"]["splits"]
    kind = "grey" if data["channels"] == 1 else "colour"
    most = report.study.user_attrs.get("plan", {}).get("trial_samples", splits["train"])
    return [
        f"The best {listed(list(report.best.params))} for the network {model['name']} "
        f"({model['parameters']:,} parameters) on {data['name']}: {len(data['classes'])} classes "
        f"of {kind} images, {data['size']}x{data['size']}.",
        f"{record['study']['trials']} trials, each on at most {most:,} images (of "
        f"{splits['train']:,} for training), were compared on {splits['validation']:,} validation "
        f"images; sampler {options['sampler']}, pruner {options['pruner']}, seed {record['seed']}. "
        f"The final model was trained on both, and tested once on {splits['test']:,} images that "
        "nothing else has seen.",
    ]


def found(report: Report) -> list[str]:
    """How the study and its model turned out, in sentences."""
    summary = studies.summarise(report.study, report.best.number)
    counts, test = summary["trials"], report.record["metrics"]["test"]
    low, high = test["interval95"]
    engine = report.record.get("engines", {}).get("served", "torch")  # old records have none
    served = f"As it is served, in {engine}, it reads {test.get('served_errors')} wrong."
    return [
        f"{test['errors']:,} of {test['n']:,} test images are read wrong: {test['accuracy']:.2%} "
        f"are right (95 % interval {low:.2%} to {high:.2%}).",
        *([] if engine == "torch" else [served]),
        won(summary["best"], report.record["metrics"]["validation"]),
        compared(summary["best"], summary["first"]),
        *([f"{text[0].upper()}{text[1:]}."] if (text := describe_gain(report.record)) else []),
        f"{counts['complete']} trials were completed, {counts['pruned']} pruned, "
        f"{counts['fail']} failed.",
    ]


def won(best: dict[str, Any], confirmed: dict[str, Any]) -> str:
    text = (
        f"Trial {best['number']} won, with {format_params(best['params'])}: "
        f"{best['accuracy']:.2%} of the validation images right."
    )
    if confirmed["std"] is None:
        return text
    fresh = f"{confirmed['mean']:.2%} ± {confirmed['std']:.2%}"
    return f"{text} On {confirmed['seeds']} fresh seeds it is {fresh}."


def compared(best: dict[str, Any], first: dict[str, Any]) -> str:
    """The first trial beside the best one."""
    if first["number"] == best["number"]:
        return "It was the first trial."
    text = f"The first trial, with {format_params(first['params'])},"
    if first["state"] == "pruned":
        return f"{text} was pruned at {first['accuracy']:.2%}."
    points = 100 * (best["accuracy"] - first["accuracy"])
    compared = f"{abs(points):.2f} points {'less' if points >= 0 else 'more'}"
    return f"{text} reached {first['accuracy']:.2%}: {compared}."


def listed(names: list[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def span(distribution: BaseDistribution) -> str:
    """What a hyperparameter was drawn from: "32 to 256, on a log scale"."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    scale = ", on a log scale" if getattr(distribution, "log", False) else ""
    return f"{distribution.low:g} to {distribution.high:g}{scale}"  # type: ignore[attr-defined]


def failures(trials: list[FrozenTrial]) -> list[tuple[int, str]]:
    """How many trials failed for each kind of reason, the most frequent first, with an example."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    reasons = [trial.user_attrs.get("fail_reason", "no reason was recorded") for trial in failed]
    kinds = collections.Counter(reason.split(":")[0] for reason in reasons).most_common()
    return [(n, next(r for r in reasons if r.split(":")[0] == kind)) for kind, n in kinds]


# --- the page


def write(report: Report) -> str:
    """The page: HTML that needs nothing but itself."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    trials, kept, classes = report.study.trials, report.kept, report.record["dataset"]["classes"]
    return template.render(
        name=report.name,
        record=report.record,
        asked=asked(report),
        found=found(report),
        space={key: span(each) for key, each in report.best.distributions.items()},
        best=report.best.params,
        failures=failures(trials),
        set_aside=report.study.user_attrs.get("set_aside", {}),
        complete=sum(trial.state == TrialState.COMPLETE for trial in trials),
        images={
            key: base64.b64encode(png).decode()
            for key, png in (report.of_study | report.of_model).items()
        },
        counts=np.bincount(kept["labels"], minlength=len(classes)).tolist(),
        error=calibration_error(kept["probabilities"], kept["labels"]),
        mistakes=mistakes(classes, kept),
    )


def mistakes(classes: list[str], kept: Kept) -> list[str]:
    """The pictured mistakes in words, for who does not see them."""
    at = kept.get("mistakes", np.empty(0, np.int64))
    each = plots.told_wrong(classes, kept["probabilities"][at], kept["labels"][at])
    return [f"{true} read as {read}" for true, read, *_ in each]


# --- in optuna-dashboard


def show(study: optuna.Study, report: Report, artifacts: Path, where: str) -> None:
    """Attach the model's pictures to its trial, the others to the study, and write the note."""
    from optuna_dashboard import save_note

    if report.name in _shown(study):  # by another member, meanwhile
        return
    trial_id = study.get_trials(deepcopy=False)[report.best.number]._trial_id
    attach(study, "artifacts:", report.of_study, artifacts)
    # A finished trial takes no attributes any more; the dashboard looks here for its artifacts too.
    attach(study, f"dashboard:artifacts:{trial_id}:", report.of_model, artifacts)
    parts = ["## Asked", *asked(report), "## Found", *found(report), "## Where", where]
    save_note(study, "\n\n".join(parts))
    study.set_user_attr("reports", [*_shown(study), report.name])


def attach(study: optuna.Study, place: str, pictures: dict[str, bytes], folder: Path) -> None:
    """Make the pictures Optuna artifacts; those of an earlier model give way to them.

    An artifact's id follows from its study, place and name: nothing is attached twice, whenever
    a command was stopped.
    """
    storage, store = study._storage, FileSystemArtifactStore(folder)
    for key, png in pictures.items():
        artifact_id = str(uuid.uuid5(uuid.UUID(study.user_attrs["id"]), place + key))
        about = {"artifact_id": artifact_id, "filename": f"{key}.png"}
        kind = {"mimetype": "image/png", "encoding": None}
        store.write(artifact_id, io.BytesIO(png))
        storage.set_study_system_attr(
            study._study_id, place + artifact_id, json.dumps(about | kind)
        )
