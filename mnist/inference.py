"""Saved model -> a function from images to probabilities; imports torch only if needed."""

import math
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mnist import conformal, ood, registry
from mnist.ood import OutOfDistributionScore
from mnist.process import available_cores

if TYPE_CHECKING:
    from torch import nn

ENGINE_FILES = {"onnx_int8": "onnx_int8", "onnx": "onnx", "torch": "weights"}
"""Engine -> the kind of file it runs, in the order in which "auto" tries them on a CPU."""
NVIDIA = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # a machine with a GPU has one of these

# Largest difference of a golden probability. Between ONNX Runtime with and without optimisations,
# the same files differed by 0.007 in int8 and by 1e-6 otherwise, over 2,500 images.
TOLERANCE = {"onnx_int8": 0.02, "onnx": 1e-4, "torch": 1e-4}
BATCH_SIZE = 64  # larger batches are no faster and take more memory

Outputs = tuple[np.ndarray, np.ndarray]
"""Logits (N, classes) and features (N, d), both float32; d is 0 for old models."""
Runner = Callable[[np.ndarray], Outputs]
"""Images uint8 (N, channels, size, size), as images.normalise returns them -> Outputs."""


class Predictions(NamedTuple):
    """The predictions of a classifier for N pictures.

    `probabilities` (N, classes) float32; whether each picture is `uncertain` (N,) bool; the
    prediction `sets` (N, classes) bool of conformal.make_sets, None for models without limits.
    """

    probabilities: np.ndarray
    uncertain: np.ndarray
    sets: np.ndarray | None

    def labels(self, i: int, classes: Sequence[str]) -> list[str] | None:
        """The classes in the prediction set of picture i, the most likely one first."""
        if self.sets is None:
            return None
        ranking = (-self.probabilities[i]).argsort(kind="stable")
        return [classes[k] for k in ranking if self.sets[i, k]]


