"""Zero-shot protocols: which prompts an instance gets, and which of the predicted masks counts.

Prompts are "box" (the annotation's box) and "K clicks" (see `clicks.py`). The mask that counts is always named, because
published figures differ by it more than by the model: "single" (the one mask of `multimask_output=False`), "predicted" (of
three, the one whose predicted IoU is highest) or "oracle" (of three, the one whose true IoU is highest: an upper bound).
Every protocol's IoU is taken at the picture's own size.
"""

from dataclasses import asdict, dataclass

import torch

from ..data import Sample, decode_masks
from .clicks import deepest_point, next_click
from .metrics.mask_iou.iou import boundary_iou, mask_iou
from .models import Encoded, Prediction, PromptableModel


PROMPTS = ("box", "clicks")
MASK_CHOICES = ("single", "predicted", "oracle")

# Float logits of one chunk of instances, three masks each, at the picture's size or the model's, whichever is larger.
_CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class ProtocolSettings:
    """What is asked of a model. Raises ValueError for a prompt, a choice of mask or a number of clicks that is not known.

    Attributes:
        prompts: of `PROMPTS`.
        mask_choices: of `MASK_CHOICES`.
        num_clicks: after how many clicks the IoU is taken.
        feed_back: whether the logits of the mask taken go in with the next click.
        with_crowd: whether crowd instances are evaluated as well.
        with_boundary_iou: whether boundary IoU is computed too.
        max_instances: the first so many of each picture; None is all.
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

    def sentences(self) -> list[str]:
        """What a reader must know beside the numbers."""
        taken = {
            "single": "single: the one mask of multimask_output=False",
            "predicted": "predicted: of three masks, the one with the highest predicted IoU",
            "oracle": "oracle: of three masks, the one with the highest true IoU, an upper bound",
        }
        prompts = {
            "box": "box: the annotation's box, as annotated, without noise",
            "clicks": "clicks: the first at the point deepest inside the mask (distance transform, picture padded with "
            "zeros), each next one at the deepest point of the larger error region of the mask taken; "
            + ("its logits are fed back" if self.feed_back else "no logits are fed back"),
        }
        instances = "all instances, crowds included" if self.with_crowd else "crowd instances left out"
        if self.max_instances is not None:
            instances += f", at most the first {self.max_instances} of each picture"
        return [
            *(prompts[name] for name in self.prompts),
            *(taken[name] for name in self.mask_choices),
            f"mIoU: mean over instances of the IoU at the picture's own size; {instances}",
        ]

    def to_dict(self) -> dict:
        return asdict(self)


class InstanceProtocols:
    """Boxes and clicks for every annotated instance, as `evaluate` runs it over a dataset.

    One record for each instance of a picture, in their order: {"picture", "instance", "area", "width", "height", "iou":
    {"box/single": ..., "3 clicks/oracle": ...}, "predicted_iou": the same keys, "boundary_iou": the same keys or none}.
    """

    needs_embeddings = True

    def __init__(self, settings: ProtocolSettings):
        self.settings = settings

    def __call__(self, model: PromptableModel, encoded: Encoded, sample: Sample) -> list[dict]:
        return _evaluate_sample(model, encoded, sample, self.settings)


def _evaluate_sample(
    model: PromptableModel, encoded: Encoded, sample: Sample, settings: ProtocolSettings
) -> list[dict]:
    instances = [instance for instance in sample.instances if settings.with_crowd or not instance.is_crowd]
    instances = instances[: settings.max_instances]
    pixels = max(sample.width * sample.height, encoded.reshaped_size[0] * encoded.reshaped_size[1])
    chunk_size = max(1, _CHUNK_BYTES // (3 * 4 * pixels))
    records = []
    for start in range(0, len(instances), chunk_size):
        chunk = instances[start : start + chunk_size]
        scorer = _Scorer(chunk, sample, settings, model.model.device)
        if "box" in settings.prompts:
            _box_protocol(model, encoded, chunk, scorer)
        if "clicks" in settings.prompts:
            _click_protocol(model, encoded, scorer)
        records += scorer.records
    return records


class _Scorer:
    """Takes the mask that counts from a prediction and writes its IoU into the instances' records."""

    def __init__(self, instances, sample: Sample, settings: ProtocolSettings, device: torch.device):
        self.settings = settings
        # RLE decodes column by column: the rows are put into order on the device.
        columns = torch.from_numpy(decode_masks(instances).transpose(0, 2, 1))  # bool (n, W, H)
        self.targets = columns.to(device).transpose(1, 2).contiguous()[:, None]  # (n, 1, H, W)
        self.records = [
            {
                "picture": sample.id, "instance": instance.id, "area": instance.area, "width": sample.width,
                "height": sample.height, "iou": {}, "boundary_iou": {}, "predicted_iou": {},
            }
            for instance in instances
        ]  # fmt: skip

    def take(self, prediction: Prediction, choice: str, protocol: str | None) -> torch.Tensor:
        """The index (n,) of the mask that counts; its scores are recorded under `protocol`, unless that is None."""
        ious = mask_iou(prediction.masks, self.targets)  # (n, m)
        if choice == "single":
            taken = torch.zeros(len(ious), dtype=torch.long, device=ious.device)
        else:
            taken = (ious if choice == "oracle" else prediction.predicted_iou).argmax(dim=1)
        if protocol is not None:
            scores = {"iou": ious, "predicted_iou": prediction.predicted_iou}
            for measure, values in scores.items():
                values = values.gather(1, taken[:, None].to(values.device))[:, 0].tolist()
                for record, value in zip(self.records, values, strict=True):
                    record[measure][protocol] = value
            if self.settings.with_boundary_iou:
                masks = select(prediction.masks, taken)
                values = boundary_iou(masks, self.targets[:, 0]).tolist()
                for record, value in zip(self.records, values, strict=True):
                    record["boundary_iou"][protocol] = value
        return taken


