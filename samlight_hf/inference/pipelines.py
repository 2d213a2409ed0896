"""transformers' pipeline task "fast-mask-generation": the stock "mask-generation", by `MaskGenerator`."""

import os

import torch
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image

from ..engine.memory_budget import DEFAULT_MEMORY_MB
from ..images.levels import has_more_than_8_bits, to_rgb
from ..images.preprocessing import image_tensor
from ..masks.results import GeneratedMasks
from .mask_generation import MaskGenerationSettings, MaskGenerator


TASK = "fast-mask-generation"

_SETTINGS = tuple(MaskGenerationSettings.__dataclass_fields__)
_HOLE_FILLING = ("max_hole_area", "max_sprinkle_area")


class FastMaskGenerationPipeline(Pipeline):
    """Masks of everything in an image, with the arguments and the result of transformers' `MaskGenerationPipeline`.

    `pipeline("fast-mask-generation", model=..., max_memory_mb=1500, cuda_graphs=None)`: the last two are those of
    `MaskGenerator`. Called with an image (path, URL, PIL image) it returns a dictionary, with a list of images a list
    of these:

    masks: list of bool (H, W) tensors on the CPU, the best first. Left out with `output_masks=False`: as pixels, many
        masks take longer than all else.
    scores: float32 (n,), the predicted IoU.
    rle_mask, with `output_rle_mask=True`: list of COCO's uncompressed RLE.
    bounding_boxes, with `output_bboxes_mask=True`: int64 (n, 4), the first and the last column and row inside.

    Beyond the stock pipeline: any dtype; `points_per_batch=None` decodes as many as fit into memory; grids may differ
    between crop layers; an image without masks gives empty lists; `output_rle_masks`, which the stock one documents,
    works.

    Threads may share a pipeline, as they may share a `MaskGenerator`, and it can be pickled likewise.

    Raises ValueError for settings outside their range, and for filling holes, which SAM's image processor has not.
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
            elif name in ("points_per_batch", *_SETTINGS):
                forward[name] = value
            elif name in ("output_masks", "output_rle_mask", "output_bboxes_mask"):
                postprocess[name] = value
            else:
                raise ValueError(f"{name} is no argument of {TASK}.")
        return preprocess, forward, postprocess

    def __call__(self, image, *args, batch_size=None, **kwargs):
        """See the class. `batch_size` has no meaning here: points are batched, and images are not."""
        return super().__call__(image, *args, **kwargs)

    def preprocess(self, image, timeout: float | None = None) -> dict[str, torch.Tensor]:
        return {"image": image_tensor(_load(image, timeout))}

    def _forward(self, model_inputs, points_per_batch: int | None = None, **settings) -> dict[str, GeneratedMasks]:
        generator = self.generator.with_budget(
            self.max_memory_mb, points_per_batch
        )  # of this call: threads may share it
        return {"generated": generator.generate(model_inputs["image"], MaskGenerationSettings(**settings))}

    def postprocess(self, model_outputs, output_masks=True, output_rle_mask=False, output_bboxes_mask=False) -> dict:
        generated = model_outputs["generated"]
        result = {"masks": [torch.from_numpy(mask) for mask in generated.masks]} if output_masks else {}
        result["scores"] = torch.from_numpy(generated.scores)
        if output_rle_mask:
            result["rle_mask"] = generated.masks.to_coco(compressed=False)
        if output_bboxes_mask:
            boxes = torch.from_numpy(generated.boxes_xyxy).long()
            boxes[:, 2:] -= torch.from_numpy(generated.masks.areas > 0)[:, None].long()
            result["bounding_boxes"] = boxes
        return result


def _load(image: str | Image.Image, timeout: float | None) -> Image.Image:
    """An image as transformers loads it, but for levels of more than 8 bits, which that would clip to white."""
    opened = Image.open(image) if isinstance(image, str) and os.path.isfile(image) else image
    if isinstance(opened, Image.Image) and has_more_than_8_bits(opened):
        return to_rgb(opened, image if isinstance(image, str) else "the image", upright=True)
    return load_image(opened, timeout=timeout)
