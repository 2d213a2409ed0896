"""Measurements that `samlight evaluate` can make: of instances, everything mode, detections and fidelity."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..utils.processes import tell
from .options import tiles_from_options


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..data import ImageDataset
    from ..data.coco import CocoDataset
    from ..evaluation.models import PromptableModel
    from ..evaluation.protocols import ProtocolSettings
    from ..evaluation.tasks import EvaluationTask


EVERYTHING = "everything"


@dataclass(frozen=True)
class Measurement:
    """A task that is run on every image, with what the journal and the report need to know about it.

    Attributes:
        name: part of the journal's file name, and shown in the progress bar.
        task: computes the records of an image.
        settings: kept in the journal; a journal with other settings is refused.
        sentences: how the numbers were measured, for readers of the report.
        summarize: computes scores by name from the records of all images. None for the scores of instances, whose
            records themselves are reported.
    """

    name: str
    task: "EvaluationTask"
    settings: dict
    sentences: list[str]
    summarize: Callable[[list[dict]], dict[str, float]] | None = None


def measurements_of(
    dataset: "ImageDataset", settings: "ProtocolSettings | None", args: argparse.Namespace, state: "PartialState"
) -> list[Measurement]:
    """Return the measurements that the arguments ask for; without `settings`, instances are not evaluated."""
    from ..data.coco import CocoDataset
    from ..evaluation.fidelity import Fidelity, summarize_fidelity
    from ..evaluation.protocols import RECORDS_VERSION, InstanceProtocols

    measurements = []
    if settings is not None:
        instances = InstanceProtocols(settings)
        about = {**settings.to_dict(), "records_version": RECORDS_VERSION}
        measurements.append(Measurement("instances", instances, about, settings.sentences()))
    if EVERYTHING in args.protocol:
        measurements.append(_everything_measurement(args))
    elif any((args.crops_n_layers, args.tile, args.overlap, args.pred_iou_thresh, args.stability_score_thresh)):
        raise argparse.ArgumentTypeError(
            "--crops-n-layers, --tile, --overlap, --pred-iou-thresh and --stability-score-thresh are of everything "
            "mode: add --protocol everything."
        )
    if args.lvis and not args.detections:
        raise argparse.ArgumentTypeError("--lvis says how --detections are scored: give --detections too.")
    if args.detections:
        if not isinstance(dataset, CocoDataset):
            raise argparse.ArgumentTypeError("--detections needs --annotations of COCO's shape, a JSON file.")
        measurements.append(_detection_measurement(dataset, args))
    if args.teacher:
        teacher = load_promptable_model(args.teacher, args, state)
        about = {
            "teacher": teacher.fingerprint(), "teacher_settings": teacher.settings_digest(),
            "max_instances": args.max_instances,
        }  # fmt: skip
        sentence = f"fidelity: image embeddings, layers and masks against {args.teacher}, same images and prompts"
        task = Fidelity(teacher, args.max_instances)
        measurements.append(Measurement("fidelity", task, about, [sentence], summarize_fidelity))
    return measurements


def _everything_measurement(args: argparse.Namespace) -> Measurement:
    from ..evaluation.average_precision import EverythingTask, summarize_everything

    tiles = tiles_from_options(args)
    settings: dict[str, Any] = {
        "points_per_side": args.points_per_side, "pred_iou_thresh": args.pred_iou_thresh,
        "stability_score_thresh": args.stability_score_thresh, "crops_n_layers": args.crops_n_layers,
    }  # fmt: skip
    where = f", crops_n_layers={args.crops_n_layers}" if args.crops_n_layers else ""
    where += f", in tiles of {tiles.size} px with an overlap of {tiles.overlap}" if tiles else ""
    filters = (
        f"predicted IoU above {args.pred_iou_thresh} and stability above {args.stability_score_thresh}"
        if args.pred_iou_thresh or args.stability_score_thresh
        else "no thresholds but NMS"
    )
    sentences = [
        f"AR@1000: everything mode, {args.points_per_side}x{args.points_per_side} points{where}, {filters}",
        "masks right@0.5: share of its masks whose IoU with an annotated region is at least 0.5; ranking AUC: how "
        "often a right mask has a higher score than a wrong one of the same image",
    ]
    task = EverythingTask(**settings, tiles=tiles)
    settings["tiles"] = tiles and asdict(tiles)
    return Measurement(EVERYTHING, task, settings, sentences, summarize_everything)


def _detection_measurement(dataset: "CocoDataset", args: argparse.Namespace) -> Measurement:
    from ..evaluation.average_precision import DetectorBoxes, average_precision, check_annotations
    from ..evaluation.files import content_digest

    category_ids = check_annotations(args.annotations, dataset.ids, args.lvis)
    task = DetectorBoxes(args.detections, dataset.ids, category_ids)
    sentence = f"{'LVIS' if args.lvis else 'COCO'} mask AP: boxes of {args.detections}, one mask each"
    if task.num_other:
        sentence += f"; {task.num_other} boxes of other images left out"
    for count, kind in (
        (task.num_empty, "without width or height"),
        (task.num_unknown, f"of categories that {args.annotations} does not have"),
    ):
        if count:
            left_out = f"{count} boxes {kind} left out"
            sentence += f"; {left_out}"
            tell(f"samlight: warning: {args.detections}: {left_out}", file=sys.stderr)

    def summarize(records: list[dict]) -> dict[str, float]:
        predictions = [prediction for record in records for prediction in record["predictions"]]
        image_ids = [record["image_id"] for record in records]  # without images that could not be read
        return average_precision(args.annotations, predictions, image_ids, args.lvis)

    settings = {"detections": args.detections, "detections_content": content_digest(args.detections)}
    return Measurement("detections", task, settings, [sentence], summarize)


def load_promptable_model(path: str, args: argparse.Namespace, state: "PartialState") -> "PromptableModel":
    """Load a model for `--device`, `--dtype` and `--optimize`; with `--device auto`, on the device of this process."""
    from ..evaluation.models import SUPPORTED, PromptableModel
    from ..loading import load_model

    device = str(state.device) if args.device == "auto" else args.device
    model, processor = load_model(path, device, args.dtype, tuple(SUPPORTED))
    if not args.optimize:
        return PromptableModel(model, processor)
    try:
        return PromptableModel.optimized(model, processor, args.batch_size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--optimize is not for {path}: {error}") from error