def select(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(n, m, ...) and (n,) -> (n, ...)."""
    return tensor[torch.arange(len(tensor), device=tensor.device), index.to(tensor.device)]


def box_xyxy(bbox_xywh: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as corners, the lower right one exclusive."""
    x, y, width, height = bbox_xywh
    return x, y, x + width, y + height


def _box_protocol(model: PromptableModel, encoded: Encoded, instances, scorer: _Scorer):
    boxes = torch.tensor([box_xyxy(instance.bbox_xywh) for instance in instances])
    predictions: dict[bool, Prediction] = {}
    for choice in scorer.settings.mask_choices:
        multimask = choice != "single"
        if multimask not in predictions:
            predictions[multimask] = model.predict(encoded, boxes_xyxy=boxes, multimask_output=multimask)
        scorer.take(predictions[multimask], choice, f"box/{choice}")


def _click_protocol(model: PromptableModel, encoded: Encoded, scorer: _Scorer):
    """Each way to choose the mask is a run of its own, because it decides where the next click goes."""
    settings = scorer.settings
    targets = scorer.targets[:, 0].cpu().numpy()
    first_points = [deepest_point(mask)[0] for mask in targets]
    first: dict[bool, Prediction] = {}  # the first click is the same for every choice
    for choice in settings.mask_choices:
        multimask = choice != "single"
        points = [[point] for point in first_points]
        labels = [[1] for _ in first_points]
        logits = None
        for click in range(1, max(settings.num_clicks) + 1):
            if click > 1 or multimask not in first:
                prediction = model.predict(
                    encoded,
                    points_xy=torch.tensor(points),
                    labels=torch.tensor(labels),
                    logits=logits if settings.feed_back else None,
                    multimask_output=multimask,
                )
                if click == 1:
                    first[multimask] = prediction
            else:
                prediction = first[multimask]
            counts = click in settings.num_clicks
            plural = "" if click == 1 else "s"
            taken = scorer.take(prediction, choice, f"{click} click{plural}/{choice}" if counts else None)
            if click == max(settings.num_clicks):
                break
            logits = select(prediction.logits, taken)[:, None]
            predicted = select(prediction.masks, taken).cpu().numpy()
            for mask, target, its_points, its_labels in zip(predicted, targets, points, labels, strict=True):
                point, label = next_click(mask, target)
                its_points.append(point)
                its_labels.append(label)
