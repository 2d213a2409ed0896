"""Prompts in pixels of the original image: checking them, and putting them into batches."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


# An image with this many prompts of one kind is decoded alone, which saves a part of the decoder's work.
_PROMPTS_ALONE = 8
_FEW_NUMBERS = 32  # a loop over them takes less time than NumPy's functions
_NUMPY_TYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32)


@dataclass
class Prompt:
    """One prompt on one image; it has at least one of points, box and logits.

    Attributes:
        image: The index of the image.
        points: k lists of x and y, in pixels of the image.
        labels: k numbers, 1 on the object and 0 beside it.
        box: x1, y1, x2, y2, in pixels of the image.
        logits: float32 (h, w), a mask in the frame of the model's input.
    """

    image: int
    points: list[list[float]] | None
    labels: list[int] | None
    box: list[float] | None
    logits: torch.Tensor | None

    def kind(self) -> tuple:
        """Return a key that prompts of one batch share: there is no padding, which attention would see."""
        return None if self.points is None else len(self.points), self.box is None, self.logits is None

    @property
    def is_short(self) -> bool:
        """Whether it is a point, two points, a box, or a box with a point."""
        return _is_short(None if self.points is None else len(self.points), self.box, self.logits)


def _is_short(num_points: int | None, box, logits) -> bool:
    """Return whether points and box are at most three tokens: without a box, points have a padding token more."""
    return logits is None and (num_points or 0) + (1 if box is None else 2) <= 3


@dataclass(frozen=True)
class ObjectPrompt:
    """What points at one object, in pixels of the image: points, a box, or both.

    Attributes:
        points_xy: k points (x, y).
        labels: k numbers, 1 on the object and 0 beside it.
        box_xyxy: (x1, y1, x2, y2), or None.

    Raises:
        ValueError: where nothing points at the object, and for labels that do not fit the points.
    """

    points_xy: tuple[tuple[float, ...], ...] = ()
    labels: tuple[int, ...] = ()
    box_xyxy: tuple[float, ...] | None = None

    def __post_init__(self):
        if len(self.labels) != len(self.points_xy):
            raise ValueError(f"there are {len(self.labels)} labels and {len(self.points_xy)} points: each needs one.")
        if wrong := [label for label in self.labels if label not in (0, 1)]:
            raise ValueError(f"label {wrong[0]} must be 1, on the object, or 0, beside it.")
        if self.box_xyxy is None and 1 not in self.labels:
            raise ValueError("an object needs a box or a point on it: all of its points are beside it.")

    @property
    def is_ambiguous(self) -> bool:
        """Whether several objects may be meant, as by one point, so that the best of three masks is taken."""
        return self.box_xyxy is None and len(self.points_xy) == 1


def clip_prompts(
    size: tuple[int, int], boxes_xyxy: Sequence[Sequence[float]] = (), points_xy: Sequence[Sequence[float]] = ()
) -> tuple[list[list[float]], list[list[float]]]:
    """Cut boxes and points to the image: detectors' boxes stick out by a pixel, or by many.

    Args:
        size: (width, height) of the image.
        boxes_xyxy: Boxes (x1, y1, x2, y2), each with some part in the image.
        points_xy: Points (x, y), each less than a pixel outside; those beyond the last pixel are moved to it.

    Returns:
        The boxes, with 0 <= x1 < x2 <= width, and the points, with 0 <= x < width; likewise in y.

    Raises:
        ValueError: For the first box or point that lies outside altogether or is not finite, and for a box that is
            reversed or has no area.
    """
    return [_clip_box(box, *size) for box in boxes_xyxy], [_clip_point(point, *size) for point in points_xy]


def _clip_box(box: Sequence[float], width: int, height: int) -> list[float]:
    if len(box) != 4:
        raise ValueError(f"box {_text(box)} must be four finite numbers, X1,Y1,X2,Y2.")
    x1, y1, x2, y2 = box
    if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:  # as most are: nothing else is asked, nor cut
        return [x1, y1, x2, y2]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box {_text(box)} must be four finite numbers, X1,Y1,X2,Y2.")
    check_order(box)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise ValueError(
            f"box {_text(box)} lies outside the image of {width}x{height} pixels: keep X from 0 to {width} and Y from "
            f"0 to {height}."
        )
    return [max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)]


def check_order(box_xyxy: Sequence[float]):
    """Raise ValueError for a box that is reversed or has no area."""
    x1, y1, x2, y2 = box_xyxy
    if x1 >= x2 or y1 >= y2:
        kind = "has no area" if x1 == x2 or y1 == y2 else "is reversed"
        raise ValueError(f"box {_text(box_xyxy)} {kind}: it must be X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2.")


def _clip_point(point: Sequence[float], width: int, height: int) -> list[float]:
    if len(point) != 2 or not all(map(math.isfinite, point)):
        raise ValueError(f"point {_text(point)} must be two finite numbers, X,Y.")
    if not (-1 < point[0] < width + 1 and -1 < point[1] < height + 1):
        raise ValueError(
            f"point {_text(point)} lies outside the image of {width}x{height} pixels: keep X from 0 to {width - 1} and "
            f"Y from 0 to {height - 1}."
        )
    return [max(place, 0.0) if place < length else length - 1.0 for place, length in zip(point, (width, height))]


def parse_prompts(
    image: int,
    size: tuple[int, int],
    points_xy=None,
    labels=None,
    boxes_xyxy=None,
    logits: torch.Tensor | None = None,
    logits_name: str = "logits",
) -> list[Prompt]:
    """Check the prompts on one image.

    Args:
        image: The index of the image, for `Prompt.image`.
        size: (height, width) of the image.
        points_xy: See `Predictor.predict`, as for labels and boxes_xyxy.
        labels: See `points_xy`.
        boxes_xyxy: See `points_xy`.
        logits: float32 (n, h, w), one for each prompt, from `logits_of_prompt`.
        logits_name: The user's name for the logits, for messages.

    Returns:
        The prompts, in pixels of the image.

    Raises:
        ValueError: For wrong shapes and numbers of prompts, and for prompts outside the image.
    """
    points = None if points_xy is None else [_points(prompt) for prompt in _entries("points_xy", points_xy)]
    boxes = None if boxes_xyxy is None else clip_prompts(size[::-1], _boxes(boxes_xyxy))[0]
    if points is not None:
        points = [clip_prompts(size[::-1], points_xy=prompt)[1] for prompt in points]
    lengths = {len(part) for part in (points, boxes, logits) if part is not None}
    if len(lengths) > 1:
        parts = {"points_xy": points, "boxes_xyxy": boxes, logits_name: logits}
        counts = ", ".join(f"{name} has {len(part)}" for name, part in parts.items() if part is not None)
        raise ValueError(f"all prompts need the same parts, but {counts}.")
    columns, missing = (points, _labels(labels, points), boxes, logits), [None] * max(lengths, default=0)
    return [Prompt(image, *parts) for parts in zip(*[missing if column is None else column for column in columns])]


class PromptArrays(NamedTuple):
    """n prompts of one kind on one image, in pixels of the image.

    Attributes:
        points: float32 (n, k, 2), or None.
        labels: int64 (n, k), or None without points.
        boxes: float32 (n, 4), or None.
        logits: float32 (n, h, w), or None.
    """

    points: np.ndarray | None
    labels: np.ndarray | None
    boxes: np.ndarray | None
    logits: torch.Tensor | None = None

    def __len__(self) -> int:
        return next(len(part) for part in (self.points, self.boxes, self.logits) if part is not None)

    @property
    def is_short(self) -> bool:
        """Whether each prompt is a point, two points, a box, or a box with a point."""
        return _is_short(None if self.points is None else self.points.shape[1], self.boxes, self.logits)

    def part(self, start: int, stop: int) -> "PromptArrays":
        """Return the prompts from `start` to before `stop`."""
        points, labels, boxes = (None if part is None else part[start:stop] for part in self[:3])
        return PromptArrays(points, labels, boxes, None if self.logits is None else self.logits[start:stop])

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "PromptArrays":
        """Stack prompts of one kind."""
        first = prompts[0]
        points = labels = boxes = None
        if first.points is not None:
            points = np.array([prompt.points for prompt in prompts], dtype=np.float32)
            labels = np.array([prompt.labels for prompt in prompts], dtype=np.int64)
        if first.box is not None:
            boxes = np.array([prompt.box for prompt in prompts], dtype=np.float32)
        logits = [prompt.logits for prompt in prompts if prompt.logits is not None]  # of all of them, or of none
        return cls(points, labels, boxes, torch.stack(logits) if logits else None)


def regular_prompts(size: tuple[int, int], points_xy=None, labels=None, boxes_xyxy=None) -> PromptArrays | None:
    """Check prompts that are arrays, all at once: the same as `parse_prompts`, without a loop over prompts.

    Args:
        size: (height, width) of the image.
        points_xy: As in `parse_prompts`, like labels and boxes_xyxy.
        labels: See `points_xy`.
        boxes_xyxy: See `points_xy`.

    Returns:
        The prompts, or None if they are no arrays of numbers, differ in the number of points, or are wrong:
        `parse_prompts` then accepts them, or says what is wrong.
    """
    points = boxes = None
    if points_xy is not None:
        points = _clipped(_array(points_xy, 3, 2), size, _clip_point, _clip_points)
        if points is None:
            return None
        labels = np.ones(points.shape[:2], dtype=np.int64) if labels is None else _array(labels, 2, points.shape[1])
        if labels is None or len(labels) != len(points) or not ((labels == 0) | (labels == 1)).all():
            return None
        labels = labels.astype(np.int64)
    elif labels is not None:
        return None
    if boxes_xyxy is not None:
        boxes = _clipped(_array(boxes_xyxy, 2, 4), size, _clip_box, _clip_boxes)
        if boxes is None or (points is not None and len(points) != len(boxes)):
            return None
    return None if points is None and boxes is None else PromptArrays(points, labels, boxes)


def _clipped(
    values: np.ndarray | None, size: tuple[int, int], clip_one: Callable, clip_all: Callable
) -> np.ndarray | None:
    """Cut points or boxes to the image of `size` (height, width), float32; None if one of them is wrong."""
    if values is None:
        return None
    height, width = size
    if values.size > _FEW_NUMBERS:
        clipped = clip_all(values, width, height)
        return None if clipped is None else clipped.astype(np.float32)
    rows = values.reshape(-1, values.shape[-1]).tolist()
    try:
        clipped = [clip_one(row, width, height) for row in rows]
    except ValueError:
        return None
    return np.array(clipped, dtype=np.float32).reshape(values.shape)


def _clip_points(points: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Apply `_clip_point` to points (..., 2); return None if one is outside, or not finite."""
    if not ((points > -1) & (points < (width + 1, height + 1))).all():
        return None
    lengths = np.array([width, height], dtype=np.float64)
    return np.where(points < lengths, np.maximum(points, 0.0), lengths - 1)


