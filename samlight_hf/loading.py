"""A checkpoint from a folder or the Hub, loaded strictly: all of its weights, and nothing but its weights, or an error."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForMaskGeneration, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from . import SamLighteningModel  # noqa: F401  registered with the Auto classes where it is imported
from .utils import json_files
from .utils.messages import one_line


_MESSAGE_LIMIT = 300  # of what other libraries say
MODEL_TYPES = ("sam_lightening", "sam")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = ("F64", "F32", "BF16", "F16")  # safetensors' names; transformers would cast any other in silence
# What transformers' Trainer keeps beside a model to go on from there. Pickles too, but no weights of a model.
TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|training_args\.bin")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line with what is wrong and what to do."""


def load_model(
    path_or_repo: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    model_types: tuple[str, ...] = MODEL_TYPES,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, in eval mode on `device`, and its processor.

    `path_or_repo` is a folder or a Hub name ("org/name"), of one of `model_types`: by default a SAM-Lightening or an original
    SAM, whose processors keep an image's aspect. Only safetensors are read, never pickles. `device` is torch's name of one, or "auto": CUDA if there is one, otherwise the CPU.

    Raises:
        CheckpointError: for missing, unexpected, mismatched, unreadable, NaN or infinite weights, another kind of model,
            or a processor that does not fit. A model with random weights is never returned.
        ValueError: for a device or a dtype that cannot be used here.
    """
    device, dtype = find_device(device), find_dtype(dtype)
    source = str(path_or_repo)
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
        _check_folder(Path(source), model_types)
    elif source.startswith((".", "/", "~")) or source.count("/") != 1 or "\\" in source:
        raise CheckpointError(f"{source}: no such folder. Give a checkpoint's folder, or a Hub name such as org/name.")
    with quiet_transformers():
        try:
            model, report = AutoModelForMaskGeneration.from_pretrained(
                source, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(source)
        except LOADING_ERRORS as error:
            where = "" if Path(source).exists() else "no such folder here, and from the Hub it "
            raise CheckpointError(f"{source}: {where}cannot be loaded: {one_line(error, _MESSAGE_LIMIT)}") from error
    _check_model(source, model, report, model_types)
    if model.config.model_type in MODEL_TYPES:
        _check_processor(source, model, processor)
    return model.to(device).eval(), processor


def find_device(name: str) -> torch.device:
    """The device of that name; ValueError where it cannot be used on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({one_line(error, _MESSAGE_LIMIT)}). Use cpu or auto."
        ) from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no weights. Use cpu or auto.")
    return device


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating point type of that name; ValueError for another."""
    dtype = DTYPES.get(name, name)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={name!r} is not known. Use one of {', '.join(DTYPES)}.")
    return dtype


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that change with the weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        bits = weight.double().view(torch.int64).sum().item()  # exact: the same by any number of threads, on any device
        digest.update(f"{name} {tuple(weight.shape)} {bits}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no progress bars of transformers inside: what they would say is checked here, and raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path, model_types: tuple[str, ...]):
    """Raises CheckpointError for what can be seen without building a model."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file. Give the checkpoint's folder, with config.json in it.")
    config = read_json(folder / "config.json", "Is this a checkpoint's folder?")
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise CheckpointError(f"{folder}: model_type={model_type!r}, but this needs one of {', '.join(model_types)}.")
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: truncated or damaged ({one_line(error, _MESSAGE_LIMIT)}). Copy or download it again."
            ) from error
        for name, dtype in dtypes.items():
            if model_type in MODEL_TYPES and dtype not in _STORED_DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is stored as {dtype}, and SAM's weights are floating point numbers "
                    f"({', '.join(_STORED_DTYPES)}). Save the model again with save_pretrained."
                )
    processors = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    fix = "Add the teacher's, or save the model again with save_pretrained."
    if not any(file.is_file() for file in processors):
        raise CheckpointError(f"{folder}: has no processor_config.json. {fix}")
    for file in filter(Path.is_file, processors):
        read_json(file, fix)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all inside its folder; CheckpointError where one of them is not there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = read_json(index, "Copy or download it again.").get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for name in names:
            if not (isinstance(name, str) and _SHARD.fullmatch(name)):  # "../../elsewhere" is read by transformers
                raise CheckpointError(
                    f"{index}: {one_line(ValueError(repr(name)), _MESSAGE_LIMIT)} is no shard's name, such as "
                    "model-00001-of-00002.safetensors. Do not use this checkpoint, or save it again with save_pretrained."
                )
        for name in set(names):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: has no {name}, which its index names. Copy or download it again.")
        return [folder / name for name in sorted(set(names))]
    pickles = sorted(file.name for suffix in ("bin", "pth", "pt", "ckpt") for file in folder.glob(f"*.{suffix}"))
    if pickles := [name for name in pickles if not TRAINER_STATE.fullmatch(name)]:
        raise CheckpointError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code when read and are refused. "
            f"{how_to_convert(folder / pickles[0])}"
        )
    raise CheckpointError(f"{folder}: has no model.safetensors. Copy or download the checkpoint again.")


