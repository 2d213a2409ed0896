"""What every reader returns: an image with its instances, and a report of what could not be used."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from PIL import Image


# A larger share of skipped images than this changes what a number says about the dataset.
MAX_SKIPPED_SHARE = 0.05

MAX_EXAMPLES = 5

# What a report counts, by the names of its fields.
_KINDS = {"pictures": "images", "instances": "instances", "parts": "parts"}  # of a report on disk, and its attributes


class SkipReason(StrEnum):
    """Why an image, an instance or a part of one is left out. The value is what a report prints and its JSON holds."""

    # of images
    MISSING_IMAGE = "image file missing"
    MISSING_JSON = "annotation JSON missing"
    MALFORMED_JSON = "annotation JSON malformed"
    MALFORMED_IMAGE = "image entry malformed"
    BROKEN_IMAGE = "image damaged or truncated"
    IMAGE_SIZE = "image size disagrees with the annotations' image entry"
    DUPLICATE_IMAGE = "duplicate image id"
    MISSING_MASK = "mask file missing"
    MALFORMED_MASK = "mask file damaged, or of numbers that are no labels"
    COLOURED_MASK = "mask file in colours: save label numbers, as grey levels or a palette's indices"
    DEEP_COLOUR_MASK = "mask file in colours of 16 bits: save label numbers in one channel"
    GREY_MASK = "mask file of grey levels, not labels: threshold it, or read it with binary_masks"
    SEVERAL_MASKS = "several mask files of one image"
    BROKEN_CUTOUT = "pasted cut-out damaged, or without transparency"
    NO_INSTANCE = "no instance that can be used"
    TOO_THIN = "image too thin for the model"
    NOTHING_IN_VIEW = "no instance large enough in the part that is seen"
    # of instances
    UNKNOWN_IMAGE = "annotation of an image that the JSON does not list"
    IMAGE_SKIPPED = "annotation of a skipped image"
    MALFORMED_ANNOTATION = "annotation malformed"
    DUPLICATE_ANNOTATION = "duplicate annotation id"
    NO_MASK = "annotation without a mask"
    RLE_SIZE = "RLE size disagrees with the image"
    MALFORMED_RLE = "RLE malformed"
    TOO_FEW_POINTS = "polygon with under three points"
    OUTSIDE = "polygon, box or point outside the image"
    ZERO_AREA = "mask of zero area"
    VOID_LABEL = "label 255 beside small ones, taken for void (ignore_label says otherwise)"
    # of parts of instances that are kept
    STRAY_RING = "ring of under three points among a mask's polygons"
    FLAT_POLYGON = "polygon outside a list of polygons, read as the only one"
    MISSING_ID = "no annotation id that can be used: numbered instead"
    BAD_CATEGORY = "category id that is no number"
    BAD_BOX = "box malformed or outside the image: the mask's taken instead"
    BAD_POINT = "point malformed or outside the image"


class SampleError(ValueError):
    """An image or an annotation that cannot be used; `reason` says why, `where` names it."""

    def __init__(self, reason: SkipReason, where: str = ""):
        super().__init__(reason, where)  # both, so that it can be pickled
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else str(self.reason)


@dataclass(frozen=True)
class Instance:
    """One annotated object of an image of H x W pixels.

    Attributes:
        id: the annotation's id, an int or a string.
        rle: the mask as compressed COCO RLE, `{"size": [H, W], "counts": bytes or str}`.
        bbox_xywh: pixels of the image, x and y of the upper left corner, as annotated; where the annotation has no box
            or one without area, the tight box of the mask.
        area: in square pixels, as annotated; where it is not annotated or not positive, the mask's count of pixels.
        is_crowd: one mask for many objects, which evaluations leave out unless asked.
        category_id: None where the dataset has no categories.
        point_xy: an annotated point of the object in pixels of the image, or None.
    """

    id: int | str
    rle: dict
    bbox_xywh: tuple[float, float, float, float]
    area: float
    is_crowd: bool = False
    category_id: int | None = None
    point_xy: tuple[float, float] | None = None

    def mask(self) -> np.ndarray:
        """The mask, bool (H, W). Like RLE itself it lies in memory column by column (Fortran order)."""
        from pycocotools import mask as coco_mask

        return coco_mask.decode(self.rle).view(bool)


@dataclass(frozen=True)
class Sample:
    """An image, PIL in mode RGB, of `width` x `height` pixels, with its instances in the order of the annotations."""

    id: str
    image: Image.Image
    instances: tuple[Instance, ...]
    width: int
    height: int

    def masks(self) -> np.ndarray:
        """`decode_masks` of all instances."""
        return decode_masks(self.instances) if self.instances else np.zeros((0, self.height, self.width), dtype=bool)


def decode_masks(instances: Sequence[Instance]) -> np.ndarray:
    """The masks of one or more instances of an image, bool (n, H, W), column by column in memory: a view of (n, W, H)."""
    from pycocotools import mask as coco_mask

    masks = coco_mask.decode([instance.rle for instance in instances])  # (H, W, n), n slowest in memory
    return masks.view(bool).transpose(2, 0, 1)


@dataclass
class _Skipped:
    """How many for one reason, and the first examples in sorted order, so that merging in any order gives the same."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[str]):
        self.count += count
        self.examples = sorted({*self.examples, *examples})[:MAX_EXAMPLES]


