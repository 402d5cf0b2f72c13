"""The release of the final model: folding, export, one evaluation, saving."""

import hashlib
import io
import logging
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial

from mnist import export, folding, models, plugins, registry, training
from mnist.job.display import Display
from mnist.job.state import Job, build_network, describe_origin, is_replaced
from mnist.search import study as studies
from mnist.search.workers import folder_bytes, load_checkpoint, save_checkpoint

MAX_MISTAKES = 24  # whose images are saved for the report
EVALUATION_BYTES = 10_000_000  # an upper bound on the size of a saved evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """Weights of a training form, with the hyperparameters of `best`, trained on training and
    validation images. `seconds`: the training time; None if an earlier process finished it."""

    best: FrozenTrial
    weights: dict[str, torch.Tensor]
    samples: int
    seconds: float | None


def save(job: Job, trained: TrainedModel, screen: Display) -> dict[str, Any] | None:
    """Export the model, evaluate it once on the test split and save it; returns the result.

    None where another member has replaced this one as the leader.
    """
    options, dataset, best = job.options, job.dataset, trained.best
    screen.print_line("evaluating, once, and saving")
    form = build_network(options, dataset, torch.device("cpu"))
    form.load_state_dict(trained.weights)
    form.eval()
    model = folding.fold(form).to(job.device)
    exported = export.export(model, dataset, folding.merge_norms(form))
    state, predictions = io.BytesIO(), io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, state)
    files = {"weights": (".pth", state.getvalue())} | exported.files
    digest = hashlib.sha256(files["weights"][1])
    digest.update(files.get(exported.served.engine, ("", b""))[1])
    if is_replaced(job):
        return None
    evaluation = evaluate(job, form, exported, job.folder / f"test-{digest.hexdigest()[:16]}.pt")
    scores = training.classification_scores(
        evaluation["probabilities"], evaluation["labels"], dataset.classes
    )
    served_errors = export.count_errors(evaluation["served"].numpy(), evaluation["labels"].numpy())
    record = {
        "dataset": dataset.record(scores["n"]),
        "model": {"name": options.model, "parameters": models.count_parameters(model)},
        "hyperparameters": best.params,
        "training": {
            "samples": trained.samples,
            "seconds": trained.seconds,
            "form": "factored" if folding.has_factors(form) else "plain",
            "bfloat16": job.plan.bfloat16,
        },
        "study": {
            "name": job.study.study_name,
            "id": job.member.study_id,
            "trial": best.number,
            "trials": job.member.run_locked(studies.count_finished),
            "worth": job.member.run_locked(
                lambda study: studies.gain_over_baselines(study, best.number)
            ),
        },
        "metrics": {
            "validation": validation_metrics(job, best),
            "calibration": exported.metrics,
            "test": scores | {"served_errors": served_errors},
        },
        "calibration": exported.calibration,
        "engines": {"served": exported.served.engine, "left_out": exported.left_out},
        "quick": options.quick,
        **describe_origin(options),
    }
    arrays: dict[str, Any] = {key: part.numpy() for key, part in evaluation.items()}
    np.savez_compressed(predictions, **arrays)
    files["predictions"] = (".test.npz", predictions.getvalue())
    if is_replaced(job):
        return None
    promote = options.promote
    if exported.served.engine == "torch" and plugins.is_from_plugin(models.NETWORKS[options.model]):
        log.warning("without ONNX nothing can serve a plugin's network; it is not made current")
        promote = "never"
    name = registry.save(options.output, files, record, promote)
    return registry.record(options.output, name)[1] | {"name": name}


def evaluate(
    job: Job, form: torch.nn.Module, exported: export.Export, path: Path
) -> dict[str, torch.Tensor]:
    """Predictions on the test split, which only this function opens.

    `probabilities` (N, classes) float32 of the weights, `served` those of the file that a server
    runs, `labels` (N,) int64, and of the weights' worst MAX_MISTAKES the indices `mistakes` (M,)
    int64 and `images` (M, channels, size, size) uint8. The training form stands in for the weights:
    it computes the same, of `parallel` in 3 instead of 16 s. They are saved at `path` until the
    model is saved, so that no process evaluates again after another one was killed in between.
    Raises OSError where the disk has no room for them.
    """
    evaluation = load_checkpoint(path)
    if evaluation is None:
        quota = job.options.disk_quota
        free_bytes = [shutil.disk_usage(job.folder).free]
        free_bytes += [] if quota is None else [quota - folder_bytes(job.options.artifacts)]
        if min(free_bytes) < EVALUATION_BYTES:
            raise OSError(f"no room for the evaluation in {job.folder}; it is not begun")
        test = job.dataset.open_test()
        images = test.images.to(job.device)
        temperature = exported.calibration["temperature"]
        narrow = folding.merge_norms(form).to(job.device)
        probabilities = training.predict(narrow, job.dataset, images, temperature)
        worst = training.worst_mistakes(probabilities, test.labels, MAX_MISTAKES)
        evaluation = {
            "probabilities": probabilities,
            "served": torch.from_numpy(exported.served(test.images.numpy())),
            "labels": test.labels,
            "mistakes": worst,
            "images": test.images[worst],
        }
        save_checkpoint(evaluation, path)
    return evaluation


def validation_metrics(job: Job, best: FrozenTrial) -> dict[str, Any]:
    """The winner's errors as a trial, and its accuracies on fresh seeds."""
    assert best.value is not None
    n = len(job.dataset.validation)
    confirmed = job.member.run_locked(lambda study: studies.confirmations(study, best.number))
    values = confirmed or [best.value]
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }
