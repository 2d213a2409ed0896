"""`samlight convert`: write a checkpoint for another image size, or of an original SAM, to a new folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import model_path_of, not_empty, parse_positive


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add_convert_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model", type=not_empty, metavar="DIR",
        help="checkpoint's folder, Hub name, or an original .pth file (the bundled one, in a clone)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; it must be new")
    parser.add_argument(
        "--image-size", type=parse_positive, metavar="PX",
        help="longest side that images are resized to: a multiple of the patch size (that of the model)",
    )  # fmt: skip
    parser.add_argument(
        "--bands", choices=("image", "tokens"), default="image",
        help="what the bands of local layers keep: their share of the image's height, or their rows of tokens "
        "(%(default)s)",
    )  # fmt: skip


def run_convert(args: argparse.Namespace) -> int:
    """Write the converted checkpoint, load it again, and compare the weights. Returns the exit status.

    Raises:
        ArgumentTypeError: for a folder that exists already.
        ValueError: for a checkpoint that cannot be loaded, and a size that cannot be.
    """
    import torch

    from ..conversion import load_teacher, resize_model, resize_processor
    from ..conversion.resizing import describe_pattern
    from ..loading import load_model, quiet_transformers
    from ..utils.atomic_files import check_replaceable, replace_folder

    model_path = model_path_of(args.model)
    _check_new(args.out)
    check_replaceable(args.out)
    model, processor = load_teacher(model_path, device="cpu")
    dtype = _stored_dtype(model_path, model)
    before = model.config.vision_config.image_size
    if args.image_size is not None:
        model = resize_model(model, args.image_size, args.bands)
        processor = resize_processor(processor, args.image_size, model.config.vision_config.patch_size)
    model = model.to(dtype)

    def write(folder: Path):
        with quiet_transformers():
            processor.save_pretrained(folder)
            model.save_pretrained(folder)
        _check_new(args.out)  # another command may have made it meanwhile

    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(args.out, write)
    loaded, _ = load_model(args.out, "cpu", model.dtype)
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, loaded.state_dict()[name]):
            raise RuntimeError(f"{args.out}: {name} is not what was written. Do not use this folder.")
    _describe(args, before, describe_pattern(model.config.vision_config))
    return 0


def _check_new(out: Path):
    if out.exists():
        raise argparse.ArgumentTypeError(f"--out {out} exists already. Choose a new folder.")


def _stored_dtype(model_path: str, model: "PreTrainedModel") -> "torch.dtype":
    """Return the type to store weights in: that of config.json where it holds each of them exactly, else float32.

    Args:
        model_path: where the model was loaded from.
        model: in float32, which holds all weights.
    """
    import torch
    from transformers import PreTrainedConfig

    from ..conversion.original import ORIGINAL_SUFFIXES
    from ..loading import DTYPES

    if Path(model_path).suffix in ORIGINAL_SUFFIXES and not Path(model_path).expanduser().is_dir():
        return torch.float32
    config, _ = PreTrainedConfig.get_config_dict(str(Path(model_path).expanduser()))
    dtype = DTYPES.get(config.get("dtype", config.get("torch_dtype")), torch.float32)
    if all(torch.equal(weight, weight.to(dtype).float()) for weight in model.parameters()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    print(f"samlight: the weights are not {name}, as config.json says, and stay float32.", file=sys.stderr)
    return torch.float32


def _describe(args: argparse.Namespace, before: int, pattern: list[str]):
    for layer, line in enumerate(pattern):
        print(f"layer {layer}: {line}")
    size = before if args.image_size is None else args.image_size
    print(f"{args.out}: {size} px" + (f", from {before} px" if size != before else ""))
    if size != before:
        print(
            "samlight: the model card was not copied: its scores are of another size. A short training at the new size "
            "improves the masks (docs/sizes.md); `samlight evaluate` and `samlight card` make a new card.",
            file=sys.stderr,
        )
