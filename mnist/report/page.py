"""The report of a study: the page NAME.report.html, and figures and a note in optuna-dashboard."""

import base64
import collections
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from mnist import conformal, registry
from mnist.report import model_plots, plots
from mnist.report.text import describe_gain, format_params
from mnist.scores import calibration_error
from mnist.search import summary as summaries
from mnist.search.members import Member

SUFFIX = ".report.html"

Predictions = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Report:
    """The content of a report; `study` is a copy in memory, figures are PNG files by name."""

    name: str
    record: registry.Record
    study: optuna.Study
    predictions: Predictions
    study_figures: dict[str, bytes]
    model_figures: dict[str, bytes]

    @property
    def best(self) -> FrozenTrial:
        return self.study.trials[self.record["study"]["trial"]]


def make(member: Member, name: str, output: Path, artifacts: Path) -> None:
    """Write the report page next to the weights, and add the figures to the dashboard.

    Both are made once; a missing page is made again. A model in another machine's registry is
    skipped, as only that machine has its files.
    """
    if name not in registry.read(output)["models"]:
        return
    page, reported = output / f"{name}{SUFFIX}", member.run_locked(_reported_models)
    if page.exists() and name in reported:
        return
    with np.load(registry.file(output, name, "predictions")) as file:
        predictions = dict(file)
    study, record = member.run_locked(copy_to_memory), registry.record(output, name)[1]
    report = draw(study, name, record, predictions)
    html = render_page(report).encode(errors="backslashreplace")
    registry.attach_file(output, name, SUFFIX, html)
    if name not in reported:
        location = f"Model: `{output / name}.pth`\n\nReport: `{page}`"
        member.run_locked(lambda study: add_to_dashboard(study, report, artifacts, location))


def _reported_models(study: optuna.Study) -> list[str]:
    """The models whose figures were added to the study."""
    return study.user_attrs.get("reports", [])


def copy_to_memory(study: optuna.Study) -> optuna.Study:
    """A snapshot of the study in memory, which needs no lock while figures are drawn."""
    memory = optuna.storages.InMemoryStorage()
    name = study.study_name
    optuna.copy_study(from_study_name=name, from_storage=study._storage, to_storage=memory)
    return optuna.load_study(study_name=name, storage=memory)


def draw(
    study: optuna.Study, name: str, record: registry.Record, predictions: Predictions
) -> Report:
    """Draw the figures; `predictions` are the arrays of release.evaluate()."""
    with_importance = summaries.compute_importance(study) is not None
    study_figures = plots.plot_study(study, record["study"]["trial"], with_importance)
    model_figures = model_plots.plot_model(record["dataset"]["classes"], predictions)
    return Report(name, record, study, predictions, study_figures, model_figures)


# --- the text


def describe_task(report: Report) -> list[str]:
    """Sentences about the task of the study."""
    record, options = report.record, report.record["options"]
    data, model, splits = record["dataset"], record["model"], record["dataset"]["splits"]
    colour = "grey" if data["channels"] == 1 else "colour"
    samples = report.study.user_attrs.get("plan", {}).get("trial_samples", splits["train"])
    return [
        f"The best {join_words(list(report.best.params))} for the network {model['name']} "
        f"({model['parameters']:,} parameters) on {data['name']}: {len(data['classes'])} classes "
        f"of {colour} images, {data['size']}x{data['size']}.",
        f"{record['study']['trials']} trials, each on at most {samples:,} images (of "
        f"{splits['train']:,} for training), were compared on {splits['validation']:,} validation "
        f"images; sampler {options['sampler']}, pruner {options['pruner']}, seed {record['seed']}. "
        f"The final model was trained on both, and tested once on {splits['test']:,} images that "
        "nothing else has seen.",
    ]


def describe_result(report: Report) -> list[str]:
    """Sentences about the result of the study."""
    summary = summaries.summarise(report.study, report.best.number)
    counts, test = summary["trials"], report.record["metrics"]["test"]
    low, high = test["interval95"]
    engine = report.record.get("engines", {}).get("served", "torch")  # old records have none
    served = f"As served, in {engine}, the model makes {test.get('served_errors')} errors."
    return [
        f"{test['errors']:,} of {test['n']:,} test images are misclassified: the accuracy "
        f"is {test['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}).",
        *([] if engine == "torch" else [served]),
        *describe_sets(report.record),
        describe_winner(summary["best"], report.record["metrics"]["validation"]),
        describe_first(summary["best"], summary["first"]),
        *([f"{text[0].upper()}{text[1:]}."] if (text := describe_gain(report.record)) else []),
        f"{counts['complete']} trials were completed, {counts['pruned']} pruned, "
        f"{counts['fail']} failed.",
    ]


def describe_sets(record: Mapping[str, Any]) -> list[str]:
    """A sentence about the prediction sets; none for old records."""
    test, calibration = record["metrics"]["test"], record.get("calibration", {})
    stored = calibration.get("prediction_sets", {})
    limits = conformal.choose(stored, conformal.DEFAULT_COVERAGE)
    if "coverage" not in test or limits is None:
        return []
    return [
        f"The prediction sets contain the true class of {test['coverage']:.2%} of the test images "
        f"({100 * limits.coverage:.4g} % is the target), and have {test['set_size']:.3f} classes "
        "on average."
    ]


