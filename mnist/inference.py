"""A saved record -> a function from images to probabilities; torch is imported only if needed."""

import math
import os
import textwrap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist import ood, registry
from mnist.ood import OutOfDistributionScore

if TYPE_CHECKING:
    from torch import nn

FILES = {"onnx_int8": "onnx_int8", "onnx": "onnx", "torch": "weights"}
"""Engine -> the kind of file it runs, in the order in which "auto" tries them on a CPU."""
NVIDIA = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of which one is there where a GPU is

# Largest difference of a golden probability. Where the same files were carried out in another way
# (ONNX Runtime without its optimisations), it was 0.007 in int8 and 1e-6 else, over 2,500 images.
TOLERANCE = {"onnx_int8": 0.02, "onnx": 1e-4, "torch": 1e-4}
PART = 64  # images at a time; more are no faster, and take memory

Outputs = tuple[np.ndarray, np.ndarray]
"""Logits (N, classes) and features (N, d), both float32; old models have none: d is 0."""
Run = Callable[[np.ndarray], Outputs]
"""images uint8 (N, channels, size, size), as images.normalise gives -> Outputs"""


@dataclass(frozen=True)
class Classifier:
    """Called with images uint8 (N, channels, size, size), it gives their probabilities.

    `engine` carries it out; `passed_over` has the better engines that do not, and why. What has a
    score below `uncertain_below` does not look like any class; the score is that of `ood_score`,
    or, where there is none, the largest logit.
    """

    engine: str
    run: Run
    temperature: float = 1.0
    passed_over: Mapping[str, str] = field(default_factory=dict)
    ood_score: OutOfDistributionScore | None = None
    uncertain_below: float = -math.inf

    def outputs(self, images: np.ndarray) -> Outputs:
        """Logits (N, classes), before the temperature, and features (N, d); float32."""
        parts = [self.run(images[i : i + PART]) for i in range(0, len(images), PART)]
        logits, features = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(features)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(N, classes) float32, before the temperature."""
        return self.outputs(images)[0]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, classes) float32, each row of which has the sum 1."""
        return probabilities(self.logits(images), self.temperature)

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities, and whether each image is uncertain: (N,) bool."""
        logits, features = self.outputs(images)
        uncertain = self.scores(logits, features) < self.uncertain_below
        return probabilities(logits, self.temperature), uncertain

    def scores(self, logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(N,) float32, high for what looks like a class."""
        return self.ood_score(features) if self.ood_score else logits.max(1)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The softmax of logits (N, classes) over the temperature: the one place where that is done.

    A temperature above 1 makes a model less sure (Guo et al. 2017, arXiv 1706.04599).
    """
    scaled = (logits - logits.max(1, keepdims=True)) / np.float32(temperature)
    shares = np.exp(scaled)
    return shares / shares.sum(1, keepdims=True)


def load(
    folder: Path,
    name: str | None = None,
    threads: int | None = None,
    engine: str = "auto",
    tried: bool = False,
) -> Classifier:
    """The classifier of one saved model, the current one by default.

    `engine` is one of FILES, or "auto" for the first of them that can, where there is a GPU torch
    before the others, which run on the CPU. An engine can if its file is there and gives for the
    golden inputs what it gave when the model was saved, to within TOLERANCE. For processors
    differ: int8 sums overflow on some. The golden inputs are the warm-up, too; if another process
    has just `tried` the same, the first of them is enough.

    Raises ValueError for an unknown engine; registry.RegistryError where there is no such model,
    a file of it is missing or altered, or no engine can run it.
    """
    if engine not in ("auto", *FILES):
        raise ValueError(f"unknown engine {engine!r}; known: auto, {', '.join(FILES)}")
    name, record = registry.record(folder, name)
    golden = _golden(folder, name, record)
    if tried:
        golden = {key: part[:1] for key, part in golden.items()}
    left_out = record.get("engines", {}).get("left_out", {})
    why: dict[str, str] = {}
    candidates = [engine]
    if engine == "auto":
        candidates = sorted(FILES, key="torch".__ne__) if _has_gpu() else [*FILES]
    for candidate in candidates:
        if FILES[candidate] not in record["files"]:
            why[candidate] = left_out.get(candidate, f"there is no {FILES[candidate]} file")
            continue
        path = registry.file(folder, name, FILES[candidate])
        calibrated = _calibrated(folder, name, record, candidate)
        try:
            run = _torch(path, record, threads) if candidate == "torch" else by_onnx(path, threads)
            classifier = Classifier(candidate, run, passed_over=why, **calibrated)
            _verify(classifier, golden, len(record["dataset"]["classes"]))
            return classifier
        except Exception as error:  # noqa: BLE001 - of a pickle or a runtime: no common class
            why[candidate] = textwrap.shorten(str(error), 150)  # torch writes paragraphs
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in why.items())
    raise registry.RegistryError(f"model {name} cannot be loaded: {reasons}")


def by_onnx(model: Path | bytes, threads: int | None = None) -> Run:
    """An ONNX file, or its content, carried out by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    # Threads wait busily within a run, but not for the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors; what it warns of is not for who serves a model
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: _joined(*session.run(None, {name: images}))


