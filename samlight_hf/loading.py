"""Strict loading of checkpoints from a folder or the Hub: a missing, unexpected or damaged weight raises an error."""

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import find_adapter_config_file, logging

from . import SamLighteningModel  # noqa: F401  registered with the Auto classes where it is imported
from .images.preprocessing import skipped_step
from .utils import json_files
from .utils.messages import one_line


_MESSAGE_LIMIT = 300  # characters of another library's error message
_TRUST = False  # in code of checkpoints; None would make transformers ask whoever sits at the terminal
MODEL_TYPES = ("sam_lightening", "sam")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = ("F64", "F32", "BF16", "F16")  # safetensors' names; transformers silently casts any other dtype
# Files that transformers' Trainer keeps beside a model to resume training: pickles that hold no weights of the model.
TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|training_args\.bin")
# Settings that describe a file and the classes that read it, not the computation.
_OF_THE_FILE = {
    "_name_or_path", "architectures", "auto_map", "dtype", "image_processor_type", "processor_class", "torch_dtype",
    "transformers_version",
}  # fmt: skip
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # org/name
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


class CheckpointError(ValueError):
    """Error for a checkpoint that cannot be used. The message is one line that names the fault and the fix."""


def load_model(
    path_or_repo: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    model_types: tuple[str, ...] = MODEL_TYPES,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor. Only safetensors are read, never pickles, and no code of a checkpoint is run.

    Args:
        path_or_repo: Folder or Hub name ("org/name").
        device: Name of a torch device, or "auto": CUDA where available, otherwise the CPU.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        model_types: Accepted values of the config's `model_type`. Default: SAM-Lightening and the original SAM, whose
            processors keep an image's aspect ratio.

    Returns:
        The model in eval mode on `device`, and its processor.

    Raises:
        CheckpointError: For missing, unexpected, mismatched, unreadable, NaN or infinite weights, for another type of
            model, for one that needs code of its own or has an adapter, and for a processor that does not fit. A model
            with random weights is never returned.
        ValueError: For a device or a dtype that cannot be used here.
    """
    torch_device, torch_dtype = find_device(device), find_dtype(dtype)
    source = str(path_or_repo)
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
        _check_folder(Path(source), model_types)
    elif not _HUB_NAME.fullmatch(source):
        raise CheckpointError(f"{source}: no such folder. Give a checkpoint's folder, or a Hub name such as org/name.")
    with quiet_transformers(), _explained(source, model_types):
        # The config first: where the Hub cannot be reached, each file is asked for again and again, for half a minute.
        AutoConfig.from_pretrained(source, trust_remote_code=_TRUST)
        _check_adapter(source)
        model, report = AutoModelForMaskGeneration.from_pretrained(
            source, dtype=torch_dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=_TRUST,
        )  # fmt: skip
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=_TRUST)
    _check_model(source, model, report, model_types)
    if model.config.model_type in MODEL_TYPES:
        check_processor(source, model, processor)
    return model.to(torch_device).eval(), processor


@contextmanager
def _explained(source: str, model_types: tuple[str, ...]) -> Iterator[None]:
    """Raise CheckpointError in place of another library's errors."""
    try:
        yield
    except CheckpointError:
        raise
    except LOADING_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{source}: needs code of its own, which is never run here. Use a checkpoint whose model and "
                f"processor are transformers' SAM or SAM-Lightening (model_type {' or '.join(model_types)})."
            ) from error
        where = "" if Path(source).exists() else "no such folder here, and from the Hub it "
        raise CheckpointError(f"{source}: {where}cannot be loaded: {one_line(error, _MESSAGE_LIMIT)}") from error


def find_device(name: str) -> torch.device:
    """Return the torch device of this name; "auto" is CUDA where available, otherwise the CPU.

    Raises:
        ValueError: For a device that cannot be used on this machine.
    """
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
    """Return the torch dtype of this name; one of `DTYPES` is returned unchanged.

    Raises:
        ValueError: For any other dtype.
    """
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype={name!r} is not known. Use one of {', '.join(DTYPES)}.")
    return dtype


