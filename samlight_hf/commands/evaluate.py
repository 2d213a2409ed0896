"""`samlight evaluate`: models side by side on a dataset, with a report that says how every number was measured."""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.processes import process_group, tell
from .options import not_empty, parse_fraction


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..data import ImageDataset
    from ..evaluation.models import PromptableModel
    from ..evaluation.protocols import ProtocolSettings
    from ..evaluation.report import ModelResult
    from ..evaluation.work import EvaluationTask

EVERYTHING = "everything"


def add_evaluate_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model", action="append", required=True, type=not_empty, metavar="DIR",
        help="checkpoint's folder or Hub name; may be repeated, and the first is what the others are compared with",
    )  # fmt: skip
    data = parser.add_argument_group("data: SA-1B tars, a COCO-shaped JSON with its images, or a folder of mask files")
    data.add_argument(
        "--dataset", metavar="PATH", help="tar file, folder or pattern of SA-1B's layout, or a folder with images/ and masks/"
    )  # fmt: skip
    data.add_argument("--annotations", metavar="JSON", help="annotations of COCO, LVIS, or of the same shape")
    data.add_argument("--images", metavar="DIR", help="folder of the annotated images")
    data.add_argument(
        "--ignore-label", default="auto", metavar="N",
        help="label of mask files that is void; auto: 255 beside labels from 1 to 126 alone; none: no label (%(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--binary-masks", action="store_true", help="mask files are one object each, from half the brightness on"
    )
    data.add_argument("--limit", type=int, metavar="N", help="the first N images")
    data.add_argument("--max-instances", type=int, metavar="N", help="the first N instances of each image")
    data.add_argument("--include-crowd", action="store_true", help="crowd instances too, which are left out otherwise")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--protocol", nargs="+", default=["box", "clicks"], choices=["box", "clicks", EVERYTHING], help="%(default)s"
    )
    protocol.add_argument(
        "--mask-choice", nargs="+", default=["single", "predicted", "oracle"], choices=["single", "predicted", "oracle"],
        help="which mask counts (%(default)s)",
    )  # fmt: skip
    protocol.add_argument("--clicks", nargs="+", type=int, default=[1, 3, 5], metavar="K", help="%(default)s")
    protocol.add_argument("--no-feedback", action="store_true", help="do not feed logits back with the next click")
    protocol.add_argument("--boundary-iou", action="store_true", help="boundary IoU too")
    protocol.add_argument(
        "--points-per-side", type=int, default=32, metavar="N", help="of everything mode (%(default)s)"
    )
    for option, what in (("--pred-iou-thresh", "predicted IoU"), ("--stability-score-thresh", "stability")):
        protocol.add_argument(
            option, type=parse_fraction, default=0.0, metavar="T",
            help=f"everything mode keeps masks with a {what} above it (%(default)s)",
        )  # fmt: skip
    protocol.add_argument("--detections", metavar="JSON", help="a detector's COCO results: mask AP with its boxes")
    protocol.add_argument("--lvis", action="store_true", help="LVIS's AP for --detections, not COCO's")
    protocol.add_argument("--teacher", metavar="DIR", help="how close each model is to this one")
    run = parser.add_argument_group("run; several GPUs: accelerate launch examples/evaluate.py ...")
    run.add_argument("--out", type=Path, default=Path("outputs/evaluate"), help="report folder (%(default)s)")
    run.add_argument("--batch-size", type=int, default=4, metavar="N", help="images encoded at once (%(default)s)")
    run.add_argument("--num-workers", type=int, default=4, metavar="N", help="processes that read ahead (%(default)s)")
    run.add_argument("--worst", type=int, default=20, metavar="N", help="worst cases to draw (%(default)s)")
    run.add_argument("--no-plots", action="store_true", help="no plots and no worst cases")
    run.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    run.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")


