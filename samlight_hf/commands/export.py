"""`samlight export`: a SAM for onnxruntime and transformers.js, checked against torch."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import EXAMPLE_IMAGES, missing_package, not_empty, parse_positive


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data import ImageDataset

DTYPES = ("fp32", "fp16", "int8", "uint8")
_SCENES = 20  # of the dataset that mIoU is measured on where none is given


def add_export_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "folder", type=not_empty, metavar="FOLDER", help="the checkpoint's folder or Hub name; any SAM of transformers"
    )
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to create; one of an earlier export is replaced"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["fp32"],
        help="a pair of files for each; int8 and uint8 quantize the weights (fp32)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", nargs="+", metavar="PATH",
        help="images or folders of images that the image encoder's activations are measured on: static int8 and uint8. "
        "Without: dynamic",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-images", type=parse_positive, default=16, metavar="N", help="of --calibrate (%(default)s)"
    )
    parser.add_argument("--opset", type=int, default=18, metavar="N", help="of ONNX, 18 to 23 (%(default)s)")
    parser.add_argument(
        "--image-size", type=parse_positive, metavar="PX",
        help="longest side of the model's input, where it is not the trained one: faster and less exact",
    )  # fmt: skip
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check", action="store_true", help="onnx.checker, comparison with torch on a photograph, mIoU of int8, uint8"
    )
    check.add_argument("--image", type=Path, metavar="FILE", help="photograph to compare on (one of the repository)")
    check.add_argument(
        "--dataset", metavar="PATH",
        help="that mIoU is measured on: SA-1B tars, or a folder with images/ and masks/ (generated scenes)",
    )  # fmt: skip
    check.add_argument("--annotations", metavar="JSON", help="annotations of COCO's shape")
    check.add_argument("--images", metavar="DIR", help="folder of the annotated images")
    check.add_argument(
        "--limit", type=parse_positive, default=50, metavar="N", help="of --dataset (%(default)s images)"
    )


def run_export(args: argparse.Namespace) -> int:
    """Export, print the files, and check them with `--check`. Returns 1 where a check fails.

    Raises:
        ArgumentTypeError: for options that do not go together, and where onnx or onnxruntime is not installed.
    """
    quantized = [dtype for dtype in args.dtype if dtype.endswith("int8")]
    if args.calibrate and not quantized:
        raise argparse.ArgumentTypeError("--calibrate goes with --dtype int8 or uint8.")
    measured = [f"--{name}" for name in ("dataset", "annotations") if getattr(args, name)]
    if not args.check and (unused := [*["--image"] * bool(args.image), *measured]):
        raise argparse.ArgumentTypeError(f"{unused[0]} is for --check: give that too, or leave {unused[0]} out.")
    if measured and not quantized:
        raise argparse.ArgumentTypeError(
            f"{measured[0]}: mIoU is measured of int8 and uint8. Give --dtype int8, or leave {measured[0]} out."
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_package(error, "the export", "export") from error
    from ..export import export_onnx
    from ..export.graphs import check_opset
    from ..loading import load_model

    try:
        check_opset(args.opset)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--opset {args.opset}: {error}") from error
    image = _photograph(args) if args.check else None
    dataset = _dataset(args) if args.check and quantized else None
    model, processor = load_model(args.folder, device="cpu", dtype="float32")
    if args.image_size not in (None, model.config.vision_config.image_size):
        model, processor = _resize(model, processor, args.image_size)
    files = export_onnx(model, processor, args.out, args.dtype, args.opset, _calibration(args), progress=_tell)
    for file in files:
        print(f"{file.stat().st_size:>14,}  {file.relative_to(args.out)}")
    size = model.config.vision_config.image_size
    print(f"Exported to {args.out}: opset {args.opset}, input {size}x{size}.")
    return 0 if image is None else _check(args, model, processor, image, dataset)


def _check(args: argparse.Namespace, model, processor, image: Path, dataset: "ImageDataset | None") -> int:
    from ..export import OnnxRunner, TorchRunner, check_folder, mean_iou

    failures = 0
    for dtype in dict.fromkeys(args.dtype):
        result = check_folder(args.out, model, processor, image, dtype)
        failures += result.failure is not None
        print(
            f"{dtype}: onnx.checker accepts both graphs. On {image.name}, {result.prompts} kinds of prompts: logits "
            f"within {result.max_difference:.1e} of torch's, masks at IoU >= {result.min_iou:.4f}. "
            + ("Not as it must be: " + result.failure if result.failure else "OK.")
        )
    if dataset is not None:
        _tell(f"mIoU of torch on {_name(args)}")
        reference, num_instances = mean_iou(TorchRunner(model), processor, dataset, _tell)
        print(
            f"mIoU of boxes, {num_instances} instances of {len(dataset)} images of {_name(args)}: torch {reference:.4f}"
        )
        for dtype in (dtype for dtype in dict.fromkeys(args.dtype) if dtype.endswith("int8")):
            score, _ = mean_iou(OnnxRunner(args.out, dtype), processor, dataset, _tell)
            print(f"  {dtype} {score:.4f}, a loss of {reference - score:+.4f}")
    return 1 if failures else 0


def _photograph(args: argparse.Namespace) -> Path:
    image = args.image or EXAMPLE_IMAGES / "coffee.jpg"
    if not image.is_file():
        raise argparse.ArgumentTypeError(f"{image}: no such file. Give a photograph with --image.")
    return image


def _dataset(args: argparse.Namespace) -> "ImageDataset":
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise missing_package(error, f"mIoU of {' and '.join(args.dtype)}", "export") from error
    from ..data import SyntheticScenes, load_dataset

    if args.dataset is None and args.annotations is None:
        return SyntheticScenes(min(_SCENES, args.limit), image_size=256)
    path = args.dataset or args.annotations
    return load_dataset(path, args.annotations if args.dataset else None, args.images, limit=args.limit)


def _name(args: argparse.Namespace) -> str:
    return args.dataset or args.annotations or "generated scenes (--dataset names another set)"


def _calibration(args: argparse.Namespace) -> "list[Image] | None":
    """Return the images of `--calibrate`, spread evenly; those that cannot be read are told and left out."""
    if not args.calibrate:
        return None
    from ..images.reading import ImageError, find_images, open_image

    paths, problems = find_images(args.calibrate)
    if problems:
        raise ValueError(f"--calibrate {problems[0]}")
    step, images = max(1, len(paths) // args.calibration_images), []
    for path in paths[::step][: args.calibration_images]:
        try:
            images.append(open_image(path))
        except ImageError as error:
            _tell(f"--calibrate: left out {error}")
    return images


def _resize(model, processor, image_size: int):
    from ..conversion import resize_model, resize_processor

    try:
        model = resize_model(model, image_size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--image-size {image_size}: {error}") from error
    return model, resize_processor(processor, image_size, model.config.vision_config.patch_size)


def _tell(line: str):
    print(f"samlight: {line}", file=sys.stderr)
