"""Checks of a folder before it is published. None of them runs code from the folder."""

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard, get_token
from safetensors import safe_open

from ..loading import LOADING_ERRORS, CheckpointError, how_to_convert, load_model, read_json, weight_files
from ..modeling.image_processing_sam_lightening import SamLighteningImageProcessor
from ..modeling.modeling_sam_lightening import SamLighteningModel
from ..utils.messages import one_line


CODE_FOLDER = Path(inspect.getfile(SamLighteningModel)).parent
CODE = tuple(sorted(path.name for path in CODE_FOLDER.glob("*.py") if path.name != "__init__.py"))
AUTO_MAP = dict(SamLighteningModel._auto_map)
PROCESSOR_NAME = "processor_config.json"
INDEX_NAME = "model.safetensors.index.json"
CARD_NAME = "README.md"
LICENSE_NAME = "LICENSE"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Files of a repository that `from_pretrained` loads: left over from an earlier version, they would be mixed with the
# new ones. With peft installed, adapters are among them.
LOADED_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|pytorch_model.*\.(bin|bin\.index\.json)"
    r"|[^/]+\.py|(pre)?processor_config\.json|adapter_config\.json|adapter_model\.(safetensors|bin)"
)
_PROCESSOR_CLASS = SamLighteningImageProcessor
_PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": f"{_PROCESSOR_CLASS.__module__.rpartition('.')[2]}.{_PROCESSOR_CLASS.__name__}"
}

_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SHORTEST_TOKEN = 8  # a shorter token is a placeholder that any text may contain
# Matches /home/me/x, ~/x, C:\x and file://x, but neither and/or nor https://host/path.
_ABSOLUTE_PATH = re.compile(
    r"(?:(?<![\w./:~)\]-])(?:/|~/)[\w.@+-]+/[\w./@+-]*|(?<!\w)[A-Za-z]:\\{1,2}\w[\w\\.-]*|file://[^\s\"')]+)"
)


class FolderError(ValueError):
    """Error for a folder that must not be published. The message is one line with the file, the fault and the fix."""


def check_folder(folder: str | os.PathLike):
    """Check that a folder is complete, holds nothing else, and may be published. Runs no model.

    Required: weights in safetensors only, finite, and exactly those of the model; the package's code, byte by byte; a
    config that names no code elsewhere; a model card with readable metadata. Refused: other files, sub-folders, links,
    pickles, secrets and absolute paths.

    Args:
        folder: Folder made by `build_folder`.

    Raises:
        FolderError: For the first fault found.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder.")
    model_type = _model_type(folder)
    _check_names(folder, model_type)
    _check_code(folder, model_type)
    _check_auto_maps(folder, model_type)
    _check_card(folder / CARD_NAME)
    for name, text in _texts(folder):
        check_text(name, text)
    with as_folder_errors():
        load_model(folder, "cpu", model_types=(model_type,))


@contextmanager
def as_folder_errors() -> Iterator[None]:
    """Raise a FolderError in place of each CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise FolderError(str(error)) from error


def check_text(name: str, text: str):
    """Raise FolderError where a text to be published holds a secret or an absolute path. `name` is for the message."""
    token, secret = get_token(), None
    if token and len(token) >= _SHORTEST_TOKEN and token in text:
        secret = "your own Hub token"
    elif match := _SECRET.search(text):
        secret = f"{match[0][:6]}..."
    if secret:
        raise FolderError(
            f"{name} holds what looks like a secret ({secret}). Take it out, and revoke it if it was shared."
        )
    if match := _ABSOLUTE_PATH.search(text):
        raise FolderError(f"{name} names a place on one machine ({match[0]}). Take it out, or make it relative.")


def without_absolute_paths(text: str) -> str:
    """Replace each absolute path in the text by its last component."""
    return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def metadata_of(card: str) -> dict:
    """Return the metadata between the two --- lines at the head of a card; raise ValueError where there is none."""
    if not card.lstrip().startswith("---"):
        raise ValueError(
            "the model card has no metadata between two lines of --- at its head. `samlight card` writes it."
        )
    try:
        return ModelCard(card).data.to_dict()
    except Exception as error:  # from the YAML parser, or from huggingface_hub's own checks
        raise ValueError(f"the model card's metadata cannot be read ({one_line(error, 200)}).") from error


