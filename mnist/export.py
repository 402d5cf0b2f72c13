"""A trained model -> ONNX, int8, temperature, threshold, golden inputs: all that serving needs."""

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

from mnist import inference, models, ood, training
from mnist.data import Dataset
from mnist.inference import Classifier, Outputs, probabilities
from mnist.scores import calibration_error

# Layers with weights, and what int8 passes through between them; norms and softmax stay float32.
QUANTISED = ["Conv", "Gemm", "MatMul", "Relu", "Add", "Concat"]
QUANTISED += ["MaxPool", "AveragePool", "GlobalAveragePool"]
RANGE_IMAGES = 512  # training images on which int8 learns the range of every layer
MORE_ERRORS = 1  # than torch that int8 may make on the calibration split
GOLDEN = 16  # images
MOST_TEMPERATURE = 10.0  # and its inverse is the least
UNCERTAIN = 0.01  # of the calibration images, at most
MOST_UNCERTAIN = 0.1  # of them by another engine than the one that is served; 1 to 2 % is usual
OOD_IMAGES = 5_000  # training images; with 2,500 of them 2 % less noise is flagged

log = logging.getLogger(__name__)

Form = tuple[Classifier, Outputs]
"""A model as one engine carries it out, and what it makes of the calibration images."""


@dataclass(frozen=True)
class Export:
    """What a model is saved with beside its weights.

    `files` are as registry.save takes them; `served` is what a server will run; `left_out` has
    the engines that are not to run this model, and why; `metrics` was measured on the calibration
    split, with the probabilities that are served; `calibration` is what was decided there.
    """

    files: dict[str, tuple[str, bytes]]
    served: Classifier
    left_out: dict[str, str]
    metrics: dict[str, Any]
    calibration: dict[str, Any]


def export(model: nn.Module, dataset: Dataset, narrow: nn.Module | None = None) -> Export:
    """Bring a trained model into every form it can be served in, and see which of them is right.

    ONNX is of `narrow`, which computes what `model` computes with fewer multiplications
    (mnist.folding), where it is given. In float32 it must give torch's probabilities, in int8 at
    most MORE_ERRORS more errors than torch on the calibration split, where the temperature is
    fitted, too, and the score below which a picture is uncertain. What cannot be had, of a network
    of a plugin perhaps, is left out with a warning; torch can always serve.
    """
    dataset = dataset.to(torch.device("cpu"))
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    model, narrow = _on_cpu(model), _on_cpu(narrow or model)
    forms, files, left_out = _forms(model, narrow, dataset)
    for engine, reason in left_out.items():
        log.warning("the model is saved without %s: %s", engine, reason)
    served = calibrated(forms, dataset)
    if served.ood_score is None:
        log.warning("what looks like no class is told by logits, not by features")
    else:
        files["likeness"] = (".likeness.npz", served.ood_score.to_bytes())
    given = {
        engine: probabilities(outputs[0], served.temperature)
        for engine, (_, outputs) in forms.items()
    }
    files["golden"] = (".golden.npz", golden(images, given, served.engine))
    logits = forms[served.engine][1][0]
    metrics = {
        "errors": errors(given["torch"], labels),
        "n": len(labels),
        "served_errors": errors(given[served.engine], labels),
        "ece": calibration_error(given[served.engine], labels),
        "ece_before": calibration_error(probabilities(logits), labels),
    }
    calibration = {
        "temperature": served.temperature,
        "uncertain_below": served.uncertain_below,
        "score": "likeness" if served.ood_score else "logit",
    }
    return Export(files, served, left_out, metrics, calibration)


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy of it where it is on another device; in evaluation mode."""
    there = all(part.device.type == "cpu" for part in model.parameters())
    return (model if there else copy.deepcopy(model).cpu()).eval()


def _forms(
    model: nn.Module, narrow: nn.Module, dataset: Dataset
) -> tuple[dict[str, Form], dict[str, tuple[str, bytes]], dict[str, str]]:
    """By engine what is right, the best first, and its file; and why others are left out."""
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    in_torch = Classifier("torch", inference.by_torch(model, dataset.mean, dataset.std))
    forms = {"torch": (in_torch, in_torch.outputs(images))}
    files: dict[str, tuple[str, bytes]] = {}
    left_out: dict[str, str] = {}
    steps: list[tuple[str, str, Callable[[], bytes]]] = [
        ("onnx", ".onnx", lambda: to_onnx(narrow, dataset)),
        ("onnx_int8", ".int8.onnx", lambda: to_int8(files["onnx"][1], dataset)),
    ]
    for engine, ending, make in steps:
        try:
            content = make()
            form = Classifier(engine, inference.by_onnx(content))
            outputs = form.outputs(images)
            _check(engine, outputs[0], forms["torch"][1][0], labels)
        except Exception as error:  # noqa: BLE001 - whatever the exporter or a runtime raises
            left_out[engine] = textwrap.shorten(str(error) or repr(error), 150)
            log.info("%s: %s", engine, left_out[engine])
            if engine == "onnx":
                break
            continue
        files[engine], forms[engine] = (ending, content), (form, outputs)
    best_first = {engine: forms[engine] for engine in inference.FILES if engine in forms}
    return best_first, files, left_out


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
    """A network that standardises its input: images uint8 (N, C, H, W) -> logits and features.

    So serving need not know how, and cannot do it otherwise than training.
    """

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model, self.dataset = models.WithFeatures(model), dataset

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(training.standardise(images, self.dataset))


def to_onnx(model: nn.Module, dataset: Dataset) -> bytes:
    """ONNX in float32: images uint8 (N, C, H, W), any N -> logits float32 (N, classes), features.

    By the older of torch's two exporters: the newer needs onnxscript, takes 2 to 4 s more, and
    writes this machine's paths into the file. It traces the network; _check sees that what it
    made is right.
    """
    # Where it fails it prints the graph; to standard output, if it is not told otherwise.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    network, images = _FromPixels(model, dataset).eval(), dataset.calibration.images[:2]
    with torch.no_grad():
        names = ["logits", *(f"features{i}" for i, _ in enumerate(network(images)[1:]))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (images,),
            path,
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "n"} for name in ("images", *names)},
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
    But none so unsure that its class could be another one within the tolerance.
    """
    margins = [np.diff(np.sort(found)[:, -2:])[:, 0] for found in given.values()]
    clear = np.min(margins, axis=0) > 2 * max(inference.TOLERANCE.values())
    order = given[served].max(1).argsort(kind="stable")
    order = order[clear[order]] if clear.any() else order
    chosen = order[np.geomspace(1, len(order), GOLDEN).round().astype(int) - 1]
    stream = io.BytesIO()
    parts: dict[str, Any] = {engine: found[chosen] for engine, found in given.items()}
    np.savez_compressed(stream, images=images[chosen], **parts)
    return stream.getvalue()


