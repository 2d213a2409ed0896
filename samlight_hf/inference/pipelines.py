"""The transformers pipeline task "fast-mask-generation": "mask-generation" computed by `MaskGenerator`."""

import os

import torch
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image

from ..engine.memory_budget import DEFAULT_MEMORY_MB
from ..images.formats import open_lazily
from ..images.levels import has_more_than_8_bits, is_turned, to_rgb
from ..images.preprocessing import image_tensor
from ..masks.results import GeneratedMasks
from .crops import SETTING_NAMES, MaskGenerationSettings
from .mask_generation import MaskGenerator


TASK = "fast-mask-generation"

_HOLE_FILLING = ("max_hole_area", "max_sprinkle_area")


class FastMaskGenerationPipeline(Pipeline):
    """Segments everything in an image, with the arguments and results of transformers' `MaskGenerationPipeline`.

    In addition, it accepts any dtype, and grids that differ between the crop layers. `points_per_batch=None` decodes as
    many points as fit into memory. An image without masks gives empty lists. `output_rle_masks`, which the stock
    pipeline documents and ignores, works. See `__call__` for the arguments of a call.

    Threads may share a pipeline, and it can be pickled, under the conditions of `MaskGenerator`.

    Args:
        *args: See `transformers.pipeline`.
        max_memory_mb: See `MaskGenerator`.
        cuda_graphs: See `MaskGenerator`.
        **kwargs: See `transformers.pipeline`, and the arguments of `__call__` as defaults for all calls.

    Example:
        >>> segment = pipeline("fast-mask-generation", model="org/sam-lightening", max_memory_mb=1500)
        >>> result = segment("photo.jpg", output_masks=False, output_rle_mask=True)
        >>> len(result["scores"]) == len(result["rle_mask"])
        True
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, max_memory_mb: float = DEFAULT_MEMORY_MB, cuda_graphs: bool | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_memory_mb = max_memory_mb
        self.generator = MaskGenerator(self.model, self.image_processor, max_memory_mb, cuda_graphs=cuda_graphs)

    def _sanitize_parameters(self, **kwargs):
        preprocess, forward, postprocess = {}, {}, {}
        for name in _HOLE_FILLING:
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not possible: SAM's image processor fills no holes.")
        if "output_rle_masks" in kwargs:
            kwargs.setdefault("output_rle_mask", kwargs.pop("output_rle_masks"))
        for name, value in kwargs.items():
            if name == "timeout":
                preprocess[name] = value
            elif name in ("points_per_batch", *SETTING_NAMES):
                forward[name] = value
            elif name in ("output_masks", "output_rle_mask", "output_bboxes_mask"):
                postprocess[name] = value
            else:
                raise ValueError(f"{name} is no argument of {TASK}.")
        return preprocess, forward, postprocess

    def __call__(self, image, *args, batch_size=None, **kwargs):
        """Segment everything in one image, or in each image of a list.

        Args:
            image: A path, URL or PIL image, or a list of these.
            *args: See `transformers.Pipeline`.
            batch_size: Ignored: points are batched, not images.
            **kwargs: `points_per_batch`, see `MaskGenerator`; `timeout` in seconds for URLs; `output_masks` (default:
                True), `output_rle_mask` and `output_bboxes_mask` (default: False), see below; and the settings of
                `MaskGenerationSettings` by name.

        Returns:
            A dictionary with the masks in the order of their scores, or a list of dictionaries for a list of images:

            - masks: bool (H, W) tensors on the CPU, a list. With many masks this takes longer than all other steps:
              leave them out with `output_masks=False`.
            - scores: float32 (n,), the predicted IoU.
            - rle_mask: COCO's uncompressed RLE of the masks, a list, with `output_rle_mask`.
            - bounding_boxes: int64 (n, 4), the first and the last column and row inside, with `output_bboxes_mask`.

        Raises:
            ValueError: For settings outside their range, unknown arguments, and `max_hole_area` or `max_sprinkle_area`:
                SAM's image processor fills no holes.
        """
        return super().__call__(image, *args, **kwargs)

    def preprocess(self, image, timeout: float | None = None) -> dict[str, torch.Tensor]:
        return {"image": image_tensor(_load(image, timeout))}

    def _forward(self, model_inputs, points_per_batch: int | None = None, **settings) -> dict[str, GeneratedMasks]:
        # A generator for this call alone: threads may share the pipeline.
        generator = self.generator.with_budget(self.max_memory_mb, points_per_batch)
        return {"generated": generator.generate(model_inputs["image"], MaskGenerationSettings(**settings))}

    def postprocess(self, model_outputs, output_masks=True, output_rle_mask=False, output_bboxes_mask=False) -> dict:
        generated = model_outputs["generated"]
        result: dict = {"masks": [torch.from_numpy(mask) for mask in generated.masks]} if output_masks else {}
        result["scores"] = torch.from_numpy(generated.scores)
        if output_rle_mask:
            result["rle_mask"] = generated.masks.to_coco(compressed=False)
        if output_bboxes_mask:
            boxes = torch.from_numpy(generated.boxes_xyxy).long()
            boxes[:, 2:] -= torch.from_numpy(generated.masks.areas > 0)[:, None].long()
            result["bounding_boxes"] = boxes
        return result


def _load(image: str | Image.Image, timeout: float | None) -> Image.Image:
    """Load an image as transformers does, except for what that would clip to white, or Pillow would scramble.

    These are levels of more than 8 bits, and turned TIFFs. A file that is no raster image is not opened.
    """
    opened = open_lazily(image) if isinstance(image, str) and os.path.isfile(image) else image
    if isinstance(opened, Image.Image) and (
        has_more_than_8_bits(opened) or (opened.format == "TIFF" and is_turned(opened))
    ):
        return to_rgb(opened, image if isinstance(image, str) else "the image", upright=True)
    return load_image(opened, timeout=timeout)
