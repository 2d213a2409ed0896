"""Return types of all readers: an image with its instances, and a report of skipped data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from PIL import Image


# Above this share of skipped images, a score no longer describes the dataset.
MAX_SKIPPED_SHARE = 0.05

# Examples that a report names for each reason.
MAX_EXAMPLES = 5

_KINDS = {"pictures": "images", "instances": "instances", "parts": "parts"}  # key in saved reports: attribute


def _count(number: int, nouns: str) -> str:
    return f"{number} {nouns if number != 1 else nouns.removesuffix('s')}"


class SkipReason(StrEnum):
    """Reasons to skip an image, an instance or a part of an instance. Reports print and save the value."""

    # of images
    MISSING_IMAGE = "image file missing"
    MISSING_JSON = "annotation JSON missing"
    JSON_ALONE = "annotation JSON without a .jpg, .jpeg, .png or .webp file of its name"
    MALFORMED_JSON = "annotation JSON malformed"
    MALFORMED_IMAGE = "image entry malformed"
    BROKEN_IMAGE = "image damaged or truncated"
    UNKNOWN_FORMAT = "no image, or one of a format that cannot be opened, such as HEIC"
    IMAGE_SIZE = "image of another size than its mask file or its entry in the annotations"
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
    """Error for an image or an annotation that cannot be used.

    Attributes:
        reason: the `SkipReason`.
        where: name of the image, file or annotation; empty where the caller knows it.
    """

    def __init__(self, reason: SkipReason, where: str = ""):
        super().__init__(reason, where)  # both arguments, so that the error can be pickled
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else str(self.reason)


class CutoutError(SampleError):
    """Error for a cut-out that cannot be pasted.

    Attributes:
        index: index of the cut-out.
    """

    def __init__(self, index: int, where: str):
        super().__init__(SkipReason.BROKEN_CUTOUT, where)
        self.args = index, where  # so that the error can be pickled
        self.index = index


@dataclass(frozen=True)
class Instance:
    """One annotated object of an image of H x W pixels.

    Attributes:
        id: the annotation's id, an int or a string.
        rle: the mask as compressed COCO RLE, `{"size": [H, W], "counts": bytes or str}`.
        bbox_xywh: the annotated box in pixels of the image: x and y of the upper left corner, width, height. The tight
            box of the mask if the annotation has no box, or a box without area.
        area: the annotated area in square pixels. The number of pixels in the mask if the annotation has no positive
            area.
        is_crowd: True for one mask of many objects. Evaluations leave crowds out by default.
        category_id: the annotated category, or None.
        point_xy: an annotated point (x, y) of the object in pixels of the image, or None.
    """

    id: int | str
    rle: dict
    bbox_xywh: tuple[float, float, float, float]
    area: float
    is_crowd: bool = False
    category_id: int | None = None
    point_xy: tuple[float, float] | None = None

    def mask(self) -> np.ndarray:
        """Decode the mask: bool (H, W), in Fortran memory order (column by column), as RLE is."""
        from pycocotools import mask as coco_mask

        return coco_mask.decode(self.rle).view(bool)


@dataclass(frozen=True)
class Sample:
    """An image with its instances.

    Attributes:
        id: name of the image, unique within its dataset.
        image: the decoded image, PIL in mode RGB.
        instances: the usable instances, in the order of the annotations.
        width, height: size of the image in pixels.
    """

    id: str
    image: Image.Image
    instances: tuple[Instance, ...]
    width: int
    height: int

    def masks(self) -> np.ndarray:
        """Decode the masks of all instances: bool (num_instances, height, width)."""
        return decode_masks(self.instances) if self.instances else np.zeros((0, self.height, self.width), dtype=bool)


def decode_masks(instances: Sequence[Instance]) -> np.ndarray:
    """Decode the masks of one or more instances of the same image.

    Args:
        instances: n instances, at least one.

    Returns:
        bool (n, H, W), each mask in Fortran memory order (column by column): a transposed view of (n, W, H).
    """
    from pycocotools import mask as coco_mask

    masks = coco_mask.decode([instance.rle for instance in instances])  # (H, W, n), n slowest in memory
    return masks.view(bool).transpose(2, 0, 1)


@dataclass
class _Skipped:
    """Count and examples of one reason. Examples are sorted, so that reports merge to the same result in any order."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[str]):
        self.count += count
        self.examples = sorted({*self.examples, *examples})[:MAX_EXAMPLES]