def describe_winner(best: dict[str, Any], confirmed: dict[str, Any]) -> str:
    text = (
        f"Trial {best['number']} won, with {format_params(best['params'])}: "
        f"{best['accuracy']:.2%} of the validation images were classified correctly."
    )
    if confirmed["std"] is None:
        return text
    fresh = f"{confirmed['mean']:.2%} ± {confirmed['std']:.2%}"
    return f"{text} On {confirmed['seeds']} fresh seeds it is {fresh}."


def describe_first(best: dict[str, Any], first: dict[str, Any]) -> str:
    """The first trial compared with the best one."""
    if first["number"] == best["number"]:
        return "It was the first trial."
    text = f"The first trial, with {format_params(first['params'])},"
    if first["state"] == "pruned":
        return f"{text} was pruned at {first['accuracy']:.2%}."
    points = 100 * (best["accuracy"] - first["accuracy"])
    compared = f"{abs(points):.2f} points {'less' if points >= 0 else 'more'}"
    return f"{text} reached {first['accuracy']:.2%}: {compared}."


def join_words(names: list[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def describe_distribution(distribution: BaseDistribution) -> str:
    """A distribution in words, such as "32 to 256, on a log scale"."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    scale = ", on a log scale" if getattr(distribution, "log", False) else ""
    return f"{distribution.low:g} to {distribution.high:g}{scale}"  # type: ignore[attr-defined]


def count_failures(trials: list[FrozenTrial]) -> list[tuple[int, str]]:
    """The number of failed trials by kind of reason, the most frequent first, with an example."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    reasons = [trial.user_attrs.get("fail_reason", "no reason was recorded") for trial in failed]
    kinds = collections.Counter(reason.split(":")[0] for reason in reasons).most_common()
    return [(n, next(r for r in reasons if r.split(":")[0] == kind)) for kind, n in kinds]


# --- the page


def render_page(report: Report) -> str:
    """The report as HTML without external files."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    trials, predictions = report.study.trials, report.predictions
    classes, distributions = report.record["dataset"]["classes"], report.best.distributions
    return template.render(
        name=report.name,
        record=report.record,
        task=describe_task(report),
        result=describe_result(report),
        space={name: describe_distribution(value) for name, value in distributions.items()},
        best=report.best.params,
        failures=count_failures(trials),
        set_aside=report.study.user_attrs.get("set_aside", {}),
        complete=sum(trial.state == TrialState.COMPLETE for trial in trials),
        images={
            key: base64.b64encode(png).decode()
            for key, png in (report.study_figures | report.model_figures).items()
        },
        counts=np.bincount(predictions["labels"], minlength=len(classes)).tolist(),
        error=calibration_error(predictions["probabilities"], predictions["labels"]),
        mistakes=describe_mistakes(classes, predictions),
    )


def describe_mistakes(classes: list[str], predictions: Predictions) -> list[str]:
    """The mistakes in the figure as text, for readers who do not see it."""
    at = predictions.get("mistakes", np.empty(0, np.int64))
    probabilities, labels = predictions["probabilities"][at], predictions["labels"][at]
    mistakes = model_plots.list_mistakes(classes, probabilities, labels)
    return [f"{true} predicted as {read}" for true, read, *_ in mistakes]


# --- in optuna-dashboard


def add_to_dashboard(study: optuna.Study, report: Report, artifacts: Path, location: str) -> None:
    """Attach the model's figures to its trial, the others to the study, and write the note."""
    from optuna_dashboard import save_note

    if report.name in _reported_models(study):  # another member added it meanwhile
        return
    trial_id = study.get_trials(deepcopy=False)[report.best.number]._trial_id
    attach_artifacts(study, "artifacts:", report.study_figures, artifacts)
    # A finished trial takes no attributes; the dashboard also reads this key for its artifacts.
    attach_artifacts(study, f"dashboard:artifacts:{trial_id}:", report.model_figures, artifacts)
    task, result = describe_task(report), describe_result(report)
    parts = ["## What was asked", *task, "## What was found", *result, "## Files", location]
    save_note(study, "\n\n".join(parts))
    study.set_user_attr("reports", [*_reported_models(study), report.name])


def attach_artifacts(
    study: optuna.Study, prefix: str, pictures: dict[str, bytes], folder: Path
) -> None:
    """Store figures as Optuna artifacts; they replace those of an earlier model.

    An artifact's id follows from its study, place and name, so an interrupted command attaches
    nothing twice.
    """
    storage, store = study._storage, FileSystemArtifactStore(folder)
    for key, png in pictures.items():
        artifact_id = str(uuid.uuid5(uuid.UUID(study.user_attrs["id"]), prefix + key))
        entry = {"artifact_id": artifact_id, "filename": f"{key}.png"}
        media_type = {"mimetype": "image/png", "encoding": None}
        store.write(artifact_id, io.BytesIO(png))
        storage.set_study_system_attr(
            study._study_id, prefix + artifact_id, json.dumps(entry | media_type)
        )