def by_torch(model: "nn.Module", mean: float, std: float) -> Run:
    """A network in torch, where it is; `mean` and `std` are those of its data set."""
    import torch

    from mnist import models

    watched = models.WithFeatures(model).eval()
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    alone = threading.Lock()  # `watched` hangs what it looks for on the network's own layers

    @torch.inference_mode()
    def run(images: np.ndarray) -> Outputs:
        with alone:
            outputs = watched((torch.from_numpy(images).to(device).float() / 255 - mean) / std)
        return _joined(*(each.cpu().numpy() for each in outputs))

    return run


def _joined(logits: np.ndarray, *features: np.ndarray) -> Outputs:
    """Each layer's features brought to the length 1, in one row."""
    if not features:
        return logits, np.empty((len(logits), 0), np.float32)
    joined, widths = np.concatenate(features, 1), [part.shape[1] for part in features]
    starts = np.cumsum([0, *widths[:-1]])
    lengths = np.sqrt(np.add.reduceat(joined**2, starts, axis=1))
    return logits, joined / np.repeat(np.maximum(lengths, 1e-9), widths, axis=1)


def _torch(path: Path, record: registry.Record, threads: int | None) -> Run:
    import torch

    from mnist import models

    data = record["dataset"]
    if threads is not None:
        torch.set_num_threads(threads)
    network = record["model"]["name"]
    model = models.build(network, data["channels"], data["size"], len(data["classes"]))
    # Mapped: to read a large layer in one call keeps a processor from all others for a while.
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    if _has_gpu():
        torch.backends.cudnn.allow_tf32 = False  # it would be off by more than TOLERANCE
        model.cuda()
    return by_torch(model, data["mean"], data["std"])


def _has_gpu() -> bool:
    """Whether torch can use one. Importing torch takes seconds, so the machine is asked first."""
    if not any(path.exists() for path in NVIDIA):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _calibrated(folder: Path, name: str, record: registry.Record, engine: str) -> dict[str, Any]:
    """What a Classifier takes of the record's `calibration`; old records say less.

    In models of before there were training forms int8 was another network than the others, which
    have a `full` entry.
    """
    about, kind = record.get("calibration", {}), "likeness"
    if engine != "onnx_int8" and "full" in about:
        about, kind = about["full"], "full_likeness"
    found = {key: about[key] for key in ("temperature", "uncertain_below") if key in about}
    if kind in record["files"]:
        found["ood_score"] = ood.load(registry.file(folder, name, kind))
    return found


def _golden(folder: Path, name: str, record: registry.Record) -> dict[str, np.ndarray]:
    """`images`, and for each engine the probabilities it gave; a blank image in old records."""
    if "golden" in record["files"]:
        with np.load(registry.file(folder, name, "golden")) as golden:
            return dict(golden)
    data = record["dataset"]
    return {"images": np.zeros((1, data["channels"], data["size"], data["size"]), np.uint8)}


def _verify(classifier: Classifier, golden: dict[str, Any], classes: int) -> None:
    """Raises ValueError where the classifier is not what was saved; serves as warm-up as well."""
    images = golden["images"]
    for batch in (images[:1], images):
        found, _ = classifier.read(batch)
        if found.shape != (len(batch), classes) or not np.isfinite(found).all():
            raise ValueError(f"it gives no {classes} probabilities, but {found.shape[1:]}")
        if "torch" in golden:  # the probabilities are close, so the classes are the same
            off = float(np.abs(found - golden[classifier.engine][: len(batch)]).max())
            if off > TOLERANCE[classifier.engine]:
                limit = TOLERANCE[classifier.engine]
                raise ValueError(f"golden inputs: probabilities are off by {off:.3g}, over {limit}")


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
