"""Zero-shot protocols: the prompts for an instance, and the choice of the predicted mask.

Prompts are "box" (the annotation's box) and "K clicks" (see `clicks.py`). The choice of the mask is always named,
because published figures depend on it more than on the model: "single" (the one mask of `multimask_output=False`),
"predicted" (of three masks, the one with the highest predicted IoU) or "oracle" (of three masks, the one with the
highest true IoU, an upper bound). The IoU of every protocol is computed at the image's own size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from ..data import Sample
from ..masks.boxes import xywh_to_xyxy
from .clicks import next_clicks
from .metrics.mask_iou.iou import boundary_iou, mask_area, mask_iou
from .models import Encoded, PromptableModel, PromptedMasks, to_device
from .statistics import PLACES
from .targets import Targets
from .tasks import EvaluationTask


PROMPTS = ("box", "clicks")
MASK_CHOICES = ("single", "predicted", "oracle")
# Raised when records get a new measure: journals of earlier records are refused.
RECORDS_VERSION = 2
_MEASURES = ("iou", "boundary_iou", "predicted_iou", "mask_index", "relative_area")

# Float logits of one chunk of instances, three masks each, at the larger of the image's and the model's size.
_CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class ProtocolSettings:
    """The settings of the protocols.

    Attributes:
        prompts: some of `PROMPTS`.
        mask_choices: some of `MASK_CHOICES`.
        num_clicks: numbers of clicks after which the IoU is computed.
        feed_back: whether the logits of the chosen mask are fed back with the next click.
        with_crowd: whether crowd instances are evaluated too.
        with_boundary_iou: whether boundary IoU is computed too.
        max_instances: evaluate only the first instances of each image; None for all.

    Raises:
        ValueError: for an unknown prompt or choice of mask, and a number below 1.
    """

    prompts: tuple[str, ...] = PROMPTS
    mask_choices: tuple[str, ...] = MASK_CHOICES
    num_clicks: tuple[int, ...] = (1, 3, 5)
    feed_back: bool = True
    with_crowd: bool = False
    with_boundary_iou: bool = False
    max_instances: int | None = None

    def __post_init__(self):
        for name, values, known in (
            ("prompts", self.prompts, PROMPTS),
            ("mask_choices", self.mask_choices, MASK_CHOICES),
        ):
            if not values or set(values) - set(known):
                raise ValueError(f"{name}={tuple(values)} must be some of {', '.join(known)}.")
        if not self.num_clicks or min(self.num_clicks) < 1:
            raise ValueError(f"num_clicks={tuple(self.num_clicks)} must be positive.")
        check_max_instances(self.max_instances)

    def sentences(self) -> list[str]:
        """Return sentences that describe the protocol beside the numbers of a report."""
        taken = {
            "single": "single: the one mask of multimask_output=False",
            "predicted": "predicted: of three masks, the one with the highest predicted IoU",
            "oracle": "oracle: of three masks, the one with the highest true IoU, an upper bound",
        }
        prompts = {
            "box": "box: the annotation's box, as annotated, without noise",
            "clicks": "clicks: the first at the point deepest inside the mask (distance transform, image padded with "
            "zeros), each next one at the deepest point of the larger error region of the mask taken; "
            + ("its logits are fed back" if self.feed_back else "no logits are fed back"),
        }
        instances = "all instances, crowds included" if self.with_crowd else "crowd instances left out"
        if self.max_instances is not None:
            instances += f", at most the first {self.max_instances} of each image"
        return [
            *(prompts[name] for name in self.prompts),
            *(taken[name] for name in self.mask_choices),
            f"mIoU: mean over instances of the IoU at the image's own size; {instances}",
        ]

    def to_dict(self) -> dict:
        return asdict(self)


def check_max_instances(max_instances: int | None):
    """Raise ValueError unless `max_instances` is None or at least 1."""
    if max_instances is not None and max_instances < 1:
        raise ValueError(f"max_instances={max_instances} must be at least 1, or None for all.")


class InstanceProtocols(EvaluationTask):
    """A task that prompts every annotated instance with boxes and clicks.

    It returns one record for each instance of an image, in their order: {"picture", "instance", "area", "width",
    "height", "iou": {"box/single": ..., "3 clicks/oracle": ...}, "predicted_iou": the same keys, "boundary_iou": the
    same keys or none, "mask_index": {"3 clicks/oracle": ...}, which of three masks counts, from 0, and
    "relative_area": {"1 click/first": ..., "1 click/second": ..., "1 click/third": ...}, the area of each of the three
    masks as a multiple of the object's, for boxes and first clicks}.
    """

    def __init__(self, settings: ProtocolSettings):
        self.settings = settings

    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        return self.batch(model, [encoded], [self.prepare(sample)])[0]

    def prepare(self, sample: Sample) -> Targets:  # type: ignore[override]  # not static: it needs the settings
        instances = [instance for instance in sample.instances if self.settings.with_crowd or not instance.is_crowd]
        with_clicks = "clicks" in self.settings.prompts
        return Targets.of(sample, instances[: self.settings.max_instances], with_clicks)

    def batch(
        self, model: PromptableModel, encoded: Sequence[Encoded | None], prepared: Sequence[Targets]
    ) -> list[list[dict]]:
        """Return the records of each image. On a GPU with Triton only the records, at the end, wait for the device."""
        images = cast(Sequence[Encoded], encoded)
        pieces = [
            (image, piece)
            for image, targets in zip(images, prepared, strict=True)
            for piece in _in_pieces(image, targets)
        ]
        scores = [_Scores(self.settings.with_boundary_iou) for _ in pieces]
        if "box" in self.settings.prompts:
            _box_protocol(model, pieces, scores, self.settings)
        if "clicks" in self.settings.prompts:
            for (image, piece), piece_scores in zip(pieces, scores, strict=True):
                _click_protocol(model, image, piece, piece_scores, self.settings)
        rows = itertools.chain.from_iterable(_records([piece for _, piece in pieces], scores))
        return [list(itertools.islice(rows, len(targets))) for targets in prepared]


def _in_pieces(encoded: Encoded, targets: Targets) -> list[Targets]:
    """Split the instances of an image into pieces whose masks fit into memory."""
    pixels = max(targets.width * targets.height, encoded.reshaped_size[0] * encoded.reshaped_size[1])
    size = max(1, _CHUNK_BYTES // (3 * 4 * pixels))
    return [targets[start : start + size] for start in range(0, len(targets), size)]


class _Scores:
    """The scores of n instances: chooses a mask of each prediction, and keeps its scores, (n,) each, on the device."""

    def __init__(self, with_boundary_iou: bool):
        self.with_boundary_iou = with_boundary_iou
        self.values: dict[tuple[str, str], torch.Tensor] = {}  # (measure, protocol)

    def take(self, prediction: PromptedMasks, targets: torch.Tensor, choice: str, protocol: str | None) -> torch.Tensor:
        """Choose a mask of each prediction, and store its scores.

        Args:
            prediction: the predictions for n instances.
            targets: bool (n, H, W).
            choice: one of `MASK_CHOICES`.
            protocol: the name under which the scores are stored; None stores nothing.

        Returns:
            The index (n,) of the chosen masks.
        """
        ious = mask_iou(prediction.masks, targets[:, None])  # (n, m)
        if choice == "single":
            taken = torch.zeros(len(ious), dtype=torch.long, device=ious.device)
        else:
            taken = (ious if choice == "oracle" else prediction.predicted_iou).argmax(dim=1)
        if protocol is not None:
            self.values["iou", protocol] = select(ious, taken)
            self.values["predicted_iou", protocol] = select(prediction.predicted_iou, taken)
            if choice != "single":
                self.values["mask_index", protocol] = taken
            if self.with_boundary_iou:
                self.values["boundary_iou", protocol] = boundary_iou(select(prediction.masks, taken), targets)
        return taken

    def measure_areas(self, prediction: PromptedMasks, targets: torch.Tensor, prompt: str):
        """Store the areas of the three masks of each prediction, relative to those of the targets (n, H, W)."""
        areas = mask_area(prediction.masks) / mask_area(targets).clamp(min=1)[:, None]  # (n, 3)
        for place, values in zip(PLACES, areas.T):
            self.values["relative_area", f"{prompt}/{place}"] = values


def _records(pieces: Sequence[Targets], scores: Sequence[_Scores]) -> list[list[dict]]:
    """Return the records of each piece's instances. All scores leave the device at once."""
    tensors = [values for piece_scores in scores for values in piece_scores.values.values()]
    wide = tensors[0].dtype if tensors else None  # float64 except on mps; float32 values are converted without loss
    numbers = iter(torch.cat([values.to(wide) for values in tensors]).tolist() if tensors else ())
    records = []
    for piece, piece_scores in zip(pieces, scores, strict=True):
        piece_records: list[dict[str, Any]] = [
            {
                "picture": piece.image, "instance": instance.id, "area": instance.area, "width": piece.width,
                "height": piece.height, **{measure: {} for measure in _MEASURES},
            }
            for instance in piece.instances
        ]  # fmt: skip
        for measure, protocol in piece_scores.values:
            for record in piece_records:
                number = next(numbers)
                record[measure][protocol] = int(number) if measure == "mask_index" else number
        records.append(piece_records)
    return records


def select(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select one of m entries: (n, m, ...) and indexes (n,) -> (n, ...)."""
    return tensor[torch.arange(len(tensor), device=tensor.device), index.to(tensor.device)]


def _box_protocol(
    model: PromptableModel,
    pieces: Sequence[tuple[Encoded, Targets]],
    scores: Sequence[_Scores],
    settings: ProtocolSettings,
):
    encoded = [image for image, _ in pieces]
    boxes = [torch.tensor([xywh_to_xyxy(instance.bbox_xywh) for instance in piece.instances]) for _, piece in pieces]
    predictions = {
        multimask: model.predict_boxes(encoded, boxes, multimask_output=multimask)
        for multimask in {choice != "single" for choice in settings.mask_choices}
    }
    for (_, piece), piece_scores in zip(pieces, scores, strict=True):
        targets = piece.masks(model.model.device)
        piece_predictions = {multimask: next(following) for multimask, following in predictions.items()}
        if True in piece_predictions:
            piece_scores.measure_areas(piece_predictions[True], targets, "box")
        for choice in settings.mask_choices:
            piece_scores.take(piece_predictions[choice != "single"], targets, choice, f"box/{choice}")


def _click_protocol(
    model: PromptableModel, encoded: Encoded, piece: Targets, scores: _Scores, settings: ProtocolSettings
):
    """Run the clicks for each choice of the mask separately: the chosen mask decides where the next click goes."""
    targets = piece.masks(model.model.device)
    assert piece.first_clicks is not None
    first_points = to_device(torch.from_numpy(piece.first_clicks), targets.device)[:, None]  # (n, 1, 2)
    first: dict[bool, PromptedMasks] = {}  # the first click is the same for every choice
    for choice in settings.mask_choices:
        multimask = choice != "single"
        points, labels = first_points, torch.ones(len(piece), 1, dtype=torch.int64, device=targets.device)
        logits = None
        for click in range(1, max(settings.num_clicks) + 1):
            if click > 1 or multimask not in first:
                prediction = model.predict(
                    encoded,
                    points_xy=points,
                    labels=labels,
                    logits=logits if settings.feed_back else None,
                    multimask_output=multimask,
                )
                if click == 1:
                    first[multimask] = prediction
                    if multimask and 1 in settings.num_clicks:
                        scores.measure_areas(prediction, targets, "1 click")
            else:
                prediction = first[multimask]
            counts = click in settings.num_clicks
            plural = "" if click == 1 else "s"
            protocol = f"{click} click{plural}/{choice}" if counts else None
            taken = scores.take(prediction, targets, choice, protocol)
            if click == max(settings.num_clicks):
                break
            logits = select(prediction.logits, taken)[:, None]
            point, label = next_clicks(select(prediction.masks, taken), targets)
            points = torch.cat([points, point[:, None]], dim=1)
            labels = torch.cat([labels, label[:, None]], dim=1)
