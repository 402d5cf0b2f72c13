"""The final model as a user gets it: folded, exported, evaluated once, saved."""

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
from mnist import study as studies
from mnist.display import Display
from mnist.job import Job, network, origin, replaced
from mnist.workers import folder_bytes, load_checkpoint, save_checkpoint

MISTAKES = 24  # whose images are kept, to be looked at
EVALUATION_BYTES = 10_000_000  # more than what is kept of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Weights of a training form, trained as `best` was on training and validation images.

    `seconds` of all that training; None where it was over when this process came.
    """

    best: FrozenTrial
    weights: dict[str, torch.Tensor]
    samples: int
    seconds: float | None


def save(job: Job, trained: Trained, screen: Display) -> dict[str, Any] | None:
    """Measure the finished model, open the test split this one time, save; the result().

    None where this member was replaced meanwhile.
    """
    options, dataset, best = job.options, job.dataset, trained.best
    screen.print_line("evaluating, once, and saving")
    form = network(options, dataset, torch.device("cpu"))
    form.load_state_dict(trained.weights)
    form.eval()
    model = folding.fold(form).to(job.device)
    exported = export.export(model, dataset, folding.merge_norms(form))
    state, predictions = io.BytesIO(), io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, state)
    files = {"weights": (".pth", state.getvalue())} | exported.files
    digest = hashlib.sha256(files["weights"][1])
    digest.update(files.get(exported.served.engine, ("", b""))[1])
    if replaced(job):
        return None
    found = evaluate(job, model, exported, job.folder / f"test-{digest.hexdigest()[:16]}.pt")
    scores = training.classification_scores(
        found["probabilities"], found["labels"], dataset.classes
    )
    served_errors = export.errors(found["served"].numpy(), found["labels"].numpy())
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
            "validation": validation(job, best),
            "calibration": exported.metrics,
            "test": scores | {"served_errors": served_errors},
        },
        "calibration": exported.calibration,
        "engines": {"served": exported.served.engine, "left_out": exported.left_out},
        "quick": options.quick,
        **origin(options),
    }
    parts: dict[str, Any] = {key: part.numpy() for key, part in found.items()}
    np.savez_compressed(predictions, **parts)
    files["predictions"] = (".test.npz", predictions.getvalue())
    if replaced(job):
        return None
    promote = options.promote
    if exported.served.engine == "torch" and plugins.is_from_plugin(models.NETWORKS[options.model]):
        log.warning("without ONNX nothing can serve a plugin's network; it is not made current")
        promote = "never"
    name = registry.save(options.output, files, record, promote)
    return registry.record(options.output, name)[1] | {"name": name}


def evaluate(
    job: Job, model: torch.nn.Module, exported: export.Export, path: Path
) -> dict[str, torch.Tensor]:
    """What is found on the test split, which is opened here only.

    `probabilities` (N, classes) float32 of the weights and, as `served`, those of the file that is
    served, `labels` (N,) int64; of the weights' worst MISTAKES the indices `mistakes` (M,) int64
    and `images` (M, channels, size, size) uint8.
    They are kept at `path` until the model is saved: who takes over from a process that was killed
    in between does not evaluate again. Raises OSError where there is no room for them.
    """
    kept = load_checkpoint(path)
    if kept is None:
        quota = job.options.disk_quota
        room = [shutil.disk_usage(job.folder).free]
        room += [] if quota is None else [quota - folder_bytes(job.options.artifacts)]
        if min(room) < EVALUATION_BYTES:
            raise OSError(f"no room for the evaluation in {job.folder}; it is not begun")
        test = job.dataset.open_test()
        images = test.images.to(job.device)
        temperature = exported.calibration["temperature"]
        probabilities = training.predict(model, job.dataset, images, temperature)
        worst = training.worst_mistakes(probabilities, test.labels, MISTAKES)
        kept = {
            "probabilities": probabilities,
            "served": torch.from_numpy(exported.served(test.images.numpy())),
            "labels": test.labels,
            "mistakes": worst,
            "images": test.images[worst],
        }
        save_checkpoint(kept, path)
    return kept


def validation(job: Job, best: FrozenTrial) -> dict[str, Any]:
    """The winner's errors as a trial, and its accuracy on fresh seeds."""
    assert best.value is not None
    n = len(job.dataset.validation)
    fresh = job.member.run_locked(lambda study: studies.confirmations(study, best.number))
    values = fresh or [best.value]
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }
