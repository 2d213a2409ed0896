"""Training of the IoU head alone, on what it sees of a finished model: no mask changes.

The IoU head orders masks: the three of a click, and those of everything mode. While a whole model is trained, it learns
from masks that still change, and of objects that the masks of a click fit best. Here it learns which of the finished
masks a user who clicks on an annotated object wants. Its inputs are recorded once, so its steps are small.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..data import ImageDataset, Sample
from ..data.clicks import deepest_point
from ..inference.predictor import Predictor


MAX_OBJECTS, NUM_POINTS = 14, 24  # of an image
AREA_POWER = 0.25  # objects are drawn in proportion to their area to this power
MIN_PIXELS = 4  # of an object at the size of the decoder's masks
BATCH_SIZE, WARMUP_STEPS = 128, 30


@dataclass(frozen=True)
class HeadExamples:
    """What the IoU head sees of n prompts, and how good the three masks of each are.

    Attributes:
        tokens: float32 (n, C), the inputs of the head.
        own: float32 (n, 3), the IoU of the masks with the prompted object; NaN for points anywhere in the image.
        best: float32 (n, 3), their highest IoU with any annotated object of the image.
    """

    tokens: torch.Tensor
    own: torch.Tensor
    best: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def record_examples(
    model: PreTrainedModel, processor: ProcessorMixin, dataset: ImageDataset, num_images: int, seed: int = 0
) -> HeadExamples:
    """Record the IoU head's inputs and the true IoUs for prompts on images that are drawn from a data set.

    Up to 14 objects of an image are each prompted by their deepest point, by a point anywhere in them, and by their
    box. 24 further points lie anywhere in the image.

    Args:
        model: a SAM or SAM-Lightening.
        processor: the model's processor.
        dataset: images with masks.
        num_images: number of images that are used, fewer if there are no more.
        seed: of all draws.

    Raises:
        ValueError: where no image has an object that can be used.
    """
    parts: Any = model
    generator, inputs = np.random.default_rng(seed), []
    head = parts.mask_decoder.iou_prediction_head
    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, -2)))
    recorded: list[HeadExamples] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says that a decoder with a hook runs in the model
            predictor = Predictor(model, processor, output="torch")
        for index in generator.permutation(len(dataset)):
            if len(recorded) == num_images:
                break
            sample, _ = dataset.load(int(index))
            if sample is not None:
                recorded += _record(predictor, sample, generator, inputs)
    finally:
        hook.remove()
    if not recorded:
        raise ValueError("no image of the data set has an object that can be used.")
    return HeadExamples(*(torch.cat([getattr(part, name) for part in recorded]) for name in ("tokens", "own", "best")))


def _record(
    predictor: Predictor, sample: Sample, generator: np.random.Generator, inputs: list[torch.Tensor]
) -> list[HeadExamples]:
    """Return the examples of one image, in a list, which is empty for an image without usable objects."""
    image = predictor.encode(sample.image)
    side = predictor.logits_size[0]
    height, width = (max(1, round(side * size / max(image.size))) for size in image.size)
    targets, deepest, inside, boxes = [], [], [], []
    for instance in sample.instances:
        mask = np.ascontiguousarray(instance.mask()).astype(bool)
        small = Image.fromarray(mask).convert("L").resize((width, height), Image.Resampling.BOX)
        if (target := np.asarray(small) > 127).sum() < MIN_PIXELS:
            continue
        rows, columns = np.nonzero(mask)
        chosen = generator.integers(len(rows))
        targets.append(target)
        deepest.append(deepest_point(mask)[0])
        inside.append((columns[chosen], rows[chosen]))
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    if not targets:
        return []
    weights = np.array([target.sum() for target in targets], dtype=float) ** AREA_POWER
    drawn = generator.choice(len(targets), min(len(targets), MAX_OBJECTS), replace=False, p=weights / weights.sum())
    anywhere = generator.random((NUM_POINTS, 2)) * image.size[::-1]
    points = np.concatenate([np.array(deepest)[drawn], np.array(inside)[drawn], anywhere])[:, None]
    inputs.clear()
    prompts = {"points_xy": points}, {"boxes_xyxy": np.array(boxes)[drawn]}
    predictions: Any = [predictor.predict(**prompt, image=image, full_size=False) for prompt in prompts]  # of one image
    masks = torch.cat([prediction.logits[..., :height, :width] > 0 for prediction in predictions]).flatten(2).float()
    ious = _iou(masks, torch.from_numpy(np.stack(targets)).to(masks.device).flatten(1).float())
    objects = torch.from_numpy(np.concatenate([drawn, drawn, np.full(NUM_POINTS, -1), drawn]))
    own = ious[torch.arange(len(ious)), :, objects].masked_fill(objects[:, None].to(ious.device) < 0, torch.nan)
    return [HeadExamples(torch.cat(inputs).float().cpu(), own.cpu(), ious.amax(dim=2).cpu())]


def _iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the IoU of masks (n, 3, pixels) with targets (k, pixels), both of 0 and 1: (n, 3, k)."""
    shared = masks @ targets.T
    return shared / (masks.sum(dim=2, keepdim=True) + targets.sum(dim=1) - shared).clamp(min=1)