def refuse_pickles(folder: Path, allowed: re.Pattern | None = None):
    """Raise FolderError for a file with the suffix of a pickle or the like, unless `allowed` matches its name."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES and not (allowed and allowed.fullmatch(path.name)):
            has_weights = (folder / "model.safetensors").is_file() or (folder / INDEX_NAME).is_file()
            fix = "Remove it: the weights are there as safetensors." if has_weights else how_to_convert(path)
            raise FolderError(f"{path}: not safetensors; a pickle can run code when it is read, and is refused. {fix}")


def _model_type(folder: Path) -> str:
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type not in ("sam_lightening", "sam"):
        raise FolderError(f"{folder / 'config.json'}: model_type={model_type!r}, but it must be sam_lightening or sam.")
    return model_type


def _check_names(folder: Path, model_type: str):
    refuse_pickles(folder)
    needed = {"config.json", PROCESSOR_NAME, CARD_NAME, LICENSE_NAME, *(CODE if model_type == "sam_lightening" else ())}
    with as_folder_errors():
        weights = {path.name for path in weight_files(folder)}
    index = {INDEX_NAME} if "model.safetensors" not in weights else set()
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise FolderError(f"{path}: a link or a folder. Only plain files are published: remove it.")
        if path.name not in needed | weights | index:
            kind = (
                "belongs to another set of weights"
                if WEIGHTS.fullmatch(path.name)
                else "does not belong to a checkpoint"
            )
            raise FolderError(f"{path}: {kind}. Remove it, or make the folder with build_folder.")
    if missing := sorted(needed - {path.name for path in folder.iterdir()}):
        raise FolderError(f"{folder}: has no {missing[0]}. Make the folder with build_folder.")


def _check_code(folder: Path, model_type: str):
    for name in CODE if model_type == "sam_lightening" else ():
        if (folder / name).read_bytes() != (CODE_FOLDER / name).read_bytes():
            raise FolderError(f"{folder / name} is not the package's own {name}. Make the folder with build_folder.")


def _check_auto_maps(folder: Path, model_type: str):
    """Raise FolderError for an auto_map that makes trust_remote_code=True run code of another repository."""
    allowed = {} if model_type == "sam" else AUTO_MAP
    config = _read_json(folder / "config.json")
    if config.get("auto_map", {}) != allowed:
        raise FolderError(
            f"{folder / 'config.json'}: auto_map must be {allowed}, or trust_remote_code=True runs other code. "
            "Make the folder with build_folder."
        )
    nested = [auto_map for key, auto_map in _auto_maps(config) if key]
    of_processor = [auto_map for _, auto_map in _auto_maps(_read_json(folder / PROCESSOR_NAME))]
    for auto_map in nested + [auto_map for auto_map in of_processor if auto_map != _PROCESSOR_AUTO_MAP or not allowed]:
        raise FolderError(f"{folder}: auto_map={auto_map} names other code than this folder's. Remove it.")


def _auto_maps(content, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield every auto_map at any depth of a JSON value, with the path of keys above it."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == "auto_map":
                yield key, value
            else:
                yield from _auto_maps(value, f"{key}.{name}")
    elif isinstance(content, list):
        for value in content:
            yield from _auto_maps(value, f"{key}.[]")


def _check_card(path: Path):
    try:
        metadata = metadata_of(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise FolderError(f"{path}: {error}") from error
    if metadata.get("library_name") != "transformers":
        raise FolderError(f"{path}: library_name must be transformers, or the Hub does not know how to load the model.")


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and content of each text but the package's code, and of the metadata of each safetensors file."""
    for name in ("config.json", PROCESSOR_NAME, CARD_NAME, LICENSE_NAME, INDEX_NAME):
        if (folder / name).is_file():
            yield str(folder / name), (folder / name).read_text(encoding="utf-8", errors="replace")
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                yield f"{path}'s metadata", json.dumps(weights.metadata() or {})
        except LOADING_ERRORS as error:
            raise FolderError(
                f"{path}: truncated or damaged ({one_line(error, 200)}). Copy or download it again."
            ) from error


def _read_json(path: Path) -> dict:
    with as_folder_errors():
        return read_json(path, "Is this a checkpoint's folder?")
