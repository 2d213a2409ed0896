"""`samlight evaluate`: models side by side on a dataset, with a report that says how every number was measured."""

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..utils.json_files import read_json
from ..utils.processes import process_group, tell
from ..utils.termination import exit_status, explained_end
from .measurements import EVERYTHING, Measurement, load_promptable_model, measurements_of
from .options import (
    add_grid_options,
    add_tile_options,
    missing_package,
    not_empty,
    parse_fraction,
    parse_not_negative,
    parse_positive,
)


if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from ..data import ImageDataset, SkipReport
    from ..evaluation.models import PromptableModel
    from ..evaluation.protocols import ProtocolSettings
    from ..evaluation.report import ModelResult


def add_evaluate_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model", action="append", required=True, type=not_empty, metavar="DIR",
        help="checkpoint's folder or Hub name; may be repeated, and the first is what the others are compared with",
    )  # fmt: skip
    data = parser.add_argument_group("data: SA-1B tars, a COCO-shaped JSON with its images, or a folder of mask files")
    data.add_argument(
        "--dataset", metavar="PATH",
        help="tar file, folder or pattern of SA-1B's layout, or a folder with images/ and masks/",
    )  # fmt: skip
    data.add_argument("--annotations", metavar="JSON", help="annotations of COCO, LVIS, or of the same shape")
    data.add_argument("--images", metavar="DIR", help="folder of the annotated images")
    data.add_argument(
        "--ignore-label", default="auto", metavar="N",
        help="label of mask files that is void; auto: 255 beside labels from 1 to 126 alone; none: no label "
        "(%(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--binary-masks", action="store_true", help="mask files are one object each, from half the brightness on"
    )
    data.add_argument("--limit", type=parse_positive, metavar="N", help="the first N images")
    data.add_argument("--max-instances", type=parse_positive, metavar="N", help="the first N instances of each image")
    data.add_argument("--include-crowd", action="store_true", help="crowd instances too, which are left out otherwise")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--protocol",
        nargs="+",
        default=["box", "clicks"],
        choices=["box", "clicks", EVERYTHING],
        help="prompts (box clicks)",
    )
    protocol.add_argument(
        "--mask-choice", nargs="+", default=["single", "predicted", "oracle"],
        choices=["single", "predicted", "oracle"], help="which mask counts (all three)",
    )  # fmt: skip
    protocol.add_argument(
        "--clicks", nargs="+", type=parse_positive, default=[1, 3, 5], metavar="K", help="numbers of clicks (1 3 5)"
    )
    protocol.add_argument("--no-feedback", action="store_true", help="do not feed logits back with the next click")
    protocol.add_argument("--boundary-iou", action="store_true", help="boundary IoU too")
    add_grid_options(protocol)
    add_tile_options(protocol)
    for option, what in (("--pred-iou-thresh", "predicted IoU"), ("--stability-score-thresh", "stability")):
        protocol.add_argument(
            option, type=parse_fraction, default=0.0, metavar="T",
            help=f"everything mode keeps masks with a {what} above it (%(default)s)",
        )  # fmt: skip
    protocol.add_argument("--detections", metavar="JSON", help="a detector's COCO results: mask AP with its boxes")
    protocol.add_argument("--lvis", action="store_true", help="LVIS's AP for --detections, not COCO's")
    protocol.add_argument("--teacher", metavar="DIR", help="model that each is compared with: fidelity")
    run = parser.add_argument_group("run; several GPUs: accelerate launch examples/evaluate.py ...")
    run.add_argument(
        "--out", type=Path, default=Path("outputs/evaluate"), metavar="DIR", help="report folder (%(default)s)"
    )
    run.add_argument(
        "--batch-size", type=parse_positive, default=4, metavar="N", help="images encoded at once (%(default)s)"
    )
    run.add_argument(
        "--num-workers", type=parse_not_negative, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that read ahead (%(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--worst", type=parse_not_negative, default=20, metavar="N", help="worst cases to draw (%(default)s)"
    )
    run.add_argument("--no-plots", action="store_true", help="no plots and no worst cases")
    run.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    run.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    run.add_argument(
        "--optimize", action="store_true",
        help="run models as samlight_hf.optimize does: faster, with the same masks up to rounding",
    )  # fmt: skip


def run_evaluate(args: argparse.Namespace) -> int:
    """Write the report and print its table. An interrupted run that is started again continues where it stopped.

    Returns:
        The exit status: 0, or `exit_status` of an interrupt.
    """
    try:
        import accelerate  # noqa: F401
        import pycocotools  # noqa: F401

        if EVERYTHING in args.protocol or args.detections:
            import faster_coco_eval  # noqa: F401

        from ..evaluation.protocols import ProtocolSettings
        from ..evaluation.report import require_matplotlib

        if not args.no_plots:
            require_matplotlib()
    except ImportError as error:
        raise missing_package(error, "evaluation", "eval") from error
    prompts = tuple(name for name in args.protocol if name != EVERYTHING)
    if args.detections and not args.annotations:
        raise argparse.ArgumentTypeError("--detections needs --annotations and --images: AP is measured against those.")
    names = _names(args.model)
    settings = None
    if prompts:
        settings = ProtocolSettings(
            prompts, tuple(args.mask_choice), tuple(args.clicks), not args.no_feedback, args.include_crowd,
            args.boundary_iou, args.max_instances,
        )  # fmt: skip
    if bool(args.dataset) == bool(args.annotations) or bool(args.annotations) != bool(args.images):
        raise argparse.ArgumentTypeError(
            "give either --dataset, for SA-1B tars or a folder with images/ and masks/, or --annotations and --images."
        )
    if args.out.exists() and not args.out.is_dir():
        raise argparse.ArgumentTypeError(f"--out {args.out} is a file. Choose another.")
    _check_report(args.out, names, str(args.dataset or args.annotations))
    try:
        with explained_end(lambda: "The same command goes on where it stopped."):
            with process_group(cpu=args.device == "cpu") as state:
                results, drawers = _evaluate_models(names, settings, args, state)
    except KeyboardInterrupt as interrupt:
        tell("samlight: interrupted: the same command goes on where it stopped.", file=sys.stderr)
        return exit_status(interrupt)
    if state.is_main_process:  # the others do not wait for it
        _tell_report(results, drawers, args)
    return 0


def _check_report(out: Path, names: Sequence[str], dataset: str):
    """Raise ArgumentTypeError where the report of another model or dataset would be overwritten."""
    path = out / "report.json"
    if not path.is_file():
        return
    try:
        settings = [model["settings"] for model in read_json(path, dict)["models"]]
        before = [(each["model"], each["dataset"]) for each in settings]
    except (ValueError, KeyError, TypeError):  # no report of ours, or of another version
        before = [("another program", "other data")]
    for model, data in before:
        is_there = any(name == model or name.endswith(f"/{model}") for name in names)
        if not is_there or os.path.abspath(data) != os.path.abspath(dataset):
            raise argparse.ArgumentTypeError(f"{path} is the report of {model} on {data}. Choose another --out.")


def _evaluate_models(
    names: Sequence[str], settings: "ProtocolSettings | None", args: argparse.Namespace, state: "PartialState"
) -> "tuple[list[ModelResult], list[Callable]]":
    from ..evaluation.files import dataset_digest

    dataset = _open_dataset(args)
    digest = dataset_digest(dataset, args.dataset or args.annotations)
    measurements = measurements_of(dataset, settings, args, state)
    results, drawers = [], []
    for path, name in zip(args.model, names):
        result, drawer = _evaluate_model(path, name, dataset, digest, measurements, args, state)
        results.append(result)
        drawers.append(drawer)
    return results, drawers


def _tell_report(results: "list[ModelResult]", drawers: list[Callable], args: argparse.Namespace):
    from ..evaluation.report import console_table, worst_cases, write_report

    sheets = []
    if not args.no_plots and args.worst > 0:
        for result, drawer in zip(results, drawers):
            if protocol := next((p for p in result.protocols if p.startswith(("box", "1 click"))), None):
                sheets += worst_cases(args.out, result, drawer(protocol), protocol, args.worst)
    page = write_report(args.out, results, sheets, plots=not args.no_plots)
    print(console_table(results))
    for result in results:
        for name, value in result.settings["extra"].items():
            print(f"{result.name}: {name} {value:.4f}")
        for reason, count in result.settings["skipped"].items():
            print(f"samlight: skipped {count} x {reason}", file=sys.stderr)
    print(f"Report: {page}")


def _open_dataset(args: argparse.Namespace) -> "ImageDataset":
    from ..data import MaskFolderDataset, load_dataset
    from ..data.label_maps import MaskReading, parse_ignore_label

    try:
        label = cast("int | Literal['auto'] | None", parse_ignore_label(args.ignore_label))
        reading = MaskReading(label, args.binary_masks)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--ignore-label: {error}") from error
    dataset = load_dataset(
        args.dataset or args.annotations,
        images=args.images,
        limit=args.limit,
        ignore_label=reading.ignore_label,
        binary_masks=reading.binary,
    )
    if reading != MaskReading() and not isinstance(dataset, MaskFolderDataset):
        raise argparse.ArgumentTypeError(
            "--ignore-label and --binary-masks say how mask files are read: they go with a folder with images/ and "
            "masks/."
        )
    return dataset


def _evaluate_model(
    path: str, name: str, dataset: "ImageDataset", digest: str, measurements: Sequence[Measurement],
    args: argparse.Namespace, state: "PartialState",
) -> "tuple[ModelResult, Callable]":  # fmt: skip
    """Run all measurements of one model; return its result, and a function that makes `_drawer`s for a protocol."""
    from ..data import MaskFolderDataset, SkipReport
    from ..evaluation.evaluator import Journal, evaluate
    from ..evaluation.files import slug
    from ..evaluation.report import ModelResult

    model = load_promptable_model(path, args, state)
    for measurement in measurements:
        measurement.task.check(model)
    common = {
        "model": model.fingerprint(), "model_settings": model.settings_digest(),
        "dataset": args.dataset or args.annotations, "dataset_content": digest, "num_pictures": len(dataset),
        "batch_size": args.batch_size, "dtype": args.dtype,
    }  # fmt: skip
    if args.optimize:
        common["optimize"] = True
    if isinstance(dataset, MaskFolderDataset):
        common["mask_reading"] = dataset.reading.to_dict()
    instances: list[dict] = []
    extra: dict[str, float] = {}
    images: dict[str, int] = {}
    skipped, total_seconds = SkipReport(), 0.0
    for measurement in measurements:
        file_name = f"{slug(name)}.{measurement.name}"
        journal = Journal(args.out / "journal", file_name, {**common, **measurement.settings})
        records, skipped, seconds = evaluate(
            model, dataset, measurement.task, journal, args.batch_size, args.num_workers, f"{name}, {measurement.name}"
        )
        total_seconds += seconds
        if measurement.summarize:
            extra |= measurement.summarize(records)
        else:
            instances = records
            images = {record["picture"]: index for index, line in journal.done.items() for record in line["records"]}
    about = {
        "model": name,
        "dataset": str(args.dataset or args.annotations),
        "protocols": [
            *(sentence for measurement in measurements for sentence in measurement.sentences),
            *(["the model runs as samlight_hf.optimize makes it run"] if args.optimize else []),
        ],
        "weights": common["model"],
        **_about_run(args, model.model.device, state.num_processes),
        "skipped": _skip_counts(skipped),
        "num_pictures": dataset.num_images - skipped.num_images,
        "num_instances": None if all(measurement.summarize for measurement in measurements) else len(instances),
        "seconds": {"model": sum(model.seconds.values()), "total": total_seconds},
        "latency_ms": model.latency_ms(),
        "extra": extra,
    }
    if skipped.too_many(dataset.num_images):
        tell(f"samlight: warning: {skipped.summary(dataset.num_images)}", file=sys.stderr)
    return ModelResult(about, instances), lambda protocol: _drawer(model, dataset, images, protocol)


def _about_run(args: argparse.Namespace, device: "torch.device", num_processes: int) -> dict:
    return {
        "command": args.command_line,
        "date": datetime.date.today().isoformat(),
        "device": _device_name(device) + (f" x {num_processes}" if num_processes > 1 else ""),
        "dtype": args.dtype,
        "versions": _versions(),
    }


def _skip_counts(skipped: "SkipReport") -> dict[str, int]:
    kinds = {"image": skipped.images, "instance": skipped.instances, "part of an instance": skipped.parts}
    return {f"{kind}, {reason}": entry.count for kind, reasons in kinds.items() for reason, entry in reasons.items()}


def _names(paths: Sequence[str]) -> list[str]:
    """Return the models' names: those of their folders, with as many parents as it takes to tell them apart.

    outputs/a/student and outputs/b/student become a/student and b/student. The names differ as names of files too.

    Raises:
        ArgumentTypeError: for a path that occurs twice, and for paths whose file names would be the same.
    """
    from ..evaluation.files import slug

    parts = [Path(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path_parts[-length:]) for path_parts in parts]
        if len(set(map(slug, names))) == len(names):
            return names
    if len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"--model names a model twice: {', '.join(paths)}.")
    raise argparse.ArgumentTypeError(
        f"--model names models that the report's files would not tell apart: {', '.join(paths)}. Rename a folder: "
        "file names keep only letters, digits, _, - and dots."
    )


def _drawer(model: "PromptableModel", dataset: "ImageDataset", images: Mapping[str, int], protocol: str) -> Callable:
    """Return a function for `worst_cases` that predicts the instance of a record again.

    Args:
        images: index in the dataset by image name.
        protocol: the prompt and the choice of the mask, "box/..." or "1 click/...".

    Returns:
        A function from a record to the image, its annotated mask, the predicted mask, and the prompts as arguments of
        `draw_overlay`.
    """
    import torch

    from ..data.clicks import deepest_point
    from ..evaluation.metrics.mask_iou.iou import mask_iou
    from ..masks.boxes import xywh_to_xyxy

    def draw_inputs(record):
        sample = dataset[images[record["picture"]]]
        instance = next(instance for instance in sample.instances if instance.id == record["instance"])
        target = instance.mask()
        (encoded,) = model.encode([sample.image])
        prompt, choice = protocol.split("/")
        if prompt == "box":
            box = xywh_to_xyxy(instance.bbox_xywh)
            shown, prompts = {"boxes_xyxy": [box]}, {"boxes_xyxy": torch.tensor([box])}
        else:
            point, _ = deepest_point(target)
            shown = {"points_xy": [point]}
            prompts = {"points_xy": torch.tensor([[point]]), "labels": torch.ones(1, 1, dtype=torch.long)}
        prediction = model.predict(encoded, **prompts, multimask_output=choice != "single")
        masks = prediction.masks[0].cpu()
        scores = mask_iou(masks, torch.tensor(target)[None]) if choice == "oracle" else prediction.predicted_iou[0]
        return sample.image, target, masks[int(scores.argmax())].numpy(), shown

    return draw_inputs


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .. import __version__

    return {"samlight-hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