@dataclass
class SkipReport:
    """Counts of what was skipped by reason, with a few examples of each: images, instances, and parts of instances.

    An instance of which a part was left out is kept, and is not among the skipped instances. Reports of several
    processes merge into the same report, in any order.
    """

    images: dict[str, _Skipped] = field(default_factory=dict)
    instances: dict[str, _Skipped] = field(default_factory=dict)
    parts: dict[str, _Skipped] = field(default_factory=dict)

    def add_image(self, reason: str, example: str, count: int = 1):
        self.images.setdefault(str(reason), _Skipped()).add(count, [example])

    def add_instances(self, reason: str, example: str, count: int = 1):
        if count:
            self.instances.setdefault(str(reason), _Skipped()).add(count, [example])

    def add_part(self, reason: str, example: str, count: int = 1):
        self.parts.setdefault(str(reason), _Skipped()).add(count, [example])

    @property
    def num_images(self) -> int:
        return sum(skipped.count for skipped in self.images.values())

    @property
    def num_instances(self) -> int:
        return sum(skipped.count for skipped in self.instances.values())

    def __bool__(self) -> bool:
        return any(reasons for _, reasons in self._kinds())

    def _kinds(self) -> list[tuple[str, dict[str, _Skipped]]]:
        return [(name, getattr(self, attribute)) for name, attribute in _KINDS.items()]

    def merge(self, other: "SkipReport") -> "SkipReport":
        """Adds the other report to this one, and returns this one."""
        for (_, mine), (_, theirs) in zip(self._kinds(), other._kinds()):
            for reason, skipped in theirs.items():
                mine.setdefault(reason, _Skipped()).add(skipped.count, skipped.examples)
        return self

    def too_many(self, total: int) -> bool:
        """Whether more than 5 % of `total` images were skipped. `total` counts the skipped ones too."""
        return self.num_images > MAX_SKIPPED_SHARE * total

    def summary(self, total: int | None = None) -> str:
        """What was skipped and why, a line for each reason, most frequent first.

        With `total`, the number of all images including the skipped ones, it opens with a warning where they are
        too many.
        """
        if not self:
            return "Nothing was skipped."
        share = f" of {total} images ({self.num_images / total:.1%})" if total else " images"
        parts = f", and parts of {sum(skipped.count for skipped in self.parts.values())}" if self.parts else ""
        lines = [f"Skipped {self.num_images}{share} and {self.num_instances} instances{parts}:"]
        if total and self.too_many(total):
            lines.insert(
                0, f"WARNING: more than {MAX_SKIPPED_SHARE:.0%} of the images were skipped. Results leave them out."
            )
        for kind, reasons in self._kinds():
            for reason, skipped in sorted(reasons.items(), key=lambda item: (-item[1].count, item[0])):
                more = ", ..." if skipped.count > len(skipped.examples) else ""
                lines.append(f"  {skipped.count} {_KINDS[kind]}: {reason} ({', '.join(skipped.examples)}{more})")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """For JSON: `{"pictures": {reason: {"count": n, "examples": [...]}}, "instances": {...}, "parts": {...}}`."""

        def plain(reasons):
            return {
                reason: {"count": skipped.count, "examples": list(skipped.examples)}
                for reason, skipped in sorted(reasons.items())
            }

        return {kind: plain(reasons) for kind, reasons in self._kinds()}

    @classmethod
    def from_dict(cls, values: dict) -> "SkipReport":
        """The inverse of `to_dict`; what was written without "parts" has none."""
        return cls(
            *({reason: _Skipped(**skipped) for reason, skipped in values.get(kind, {}).items()} for kind in _KINDS)
        )
