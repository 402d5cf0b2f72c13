"""A trained model -> ONNX, int8, temperature, golden inputs: what serving needs beside weights."""

import copy
import io
import logging
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn

from mnist import inference, training
from mnist.data import Dataset
from mnist.inference import Classifier, probabilities
from mnist.scores import calibration_error

# Layers with weights, and what int8 passes through between them; norms and softmax stay float32.
QUANTISED = ["Conv", "Gemm", "MatMul", "Relu", "Add", "Concat"]
QUANTISED += ["MaxPool", "AveragePool", "GlobalAveragePool"]
RANGE_IMAGES = 512  # training images on which int8 learns the range of every layer
MORE_ERRORS = 1  # than torch that int8 may make on the calibration split
GOLDEN = 16  # images
MOST_TEMPERATURE = 10.0  # and its inverse is the least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What a model is saved with beside its weights.

    `files` are as registry.save takes them; `served` is what a server will run; `left_out` has
    the engines that are not to run this model, and why; `metrics` was measured on the calibration
    split, with the probabilities that are served.
    """

    files: dict[str, tuple[str, bytes]]
    served: Classifier
    left_out: dict[str, str]
    metrics: dict[str, Any]


def export(model: nn.Module, dataset: Dataset) -> Export:
    """Bring a trained model into every form it can be served in, and see which of them is right.

    ONNX in float32 must give torch's probabilities, int8 at most MORE_ERRORS more errors than
    torch on the calibration split, where the temperature is fitted, too. What cannot be had, of
    a network of one's own perhaps, is left out with a warning; torch can always serve.
    """
    model, dataset = copy.deepcopy(model).cpu(), dataset.to(torch.device("cpu"))
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    served = Classifier("torch", inference.by_torch(model, dataset.mean, dataset.std))
    logits = {"torch": served.logits(images)}
    files: dict[str, tuple[str, bytes]] = {}
    left_out: dict[str, str] = {}
    steps: list[tuple[str, str, Callable[[], bytes]]] = [
        ("onnx", ".onnx", lambda: to_onnx(model, dataset)),
        ("onnx_int8", ".int8.onnx", lambda: to_int8(files["onnx"][1], dataset)),
    ]
    for engine, ending, make in steps:
        try:
            content = make()
            candidate = Classifier(engine, inference.by_onnx(content))
            found = candidate.logits(images)
            _check(engine, found, logits["torch"], labels)
        except Exception as error:  # noqa: BLE001 - whatever the exporter or a runtime raises
            left_out[engine] = textwrap.shorten(str(error) or repr(error), 150)
            log.warning("the model is saved without %s: %s", engine, left_out[engine])
            break
        files[engine] = (ending, content)
        served, logits[engine] = candidate, found
    temperature = fit_temperature(logits[served.engine], labels)
    given = {engine: probabilities(found, temperature) for engine, found in logits.items()}
    files["golden"] = (".golden.npz", golden(images, given, served.engine))
    metrics = {
        "errors": errors(logits["torch"], labels),
        "n": len(labels),
        "served_errors": errors(logits[served.engine], labels),
        "ece": calibration_error(given[served.engine], labels),
        "ece_before": calibration_error(probabilities(logits[served.engine]), labels),
    }
    return Export(files, replace(served, temperature=temperature), left_out, metrics)


def errors(scores: np.ndarray, labels: np.ndarray) -> int:
    """How many rows of logits or probabilities (N, classes) are highest at another class."""
    return int((scores.argmax(1) != labels).sum())


def _check(engine: str, found: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError where logits are not as right as torch's, which are `wanted`."""
    if engine == "onnx":
        off = float(np.abs(probabilities(found) - probabilities(wanted)).max())
        limit = inference.TOLERANCE[engine]
        if not off <= limit:  # nor where it is no number
            raise ValueError(f"its probabilities are off by {off:.3g}, over {limit}")
        return
    more = errors(found, labels) - errors(wanted, labels)
    if more > MORE_ERRORS:
        raise ValueError(f"it makes {more} more errors of {len(labels)}; {MORE_ERRORS} is allowed")


# --- the files -----------------------------------------------------------------------------------


class _FromPixels(nn.Module):
    """A network that standardises its input: images uint8 (N, C, H, W) -> logits (N, classes).

    So serving need not know how, and cannot do it otherwise than training.
    """

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model, self.dataset = model, dataset

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(training.standardise(images, self.dataset))


def to_onnx(model: nn.Module, dataset: Dataset) -> bytes:
    """ONNX in float32: images uint8 (N, C, H, W), any N -> logits float32 (N, classes).

    By the older of torch's two exporters: the newer needs onnxscript, takes 2 to 4 s more, and
    writes this machine's paths into the file. It traces the network; _check sees that what it
    made is right.
    """
    # Where it fails it prints the graph; to standard output, if it is not told otherwise.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _FromPixels(model, dataset).eval(),
            (dataset.calibration.images[:2],),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
            dynamo=False,
        )
        return path.read_bytes()


def to_int8(model: bytes, dataset: Dataset) -> bytes:
    """The same with weights and activations in int8, as static ranges on training images say.

    Other ways to find the ranges (more images, percentiles), full range and single scales for a
    layer all made 21 to 23 errors on 2,500 calibration images, and torch 22 (`parallel`).
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        parts = iter(dataset.train.images[:RANGE_IMAGES].split(inference.PART))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    with tempfile.TemporaryDirectory() as name:
        plain, folded, int8 = (Path(name) / stage for stage in ("plain", "folded", "int8"))
        plain.write_bytes(model)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)  # folds batch norms
        quantization.quantize_static(
            folded,
            int8,
            Images(),
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            # 7 bits: then no pair of products overflows 16 bits on x86 processors without VNNI.
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return int8.read_bytes()


def golden(images: np.ndarray, given: dict[str, np.ndarray], served: str) -> bytes:
    """An .npz of GOLDEN images and the probabilities that each engine gave for them.

    From the least sure to the surest, most of them unsure: what is certain shows no difference.
    """
    order = given[served].max(1).argsort(kind="stable")
    chosen = order[np.geomspace(1, len(order), GOLDEN).round().astype(int) - 1]
    stream = io.BytesIO()
    parts: dict[str, Any] = {engine: found[chosen] for engine, found in given.items()}
    np.savez_compressed(stream, images=images[chosen], **parts)
    return stream.getvalue()


# --- the temperature -----------------------------------------------------------------------------


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels (N,) are likeliest (Guo et al. 2017).

    1 where no image is read wrong: the likelihood then only grows as the temperature falls.
    """
    if not errors(logits, labels):
        return 1.0

    def loss(log_temperature: float) -> float:
        shares = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -float(shares[np.arange(len(labels)), labels].mean())

    limit = float(np.log(MOST_TEMPERATURE))
    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded")
    return round(float(np.exp(found.x)), 4)