@dataclass(frozen=True)
class Classifier:
    """A function from images uint8 (N, channels, size, size) to probabilities.

    `engine` is the one that runs; `skipped_engines` maps better engines to the reasons why they
    do not. A picture whose score is below `uncertain_below` does not look like any class; the score
    is that of `ood_score`, or without one the largest logit. `set_limits` are those of prediction
    sets.
    """

    engine: str
    run: Runner
    temperature: float = 1.0
    skipped_engines: Mapping[str, str] = field(default_factory=dict)
    ood_score: OutOfDistributionScore | None = None
    uncertain_below: float = -math.inf
    set_limits: conformal.Limits | None = None

    def outputs(self, images: np.ndarray) -> Outputs:
        """Logits (N, classes), before the temperature, and features (N, d); float32."""
        parts = [self.run(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)]
        logits, features = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(features)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32, before the temperature."""
        return self.outputs(images)[0]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities (N, classes) float32; each row has the sum 1."""
        return probabilities(self.logits(images), self.temperature)

    def predict(self, images: np.ndarray) -> Predictions:
        """Predict probabilities, uncertain pictures and prediction sets."""
        parts = [
            self._predict_batch(images[i : i + BATCH_SIZE])
            for i in range(0, len(images), BATCH_SIZE)
        ]
        shares, uncertain, sets = zip(*parts, strict=True)
        joined = None if self.set_limits is None else np.concatenate(sets)
        return Predictions(np.concatenate(shares), np.concatenate(uncertain), joined)

    def _predict_batch(self, images: np.ndarray) -> Predictions:
        logits, features = self.run(images)
        shares, scores = probabilities(logits, self.temperature), self.scores(logits, features)
        limits = self.set_limits
        sets = None if limits is None else conformal.make_sets(shares, scores, limits)
        return Predictions(shares, scores < self.uncertain_below, sets)

    def scores(self, logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Scores (N,) float32, high for pictures that look like a class."""
        return self.ood_score(features) if self.ood_score else logits.max(1)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The softmax of logits (N, classes) divided by the temperature, for training and serving.

    A temperature above 1 lowers the confidence (Guo et al. 2017, arXiv 1706.04599).
    """
    scaled = (logits - logits.max(1, keepdims=True)) / np.float32(temperature)
    exponentials = np.exp(scaled)
    return exponentials / exponentials.sum(1, keepdims=True)


def load(
    folder: Path,
    name: str | None = None,
    threads: int | None = None,
    engine: str = "auto",
    preflighted: bool = False,
    coverage: float = conformal.DEFAULT_COVERAGE,
) -> Classifier:
    """The classifier of a saved model, by default the current one.

    `engine` is one of ENGINE_FILES, or "auto" for the first usable one; on a GPU, torch comes
    before the others, which run on the CPU. An engine is usable if its file exists and its
    probabilities for the golden inputs are those of the time of saving, to within TOLERANCE, as
    processors differ: on some, int8 sums overflow. The golden inputs also warm the engine up. If
    another process has just checked the same model (`preflighted`), the first of them is enough.
    `coverage` is that of prediction sets.

    Raises ValueError for an unknown engine; registry.RegistryError where the model does not exist,
    one of its files is missing or altered, or no engine can run it.
    """
    if engine not in ("auto", *ENGINE_FILES):
        raise ValueError(f"unknown engine {engine!r}; known: auto, {', '.join(ENGINE_FILES)}")
    name, record = registry.record(folder, name)
    golden = _load_golden(folder, name, record)
    if preflighted:
        golden = {key: part[:1] for key, part in golden.items()}
    left_out = record.get("engines", {}).get("left_out", {})
    reasons: dict[str, str] = {}
    candidates = [engine]
    if engine == "auto":
        candidates = sorted(ENGINE_FILES, key="torch".__ne__) if _has_gpu() else [*ENGINE_FILES]
    for candidate in candidates:
        kind = ENGINE_FILES[candidate]
        if kind not in record["files"]:
            reasons[candidate] = left_out.get(candidate, f"there is no {kind} file")
            continue
        path = registry.file(folder, name, kind)
        calibration = _load_calibration(folder, name, record, candidate, coverage)
        try:
            is_torch = candidate == "torch"
            run = _load_torch(path, record, threads) if is_torch else onnx_runner(path, threads)
            classifier = Classifier(candidate, run, skipped_engines=reasons, **calibration)
            _check_golden(classifier, golden, len(record["dataset"]["classes"]))
            return classifier
        except Exception as error:  # noqa: BLE001 - errors of pickles and runtimes share no class
            reasons[candidate] = textwrap.shorten(str(error), 150)  # torch writes paragraphs
    text = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise registry.RegistryError(f"model {name} cannot be loaded: {text}")


def onnx_runner(model: Path | bytes, threads: int | None = None) -> Runner:
    """Run an ONNX file, or its content, with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    # Threads spin within a run, but not until the next run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # only errors, as the warnings do not concern serving
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: _normalise_features(*session.run(None, {name: images}))


def torch_runner(model: "nn.Module", mean: float, std: float) -> Runner:
    """Run a network with torch, on its device; `mean` and `std` are those of its data set."""
    import torch

    from mnist import models

    network = models.WithFeatures(model).eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    lock = threading.Lock()  # WithFeatures registers hooks on the layers for each call

    @torch.inference_mode()
    def run(images: np.ndarray) -> Outputs:
        with lock:
            outputs = network((torch.from_numpy(images).to(device).float() / 255 - mean) / std)
        return _normalise_features(*(output.cpu().numpy() for output in outputs))

    return run


def _normalise_features(logits: np.ndarray, *features: np.ndarray) -> Outputs:
    """Scale the features of each layer to unit length, and join the layers."""
    if not features:
        return logits, np.empty((len(logits), 0), np.float32)
    joined, widths = np.concatenate(features, 1), [part.shape[1] for part in features]
    starts = np.cumsum([0, *widths[:-1]])
    norms = np.sqrt(np.add.reduceat(joined**2, starts, axis=1))
    return logits, joined / np.repeat(np.maximum(norms, 1e-9), widths, axis=1)


def _load_torch(path: Path, record: registry.Record, threads: int | None) -> Runner:
    import torch

    from mnist import models

    data = record["dataset"]
    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cores()))
    network = record["model"]["name"]
    model = models.build(network, data["channels"], data["size"], len(data["classes"]))
    # Memory-mapped: reading a large layer in one call would block a processor for a while.
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    if _has_gpu():
        torch.backends.cudnn.allow_tf32 = False  # TF32 exceeds TOLERANCE
        model.cuda()
    return torch_runner(model, data["mean"], data["std"])


def _has_gpu() -> bool:
    """Whether torch can use a GPU. Checks device files first, as importing torch takes seconds."""
    if not any(path.exists() for path in NVIDIA):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _load_calibration(
    folder: Path, name: str, record: registry.Record, engine: str, coverage: float
) -> dict[str, Any]:
    """A Classifier's arguments from the record's `calibration`; old records lack some.

    Records from before training forms have a `full` entry for float32, as int8 was of another
    network.
    """
    entry, kind = record.get("calibration", {}), "likeness"
    if engine != "onnx_int8" and "full" in entry:
        entry, kind = entry["full"], "full_likeness"
    settings: dict[str, Any] = {
        key: entry[key] for key in ("temperature", "uncertain_below") if key in entry
    }
    settings["set_limits"] = conformal.choose(entry.get("prediction_sets", {}), coverage)
    if kind in record["files"]:
        settings["ood_score"] = ood.load(registry.file(folder, name, kind))
    return settings


def _load_golden(folder: Path, name: str, record: registry.Record) -> dict[str, np.ndarray]:
    """`images`, and each engine's probabilities for them; old records: only a blank image."""
    if "golden" in record["files"]:
        with np.load(registry.file(folder, name, "golden")) as golden:
            return dict(golden)
    data = record["dataset"]
    return {"images": np.zeros((1, data["channels"], data["size"], data["size"]), np.uint8)}


def _check_golden(classifier: Classifier, golden: dict[str, Any], classes: int) -> None:
    """Raise ValueError where the classifier differs from the saved one; also a warm-up."""
    images = golden["images"]
    for batch in (images[:1], images):
        predicted = classifier.predict(batch).probabilities
        if predicted.shape != (len(batch), classes) or not np.isfinite(predicted).all():
            raise ValueError(f"it gives no {classes} probabilities, but {predicted.shape[1:]}")
        if "torch" in golden:  # probabilities within the tolerance have the same class
            difference = float(np.abs(predicted - golden[classifier.engine][: len(batch)]).max())
            if difference > TOLERANCE[classifier.engine]:
                limit = TOLERANCE[classifier.engine]
                raise ValueError(
                    f"golden inputs: probabilities are off by {difference:.3g}, over {limit}"
                )
