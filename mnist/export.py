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

from mnist import inference, likeness, lowrank, models, training
from mnist.data import Dataset
from mnist.inference import Classifier, Outputs, probabilities
from mnist.scores import calibration_error

# Layers with weights, and what int8 passes through between them; norms and softmax stay float32.
QUANTISED = ["Conv", "Gemm", "MatMul", "Relu", "Add", "Concat"]
QUANTISED += ["MaxPool", "AveragePool", "GlobalAveragePool"]
RANGE_IMAGES = 512  # training images on which int8 learns the range of every layer
RANK_IMAGES = 2_000  # and on which the directions are learnt in which its outputs vary
# With their pixels in disorder: what looks like no class must differ in some direction, too. 95.4 %
# of noise and 81 % of letters are then flagged instead of 94.6 and 78 (`parallel`, 2026-11-21).
DISORDERED_IMAGES = 50
MORE_ERRORS = 1  # than torch that int8 may make on the calibration split
GOLDEN = 16  # images
MOST_TEMPERATURE = 10.0  # and its inverse is the least
UNCERTAIN = 0.01  # of the calibration images, at most
MOST_UNCERTAIN = 0.1  # of them by another engine than the one that is served; 1 to 2 % is usual
LIKENESS_IMAGES = 5_000  # training images; with 2,500 of them 2 % less noise is flagged

log = logging.getLogger(__name__)


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


def export(model: nn.Module, dataset: Dataset, low_rank: bool = True) -> Export:
    """Bring a trained model into every form it can be served in, and see which of them is right.

    ONNX in float32 must give torch's probabilities, int8 at most MORE_ERRORS more errors than
    torch on the calibration split, where the temperature is fitted, too, and the score below
    which a picture is uncertain. What cannot be had, of a network of one's own perhaps, is left
    out with a warning; torch can always serve.

    With `low_rank`, which takes some 10 s, int8 has layers of low rank (mnist.lowrank), unless
    features then no longer tell what looks like no class, as those of a network that has learnt
    little may not.
    """
    found = _export(model, dataset, low_rank)
    if low_rank and found.served.likeness is None:
        found = _export(model, dataset, False)
    for engine, reason in found.left_out.items():
        log.warning("the model is saved without %s: %s", engine, reason)
    if found.served.likeness is None:
        log.warning("what looks like no class is told by logits, not by features")
    return found


def _export(model: nn.Module, dataset: Dataset, low_rank: bool) -> Export:
    model, dataset = copy.deepcopy(model).cpu(), dataset.to(torch.device("cpu"))
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    served = Classifier("torch", inference.by_torch(model, dataset.mean, dataset.std))
    outputs = {"torch": served.outputs(images)}
    files: dict[str, tuple[str, bytes]] = {}
    left_out: dict[str, str] = {}
    steps: list[tuple[str, str, Callable[[], bytes]]] = [
        ("onnx", ".onnx", lambda: to_onnx(model, dataset)),
        ("onnx_int8", ".int8.onnx", lambda: to_int8(files["onnx"][1], dataset, low_rank)),
        ("onnx_int8", ".int8.onnx", lambda: to_int8(files["onnx"][1], dataset, False)),
    ]
    for engine, ending, make in steps if low_rank else steps[:-1]:  # its last is the same
        if engine in files or "onnx" in left_out:
            break
        try:
            content = make()
            candidate = Classifier(engine, inference.by_onnx(content))
            found = candidate.outputs(images)
            _check(engine, found[0], outputs["torch"][0], labels)
        except Exception as error:  # noqa: BLE001 - whatever the exporter or a runtime raises
            left_out[engine] = textwrap.shorten(str(error) or repr(error), 150)
            log.info("%s: %s", engine, left_out[engine])
            continue
        left_out.pop(engine, None)
        files[engine] = (ending, content)
        served, outputs[engine] = candidate, found
    logits = {engine: found[0] for engine, found in outputs.items()}
    temperature = fit_temperature(logits[served.engine], labels)
    served = with_threshold(replace(served, temperature=temperature), outputs, dataset)
    if served.likeness:
        files["likeness"] = (".likeness.npz", served.likeness.to_bytes())
    given = {engine: probabilities(found, temperature) for engine, found in logits.items()}
    files["golden"] = (".golden.npz", golden(images, given, served.engine))
    metrics = {
        "errors": errors(logits["torch"], labels),
        "n": len(labels),
        "served_errors": errors(logits[served.engine], labels),
        "ece": calibration_error(given[served.engine], labels),
        "ece_before": calibration_error(probabilities(logits[served.engine]), labels),
    }
    calibration = {
        "temperature": temperature,
        "uncertain_below": served.uncertain_below,
        "score": "likeness" if served.likeness else "logit",
    }
    return Export(files, served, left_out, metrics, calibration)


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


def to_int8(model: bytes, dataset: Dataset, low_rank: bool) -> bytes:
    """The same with weights and activations in int8, as static ranges on training images say.

    With `low_rank`, layers that few directions do for are in two steps (mnist.lowrank).

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
        if low_rank:
            images = dataset.train.images[:RANK_IMAGES].numpy()
            seen = np.concatenate([images, _disordered(images[:DISORDERED_IMAGES])])
            folded.write_bytes(lowrank.lower(folded.read_bytes(), seen))
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


def _disordered(images: np.ndarray) -> np.ndarray:
    pixels = images.reshape(len(images), -1)
    return np.random.default_rng(0).permuted(pixels, axis=1).reshape(images.shape)


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
    some = dataset.train.head(LIKENESS_IMAGES)
    try:
        _, features = served.outputs(some.images.numpy())
        by_features = replace(served, likeness=likeness.fit(features, some.labels.numpy()))
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
        return replace(served, likeness=None, uncertain_below=limit)


def threshold(scores: np.ndarray) -> float:
    """To four places the highest value that at most UNCERTAIN of the scores (N,) lie below."""
    lowest = np.sort(scores)[int(UNCERTAIN * len(scores))]
    return float(np.floor(np.float64(lowest) * 1e4) / 1e4)
