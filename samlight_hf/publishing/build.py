"""Checkpoint folders that load anywhere: safetensors, config, processor, code, model card and licence."""

import functools
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from ..loading import TRAINER_STATE, load_model, weight_files
from ..utils.atomic_files import check_replaceable, replace_folder
from ..utils.json_files import read_json
from .card import render_card
from .checks import (
    AUTO_MAP,
    CARD_NAME,
    CODE,
    CODE_FOLDER,
    INDEX_NAME,
    LICENSE_NAME,
    PROCESSOR_NAME,
    WEIGHTS,
    FolderError,
    refuse_pickles,
)  # fmt: skip


def build_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    card: str | None = None,
    max_shard_size: int | str | None = None,
) -> list[Path]:
    """Build a folder that loads anywhere from a checkpoint: safetensors, config, processor, code, README.md, LICENSE.

    Weights keep their values and dtypes. Nothing else of `source` is copied: no optimizer states, no logs. The folder
    is written under another name and moved into place; a folder built earlier is replaced.

    Args:
        source: Folder of the checkpoint.
        destination: Folder to create, or one built earlier.
        card: Text of README.md. Default: `render_card(source)`.
        max_shard_size: Largest size of a weight file, such as "2GB", or in bytes. Default: a single file.

    Returns:
        The paths of the files in `destination`, sorted.

    Raises:
        CheckpointError: For a source whose weights are incomplete, not finite or not safetensors.
        FolderError: For a source that does not exist or holds pickled weights.
        ValueError: For a destination that holds other files, and for an invalid shard size.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check_destination(source, destination)
    if source.is_dir():
        refuse_pickles(source, allowed=TRAINER_STATE)
    elif not source.exists():
        raise FolderError(f"{source}: no such folder. Give the checkpoint's folder, with config.json in it.")
    _, processor = load_model(source, "cpu")
    readme = render_card(source) if card is None else card

    def write(folder: Path):
        folder.mkdir(parents=True)
        weights: dict[str, torch.Tensor] = {}
        for path in weight_files(source):
            weights |= load_file(path)
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size or "1TB", metadata={"format": "pt"})
        processor.save_pretrained(folder)
        dtype = functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
        model_type = _write_config(source, folder, str(dtype).removeprefix("torch."))
        for name in CODE if model_type == "sam_lightening" else ():
            shutil.copyfile(CODE_FOLDER / name, folder / name)
        (folder / CARD_NAME).write_text(readme, encoding="utf-8")
        (folder / LICENSE_NAME).write_text(license_text(), encoding="utf-8")

    replace_folder(destination, write)
    return sorted(destination.iterdir())


def _check_destination(source: Path, destination: Path):
    if destination.resolve() == source.resolve():
        raise ValueError(f"{destination} is the source itself. Choose another destination.")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file. Choose another destination.")
    check_replaceable(destination)
    if not destination.is_dir():
        return
    names = {path.name for path in destination.iterdir()}
    always = {"config.json", PROCESSOR_NAME, CARD_NAME, LICENSE_NAME}
    foreign = sorted(name for name in names - always - {*CODE, INDEX_NAME} if not WEIGHTS.fullmatch(name))
    if foreign:
        raise ValueError(f"{destination} holds {foreign[0]}, which is no part of a built folder. Choose another one.")
    if names and (missing := sorted(always - names)):
        raise ValueError(
            f"{destination} holds {min(names)} and no {missing[0]}: it was not built here. Choose another one."
        )


def _write_config(source: Path, destination: Path, dtype: str) -> str:
    """Write the source's config, with the auto_map that trust_remote_code=True needs, and return its model_type.

    `from_pretrained` loads weights in the dtype that the config names: it is to be that which holds all of them.
    """
    config = read_json(source / "config.json", dict)
    for name in ("_name_or_path", "auto_map", "torch_dtype"):
        config.pop(name, None)
    config["dtype"] = dtype
    if config["model_type"] == "sam_lightening":
        config["auto_map"] = AUTO_MAP
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (destination / "config.json").write_text(text, encoding="utf-8")
    return config["model_type"]


def license_text() -> str:
    """Return the licence of the code, from a clone of the repository or from the installed distribution."""
    path = Path(__file__).parents[2] / LICENSE_NAME
    if path.is_file() and (path.parent / "pyproject.toml").is_file():
        return path.read_text(encoding="utf-8")
    text = importlib.metadata.distribution("samlight-hf").read_text(f"licenses/{LICENSE_NAME}")
    if text is None:
        raise FolderError("the package's own LICENSE is missing. Install samlight-hf again.")
    return text
