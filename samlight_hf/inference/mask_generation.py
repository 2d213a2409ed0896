"""Everything mode: the masks of all there is in an image, equal to transformers' `mask-generation` pipeline, and faster.

A grid of points is decoded, three masks each, on the image and, where asked for, on crops of it. Kept are masks that
the model scores well, that are stable under another threshold, that do not end at a crop's border, and of those that
lie on each other the best. The order of these steps, every comparison and every resize are the stock pipeline's. What
differs is when they happen and to what: a mask that its score rules out is never computed, stability and boxes come
straight from the decoder's logits, outlines are those of the masks that stay, and everything up to them is on the
device.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, SamImageProcessor

from ..engine.build import decoder_dtype_of, make_decoder
from ..engine.image_encoder import ImageEncoder
from ..engine.memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from ..engine.plain_decoder import Decoder, PlainMaskDecoder
from ..images.errors import IMAGE_ERRORS, check_errors, error_of_image
from ..images.preprocessing import ImageInput, check_size, image_tensor, resized_size
from ..images.reading import ImageError, read_ahead
from ..kernels.upscaled_masks import Frame, measure, why_not_triton
from ..masks.results import GeneratedMasks, MaskResult
from ..utils.autocast import without_autocast
from .candidates import Candidates, Table
from .crops import (
    DEFAULT_POINTS_PER_SIDE,
    DEFAULT_PRED_IOU_THRESH,
    DEFAULT_STABILITY_SCORE_THRESH,
    Crop,
    MaskGenerationSettings,
    crop_boxes,
    point_grid,
)
from .encoded_image import EncodedImage


_CROP_EDGE_TOLERANCE = 20  # pixels of the image


class MaskGenerator:
    """Everything mode of one model. Call it with an image, or with a list of images for a list of results.

    `max_memory_mb` bounds the memory that is allocated on a CUDA device, the model's weights included; images of more
    than about 10 million pixels may need more. Results do not depend on it, but for rounding. `points_per_batch` sets
    how many points are decoded at once; None takes what fits. `cuda_graphs` replays encoder and decoder from CUDA
    graphs, and `triton_kernels` compute masks and their outlines: both by default on CUDA devices, the latter where
    Triton runs, and a warning tells once where it does not. `decoder_dtype` is what a SAM's mask decoder computes in:
    by default the model's dtype, and float16 for bfloat16 on CUDA devices, whose three more bits tell near duplicates
    apart, where the weights fit into it.

    The model's weights are copied when this is made, and later changes of the model do not reach it; where a part runs
    in the model itself (an image encoder of another kind, adapters, hooks, other modules than the config's), a changed
    model raises ValueError. The copies cost up to the memory of a SAM-Lightening's weights once more.

    Threads may share a generator, and each gets the masks that it would get alone. On a CUDA device the steps of their
    images take turns, on any streams; on a CPU they run side by side. `set_budget` is for all threads: leave it to one,
    while no image is under way, or take a generator of each budget from `with_budget`.

    A generator can be pickled, for processes that are spawned: the model and the settings are; kernels and graphs are
    made anew. A model that `optimize` made cannot.

    Raises ValueError for a budget that the model does not fit into, and for CUDA graphs or Triton kernels that are
    asked for and cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: SamImageProcessor | ProcessorMixin,
        max_memory_mb: float = DEFAULT_MEMORY_MB,
        points_per_batch: int | None = None,
        cuda_graphs: bool | None = None,
        triton_kernels: bool | None = None,
        decoder_dtype: torch.dtype | None = None,
    ):
        self._settings = {
            "cuda_graphs": cuda_graphs, "triton_kernels": triton_kernels, "decoder_dtype": decoder_dtype,
        }  # fmt: skip
        self.model = model.eval()
        self.image_processor = getattr(image_processor, "image_processor", image_processor)
        self.device = model.device
        reason = why_not_triton(torch.empty(0, device=self.device))
        if triton_kernels and reason:
            raise ValueError(f"triton_kernels=True is not possible: {reason}")
        self.use_triton = reason is None and triton_kernels is not False
        decoder_dtype = decoder_dtype_of(model, model.dtype, decoder_dtype)
        self.decoder: Decoder = make_decoder(model, cuda_graphs, triton_kernels, decoder_dtype)
        self.encoder = ImageEncoder(model, self.image_processor, self.decoder)
        self.set_budget(max_memory_mb, points_per_batch)

    def set_budget(self, max_memory_mb: float, points_per_batch: int | None = None):
        """As when this was made, from the next image on."""
        self._settings.update(max_memory_mb=max_memory_mb, points_per_batch=points_per_batch)
        use_triton = self.use_triton and not isinstance(self.decoder, PlainMaskDecoder)
        self.budget = MemoryBudget(self.model, max_memory_mb, points_per_batch, self.decoder, use_triton)

    def with_budget(self, max_memory_mb: float, points_per_batch: int | None = None) -> "MaskGenerator":
        """A generator of this one's model, kernels and graphs, with a budget of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _settings=dict(self._settings))
        other.set_budget(max_memory_mb, points_per_batch)
        return other

    def __getstate__(self) -> dict:
        return {"model": self.model, "image_processor": self.image_processor, **self._settings}

    def __setstate__(self, state: dict):
        self.__init__(**state)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        settings: MaskGenerationSettings | None = None,
        *,
        errors: str = "return",
        **changes,
    ) -> GeneratedMasks | list[GeneratedMasks | ImageError]:
        """The masks of a path, PIL image, array or tensor (see `image_tensor`), or of each of a list of these.

        Settings are given as one object, or by name. `errors` is for lists, as `generate_many` tells.
        """
        settings = _settings(settings, changes)
        if isinstance(images, list | tuple):
            return list(self.generate_many(images, settings, errors=errors))
        return self.generate(image_tensor(images), settings)

    def generate_many(
        self,
        images: Iterable[ImageInput],
        settings: MaskGenerationSettings | None = None,
        *,
        errors: str = "return",
        **changes,
    ) -> Iterator[GeneratedMasks | ImageError]:
        """The masks of image after image, any number of them, of which the next ones are read meanwhile.

        There is one result for each image, in order. An image that is damaged, too thin or too large for the memory has
        its error there, a ImageError that names it, and a warning says the same; the others go on:

            for path, result in zip(paths, generator.generate_many(paths)):
                if isinstance(result, ImageError):
                    failed.append((path, result))

        `errors="raise"` raises the first such error instead, which ends it.
        """
        check_errors(errors)
        settings = _settings(settings, changes)
        for place, (image, tensor, error) in enumerate(read_ahead(_read, images)):
            if error is None:
                try:
                    result = self.generate(tensor, settings)
                except IMAGE_ERRORS as raised:
                    error = raised
            if error is not None:
                result = error_of_image(place, error, image)
                if errors == "raise":
                    raise result from error
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                warnings.warn(str(result), stacklevel=2)
            yield result

    @without_autocast
    @torch.inference_mode()
    def generate(
        self, image: torch.Tensor, settings: MaskGenerationSettings, progress=None, encoded=None
    ) -> GeneratedMasks:
        """The masks of one image, uint8 (3, H, W) on any device.

        `progress`, such as a tqdm bar, has its `update` called with the number of points decoded. `encoded` is what
        `encoder` or `Predictor.encode` made of this image, for callers that have it already. Raises ValueError for an
        image, or a crop of it, that is too thin for the model, and where a mask's score is NaN.
        """
        size = tuple(image.shape[-2:])
        crops = crop_boxes(*size, settings)
        for crop in crops:
            if min(crop.size) < 1:
                raise ValueError(
                    f"an image of {size[1]}x{size[0]} pixels is too small for crops_n_layers={settings.crops_n_layers}."
                )
            check_size(self.image_processor, *crop.size)
        found = Candidates(size, settings.mask_threshold, self.budget.waiting_bytes, self.use_triton)
        for crop, prepared in self._encode(image, crops, encoded):
            self._decode_crop(prepared, crop, size, settings, found, progress)
        return self._select(found, size, settings)

    def _encode(self, image: torch.Tensor, crops: list[Crop], encoded) -> Iterator[tuple[Crop, object]]:
        if encoded is not None:
            yield crops[0], encoded.read() if isinstance(encoded, EncodedImage) else encoded
            crops = crops[1:]
        step = self.budget.images_per_encoding
        for start in range(0, len(crops), step):
            part = crops[start : start + step]
            yield from zip(part, self.encoder([image[:, y1:y2, x1:x2] for (x1, y1, x2, y2), _ in part]))

    def _decode_crop(
        self,
        encoded,
        crop: Crop,
        size: tuple[int, int],
        settings: MaskGenerationSettings,
        found: Candidates,
        progress,
    ):
        """Batch after batch of points: those of their masks that the filters keep are added to `found`."""
        resized = resized_size(*crop.size, self.image_processor.size["longest_edge"])
        padded = self.image_processor.pad_size["height"], self.image_processor.pad_size["width"]
        frame = Frame(padded, resized, crop.size, (crop.box_xyxy[1], crop.box_xyxy[0]), size)
        grid = point_grid(settings.points_per_side(crop.layer))
        # The stock pipeline's order of products: a coordinate must not differ by its last bit.
        points = grid * torch.tensor([crop.size[1], crop.size[0]])
        factors = resized[1] / crop.size[1], resized[0] / crop.size[0]
        prompts = torch.stack([points[:, 0] * factors[0], points[:, 1] * factors[1]], dim=1)[:, None].to(self.device)
        points = (points + torch.tensor(crop.box_xyxy[:2])).to(self.device)
        least = settings.pred_iou_thresh if settings.pred_iou_thresh > 0 else None
        # Batches of one size, as a CUDA graph has one: the last is filled up with its last point.
        batch_size = _even_batch(len(prompts), self.budget.points_per_batch)
        labels = torch.ones(batch_size, 1, dtype=torch.int64, device=self.device)
        # Made once: each tensor that is made of numbers waits for the device.
        edges = torch.tensor([crop.box_xyxy, (0, 0, size[1], size[0])], dtype=torch.int32, device=self.device)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            num_points = len(batch)
            if num_points < batch_size:
                batch = torch.cat([batch, batch[-1:].expand(batch_size - num_points, -1, -1)])
            at_once = self.budget.points_per_upscaling
            decoded = self.decoder.decode(
                encoded, batch, labels, min_iou=least, prompts_per_upscaling=at_once, repeated=True
            )
            found.note_scores(decoded.iou)
            num_masks = decoded.iou.shape[1]
            real = int((decoded.kept < num_points * num_masks).sum()) if num_points < batch_size else len(decoded.kept)
            kept, logits = decoded.kept[:real], decoded.logits[:real]
            scores, points_kept = decoded.iou.flatten()[kept], points[start + kept // num_masks]
            self._filter(logits, scores, points_kept, edges, frame, settings, found)
            if progress is not None:
                progress.update(num_points)

    def _filter(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        points: torch.Tensor,
        edges: torch.Tensor,
        frame: Frame,
        settings: MaskGenerationSettings,
        found: Candidates,
    ):
        """Of masks (k, h, w) as the decoder gives them, adds those that are stable and do not end at the crop's border.

        `edges` holds the boxes of the crop and of the image, int32 (2, 4), on the device.
        """
        threshold, offset = settings.mask_threshold, settings.stability_score_offset
        step = self.budget.masks_per_step(frame.image, frame.crop)
        thresholds = threshold, threshold + offset, threshold - offset
        measures = measure(logits, frame, thresholds, step, self.use_triton)
        stability, boxes = measures[:, 0] / measures[:, 1], measures[:, 2:]
        is_kept = []
        if settings.stability_score_thresh > 0:
            is_kept.append(stability > settings.stability_score_thresh)
        if frame.crop != frame.image:
            boxes = boxes + edges[0, :2].repeat(2)
            is_kept.append(~_ends_at_crop(boxes, *edges))
        table = Table(scores, stability, boxes.float(), points)
        if is_kept:
            kept = torch.stack(is_kept).all(dim=0).nonzero().squeeze(1)
            table, logits = Table(*(column[kept] for column in table)), logits[kept]
        if len(logits):
            found.add(table, frame, logits, step)

    def _select(self, found: Candidates, size: tuple[int, int], settings: MaskGenerationSettings) -> GeneratedMasks:
        """Of masks that lie on each other the best, on the CPU."""
        from torchvision.ops import batched_nms

        if not found.have_numbers():
            dtype = self.decoder.dtype
            advice = "" if dtype == torch.float32 else ": its numbers may not fit into it. Use a model in float32"
            if dtype != self.model.dtype:
                advice += f", or decoder_dtype={self.model.dtype}"
            raise ValueError(f"the model's scores are NaN, with a mask decoder in {dtype}{advice}.")
        columns = found.columns()
        if columns is None:
            columns = torch.zeros(0, 8, device=self.device)
        table = Table.of(columns)
        # All masks are of one group, and their order among equals is the stock pipeline's.
        kept = batched_nms(table.boxes, table.scores, torch.zeros_like(table.scores), settings.crops_nms_thresh)
        columns, kept = columns[kept].cpu().numpy(), kept.cpu().numpy()
        masks = found.outlines(kept, self.budget.masks_per_step(size, size))
        boxes = columns[:, 2:6].copy()
        boxes[:, 2:] += (masks.areas > 0)[:, None]
        frames, counts = found.frames()
        crops = np.array([_crop_box(frame) for frame in frames], dtype=np.float32).reshape(-1, 4)
        crops = crops.repeat(counts, axis=0)[kept]
        scores, stability, points = columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 6:].copy()
        return GeneratedMasks(masks, scores, boxes, stability, points, crops)


def segment_everything(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: ImageInput,
    points_per_side: int = DEFAULT_POINTS_PER_SIDE,
    pred_iou_thresh: float = DEFAULT_PRED_IOU_THRESH,
    stability_score_thresh: float = DEFAULT_STABILITY_SCORE_THRESH,
    points_per_batch: int | None = None,
    progress=None,
) -> MaskResult:
    """Masks of everything in one image, the best first, as pixels: a `MaskGenerator` for one use.

    Raises ValueError for settings outside their range, and for an image that is too thin for the model.
    """
    if not isinstance(points_per_side, int) or points_per_side < 1:
        raise ValueError(f"points_per_side={points_per_side!r} must be a positive integer.")
    settings = MaskGenerationSettings(
        points_per_side, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
    )
    # One image would not repay the capture of CUDA graphs.
    generator = MaskGenerator(model, processor, points_per_batch=points_per_batch, cuda_graphs=False)
    return generator.generate(image_tensor(image), settings, progress).to_result()


def _read(image: ImageInput) -> tuple[ImageInput, torch.Tensor | None, Exception | None]:
    """The image, its pixels, and what reading it has raised, which must not end the reading of others."""
    try:
        return image, image_tensor(image), None
    except IMAGE_ERRORS as error:
        return image, None, error


def _settings(settings: MaskGenerationSettings | None, changes: dict) -> MaskGenerationSettings:
    if settings is None:
        return MaskGenerationSettings(**changes)
    if changes:
        raise ValueError(f"give settings as one object or by name ({', '.join(changes)}), not both.")
    return settings


def _ends_at_crop(boxes: torch.Tensor, crop_box: torch.Tensor, image_box: torch.Tensor) -> torch.Tensor:
    """Whether a box, in the image, has a side near the crop's that is not near the image's: bool (n,)."""
    near_crop, near_image = ((boxes - box).abs() <= _CROP_EDGE_TOLERANCE for box in (crop_box, image_box))
    return (near_crop & ~near_image).any(dim=1)


def _crop_box(frame: Frame) -> tuple[int, int, int, int]:
    (top, left), (height, width) = frame.corner, frame.crop
    return left, top, left + width, top + height


def _even_batch(total: int, most: int) -> int:
    """The size of the fewest batches of at most `most` that hold `total`, nearly equal."""
    return math.ceil(total / math.ceil(total / most))