@dataclass
class SkipReport:
    """Counts of skipped images, instances and parts of instances by reason, with up to 5 examples of each reason.

    A part is, for example, a malformed box: its instance is kept without it, and does not count as skipped. An empty
    report is false. Reports of several processes merge to the same report in any order.

    Attributes:
        images: count and examples of skipped images, by reason.
        instances: count and examples of skipped instances, by reason.
        parts: count and examples of parts that were left out of instances, by reason.

    Example:
        >>> report = SkipReport()
        >>> report.add_image(SkipReason.BROKEN_IMAGE, "139")
        >>> report.add_instances(SkipReason.IMAGE_SKIPPED, "139", count=20)
        >>> print(report.summary(total=100))
        Skipped 1 of 100 images (1.0%) and 20 instances:
          1 image: image damaged or truncated (139)
          20 instances: annotation of a skipped image (139, ...)
    """

    images: dict[str, _Skipped] = field(default_factory=dict)
    instances: dict[str, _Skipped] = field(default_factory=dict)
    parts: dict[str, _Skipped] = field(default_factory=dict)

    def add_image(self, reason: str, example: str, count: int = 1):
        """Count `count` skipped images, of which `example` names one."""
        self.images.setdefault(str(reason), _Skipped()).add(count, [example])

    def add_instances(self, reason: str, example: str, count: int = 1):
        """Count `count` skipped instances, which may be 0; `example` names one of them or their image."""
        if count:
            self.instances.setdefault(str(reason), _Skipped()).add(count, [example])

    def add_part(self, reason: str, example: str, count: int = 1):
        """Count `count` parts left out of instances that are kept; `example` names one of these instances."""
        self.parts.setdefault(str(reason), _Skipped()).add(count, [example])

    @property
    def num_images(self) -> int:
        """Number of skipped images."""
        return sum(skipped.count for skipped in self.images.values())

    @property
    def num_instances(self) -> int:
        """Number of skipped instances."""
        return sum(skipped.count for skipped in self.instances.values())

    def __bool__(self) -> bool:
        return any(reasons for _, reasons in self._kinds())

    def _kinds(self) -> list[tuple[str, dict[str, _Skipped]]]:
        return [(name, getattr(self, attribute)) for name, attribute in _KINDS.items()]

    def merge(self, other: "SkipReport") -> "SkipReport":
        """Add the other report to this one, in place, and return this one."""
        for (_, mine), (_, theirs) in zip(self._kinds(), other._kinds()):
            for reason, skipped in theirs.items():
                mine.setdefault(reason, _Skipped()).add(skipped.count, skipped.examples)
        return self

    def too_many(self, total: int) -> bool:
        """Return whether more than 5 % of the images were skipped.

        Args:
            total: number of all images, including the skipped ones.
        """
        return self.num_images > MAX_SKIPPED_SHARE * total

    def summary(self, total: int | None = None) -> str:
        """Describe the skipped images, instances and parts: a line for each reason, the most frequent first.

        Args:
            total: number of all images, including the skipped ones. If given, the text has the share of skipped
                images, and begins with a warning where `too_many(total)`.
        """
        if not self:
            return "Nothing was skipped."
        images = _count(self.num_images, "images")
        if total:
            images = f"{self.num_images} of {total} images ({self.num_images / total:.1%})"
        parts = f", and parts of {sum(skipped.count for skipped in self.parts.values())}" if self.parts else ""
        lines = [f"Skipped {images} and {_count(self.num_instances, 'instances')}{parts}:"]
        if total and self.too_many(total):
            lines.insert(
                0, f"WARNING: more than {MAX_SKIPPED_SHARE:.0%} of the images were skipped. Results leave them out."
            )
        for kind, reasons in self._kinds():
            for reason, skipped in sorted(reasons.items(), key=lambda item: (-item[1].count, item[0])):
                more = ", ..." if skipped.count > len(skipped.examples) else ""
                number = _count(skipped.count, _KINDS[kind])
                lines.append(f"  {number}: {reason} ({', '.join(skipped.examples)}{more})")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Convert to a dict for JSON.

        Returns:
            `{"pictures": {reason: {"count": n, "examples": [...]}}, "instances": {...}, "parts": {...}}`, where
            "pictures" has the images.
        """

        def plain(reasons):
            return {
                reason: {"count": skipped.count, "examples": list(skipped.examples)}
                for reason, skipped in sorted(reasons.items())
            }

        return {kind: plain(reasons) for kind, reasons in self._kinds()}

    @classmethod
    def from_dict(cls, values: dict) -> "SkipReport":
        """Create a report from the result of `to_dict`. Older reports without "parts" have none."""
        return cls(
            *({reason: _Skipped(**skipped) for reason, skipped in values.get(kind, {}).items()} for kind in _KINDS)
        )