def run_evaluate(args: argparse.Namespace) -> int:
    """Writes the report and prints its table. An interrupted run, started again, goes on where it was."""
    try:
        import accelerate  # noqa: F401

        from ..evaluation.protocols import ProtocolSettings
        from ..evaluation.report import require_matplotlib
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            f"{error}. Install what evaluation needs: pip install 'samlight-hf[eval]'"
        ) from error
    prompts = tuple(name for name in args.protocol if name != EVERYTHING)
    if args.batch_size < 1:
        raise argparse.ArgumentTypeError(f"--batch-size {args.batch_size} must be positive.")
    if args.detections and not args.annotations:
        raise argparse.ArgumentTypeError("--detections needs --annotations and --images: AP is measured against those.")
    names = _names(args.model)
    settings = prompts and ProtocolSettings(
        prompts, tuple(args.mask_choice), tuple(args.clicks), not args.no_feedback, args.include_crowd,
        args.boundary_iou, args.max_instances,
    )  # fmt: skip
    if not args.no_plots:
        require_matplotlib()
    if not (args.dataset or args.annotations) or (args.dataset and args.annotations):
        raise argparse.ArgumentTypeError("give --dataset for SA-1B tars, or --annotations and --images.")
    with process_group(cpu=args.device == "cpu") as state:
        results, drawers = _evaluate_models(names, settings, args, state)
    if state.is_main_process:  # the others do not wait for it
        _tell_report(results, drawers, args)
    return 0


def _evaluate_models(
    names: Sequence[str], settings: "ProtocolSettings | tuple", args: argparse.Namespace, state: "PartialState"
) -> "tuple[list[ModelResult], list[Callable]]":
    from ..evaluation.files import dataset_digest

    dataset = _open_dataset(args)
    digest = dataset_digest(dataset, args.dataset or args.annotations)
    works = _works(dataset, settings, args, state)
    results, drawers = [], []
    for path, name in zip(args.model, names):
        result, drawer = _evaluate_model(path, name, dataset, digest, works, args, state)
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
        reading = MaskReading(parse_ignore_label(args.ignore_label), args.binary_masks)
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
            "--ignore-label and --binary-masks say how mask files are read: they go with a folder with images/ and masks/."
        )
    return dataset


def _evaluate_model(
    path: str, name: str, dataset: "ImageDataset", digest: str, works: list, args: argparse.Namespace, state
) -> "tuple[ModelResult, Callable]":
    from ..data import MaskFolderDataset, SkipReport
    from ..evaluation.evaluator import Journal, evaluate
    from ..evaluation.files import slug
    from ..evaluation.report import ModelResult

    model = _load(path, args, state)
    common = {
        "model": model.fingerprint(), "dataset": args.dataset or args.annotations, "dataset_content": digest,
        "num_pictures": len(dataset), "batch_size": args.batch_size, "dtype": args.dtype,
    }  # fmt: skip
    if isinstance(dataset, MaskFolderDataset):
        common["mask_reading"] = dataset.reading.to_dict()
    records, extra, skipped, seconds, images = [], {}, SkipReport(), 0.0, {}
    for kind, work, its_settings, _, summarize in works:
        journal = Journal(args.out / "journal", f"{slug(name)}.{kind}", {**common, **its_settings})
        found, skipped, its_seconds = evaluate(
            model, dataset, work, journal, args.batch_size, args.num_workers, f"{name}, {kind}"
        )
        seconds += its_seconds
        if summarize:
            extra |= summarize(found)
        else:
            records = found
            images = {r["picture"]: index for index, line in journal.done.items() for r in line["records"]}
    result = ModelResult(
        {
            "model": name,
            "dataset": str(args.dataset or args.annotations),
            "protocols": [sentence for _, _, _, sentences, _ in works for sentence in sentences],
            "command": args.command_line,
            "date": datetime.date.today().isoformat(),
            "device": _device_name(model.model.device)
            + (f" x {state.num_processes}" if state.num_processes > 1 else ""),
            "dtype": args.dtype,
            "versions": _versions(),
            "skipped": {
                **{f"image, {reason}": s.count for reason, s in skipped.images.items()},
                **{f"instance, {reason}": s.count for reason, s in skipped.instances.items()},
                **{f"part of an instance, {reason}": s.count for reason, s in skipped.parts.items()},
            },
            "num_pictures": dataset.num_images - skipped.num_images,
            "num_instances": len(records),
            "seconds": {"model": sum(model.seconds.values()), "total": seconds},
            "latency_ms": model.latency_ms(),
            "extra": extra,
        },
        records,
    )
    if skipped.too_many(dataset.num_images):
        tell(f"samlight: warning: {skipped.summary(dataset.num_images)}", file=sys.stderr)
    return result, lambda protocol: _drawer(model, dataset, images, protocol)