def check_finite(weights: Mapping[str, torch.Tensor], owner: str):
    """Raise ValueError for NaN or infinite values, with the weight's name; `owner` begins the message."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{owner} has NaN or infinite values in {name}. Use another checkpoint.")


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on the names, shapes and values of the weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        bits = weight.double().view(torch.int64).sum().item()  # an exact sum: independent of threads and device
        digest.update(f"{name} {tuple(weight.shape)} {bits}\n".encode())
    return digest.hexdigest()[:16]


def computed_settings(settings: dict) -> dict:
    """Return the settings of a config or processor, as `to_dict` returns them, that determine what is computed.

    Windows, patterns and epsilons are among them, which no weight shows. They are the same whatever file the model was
    loaded from, and whatever release of transformers loaded it.
    """
    return {
        name: computed_settings(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _OF_THE_FILE
    }


def check_processor(source: str, model: PreTrainedModel, processor: ProcessorMixin):
    """Raise CheckpointError for a processor that does not make images of the model's size.

    Args:
        source: begins the message.
        model: a SAM.
        processor: its processor.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or not hasattr(processor, "post_process_masks"):
        raise CheckpointError(f"{source}: its processor is a {type(processor).__name__}. It needs a SamProcessor.")
    image_size = model.config.vision_config.image_size
    pad_size = image_processor.pad_size or {}
    for name, value in (
        ("size.longest_edge", image_processor.size["longest_edge"]),
        ("pad_size.height", pad_size.get("height")),
        ("pad_size.width", pad_size.get("width")),
    ):
        if value != image_size:
            raise CheckpointError(
                f"{source}: the processor's {name}={value} must equal the model's image_size={image_size}. "
                "Correct processor_config.json."
            )
    if step := skipped_step(image_processor):
        raise CheckpointError(f"{source}: the processor's {step} must be true. Correct processor_config.json.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars. Use it where their causes are checked and raised as errors."""
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
    """Raise CheckpointError for faults that show without building a model."""
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


def _check_adapter(source: str):
    """Raise CheckpointError for an adapter (PEFT): transformers would load it, and report on its weights alone."""
    found = find_adapter_config_file(source)
    if found is not None:
        raise CheckpointError(
            f"{source}: has an adapter ({Path(found).name}). Merge it into the weights with merge_and_unload of peft, "
            "and save the model with save_pretrained in a new folder."
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of a checkpoint's safetensors files, all inside its folder.

    Raises:
        CheckpointError: Where a file is missing, the index names a file elsewhere, the weights are pickled, or there
            are two sets of them.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        if shards := sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name)):
            # save_pretrained leaves an earlier model.safetensors beside the shards that it writes.
            raise CheckpointError(
                f"{folder}: has two sets of weights: model.safetensors, which transformers loads, and {shards[0]}. "
                "Remove the older set."
            )
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = read_json(index, "Copy or download it again.").get("weight_map")
        names: list = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for name in names:
            if not (isinstance(name, str) and _SHARD.fullmatch(name)):  # transformers would follow "../../elsewhere"
                raise CheckpointError(
                    f"{index}: {one_line(ValueError(repr(name)), _MESSAGE_LIMIT)} is no shard's name, such as "
                    "model-00001-of-00002.safetensors. Do not use this checkpoint, or save it again with "
                    "save_pretrained."
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
    """Return a sentence with a command that converts a pickled checkpoint to safetensors without running its code."""
    if pickle.suffix == ".pth":
        load = f"from samlight_hf.conversion import load_teacher; model = load_teacher({str(pickle)!r}, 'cpu')[0]"
    else:
        load = (
            "import samlight_hf; from transformers import AutoModelForMaskGeneration as Auto; "
            f"model = Auto.from_pretrained({str(pickle.parent)!r}, use_safetensors=False)"
        )
    script = f"{load}; model.save_pretrained({str(pickle.parent / 'safetensors')!r})"
    quoted = shlex.quote(script) if set(script) & set('"$`\\!') else f'"{script}"'
    return f"Convert it: python -c {quoted}"


def read_json(file: Path, fix: str) -> dict:
    """Read a JSON object from a file. The message of a CheckpointError ends with `fix`."""
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
