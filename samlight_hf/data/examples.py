"""One training example from one image: a pure function of the image and two random generators."""

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
    """Turns samples into dicts of tensors: see `TrainingExamples` for what is in them."""

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
        """With the defaults of `TrainingExamples`. Raises ValueError for sizes that do not fit."""
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size={image_size!r} must be an integer of at least 1.")
        mask_size = max(1, image_size // 4) if mask_size is None else mask_size
        if not isinstance(mask_size, int) or mask_size < 1 or image_size % mask_size:
            raise ValueError(f"mask_size={mask_size!r} must be an integer that divides image_size={image_size}.")
        return cls(image_size, mask_size, augmentation or Augmentation(), prompts, cutouts)

    def preprocessing(self) -> dict:
        """What the pixels depend on, besides the image and the generator."""
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
        """The example without its id. Instances that cannot be used and were met are added to `report`.

        Raises:
            SampleError: for an image that cannot be decoded, and where there are prompts but no object for them.
        """
        # The pixels depend on the first generator alone: an embedding holds whatever the prompts are.
        view = self.augmentation.view(view_generator, sample.width, sample.height, self.image_size)
        pixels = view.pixels(sample, self.augmentation.colours(view_generator))
        frame = np.zeros((3, self.image_size, self.image_size), dtype=np.uint8)
        seen = frame[:, : pixels.shape[1], : pixels.shape[2]]
        seen[:] = pixels
        pasted = self.cutouts.paste(seen, view_generator) if self.cutouts else []
        example = {
            "pixel_values": frame,
            "reshaped_input_sizes": np.array(view.size[::-1]),
        }
        if self.prompts:
            masks, boxes = self._targets(sample, view, pasted, prompt_generator, report)
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
        generator: np.random.Generator,
        report: SkipReport,
    ) -> tuple[np.ndarray, np.ndarray]:
        """bool (P, M, M) and float64 (P, 4): objects drawn without replacement, and again if there are too few."""
        num_prompts, num_annotations = self.prompts.num_prompts, len(sample.annotations)
        # What lies over the annotated objects, over the first pasted one, over the second, ..., over the last: nothing.
        covers = [np.zeros((self.mask_size, self.mask_size), dtype=bool)]
        grids = [each.grid(self.image_size, self.mask_size) for each in pasted]
        for grid in reversed(grids):
            covers.insert(0, covers[0] | grid)

        def areas() -> np.ndarray:
            (left, top, right, bottom), (width, height) = view.crop, view.size
            pixel = (right - left) * (bottom - top) / (width * height)  # of the frame, in those of the image
            own = [pixel * max(1, np.count_nonzero(each.pixels)) for each in pasted]
            return np.array([*map(sample.area, range(num_annotations)), *own])

        masks, boxes, num_valid = [], [], 0
        for position in self.prompts.order(areas, num_annotations + len(pasted), generator):
            if position >= num_annotations:
                number = position - num_annotations
                seen, cover = (grids[number], *pasted[number].extent), covers[number + 1]
            else:
                rle = self._usable_rle(sample, position, report)
                if rle is None:
                    continue
                seen, cover = view.mask(rle, self.mask_size), covers[0]
            num_valid += 1
            target = seen and self._visible(*seen, cover)
            if target:
                masks.append(target[0])
                boxes.append(target[1])
            if len(masks) == num_prompts:
                break
        if not masks:
            raise SampleError(SkipReason.NOTHING_IN_VIEW if num_valid else SkipReason.NO_INSTANCE, sample.id)
        again = np.arange(num_prompts) % len(masks)
        return np.stack(masks)[again], np.stack(boxes)[again]

    def _usable_rle(self, sample: LazySample, position: int, report: SkipReport) -> dict | None:
        where, left_out = f"{sample.id}, annotation number {position}", []
        try:
            instance = sample.instance(position, left_out)
        except SampleError as error:
            report.add_instances(error.reason, where)
            return None
        for reason in left_out:
            report.add_part(reason, where)
        return None if instance.is_crowd else instance.rle

    def _visible(
        self, mask: np.ndarray, box: np.ndarray, share: float, cover: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(mask, box) of what is not covered, or None where it is too small or too small a part."""
        num_cells = np.count_nonzero(mask)
        if np.any(mask & cover):
            mask = mask & ~cover
            share *= np.count_nonzero(mask) / num_cells
            num_cells = np.count_nonzero(mask)
            if (extent := mask_extent(mask)) is not None:
                lower, upper = np.array(extent).reshape(2, 2) * (self.image_size // self.mask_size)
                box = np.concatenate([np.maximum(box[:2], lower), np.minimum(box[2:], upper)])
        if num_cells < self.prompts.min_mask_cells or share < self.prompts.min_visible:
            return None
        return mask, box
