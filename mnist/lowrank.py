"""Fewer weights in an ONNX model: layers whose outputs need few directions, in two narrow steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from threadpoolctl import threadpool_limits

LOSS = 0.02  # most of a layer's variance that its two steps may lose
GAIN = 0.5  # most of a layer's weights that its two steps may have together
PART = 50  # images at a time: what every layer gives for them is in memory together

Floats = NDArray[np.float32]
Arrays = Mapping[str, onnx.TensorProto]


def lower(content: bytes, images: np.ndarray) -> bytes:
    """An ONNX model with each layer that gains by it in two: onto few directions, and back.

    These are the directions in which the layer's outputs vary most (Zhang et al. 2015, arXiv
    1505.06798), as many as leave LOSS of the variance to all others; they are learnt from
    `images`, what the model's one input may be given. On one thread: the result is then the same,
    bit for bit, however many cores there are.
    """
    with threadpool_limits(1, "blas"):
        return _lowered(content, images)


def _lowered(content: bytes, images: np.ndarray) -> bytes:
    model = onnx.load_from_string(content)
    arrays = {each.name: each for each in model.graph.initializer}
    layers = {node.output[0]: node for node in model.graph.node if _is_layer(node, arrays)}
    lowered = {
        name: _in_two(layers[name], arrays, *spread)
        for name, spread in _spreads(model, [*layers], images).items()
    }
    graph = model.graph
    nodes, parts = [], []
    for node in graph.node:
        steps, their_parts = lowered.get(node.output[0]) or ([node], [])
        nodes += steps
        parts += their_parts
    used = {name for node in nodes for name in node.input}
    gone = {name for layer in layers.values() for name in layer.input} - used
    parts += [each for name, each in arrays.items() if name not in gone]
    graph.CopyFrom(helper.make_graph(nodes, graph.name, graph.input, graph.output, parts))
    return model.SerializeToString()


def _is_layer(node: onnx.NodeProto, arrays: Arrays) -> bool:
    """Whether it is a convolution or a linear layer, as torch exports them, of known weights."""
    about = _attributes(node)
    if node.op_type == "Conv":
        usual = about.get("group", 1) == 1
    else:
        usual = node.op_type == "Gemm" and about.get("transB") == 1 and not about.get("transA")
        usual &= about.get("alpha", 1) == about.get("beta", 1) == 1
    float32 = {name for name, each in arrays.items() if each.data_type == onnx.TensorProto.FLOAT}
    return usual and {*node.input[1:]} <= float32


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _spreads(
    model: onnx.ModelProto, names: list[str], images: np.ndarray
) -> dict[str, tuple[Floats, NDArray[np.float64]]]:
    """Of each of these tensors, (N, d) or (N, d, H, W), the mean (d,) and covariance (d, d)."""
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    products: dict[str, Any] = dict.fromkeys(names, 0.0)
    for i in range(0, len(images), PART):
        outputs = session.run(names, {given.name: images[i : i + PART]})
        for name, found in zip(names, outputs, strict=True):
            rows = np.moveaxis(found, 1, -1).reshape(-1, found.shape[1])
            rows = np.concatenate([rows, np.ones_like(rows[:, :1])], 1)
            products[name] = products[name] + (rows.T @ rows).astype(float)
    spreads = {}
    for name, product in products.items():  # its last row and column: the sums, and their number
        product /= product[-1, -1]
        mean = product[-1, :-1]
        spreads[name] = mean.astype(np.float32), product[:-1, :-1] - np.outer(mean, mean)
    return spreads


def _in_two(
    node: onnx.NodeProto, arrays: Arrays, mean: Floats, covariance: NDArray[np.float64]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]] | None:
    """The two layers, and their weights and biases; nothing where they would not be much less."""
    weights, *biases = (numpy_helper.to_array(arrays[name]) for name in node.input[1:])
    bias = biases[0].reshape(-1) if biases else np.zeros_like(mean)
    basis = _directions(covariance)
    outputs, rank = basis.shape
    if rank * (outputs + weights.size // outputs) > GAIN * weights.size:
        return None
    narrow = (basis.T @ weights.reshape(outputs, -1)).reshape(rank, *weights.shape[1:])
    wide = basis.reshape(outputs, rank, *(1 for _ in weights.shape[2:]))
    back = {"transB": 1} if node.op_type == "Gemm" else {"kernel_shape": wide.shape[2:]}
    middle = f"{node.output[0]}_narrow"
    nodes, parts = [], []
    for start, end, attributes, *values in (
        (node.input[0], middle, _attributes(node), narrow, basis.T @ (bias - mean)),
        (middle, node.output[0], back, wide, mean),
    ):
        names = [f"{end}_weights", f"{end}_bias"]
        parts += [numpy_helper.from_array(*pair) for pair in zip(values, names, strict=True)]
        nodes.append(helper.make_node(node.op_type, [start, *names], [end], end, **attributes))
    return nodes, parts


def _directions(covariance: NDArray[np.float64]) -> Floats:
    """An orthonormal basis (d, rank) of all but LOSS of the variance.

    It is turned at random, so that all of its directions vary alike: 8 bits then do for each.
    """
    variances, axes = np.linalg.eigh(covariance)
    lost = np.cumsum(np.maximum(variances, 0)) <= LOSS * np.trace(covariance)
    rank = max(1, int((~lost).sum()))
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((rank, rank)))[0]
    return (axes[:, -rank:] @ turn).astype(np.float32)
