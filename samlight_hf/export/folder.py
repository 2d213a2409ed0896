"""An exported folder, as transformers.js expects it of a SAM.

config.json               model_type "sam"
preprocessor_config.json  resizing, normalisation and padding
onnx/vision_encoder.onnx, onnx/prompt_encoder_mask_decoder.onnx, and the same with _fp16, _int8, _uint8
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..images.preprocessing import image_tensor, preprocess
from ..loading import check_processor
from ..utils.atomic_files import check_replaceable, replace_folder
from ..utils.json_files import read_json
from . import precision
from .graphs import (
    DECODER,
    DEFAULT_OPSET,
    ENCODER,
    check_model,
    check_opset,
    export_decoder,
    export_encoder,
    make_masks_optional,
)


DTYPES = tuple(precision.SUFFIXES)
CONFIG, PREPROCESSOR_CONFIG = "config.json", "preprocessor_config.json"
_MARK = "onnx_export"  # a key of config.json, by which an earlier export is known
_FILES = {CONFIG, PREPROCESSOR_CONFIG} | {
    f"onnx/{name}{suffix}.{ending}"
    for name in (ENCODER, DECODER)
    for suffix in precision.SUFFIXES.values()
    for ending in ("onnx", "onnx_data")
}


def export_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: str | os.PathLike,
    dtypes: Sequence[str] = ("fp32",),
    opset: int = DEFAULT_OPSET,
    calibration: Iterable[str | os.PathLike | Image.Image] | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> list[Path]:
    """Export a SAM to a folder of ONNX graphs that onnxruntime and transformers.js load.

    The folder is written under another name and moved into place; one exported earlier is replaced.

    Args:
        model: any SamModel or SamLighteningModel, on any device and in any floating point type. It is not changed;
            weights are exported in float32.
        processor: its processor.
        out: folder to create.
        dtypes: of "fp32", "fp16", "int8" and "uint8": one pair of files for each.
        opset: version of ONNX's operators, from 18 to 23.
        calibration: images on which the ranges of the image encoder's activations are measured, for static
            quantization. Default: dynamic quantization. The mask decoder is always quantized dynamically.
        progress: called with a line of text before each step.

    Returns:
        The files, sorted.

    Raises:
        ValueError: for a model that is no SAM, has no values or is optimized, for a processor of another size, for an
            unknown dtype, weights too large for fp16, an opset out of range, and a folder that holds other files or
            cannot be replaced.
        ImportError: where onnx, onnxscript or onnxruntime is not installed.
    """
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    out = Path(out)
    check_model(model)
    check_processor(type(processor).__name__, model, processor)
    check_opset(opset)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known. Use one of {', '.join(DTYPES)}.")
    if "fp16" in dtypes:
        _check_float16(model)
    _check_destination(out)
    kinds = {(weight.dtype, weight.device.type) for weight in model.parameters()}
    if model.training or kinds != {(torch.float32, "cpu")}:
        model = copy.deepcopy(model).to("cpu", torch.float32).eval()  # the caller's stays as it is
    inputs = None
    if calibration is not None:
        inputs = [{"pixel_values": pixels(processor, image)} for image in calibration]
        if not inputs:
            raise ValueError("calibration has no images. Give some, or leave it out for dynamic quantization.")

    progress(f"image encoder, opset {opset}")
    graphs = {ENCODER: export_encoder(model, opset)}
    progress(f"prompt encoder and mask decoder, opset {opset}")
    graphs[DECODER] = export_decoder(model, opset)

    def write(folder: Path):
        (folder / "onnx").mkdir(parents=True)
        large = {}
        for dtype in dict.fromkeys(dtypes):
            for name, graph in graphs.items():
                progress(f"{name}: {dtype}")
                converted = _convert(graph, dtype, inputs if name == ENCODER else None)
                if name == DECODER:
                    make_masks_optional(converted)
                path = folder / "onnx" / f"{name}{precision.SUFFIXES[dtype]}.onnx"
                precision.save(converted, path)
                if path.with_name(f"{path.name}_data").exists():
                    large[path.name] = 1
        _write_json(folder / CONFIG, _config(model, dtypes, opset, inputs is not None, large))
        _write_json(folder / PREPROCESSOR_CONFIG, _preprocessor_config(processor))

    replace_folder(out, write)
    return sorted(path for path in out.rglob("*") if path.is_file())


def pixels(processor: ProcessorMixin, image: str | os.PathLike | Image.Image):
    """Return the pixel values of an image, float32 (1, 3, S, S), as an array."""
    return preprocess(processor.image_processor, [image_tensor(image)], torch.device("cpu")).numpy()


def _convert(graph, dtype: str, calibration):
    if dtype == "fp32":
        return precision._copy(graph)
    if dtype == "fp16":
        return precision.to_float16(graph)
    return precision.quantize(graph, dtype, calibration)


def _check_float16(model: PreTrainedModel):
    """Raise ValueError for weights beyond float16's range, which onnxruntime's tools would clip."""
    for name, weight in model.state_dict().items():
        if weight.numel() and weight.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{name} has values that are too large for float16. Leave fp16 out.")


def _check_destination(out: Path):
    """Raise ValueError unless `out` can be written, and is new, empty, or what an earlier export wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. Choose another --out.")
    check_replaceable(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}
    if foreign := sorted(names - _FILES):
        raise ValueError(f"{out} holds {foreign[0]}, which no export has written. Choose another --out.")
    if names and (CONFIG not in names or _MARK not in read_json(out / CONFIG, dict)):
        raise ValueError(f"{out} holds {min(names)}, and its {CONFIG} is of no export. Choose another --out.")


def _config(model: PreTrainedModel, dtypes: Sequence[str], opset: int, is_static: bool, large: dict) -> dict:
    """Return config.json: the model's, as a SAM's, with what transformers.js needs to know."""
    config = model.config.to_dict()
    exported_from = config["model_type"]
    for name in ("auto_map", "_name_or_path"):
        config.pop(name, None)
    config |= {"model_type": "sam", "architectures": ["SamModel"]}
    config["vision_config"] = {**config["vision_config"], "model_type": "sam_vision_model"}
    javascript: dict = {"dtype": "fp32" if "fp32" in dtypes else dtypes[0]}
    if large:
        javascript["use_external_data_format"] = large
    quantized = {dtype for dtype in dtypes if dtype.endswith("int8")}
    config[_MARK] = {
        "exported_from": exported_from, "opset": opset, "dtypes": list(dict.fromkeys(dtypes)),
        "quantization": ("static" if is_static else "dynamic") if quantized else None, "torch": torch.__version__,
    }  # fmt: skip
    config["transformers.js_config"] = javascript
    return config


def _preprocessor_config(processor: ProcessorMixin) -> dict:
    config = processor.image_processor.to_dict()
    names = (
        "do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize", "image_mean", "image_std",
        "mask_pad_size", "mask_size", "pad_size", "resample", "rescale_factor", "size",
    )  # fmt: skip
    kept = {name: config[name] for name in names if name in config}
    return {**kept, "image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor"}


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
