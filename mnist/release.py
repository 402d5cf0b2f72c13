"""The final model as a user gets it: lowered, exported, evaluated once, saved."""

import contextlib
import hashlib
import io
import logging
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial

from mnist import export, lowrank, models, own, registry, training
from mnist import study as studies
from mnist.display import Display
from mnist.job import LOWERED_SHARE, Job, lowering, network, origin, replaced
from mnist.workers import CHECKPOINT_S, keep, restore, used

RANK_IMAGES = 1_000  # training images from which layers of low rank are learnt
# With a tenth of the model's work, as in `parallel`, such layers see half as many images again as
# it did (job.LOWERED_SHARE of its time); never over twice as many.
LOWERED_MOST = 2.0
LOWERED_HOW = {"batch_size": 50, "optimizer": "Adam", "lr": 0.0005, "weight_decay": 0.0}
MISTAKES = 24  # whose images are kept, to be looked at
EVALUATION_BYTES = 10_000_000  # more than what is kept of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Weights trained as `best` was, on training and validation images.

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
    options, dataset, best, weights = job.options, job.dataset, trained.best, trained.weights
    model = network(job.options, job.dataset, job.device)
    model.load_state_dict(weights)
    lowered = lower(job, trained, model, screen) if lowering(options) else None
    screen.say("evaluating, once, and saving")
    exported = export.export(model, dataset, lowered)
    state, predictions = io.BytesIO(), io.BytesIO()
    torch.save(weights, state)
    files = {"weights": (".pth", state.getvalue())} | exported.files
    evaluated = files["weights"][1] + files.get(exported.served.engine, ("", b""))[1]
    digest = hashlib.sha256(evaluated).hexdigest()
    if replaced(job):
        return None
    found = evaluate(job, model, exported, job.folder / f"test-{digest[:16]}.pt")
    scores = training.scores(found["probabilities"], found["labels"], dataset.classes)
    served_errors = export.errors(found["served"].numpy(), found["labels"].numpy())
    record = {
        "dataset": dataset.record(scores["n"]),
        "model": {"name": options.model, "parameters": models.parameters(model)},
        "hyperparameters": best.params,
        "training": {"samples": trained.samples, "seconds": trained.seconds},
        "study": {
            "name": job.study.study_name,
            "id": job.member.study_id,
            "trial": best.number,
            "trials": job.member.update(studies.finished),
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
    if exported.served.engine == "torch" and own.made(models.NETWORKS[options.model]):
        log.warning("without ONNX nothing can serve a network of one's own; it is not made current")
        promote = "never"
    name = registry.save(options.output, files, record, promote)
    return registry.record(options.output, name)[1] | {"name": name}


def lower(job: Job, trained: Trained, model: torch.nn.Module, screen: Display) -> bytes | None:
    """The model with less work (mnist.lowrank), trained on for a while; ONNX in float32.

    It is kept until the model is saved: who takes over from a process that was killed goes on with
    the same. None where no layer gains, the time is over, or a network of one's own does not allow
    it.
    """
    path = job.folder / f"lowered-{trained.best.number}-{trained.samples}.pt"
    quota = job.options.disk_quota
    if (kept := restore(path)) is not None:
        return kept["onnx"].numpy().tobytes() or None
    content = b""
    try:
        if lowered := lowered_by(job, trained, model, screen, path.with_suffix(".checkpoint.pt")):
            content = export.to_onnx(lowered, job.dataset)
    except Exception as error:  # noqa: BLE001 - whatever a network of one's own raises
        log.warning("int8 goes without layers of low rank: %s", str(error) or repr(error))
    with contextlib.suppress(OSError):  # without it all goes on as well, unless it is killed
        keep({"onnx": torch.from_numpy(np.frombuffer(content, np.uint8).copy())}, path, quota)
    return content or None


def lowered_by(
    job: Job, trained: Trained, model: torch.nn.Module, screen: Display, checkpoint: Path
) -> torch.nn.Module | None:
    """The lowered model, trained on from the checkpoint, if there is one; None if nothing gains.

    Raises TimeoutError where the time is over, and what a network of one's own raises.
    """
    dataset, seed = job.dataset, studies.seed_of(job.options.seed)
    some = dataset.train.images[:RANK_IMAGES].to(job.device)
    torch.manual_seed(seed)
    lowered = lowrank.lower(model, training.standardise(some, dataset))
    if lowered is None:
        return None
    samples = round(min(LOWERED_SHARE / lowered.work, LOWERED_MOST) * trained.samples)
    screen.say(f"for int8: the model in {lowered.work:.0%} of its work, {samples:,} images more")
    saved = time.monotonic()
    for progress in training.fit(
        lowered.model,
        dataset,
        dataset.train + dataset.validation,
        **trained.best.params | LOWERED_HOW,
        samples=samples,
        seed=seed,
        micro_batch=studies.micro_batch(trained.best),
        resume=restore(checkpoint),
    ):
        screen.training("low rank", progress, LOWERED_SHARE * job.plan.final_s)
        if time.monotonic() > job.latest:
            raise TimeoutError("--timeout")
        if time.monotonic() - saved > CHECKPOINT_S and progress.state:
            keep(progress.state(), checkpoint, job.options.disk_quota)
            saved = time.monotonic()
    return lowered.model


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
    kept = restore(path)
    if kept is None:
        quota = job.options.disk_quota
        room = [shutil.disk_usage(job.folder).free]
        room += [] if quota is None else [quota - used(job.options.artifacts)]
        if min(room) < EVALUATION_BYTES:
            raise OSError(f"no room for the evaluation in {job.folder}; it is not begun")
        test = job.dataset.open_test()
        images = test.images.to(job.device)
        about = exported.calibration.get("full", exported.calibration)
        probabilities = training.predict(model, job.dataset, images, about["temperature"])
        worst = training.worst(probabilities, test.labels, MISTAKES)
        kept = {
            "probabilities": probabilities,
            "served": torch.from_numpy(exported.served(test.images.numpy())),
            "labels": test.labels,
            "mistakes": worst,
            "images": test.images[worst],
        }
        keep(kept, path)
    return kept


def validation(job: Job, best: FrozenTrial) -> dict[str, Any]:
    """The winner's errors as a trial, and its accuracy on fresh seeds."""
    assert best.value is not None
    n = len(job.dataset.validation)
    fresh = job.member.update(lambda study: studies.confirmations(study, best.number))
    values = fresh or [best.value]
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }
