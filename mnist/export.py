"""Export of a trained model: ONNX, int8, temperature, threshold and golden inputs, for serving."""

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
from torch import nn

from mnist import conformal, inference, models
from mnist.calibration import EngineOutputs, calibrate
from mnist.data import Dataset
from mnist.inference import Classifier, probabilities
from mnist.metrics import count_errors
from mnist.scores import calibration_error

# Layers with weights, and operations between them; norms and softmax stay in float32.
QUANTISED_OPS = ["Conv", "Gemm", "MatMul", "Relu", "Add", "Concat"]
QUANTISED_OPS += ["MaxPool", "AveragePool", "GlobalAveragePool"]
RANGE_IMAGES = 512  # training images that determine the int8 range of each layer
MAX_EXTRA_ERRORS = 1  # errors of int8 on the calibration split beyond those of torch
GOLDEN_IMAGES = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """The parts of a saved model besides its weights.

    `files` are for registry.save; `served` is the classifier that a server will run; `left_out`
    maps unusable engines to reasons; `metrics` are those of the served probabilities on the
    calibration split; `calibration` has the temperature, the threshold and the limits of prediction
    sets that were fitted on it.
    """

    files: dict[str, tuple[str, bytes]]
    served: Classifier
    left_out: dict[str, str]
    metrics: dict[str, Any]
    calibration: dict[str, Any]


def export(model: nn.Module, dataset: Dataset, narrow: nn.Module | None = None) -> Export:
    """Convert a trained model for each engine, check the results, and calibrate the best one.

    The ONNX files are of `narrow`, if given, which computes the same as `model` with fewer
    multiplications (mnist.folding). In float32 they must have torch's probabilities, in int8 at
    most MAX_EXTRA_ERRORS more errors than torch on the calibration split. Temperature and threshold
    of uncertainty are fitted on the same split. An engine that fails, perhaps for a plugin's
    network, is left out with a warning; torch always works.
    """
    dataset = dataset.to(torch.device("cpu"))
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    model, narrow = _copy_to_cpu(model), _copy_to_cpu(narrow or model)
    engines, files, left_out = _build_engines(model, narrow, dataset)
    for engine, reason in left_out.items():
        log.warning("the model is saved without %s: %s", engine, reason)
    served = calibrate(engines, dataset)
    if served.ood_score is None:
        log.warning("uncertain pictures are found by the largest logit: features are not usable")
    else:
        files["likeness"] = (".likeness.npz", served.ood_score.to_bytes())
    predicted = {
        engine: probabilities(outputs[0], served.temperature)
        for engine, (_, outputs) in engines.items()
    }
    logits, features = engines[served.engine][1]
    limits = conformal.fit(predicted[served.engine], served.scores(logits, features), labels)
    served = replace(served, set_limits=conformal.choose(limits, conformal.DEFAULT_COVERAGE))
    files["golden"] = (".golden.npz", make_golden(images, predicted, served.engine))
    metrics = {
        "errors": count_errors(predicted["torch"], labels),
        "n": len(labels),
        "served_errors": count_errors(predicted[served.engine], labels),
        "ece": calibration_error(predicted[served.engine], labels),
        "ece_before": calibration_error(probabilities(logits), labels),
    }
    calibration = {
        "temperature": served.temperature,
        "uncertain_below": served.uncertain_below,
        "score": "likeness" if served.ood_score else "logit",
        "prediction_sets": limits,
    }
    return Export(files, served, left_out, metrics, calibration)


def _copy_to_cpu(model: nn.Module) -> nn.Module:
    """The model in evaluation mode on the CPU; a copy if it is on another device."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return (model if on_cpu else copy.deepcopy(model).cpu()).eval()


def _build_engines(
    model: nn.Module, narrow: nn.Module, dataset: Dataset
) -> tuple[dict[str, EngineOutputs], dict[str, tuple[str, bytes]], dict[str, str]]:
    """The engines with correct outputs, best first; their files; reasons for those left out."""
    images, labels = dataset.calibration.images.numpy(), dataset.calibration.labels.numpy()
    in_torch = Classifier("torch", inference.torch_runner(model, dataset.mean, dataset.std))
    engines = {"torch": (in_torch, in_torch.outputs(images))}
    files: dict[str, tuple[str, bytes]] = {}
    left_out: dict[str, str] = {}
    steps: list[tuple[str, str, Callable[[], bytes]]] = [
        ("onnx", ".onnx", lambda: to_onnx(narrow, dataset)),
        ("onnx_int8", ".int8.onnx", lambda: to_int8(files["onnx"][1], dataset)),
    ]
    for engine, suffix, make in steps:
        try:
            content = make()
            classifier = Classifier(engine, inference.onnx_runner(content))
            outputs = classifier.outputs(images)
            _check_outputs(engine, outputs[0], engines["torch"][1][0], labels)
        except Exception as error:  # noqa: BLE001 - exporter and runtime may raise anything
            left_out[engine] = textwrap.shorten(str(error) or repr(error), 150)
            log.info("%s: %s", engine, left_out[engine])
            if engine == "onnx":
                break
            continue
        files[engine], engines[engine] = (suffix, content), (classifier, outputs)
    best_first = {engine: engines[engine] for engine in inference.ENGINE_FILES if engine in engines}
    return best_first, files, left_out


def _check_outputs(
    engine: str, logits: np.ndarray, expected: np.ndarray, labels: np.ndarray
) -> None:
    """Raise ValueError where logits are worse than torch's, which are `expected`."""
    if engine == "onnx":
        difference = float(np.abs(probabilities(logits) - probabilities(expected)).max())
        limit = inference.TOLERANCE[engine]
        if not difference <= limit:  # true for nan, too
            raise ValueError(f"its probabilities are off by {difference:.3g}, over {limit}")
        return
    extra = count_errors(logits, labels) - count_errors(expected, labels)
    if extra > MAX_EXTRA_ERRORS:
        text = f"it makes {extra} more errors of {len(labels)}"
        raise ValueError(f"{text}; {MAX_EXTRA_ERRORS} is allowed")


# --- the files -----------------------------------------------------------------------------------


class _FromPixels(nn.Module):
    """A network that standardises its input: images uint8 (N, C, H, W) -> logits and features.

    So the server cannot standardise differently from the training.
    """

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model, self.dataset = models.WithFeatures(model), dataset

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(self.dataset.standardise(images))


def to_onnx(model: nn.Module, dataset: Dataset) -> bytes:
    """ONNX in float32: images uint8 (N, C, H, W), any N -> logits float32 (N, classes), features.

    Uses the older of torch's two exporters: the newer one needs onnxscript, takes 2 to 4 s longer,
    and writes this machine's paths into the file. The exporter traces the network; _check_outputs
    verifies the result.
    """
    # A failing exporter prints the graph, by default to standard output.
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
    """ONNX with weights and activations in int8, with static ranges from training images.

    More images, percentiles, the full range, and one scale per layer each made 21 to 23 errors on
    2,500 calibration images; torch made 22 (`parallel`).
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        parts = iter(dataset.train.images[:RANGE_IMAGES].split(inference.BATCH_SIZE))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    with tempfile.TemporaryDirectory() as name:
        original, folded, int8 = (Path(name) / stage for stage in ("plain", "folded", "int8"))
        original.write_bytes(model)
        quant_pre_process(original, folded, skip_symbolic_shape=True)  # folds batch norms
        quantization.quantize_static(
            folded,
            int8,
            Images(),
            op_types_to_quantize=QUANTISED_OPS,
            per_channel=True,
            # 7 bits, so that no pair of products overflows 16 bits on x86 processors without VNNI.
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return int8.read_bytes()


def make_golden(images: np.ndarray, predicted: dict[str, np.ndarray], served: str) -> bytes:
    """An .npz file of GOLDEN_IMAGES images and each engine's probabilities for them.

    In order of confidence, and most of them of low confidence, as others show no difference; but
    none whose predicted class could change within the tolerance.
    """
    margins = [np.diff(np.sort(rows)[:, -2:])[:, 0] for rows in predicted.values()]
    is_clear = np.min(margins, axis=0) > 2 * max(inference.TOLERANCE.values())
    order = predicted[served].max(1).argsort(kind="stable")
    order = order[is_clear[order]] if is_clear.any() else order
    chosen = order[np.geomspace(1, len(order), GOLDEN_IMAGES).round().astype(int) - 1]
    stream = io.BytesIO()
    parts: dict[str, Any] = {engine: rows[chosen] for engine, rows in predicted.items()}
    np.savez_compressed(stream, images=images[chosen], **parts)
    return stream.getvalue()
