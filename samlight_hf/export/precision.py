"""Other precisions of an exported graph, by onnxruntime's tools: float16, and int8 or uint8 weights."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import onnx


# The name of a precision -> the end of a file's name, as transformers.js has them.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "uint8": "_uint8"}
LARGEST_FILE = 2**31 - 2**24  # bytes: protobuf, and so a file of ONNX, holds less than 2 GiB


def to_float16(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Convert to float16; inputs and outputs stay float32, and so does all that coordinates are computed with.

    float16 has steps of half a pixel from 512 pixels on, which would move points and boxes.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = _nodes_before(model, ("Sin", "Cos"))
    with _without_warnings():
        converted = convert_float_to_float16(
            _copy(model), keep_io_types=True, node_block_list=sorted(blocked), disable_shape_infer=True
        )
    _remove_rounding(converted, model)
    del converted.graph.value_info[:]  # some still say float32
    OnnxModel(converted).topological_sort()  # casts stand at the end, after the nodes that read them
    return converted


def quantize(
    model: "onnx.ModelProto", dtype: str, calibration: Sequence[dict[str, np.ndarray]] | None = None
) -> "onnx.ModelProto":
    """Quantize the weights of all matrix products but those of coordinates, one scale for each channel.

    Args:
        model: a graph in float32.
        dtype: "int8" or "uint8".
        calibration: inputs that the ranges of activations are measured on: static quantization. Without, they are
            measured whenever the graph runs: dynamic quantization.

    Returns:
        The quantized graph. Biases, convolutions, attention and normalisation stay float32.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    weight_type = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}[dtype]
    coordinates = _nodes_before(model, ("Sin", "Cos"))
    products = [name for name in _products_with_weights(model) if name not in coordinates]
    with tempfile.TemporaryDirectory(prefix="samlight-export-") as place, _without_warnings():
        source, target = Path(place) / "float32.onnx", Path(place) / "quantized.onnx"
        save(_copy(model), source)  # onnx moves large weights out of the graph that it saves
        if calibration is None:
            quantize_dynamic(
                source, target, weight_type=weight_type, per_channel=True, nodes_to_quantize=products,
                extra_options={"MatMulConstBOnly": True}, use_external_data_format=_is_large(model),
            )  # fmt: skip
        else:
            quantize_static(
                source, target, _reader(calibration), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=weight_type, nodes_to_quantize=products,
                calibrate_method=CalibrationMethod.MinMax, use_external_data_format=_is_large(model),
            )  # fmt: skip
        return load(target)


def save(model: "onnx.ModelProto", path: Path):
    """Save a graph; weights too large for one file go to `path` + "_data", which is transformers.js's name for it."""
    import onnx

    if _is_large(model):
        onnx.save(
            model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}_data",
            size_threshold=1024,
        )  # fmt: skip
    else:
        onnx.save(model, path)


def load(path: Path) -> "onnx.ModelProto":
    """Load a graph with all its weights."""
    import onnx

    return onnx.load(path)


def _is_large(model: "onnx.ModelProto") -> bool:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE


def _copy(model: "onnx.ModelProto") -> "onnx.ModelProto":
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _nodes_before(model: "onnx.ModelProto", op_types: Sequence[str]) -> set[str]:
    """Return the names of the nodes of these types, and of all nodes that they depend on."""
    producers = {output: node for node in model.graph.node for output in node.output}
    waiting = [node for node in model.graph.node if node.op_type in op_types]
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in names:
            names.add(node.name)
            waiting += [producers[name] for name in node.input if name in producers]
    return names


def _remove_rounding(converted: "onnx.ModelProto", original: "onnx.ModelProto"):
    """Let nodes that compute in float32 read float32: the converter rounds each value between two of them. In place.

    Args:
        converted: the graph in float16, with casts to float16 and back around each node that stays float32.
        original: the graph before, for its weights in float32.
    """
    from onnx import TensorProto

    casts = [node for node in converted.graph.node if node.op_type == "Cast"]
    rounded = {
        node.output[0]: node.input[0]
        for node in casts
        if node.name.endswith("_cast_to_fp16_node") or node.name.startswith("graph_input_cast")
    }
    weights = {w.name: w for w in original.graph.initializer if w.data_type == TensorProto.FLOAT}
    exact = {}
    for node in casts:
        source = node.input[0]
        if not node.name.endswith("_cast_to_fp32_node"):
            continue
        if source in rounded:
            exact[node.output[0]] = rounded[source]
        elif source in weights:
            exact[node.output[0]] = f"{source}_fp32"
            weight = converted.graph.initializer.add()
            weight.CopyFrom(weights[source])
            weight.name = f"{source}_fp32"
    for node in converted.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = exact.get(name, name)
    _remove_unused_casts(converted)


def _remove_unused_casts(model: "onnx.ModelProto"):
    outputs = {value.name for value in model.graph.output}
    while True:
        used = {name for node in model.graph.node for name in node.input} | outputs
        unused = [node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in used]
        if not unused:
            return
        for node in unused:
            model.graph.node.remove(node)


def _products_with_weights(model: "onnx.ModelProto") -> list[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def _reader(inputs: Sequence[dict[str, np.ndarray]]):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.remaining = iter(inputs)

        def get_next(self):
            return next(self.remaining, None)

    return Reader()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence hints to preprocess, which torch's exporter has done, and notes on values below float16's range."""
    import warnings

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
