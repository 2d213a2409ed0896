"""Make a training example from an image: a pure function of the image and two random generators."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..masks.boxes import mask_extent
from .augmentation import Augmentation, View
from .cutouts import Cutouts, Pasted
from .lazy import LazySample
from .prompts import PromptSampling
from .samples import SampleError, SkipReason, SkipReport


@dataclass(frozen=True)
class ExampleMaker:
    """Function from samples to training examples: dicts of tensors, described in `TrainingExamples`.

    Attributes:
        image_size: side of the frame in pixels.
        mask_size: side of the masks in cells.
        augmentation, prompts, cutouts: as in `TrainingExamples`.
    """

    image_size: int
    mask_size: int
    augmentation: Augmentation
    prompts: PromptSampling | None
    cutouts: Cutouts | None

    @classmethod
    def create(
        cls,
        image_size: int,
        mask_size: int | None,
        augmentation: Augmentation | None,
        prompts: PromptSampling | None,
        cutouts: Cutouts | None,
    ) -> "ExampleMaker":
        """Create a maker with the defaults of `TrainingExamples`. Raises ValueError for invalid sizes."""
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size={image_size!r} must be an integer of at least 1.")
        mask_size = max(1, image_size // 4) if mask_size is None else mask_size
        if not isinstance(mask_size, int) or mask_size < 1 or image_size % mask_size:
            raise ValueError(f"mask_size={mask_size!r} must be an integer that divides image_size={image_size}.")
        return cls(image_size, mask_size, augmentation or Augmentation(), prompts, cutouts)

    def preprocessing(self) -> dict:
        """Return the settings that determine the pixels, besides the image and the generator."""
        return {
            "image_size": self.image_size,
            "augmentation": asdict(self.augmentation),
            "cutouts": repr(self.cutouts),
        }

    def __call__(
        self,
        sample: LazySample,
        view_generator: np.random.Generator,
        prompt_generator: np.random.Generator,
        report: SkipReport,
    ) -> dict[str, torch.Tensor]:
        """Make an example, without its `example_id`.

        Args:
            sample: the image with its annotations.
            view_generator: determines the pixels.
            prompt_generator: determines objects, boxes, points and uniforms.
            report: unusable instances that were drawn are added to it.

        Raises:
            SampleError: if the image cannot be decoded, or if there are prompts but no usable object.
        """
        # The pixels depend on the first generator only, so that cached embeddings are valid for all prompts.
        view = self.augmentation.view(view_generator, sample.width, sample.height, self.image_size)
        pixels = view.pixels(sample, self.augmentation.colours(view_generator))
        frame = np.zeros((3, self.image_size, self.image_size), dtype=np.uint8)
        image = frame[:, : pixels.shape[1], : pixels.shape[2]]
        image[:] = pixels
        pasted = self.cutouts.paste(image, view_generator) if self.cutouts else []
        example = {
            "pixel_values": frame,
            "reshaped_input_sizes": np.array(view.size[::-1]),
        }
        if self.prompts:
            masks, boxes = self._targets(sample, view, pasted, self.prompts, prompt_generator, report)
            example |= {
                "masks": masks,
                "boxes": self.prompts.boxes(boxes, view.size, self.image_size, prompt_generator),
                "points": self.prompts.points(masks, view.size, self.image_size, prompt_generator),
                "uniforms": self.prompts.uniforms(prompt_generator),
            }
        return {name: torch.from_numpy(value) for name, value in example.items()}

    def _targets(
        self,
        sample: LazySample,
        view: View,
        pasted: list[Pasted],
        prompts: PromptSampling,
        generator: np.random.Generator,
        report: SkipReport,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw objects without replacement, repeat them if there are too few; return masks (P, M, M), boxes (P, 4)."""
        num_prompts, num_annotations = prompts.num_prompts, len(sample.annotations)
        # covers[0] hides the annotated objects, covers[i + 1] hides pasted object i; nothing hides the last one.
        covers = [np.zeros((self.mask_size, self.mask_size), dtype=bool)]
        grids = [cutout.grid(self.image_size, self.mask_size) for cutout in pasted]
        for grid in reversed(grids):
            covers.insert(0, covers[0] | grid)

        def areas() -> np.ndarray:
            (left, top, right, bottom), (width, height) = view.crop, view.size
            pixel_area = (right - left) * (bottom - top) / (width * height)  # a pixel of the frame, in image pixels
            pasted_areas = [pixel_area * max(1, int(np.count_nonzero(cutout.pixels))) for cutout in pasted]
            return np.array([*map(sample.area, range(num_annotations)), *pasted_areas])

        masks, boxes, num_valid = [], [], 0
        for position in prompts.order(areas, num_annotations + len(pasted), generator):
            object_in_view: tuple[np.ndarray, np.ndarray, float] | None
            if position >= num_annotations:
                number = position - num_annotations
                object_in_view, cover = (grids[number], *pasted[number].extent), covers[number + 1]
            else:
                rle = self._usable_rle(sample, position, report)
                if rle is None:
                    continue
                object_in_view, cover = view.mask(rle, self.mask_size), covers[0]
            num_valid += 1
            target = self._visible(*object_in_view, cover, prompts) if object_in_view else None
            if target:
                masks.append(target[0])
                boxes.append(target[1])
            if len(masks) == num_prompts:
                break
        if not masks:
            raise SampleError(SkipReason.NOTHING_IN_VIEW if num_valid else SkipReason.NO_INSTANCE, sample.id)
        repeated = np.arange(num_prompts) % len(masks)
        return np.stack(masks)[repeated], np.stack(boxes)[repeated]

    def _usable_rle(self, sample: LazySample, position: int, report: SkipReport) -> dict | None:
        """Return the RLE of an instance, or None if it is a crowd or unusable, which is added to `report`."""
        where = f"{sample.id}, annotation number {position}"
        left_out: list[SkipReason] = []
        try:
            instance = sample.instance(position, left_out)
        except SampleError as error:
            report.add_instances(error.reason, where)
            return None
        for reason in left_out:
            report.add_part(reason, where)
        return None if instance.is_crowd else instance.rle

    def _visible(
        self, mask: np.ndarray, box: np.ndarray, share: float, cover: np.ndarray, prompts: PromptSampling
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return mask and box of the part outside `cover`, or None if that is too small, or too small a share."""
        num_cells = np.count_nonzero(mask)
        if np.any(mask & cover):
            mask = mask & ~cover
            share *= np.count_nonzero(mask) / num_cells
            num_cells = np.count_nonzero(mask)
            if (extent := mask_extent(mask)) is not None:
                lower, upper = np.array(extent).reshape(2, 2) * (self.image_size // self.mask_size)
                box = np.concatenate([np.maximum(box[:2], lower), np.minimum(box[2:], upper)])
        if num_cells < prompts.min_mask_cells or share < prompts.min_visible:
            return None
        return mask, box