def fit_iou_head(
    model: PreTrainedModel,
    sets: Sequence[HeadExamples],
    are_complete: Sequence[bool],
    own_share: float = 0.8,
    anywhere_weight: float = 1.0,
    num_steps: int = 600,
    learning_rate: float = 3e-4,
    seed: int = 0,
):
    """Train a SAM's IoU head, in place, to predict the IoU of the three masks of a prompt.

    Each data set has the same weight. The score of the single mask, which is not measured here, is kept near its old
    value.

    Args:
        model: a SAM or SAM-Lightening.
        sets: the examples of each data set.
        are_complete: for each data set whether its images are annotated completely. Only then a point anywhere may
            lie on nothing, and is learned from.
        own_share: share of the IoU with the prompted object in what is learned; the rest is the highest IoU with any
            object. At 1 the head chooses best among the masks of a click; less orders everything mode better.
        anywhere_weight: weight of a point anywhere, relative to a prompt for an object.
        num_steps: optimizer steps, with 128 examples of each data set.
        learning_rate: the highest of a cosine schedule.
        seed: of the draws.
    """
    parts: Any = model
    head = parts.mask_decoder.iou_prediction_head
    trained = copy.deepcopy(head).float().cpu().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        single = [trained(examples.tokens)[:, 0] for examples in sets]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=1e-2)
    for step in range(num_steps):
        rate = min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + np.cos(np.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        losses = []
        for examples, old, is_complete in zip(sets, single, are_complete, strict=True):
            rows = torch.randint(len(examples), (BATCH_SIZE,), generator=generator)
            own, best = examples.own[rows], examples.best[rows]
            is_anywhere = own.isnan().any(dim=1)
            targets = torch.where(is_anywhere[:, None], best, own_share * own + (1 - own_share) * best)
            weights = torch.where(is_anywhere, anywhere_weight * is_complete, 1.0)
            scores = trained(examples.tokens[rows])
            errors = (scores[:, 1:] - targets).square().mean(dim=1)
            losses.append((errors * weights).sum() / weights.sum() + (scores[:, 0] - old[rows]).square().mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for parameter, new in zip(head.parameters(), trained.parameters(), strict=True):
            parameter.copy_(new)


def measure_order(head: nn.Module, examples: HeadExamples) -> tuple[float, float]:
    """Return the mean IoU with the prompted object of the mask of the highest score, and of the best of the three."""
    with torch.no_grad():
        chosen = copy.deepcopy(head).float().cpu()(examples.tokens)[:, 1:].argmax(dim=1, keepdim=True)
    own = examples.own[~examples.own.isnan().any(dim=1)]
    taken = examples.own.gather(1, chosen)[~examples.own.isnan().any(dim=1)]
    return taken.mean().item(), own.amax(dim=1).mean().item()
