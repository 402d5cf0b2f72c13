"""The release of the final model: folding, export, one evaluation, saving."""

import hashlib
import io
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial

from mnist import export, folding, memory, metrics, models, plugins, registry
from mnist.data import Dataset
from mnist.job.final import FinalTraining, TrainedModel
from mnist.job.options import Options
from mnist.job.results import describe_origin, find_result
from mnist.search import checkpoints, runs
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.runs import StudyConfig

MAX_MISTAKES = 24  # whose images are saved for the report
EVALUATION_BYTES = 10_000_000  # an upper bound on the size of a saved evaluation
POLL_INTERVAL_S = 1.0

log = logging.getLogger(__name__)


def finish(final: FinalTraining, load: Callable[[], Dataset]) -> dict[str, Any]:
    """The study's result (see find_result); only the leading member makes it.

    `load` loads the data, which the command does not keep during the training.
    """
    member, options, screen = final.member, final.options, final.screen
    while True:
        if member.become_leader():
            final.confirm()
            if result := find_result(member, options):
                screen.print_line(
                    f"trial {result['study']['trial']} is still the best; its saved model is kept"
                )
                return result
            trained = final.train()
            final.pool.shut_down()  # frees memory for the plain network and its export
            screen.print_line("evaluating, once, and saving")
            if result := save(trained, load(), member, options, final.config):
                return result
        screen.show_waiting("another process is finishing the study")
        time.sleep(POLL_INTERVAL_S)
        final.clock.check("another process has not finished the study yet")
        member.poll()
        if result := find_result(member, options):
            return result


def is_replaced(member: Member, options: Options) -> bool:
    """Whether another member leads or has finished the study, because this one was silent."""
    return not member.become_leader() or find_result(member, options) is not None


def save(
    trained: TrainedModel, dataset: Dataset, member: Member, options: Options, config: StudyConfig
) -> dict[str, Any] | None:
    """Export the model, evaluate it once on the test split and save it; returns the result.

    None where another member has replaced this one as the leader.
    """
    form = runs.build_network(config.network, dataset, config.plain)
    form.load_state_dict(trained.weights)
    model, merged = folding.fold(form.eval()), folding.merge_norms(form)
    exported = export.export(model, dataset, merged)
    files = {"weights": (".pth", state_dict_bytes(model))} | exported.files
    parameters = models.count_parameters(model)
    del model  # before the evaluation: with what the export has freed, 260 MB (`parallel`)
    memory.return_freed_memory()
    digest = hashlib.sha256(files["weights"][1])
    digest.update(files.get(exported.served.engine, ("", b""))[1])
    if is_replaced(member, options):
        return None
    path = config.checkpoints.evaluation(digest.hexdigest()[:16])
    evaluation = evaluate(merged, dataset, exported, path, options.disk_quota)
    record = {
        "dataset": dataset.record(len(evaluation["labels"])),
        "model": {"name": config.network, "parameters": parameters},
        "hyperparameters": trained.best.params,
        "training": {
            "samples": trained.samples,
            "seconds": trained.seconds,
            "form": "factored" if folding.has_factors(form) else "plain",
            "bfloat16": config.bfloat16,
        },
        "study": describe_study(member, trained.best),
        "metrics": {
            "validation": validation_metrics(member, trained.best, len(dataset.validation)),
            "calibration": exported.metrics,
            "test": test_metrics(evaluation, dataset),
        },
        "calibration": exported.calibration,
        "engines": {"served": exported.served.engine, "left_out": exported.left_out},
        "quick": options.quick,
        **describe_origin(options),
    }
    files["predictions"] = (".test.npz", compressed_bytes(evaluation))
    if is_replaced(member, options):
        return None
    promote = choose_promotion(options, config.network, exported.served.engine)
    name = registry.save(options.output, files, record, promote)
    return registry.record(options.output, name)[1] | {"name": name}


def choose_promotion(options: Options, network: str, engine: str) -> str:
    """--promote, or "never" for a model that no server can run."""
    if engine == "torch" and plugins.is_from_plugin(models.NETWORKS[network]):
        log.warning("a plugin's network cannot be served without ONNX; it does not become current")
        return "never"
    return options.promote


def state_dict_bytes(model: torch.nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, stream)
    return stream.getvalue()


def compressed_bytes(evaluation: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in evaluation.items()}
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    exported: export.Export,
    path: Path,
    quota: int | None,
) -> dict[str, torch.Tensor]:
    """Predictions of `model` on the test split, which only this function opens.

    `model` stands in for the saved weights: it computes the same, with narrow layers in 3 s instead
    of 16 (`parallel`, two cores of Zen 4).

    Returns `probabilities` (N, classes) float32, `served` those of the file that a server runs,
    `sets` (N, classes) bool its prediction sets, `labels` (N,) int64, and of the worst MAX_MISTAKES
    mistakes the indices `mistakes` (M,) int64 and `images` (M, channels, size, size) uint8. They
    are saved at `path` until the model is saved, so that no process evaluates again after another
    one was killed in between. Raises NoRoom where the disk or the quota has no room for them.
    """
    evaluation = checkpoints.load(path)
    if evaluation is None:
        if checkpoints.free_bytes(path.parent, quota) < EVALUATION_BYTES:
            needed = f"{EVALUATION_BYTES // 10**6} MB free in {path.parent}"
            raise checkpoints.NoRoom(f"the evaluation needs {needed}; it was not started")
        test = dataset.open_test()
        device = dataset.train.images.device
        probabilities = metrics.predict(
            model.to(device), dataset, test.images.to(device), exported.calibration["temperature"]
        )
        worst = metrics.worst_mistakes(probabilities, test.labels, MAX_MISTAKES)
        served = exported.served.predict(test.images.numpy())
        evaluation = {
            "probabilities": probabilities,
            "served": torch.from_numpy(served.probabilities),
            "labels": test.labels,
            "mistakes": worst,
            "images": test.images[worst],
        }
        if served.sets is not None:
            evaluation["sets"] = torch.from_numpy(served.sets)
        checkpoints.save(evaluation, path)
    return evaluation


def test_metrics(evaluation: dict[str, torch.Tensor], dataset: Dataset) -> dict[str, Any]:
    """The scores of the weights, and the errors and sets of the file that a server runs."""
    labels = evaluation["labels"]
    scores = metrics.classification_scores(evaluation["probabilities"], labels, dataset.classes)
    scores["served_errors"] = metrics.count_errors(evaluation["served"].numpy(), labels.numpy())
    if "sets" in evaluation:
        sets = evaluation["sets"]
        scores["coverage"] = float(sets[torch.arange(len(labels)), labels].float().mean())
        scores["set_size"] = float(sets.sum(1).float().mean())
    return scores


def describe_study(member: Member, best: FrozenTrial) -> dict[str, Any]:
    return {
        "name": member.name,
        "id": member.study_id,
        "trial": best.number,
        "trials": member.run_locked(studies.count_finished),
        "worth": member.run_locked(lambda study: studies.gain_over_baselines(study, best.number)),
    }


def validation_metrics(member: Member, best: FrozenTrial, n: int) -> dict[str, Any]:
    """The winner's errors as a trial, of `n` images, and its accuracies on fresh seeds."""
    assert best.value is not None
    confirmed = member.run_locked(lambda study: studies.confirmations(study, best.number))
    values = confirmed or [best.value]
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }
