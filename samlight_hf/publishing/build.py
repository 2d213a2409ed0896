"""A checkpoint's folder that loads anywhere: safetensors, config, processor, code, model card and licence."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from ..loading import TRAINER_STATE, load_model, weight_files
from ..utils.atomic_files import replace_folder
from ..utils.json_files import read_json
from .card import render_card
from .checks import AUTO_MAP, CARD_NAME, CODE, CODE_FOLDER, LICENSE_NAME, FolderError, refuse_pickles
from .upload import _REPLACED


def build_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    card: str | None = None,
    max_shard_size: int | str | None = None,
) -> list[Path]:
    """Makes a folder that loads anywhere from a checkpoint's: safetensors, config, processor, code, README.md, LICENSE.

    Weights keep their values and dtypes, in one file, or in shards of at most `max_shard_size` ("2GB", or bytes). `card` is
    the text of README.md, by default `render_card(source)`. Nothing else of `source` is taken: no optimizer, no logs. `destination` is written aside
    and moved; an earlier one that was built is replaced. Returns its files, sorted.

    Raises:
        CheckpointError, FolderError: for a source that is no whole checkpoint of finite safetensors weights, or has pickled ones.
        ValueError: for a destination that holds something else, and for a shard size that is none.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check_destination(source, destination)
    if source.is_dir():
        refuse_pickles(source, allowed=TRAINER_STATE)
    elif not source.exists():
        raise FolderError(f"{source}: no such folder. Give the checkpoint's folder, with config.json in it.")
    _, processor = load_model(source, "cpu")
    card = render_card(source) if card is None else card

    def write(aside: Path):
        aside.mkdir(parents=True)
        weights = {}
        for path in weight_files(source):
            weights |= load_file(path)
        save_torch_state_dict(weights, aside, max_shard_size=max_shard_size or "1TB", metadata={"format": "pt"})
        processor.save_pretrained(aside)
        model_type = _write_config(source, aside)
        for name in CODE if model_type == "sam_lightening" else ():
            shutil.copyfile(CODE_FOLDER / name, aside / name)
        (aside / CARD_NAME).write_text(card, encoding="utf-8")
        (aside / LICENSE_NAME).write_text(_license_text(), encoding="utf-8")

    replace_folder(destination, write)
    return sorted(destination.iterdir())


def _check_destination(source: Path, destination: Path):
    if destination.resolve() == source.resolve():
        raise ValueError(f"{destination} is the source itself. Choose another destination.")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file. Choose another destination.")
    if destination.is_dir():
        known = {*CODE, CARD_NAME, LICENSE_NAME, "config.json"}
        foreign = [p for p in destination.iterdir() if p.name not in known and not _REPLACED.fullmatch(p.name)]
        if foreign:
            raise ValueError(
                f"{destination} holds {foreign[0].name}, which is no part of a checkpoint. Choose another one."
            )


def _write_config(source: Path, destination: Path) -> str:
    """The source's config with what trust_remote_code=True needs; returns its model_type."""
    config = read_json(source / "config.json", dict)
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)
    if config["model_type"] == "sam_lightening":
        config["auto_map"] = AUTO_MAP
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (destination / "config.json").write_text(text, encoding="utf-8")
    return config["model_type"]


def _license_text() -> str:
    """Of the code, as it is in a clone of the repository, or as pip installed it."""
    path = Path(__file__).parents[2] / LICENSE_NAME
    if path.is_file() and (path.parent / "pyproject.toml").is_file():
        return path.read_text(encoding="utf-8")
    text = importlib.metadata.distribution("samlight-hf").read_text(f"licenses/{LICENSE_NAME}")
    if text is None:
        raise FolderError("the package's own LICENSE is missing. Install samlight-hf again.")
    return text