def _clip_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Apply `_clip_box` to boxes (n, 4); return None if one is outside, reversed, without area, or not finite."""
    if not np.isfinite(boxes).all():
        return None
    boxes = np.minimum(np.maximum(boxes, 0.0), np.array((width, height, width, height), dtype=np.float64))
    return boxes if (boxes[:, :2] < boxes[:, 2:]).all() else None


def _array(values, num_dimensions: int, last: int) -> np.ndarray | None:
    """Return numbers as float64 of this many dimensions, none of them 0 and the last one `last`; None for others."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy() if values.dtype in _NUMPY_TYPES else None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        return None
    is_regular = values.ndim == num_dimensions and values.size and values.shape[-1] == last
    return values.astype(np.float64, copy=False) if is_regular else None


def check_lists(arguments: dict, num_images: int):
    """Raise ValueError if an argument of several images is not a list with one entry for each."""
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, list | tuple) or len(value) != num_images):
            actual = len(value) if isinstance(value, list | tuple) else f"a {type(value).__name__}"
            raise ValueError(f"{name} must be a list of {num_images}, one entry for each image, not {actual}.")


def prompt_batches(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Split prompts into batches of one kind, and of one image if that has many prompts.

    Args:
        prompts: Prompts on any number of images.
        most: The maximal size of a batch.

    Yields:
        The indices of the prompts of each batch.
    """
    if len(prompts) == 1:
        yield [0]
        return
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[prompt.kind(), prompt.image].append(place)
    few: dict[tuple, list[int]] = defaultdict(list)
    for (kind, _), places in groups.items():
        if len(places) < _PROMPTS_ALONE:
            few[kind] += places
    many = [places for places in groups.values() if len(places) >= _PROMPTS_ALONE]
    for places in (*many, *few.values()):
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _entries(name: str, value) -> Sequence:
    if isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "shape", None) == ():
        raise ValueError(f"{name}={value!r} must have one entry for each prompt.")
    return value.tolist() if hasattr(value, "tolist") else value


def _boxes(boxes) -> list[list[float]]:
    boxes = _entries("boxes_xyxy", boxes)
    for box in boxes:
        if not hasattr(box, "__len__"):
            raise ValueError(
                f"boxes_xyxy holds {box!r} where a box is expected: it is (prompts, 4). Write [box] for one box."
            )
        if any(isinstance(number, list | tuple) for number in box):
            raise ValueError(
                f"boxes_xyxy holds {box!r} where a box is expected: it is (prompts, 4), without a dimension of images."
            )
    return [_numbers(box) for box in boxes]


def _points(prompt) -> list[list[float]]:
    points = [_numbers(point) for point in _entries("points_xy", prompt) if hasattr(point, "__len__")]
    if len(points) != len(prompt):
        raise ValueError(
            f"points_xy holds {_text(prompt)} where a list of points is expected: it is (prompts, points, 2). Write "
            "[[point]] for one prompt of one point."
        )
    if not points:
        raise ValueError("points_xy has a prompt without points.")
    return points


def _labels(labels, points: list | None) -> list[list[int]] | None:
    if labels is None:
        return None if points is None else [[1] * len(prompt) for prompt in points]
    if points is None:
        raise ValueError("labels are given without points_xy.")
    lists = [list(_entries("labels", prompt)) for prompt in _entries("labels", labels)]
    num_labels, num_points = [len(prompt) for prompt in lists], [len(prompt) for prompt in points]
    if num_labels != num_points:
        raise ValueError(f"labels are {num_labels} for each prompt, and its points {num_points}: each point needs one.")
    for label in (label for prompt in lists for label in prompt):
        if label not in (0, 1):
            raise ValueError(f"label {label} must be 1, on the object, or 0, beside it.")
    return [[int(label) for label in prompt] for prompt in lists]


def _numbers(values) -> list[float]:
    try:
        return [float(value) for value in _entries("a prompt", values)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{values!r} must be numbers in pixels of the image.") from error


def _text(values) -> str:
    return ",".join(f"{value:g}" for value in values)