def how_to_convert(pickle: Path) -> str:
    """The command that writes a pickled checkpoint's weights as safetensors, and runs no code that is in it."""
    if pickle.suffix == ".pth":
        load = f"from samlight_hf.conversion import load_teacher; model = load_teacher({str(pickle)!r}, 'cpu')[0]"
    else:
        load = (
            "import samlight_hf; from transformers import AutoModelForMaskGeneration as Auto; "
            f"model = Auto.from_pretrained({str(pickle.parent)!r}, use_safetensors=False)"
        )
    return f'Convert it: python -c "{load}; model.save_pretrained({str(pickle.parent / "safetensors")!r})"'


def read_json(file: Path, fix: str) -> dict:
    """A JSON object. Raises CheckpointError, ending with the `fix`, where there is none that can be read."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: has no {file.name}. {fix}")
    try:
        return json_files.read_json(file, dict)
    except ValueError as error:
        raise CheckpointError(f"{error} {fix}") from error


def _check_model(source: str, model: PreTrainedModel, report: dict, model_types: tuple[str, ...]):
    if model.config.model_type not in model_types:
        raise CheckpointError(
            f"{source}: model_type={model.config.model_type!r}, but this needs one of {', '.join(model_types)}."
        )
    for kind, meaning in (
        ("mismatched_keys", "have other shapes than config.json says"),
        ("missing_keys", "are missing"),
        ("unexpected_keys", "do not belong to this model"),
    ):
        keys = [
            key if isinstance(key, str) else " ".join(map(str, key)) for key in sorted(report.get(kind) or (), key=str)
        ]
        if keys:
            raise CheckpointError(
                f"{source}: {len(keys)} weights {meaning}, first {keys[0]}. "
                "Use the config.json that was saved with these weights."
            )
    if report.get("error_msgs"):
        raise CheckpointError(f"{source}: {one_line(ValueError(report['error_msgs']), _MESSAGE_LIMIT)}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            fix = "Use another checkpoint."
            if tensor.dtype == torch.float16:
                fix = "If it is whole, it is too large for float16: use bfloat16 or float32."
            raise CheckpointError(f"{source}: NaN or infinite values in {name}. {fix}")


def _check_processor(source: str, model: PreTrainedModel, processor: ProcessorMixin):
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or not hasattr(processor, "post_process_masks"):
        raise CheckpointError(f"{source}: its processor is a {type(processor).__name__}. It needs a SamProcessor.")
    image_size = model.config.vision_config.image_size
    pad_size = image_processor.pad_size
    for name, value in (
        ("size.longest_edge", image_processor.size["longest_edge"]),
        ("pad_size.height", pad_size["height"]),
        ("pad_size.width", pad_size["width"]),
    ):
        if value != image_size:
            raise CheckpointError(
                f"{source}: the processor's {name}={value} must equal the model's image_size={image_size}. "
                "Correct processor_config.json."
            )