def _works(dataset, settings, args, state) -> "list[tuple[str, EvaluationTask, dict, list[str], Callable | None]]":
    """What is run: name, work, what its journal must know, sentences for readers, and a summary but for the instances."""
    from ..evaluation import average_precision as detection
    from ..evaluation.fidelity import Fidelity, summarize_fidelity
    from ..evaluation.files import content_digest
    from ..evaluation.protocols import InstanceProtocols

    works = []
    if settings:
        works.append(("instances", InstanceProtocols(settings), settings.to_dict(), settings.sentences(), None))
    if EVERYTHING in args.protocol:
        arguments = {
            "points_per_side": args.points_per_side, "pred_iou_thresh": args.pred_iou_thresh,
            "stability_score_thresh": args.stability_score_thresh,
        }  # fmt: skip
        kept = (
            f"predicted IoU above {args.pred_iou_thresh} and stability above {args.stability_score_thresh}"
            if args.pred_iou_thresh or args.stability_score_thresh
            else "no thresholds but NMS"
        )
        sentences = [
            f"AR@1000: everything mode, {args.points_per_side}x{args.points_per_side} points, {kept}",
            "masks right@0.5: share of its masks whose IoU with an annotated region is at least 0.5; ranking AUC: how often "
            "a right mask has a higher score than a wrong one of the same image",
        ]
        work = detection.EverythingTask(**arguments)
        works.append((EVERYTHING, work, arguments, sentences, detection.summarize_everything))
    if args.detections:
        boxes = detection.DetectorBoxes(args.detections, dataset.ids)
        sentence = f"{'LVIS' if args.lvis else 'COCO'} mask AP: boxes of {args.detections}, one mask each"
        if boxes.num_other:
            sentence += f"; {boxes.num_other} boxes of other images left out"

        detection.check_annotations(args.annotations, dataset.ids, args.lvis)

        def summarize(records):
            results = [result for record in records for result in record["predictions"]]
            image_ids = [record["image_id"] for record in records]  # without images that could not be read
            return detection.average_precision(args.annotations, results, image_ids, args.lvis)

        about = {"detections": args.detections, "detections_content": content_digest(args.detections)}
        works.append(("detections", boxes, about, [sentence], summarize))
    if args.teacher:
        teacher = _load(args.teacher, args, state)
        about = {"teacher": teacher.fingerprint(), "max_instances": args.max_instances}
        sentence = f"fidelity: image embeddings, layers and masks against {args.teacher}, same images and prompts"
        works.append(("fidelity", Fidelity(teacher, args.max_instances), about, [sentence], summarize_fidelity))
    return works


def _names(paths: Sequence[str]) -> list[str]:
    """The folders' names, with as many of the parents' as tell them apart, as names of files too: a/student and b/student.

    ArgumentTypeError for one path twice, and for paths that files cannot tell apart.
    """
    from ..evaluation.files import slug

    parts = [Path(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(map(slug, names))) == len(names):
            return names
    if len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"--model names a model twice: {', '.join(paths)}.")
    raise argparse.ArgumentTypeError(
        f"--model names models that the report's files would not tell apart: {', '.join(paths)}. Rename a folder: file names "
        "keep only letters, digits, _, - and dots."
    )


def _load(path: str, args: argparse.Namespace, state) -> "PromptableModel":
    from ..evaluation.models import SUPPORTED, PromptableModel
    from ..loading import load_model

    device = str(state.device) if args.device == "auto" else args.device
    return PromptableModel(*load_model(path, device, args.dtype, tuple(SUPPORTED)))


def _drawer(model: "PromptableModel", dataset: "ImageDataset", images: Mapping[str, int], protocol: str) -> Callable:
    """For `worst_cases`: predicts a record's instance again, by "box/..." or "1 click/..."."""
    import torch

    from ..evaluation.clicks import deepest_point
    from ..evaluation.metrics.mask_iou.iou import mask_iou
    from ..masks.boxes import xywh_to_xyxy

    def draw_inputs(record):
        sample = dataset[images[record["picture"]]]
        instance = next(i for i in sample.instances if i.id == record["instance"])
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


def _device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .. import __version__

    return {"samlight-hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