# --- the temperature -----------------------------------------------------------------------------


def calibrated(forms: dict[str, Form], dataset: Dataset) -> Classifier:
    """The first of these engines, with temperature and threshold."""
    outputs = {engine: found for engine, (_, found) in forms.items()}
    first = next(iter(forms))
    temperature = fit_temperature(outputs[first][0], dataset.calibration.labels.numpy())
    return with_threshold(replace(forms[first][0], temperature=temperature), outputs, dataset)


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


# --- what looks like no class --------------------------------------------------------------------


def with_threshold(served: Classifier, outputs: dict[str, Outputs], dataset: Dataset) -> Classifier:
    """The classifier with what it needs to know a picture that looks like no class.

    `outputs` has those of each engine for the calibration images. The score is the features'
    likeness to training images; the largest logit where they do not tell, or differ by engine.
    """
    some = dataset.train.head(OOD_IMAGES)
    try:
        _, features = served.outputs(some.images.numpy())
        by_features = replace(served, ood_score=ood.fit(features, some.labels.numpy()))
        found = {engine: by_features.scores(*output) for engine, output in outputs.items()}
        limit = threshold(found[served.engine])
        for engine, scores in found.items():
            share = float((scores < limit).mean())
            if share > MOST_UNCERTAIN:
                raise ValueError(f"{engine} is uncertain of {share:.1%} of calibration images")
        return replace(by_features, uncertain_below=limit)
    except ValueError as error:
        log.info("features do not tell what looks like no class: %s", error)
        limit = threshold(outputs[served.engine][0].max(1))
        return replace(served, ood_score=None, uncertain_below=limit)


def threshold(scores: np.ndarray) -> float:
    """To four places the highest value that at most UNCERTAIN of the scores (N,) lie below."""
    lowest = np.sort(scores)[int(UNCERTAIN * len(scores))]
    return float(np.floor(np.float64(lowest) * 1e4) / 1e4)
