"""Everything mode: the masks of transformers' `mask-generation` pipeline for all objects in an image, but faster.

A grid of points is decoded, with three masks for each point, on the image and on crops of it if these are asked for.
Masks are kept that have a high predicted IoU, that are stable under a change of the threshold, and that do not end at
the border of a crop; of those that overlap, the best. The order of these steps, every comparison and every resize are
the stock pipeline's. The differences are in when a step runs and on what: masks that their score rules out are never
computed, stability and boxes are computed directly from the decoder's logits, run lengths are computed for the chosen
masks alone, and all steps before them run on the device.
"""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast, overload

import numpy as np
import torch
from PIL.Image import Image
from transformers import PreTrainedModel, ProcessorMixin, SamImageProcessor

from ..engine.build import decoder_dtype_of, make_decoder
from ..engine.decoded import KeptMasks
from ..engine.image_encoder import ImageEncoder
from ..engine.memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from ..engine.plain_decoder import Decoder, PlainMaskDecoder
from ..images.errors import IMAGE_ERRORS, check_errors, error_of_image
from ..images.levels import to_rgb
from ..images.preprocessing import ImageInput, check_size, image_tensor
from ..images.rasters import ArrayRaster, open_raster
from ..images.reading import ImageError, read_ahead
from ..kernels.upscaled_masks import measure, why_not_triton
from ..masks.results import GeneratedMasks
from ..utils.autocast import without_autocast
from .candidates import Candidates
from .choice import choose
from .crop_prompts import CropPrompts
from .crops import SETTING_NAMES, Crop, MaskGenerationSettings, crop_boxes
from .encoded_image import EncodedImage
from .overlapping import Running, attempt, overlapped
from .tile_merging import generated_masks, merge_tiles
from .tiles import MemoryStore, TileGrid, TileSettings, segment_tiles


_CROP_EDGE_TOLERANCE = 20  # pixels of the image


class MaskGenerator:
    """Segments everything in an image: the masks of the stock `mask-generation` pipeline, computed faster.

    Call it with an image, or with a list of images; `generate_many` takes any number of images and reads ahead.

    The weights are copied when the generator is made: later changes of the model have no effect. Where a part runs in
    the model itself (another image encoder, adapters, hooks, modules that are not those of the config), changes have
    their effect in it. Calls then raise ValueError in training mode, and when a part that was copied, or the mask
    decoder, has other weights by now. The copies take the memory of a SAM-Lightening model's weights once more.

    Threads may share a generator, and each gets the masks that it would get alone. On a CUDA device the steps of their
    images take turns, on any streams; on a CPU they run side by side. `set_budget` changes the generator for all
    threads: call it while no image is being segmented, or use `with_budget`.

    A generator can be pickled, as spawned processes need it: model and settings are stored, and kernels and graphs are
    made anew. What was copied of the model must not have changed, nor may `optimize` have made it.

    Args:
        model: A SAM of transformers, a SAM-HQ model or a `SamLighteningModel`, on its device. It is put into
            evaluation mode.
        image_processor: The model's image processor, or the processor that holds it.
        max_memory_mb: The memory that a CUDA device may allocate, the model's weights included, in MB of 2**20 bytes.
            Images of more than about 10 million pixels may need more, and so may lists of images at low thresholds,
            where masks of two images wait. Apart from rounding it does not change the masks.
        points_per_batch: The number of points decoded at once. Default: as many as fit into `max_memory_mb`.
        cuda_graphs: Replay image encoder and mask decoder from CUDA graphs. Default: on CUDA devices.
        triton_kernels: Compute masks and their run lengths with Triton kernels. Default: on CUDA devices where Triton
            runs; where it does not, a warning says so once.
        decoder_dtype: The floating point type that a SAM's mask decoder computes in. Default: the model's, but float16
            for bfloat16 on CUDA devices if the weights are in its range: its three more bits tell near duplicates
            apart.
        tiles: Segment images in overlapping tiles of this size, and merge their masks, see `TileSettings`. A path is
            then read tile by tile where its format allows it. Default: an image is one tile.
        skip_padding: Compute only the rows of patches that hold image: a landscape image takes less time, and its masks
            are close to those of all rows, but not equal; see `engine.padding`. Not for the fused encoder on CUDA.

    Raises:
        ValueError: If the model does not fit into `max_memory_mb`, if it is another model (such as SAM 2), and for CUDA
            graphs or Triton kernels that are asked for and impossible.

    Example:
        >>> generator = MaskGenerator(model, processor)
        >>> result = generator("photo.jpg", points_per_crop=32, pred_iou_thresh=0.88)
        >>> result.masks[0].shape  # the mask with the highest score
        (480, 640)
        >>> rle = result.masks.to_coco()
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
        tiles: TileSettings | None = None,
        skip_padding: bool = False,
    ):
        self._settings: dict[str, Any] = {
            "cuda_graphs": cuda_graphs, "triton_kernels": triton_kernels, "decoder_dtype": decoder_dtype,
            "tiles": tiles, "skip_padding": skip_padding,
        }  # fmt: skip
        self.tiles = tiles
        self.model = model.eval()
        self.image_processor = getattr(image_processor, "image_processor", image_processor)
        self.device = model.device
        self._overlaps = self.device.type == "cuda"  # see `overlapped`
        self._stream: torch.cuda.Stream | None = None
        reason = why_not_triton(torch.empty(0, device=self.device))
        if triton_kernels and reason:
            raise ValueError(f"triton_kernels=True is not possible: {reason}")
        self.use_triton = reason is None and triton_kernels is not False
        decoder_dtype = decoder_dtype_of(model, model.dtype, decoder_dtype)
        self.decoder: Decoder = make_decoder(model, cuda_graphs, triton_kernels, decoder_dtype)
        self.encoder = ImageEncoder(model, self.image_processor, self.decoder, skip_padding)
        self.set_budget(max_memory_mb, points_per_batch)

    def set_budget(self, max_memory_mb: float, points_per_batch: int | None = None):
        """Change `max_memory_mb` and `points_per_batch` from the next image on, see the class."""
        self._settings.update(max_memory_mb=max_memory_mb, points_per_batch=points_per_batch)
        use_triton = self.use_triton and not isinstance(self.decoder, PlainMaskDecoder)
        self.budget = MemoryBudget(self.model, max_memory_mb, points_per_batch, self.decoder, use_triton)

    def with_budget(self, max_memory_mb: float, points_per_batch: int | None = None) -> "MaskGenerator":
        """Return a generator with another budget, which shares the model, kernels and graphs of this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _settings=dict(self._settings))
        other.set_budget(max_memory_mb, points_per_batch)
        return other

    def __getstate__(self) -> dict:
        self.encoder.check_weights(also_copies=True)  # which are made anew
        return {"model": self.model, "image_processor": self.image_processor, **self._settings}

    def __setstate__(self, state: dict):
        self.__init__(**state)  # type: ignore[misc]  # as pickle would call it

    @overload
    def __call__(
        self, images: ImageInput, settings: MaskGenerationSettings | None = None, *, errors: str = "return", **changes
    ) -> GeneratedMasks: ...

    @overload
    def __call__(
        self,
        images: list[Any] | tuple[Any, ...],
        settings: MaskGenerationSettings | None = None,
        *,
        errors: str = "return",
        **changes,
    ) -> list[GeneratedMasks | ImageError]: ...

    def __call__(self, images, settings=None, *, errors="return", **changes):
        """Segment everything in one image, or in each image of a list.

        Args:
            images: A path, PIL image, array (H, W, 3) or tensor (3, H, W), see `images.preprocessing.image_tensor`; or
                a list of images.
            settings: The settings as one object. Default: `MaskGenerationSettings()`.
            errors: For lists, see `generate_many`.
            **changes: Settings by name, instead of `settings`: see `MaskGenerationSettings`.

        Returns:
            The masks, the best first, or for a list of images a list of such results.

        Raises:
            ValueError: For a setting outside its range, and for a single image that cannot be used.
        """
        settings = _settings(settings, changes)
        if isinstance(images, list | tuple):
            return list(self.generate_many(images, settings, errors=errors))
        return self._generate(images if self.tiles else image_tensor(images), settings)

    def _generate(self, image, settings: MaskGenerationSettings) -> GeneratedMasks:
        """Segment one image: a tensor, or with `tiles` whatever `image_tensor` takes."""
        if self.tiles is None:
            return self.generate(image, settings)
        is_path = isinstance(image, str | os.PathLike)
        raster = open_raster(image) if is_path else ArrayRaster(image)
        try:
            grid, store = TileGrid(raster.height, raster.width, self.tiles), MemoryStore()
            segment_tiles(lambda tile: self.generate(tile, settings), raster, grid, store)
        finally:
            raster.close()
        objects = list(merge_tiles(grid, store, settings.crops_nms_thresh))
        return generated_masks(objects, raster.height, raster.width)

    def generate_many(
        self,
        images: Iterable[ImageInput],
        settings: MaskGenerationSettings | None = None,
        *,
        errors: str = "return",
        **changes,
    ) -> Iterator[GeneratedMasks | ImageError]:
        """Segment everything in any number of images, and read the next images meanwhile.

        Args:
            images: Images as in a call, from any iterable; they are taken as they are needed. An error that it raises
                itself comes behind the results of the images before.
            settings: See a call.
            errors: "return" gives an image that is damaged, too thin or too large for the memory an `ImageError` in
                place of its result, with a warning, and goes on; "raise" raises it, which ends the generator.
            **changes: See a call.

        Yields:
            One result for each image, in order. On a CUDA device it comes when the next two images have been read, so
            that the device never waits.

        Example:
            >>> for path, result in zip(paths, generator.generate_many(paths)):
            ...     if isinstance(result, ImageError):
            ...         failed.append((path, result))
        """
        check_errors(errors)
        settings = _settings(settings, changes)
        for place, (image, result) in enumerate(self._results(images, settings)):
            if isinstance(result, Exception):
                error, result = result, error_of_image(place, result, image)
                if errors == "raise":
                    raise result from error
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                warnings.warn(str(result), stacklevel=2)
            yield result

    def _results(
        self, images: Iterable[ImageInput], settings: MaskGenerationSettings
    ) -> Iterator[tuple[ImageInput, GeneratedMasks | Exception]]:
        """Yield each image with its masks, or with the error that is in their place."""
        if self.tiles is not None:  # each is read piece by piece, when it is its turn
            yield from ((image, attempt(partial(self._generate, image, settings))) for image in images)
            return
        taken = images if isinstance(images, list | tuple) else map(_own, images)
        if not self._overlaps:
            for image, tensor, error in read_ahead(_read, taken):
                result = error if error is not None else attempt(partial(self._generate, tensor, settings))
                yield image, result
            return
        given: deque[ImageInput] = deque()

        def starts() -> Iterator[Callable[[], Running]]:
            for image, tensor, error in read_ahead(_read, taken):
                given.append(image)
                yield partial(self._start_read, tensor, error, settings)

        for result in overlapped(starts(), self._select_beside):
            yield given.popleft(), result

    def _start_read(
        self, image: torch.Tensor | None, error: Exception | None, settings: MaskGenerationSettings
    ) -> Running:
        if image is None:
            assert error is not None
            raise error
        return self._start(image, settings)

    def generate_each(
        self, images: Iterable[tuple[torch.Tensor, Any]], settings: MaskGenerationSettings, progress=None
    ) -> Iterator[GeneratedMasks]:
        """Segment everything in images that are tensors; on a CUDA device the next one begins before one ends.

        Args:
            images: Of each image the `image` and `encoded` of `generate`.
            settings: The settings.
            progress: See `generate`.

        Yields:
            The masks of each image.

        Raises:
            ValueError: In the place of an image's masks, see `generate`. The images behind it are not segmented.
        """
        if not self._overlaps:
            yield from (self.generate(image, settings, progress, encoded) for image, encoded in images)
            return
        starts = (partial(self._start, image, settings, progress, encoded) for image, encoded in images)
        for result in overlapped(starts, self._select_beside):
            if isinstance(result, Exception):
                raise result
            yield result

    @without_autocast
    @torch.inference_mode()
    def generate(
        self, image: torch.Tensor, settings: MaskGenerationSettings, progress=None, encoded=None
    ) -> GeneratedMasks:
        """Segment everything in one image that is a tensor.

        Args:
            image: uint8 (3, H, W), on any device.
            settings: The settings.
            progress: An object such as a tqdm bar, whose `update` is called with the number of points decoded.
            encoded: What `encoder` or `Predictor.encode` made of this image, so that it is not encoded again.

        Returns:
            The masks, the best first.

        Raises:
            ValueError: If the image or a crop is too thin for the model, or if scores are NaN.
        """
        running = self._start(image, settings, progress, encoded)
        running.finish()
        return self._select(running)

    @without_autocast
    @torch.inference_mode()
    def _start(self, image: torch.Tensor, settings: MaskGenerationSettings, progress=None, encoded=None) -> Running:
        """Encode an image and launch its first points; see `generate`."""
        size = (image.shape[-2], image.shape[-1])
        crops = crop_boxes(*size, settings)
        for crop in crops:
            if min(crop.size) < 1:
                raise ValueError(
                    f"an image of {size[1]}x{size[0]} pixels is too small for crops_n_layers={settings.crops_n_layers}."
                )
            check_size(self.image_processor, *crop.size)
        candidates = Candidates(size, settings.mask_threshold, self.budget.waiting_bytes, self.use_triton, self.device)
        batches = self._decode(self._encode(image, crops, encoded), size, settings, candidates, progress)
        next(batches)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return Running(size, settings, candidates, batches, stream)

    def _decode(self, encoded_crops, size, settings, candidates, progress) -> Iterator[None]:
        for crop, embedding in encoded_crops:
            yield from self._decode_crop(embedding, crop, size, settings, candidates, progress)

    def _encode(self, image: torch.Tensor, crops: list[Crop], encoded) -> Iterator[tuple[Crop, Any]]:
        """Yield each crop with its embedding; `encoded` is that of the first crop, the image itself, if it is known."""
        if encoded is not None:
            yield crops[0], encoded.read() if isinstance(encoded, EncodedImage) else encoded
            crops = crops[1:]
        step = self.budget.images_per_encoding
        for start in range(0, len(crops), step):
            part = crops[start : start + step]
            yield from zip(part, self.encoder([image[:, y1:y2, x1:x2] for (x1, y1, x2, y2), _ in part]))

    def _decode_crop(
        self,
        embedding,
        crop: Crop,
        size: tuple[int, int],
        settings: MaskGenerationSettings,
        candidates: Candidates,
        progress,
    ) -> Iterator[None]:
        """Decode the points on a crop, batch after batch, and add the masks that pass the filters to the candidates.

        Yields:
            When a batch is launched. The device has work then, and no time passes between two batches: the masks of one
            are measured before the next is launched, and all else is done with them while it is decoded.
        """
        prompts = CropPrompts.make(
            crop, size, settings.points_per_side(crop.layer),
            settings.pred_iou_thresh if settings.pred_iou_thresh > 0 else None, self.budget.points_per_batch,
            4 * self.model.config.prompt_encoder_config.image_embedding_size, self.image_processor, self.device,
        )  # fmt: skip
        add: Callable[[], None] | None = None  # the masks of the batch before to the candidates
        for start in range(0, prompts.num_points, prompts.batch_size):
            num_points = min(prompts.batch_size, prompts.num_points - start)
            wait = self.decoder.decode_ahead(
                embedding, prompts.rows[start : start + prompts.batch_size], num_points, min_iou=prompts.min_iou,
                prompts_per_upscaling=self.budget.points_per_upscaling, visible=prompts.visible, meanwhile=add,
            )  # fmt: skip
            add = None  # and the logits that it holds
            yield
            add = self._measured(wait(), prompts, settings, candidates)
            if add is not None and not self.decoder.is_lean:  # there is no room for the logits of two batches
                add()
                candidates.settle()
                add = None
            if progress is not None:
                progress.update(num_points)
        if add is not None:
            add()

    def _measured(
        self,
        kept_masks: KeptMasks,
        prompts: CropPrompts,
        settings: MaskGenerationSettings,
        candidates: Candidates,
    ) -> Callable[[], None] | None:
        """Measure masks, and return a function that adds those which pass the filters to the candidates, or None.

        Before they are added, the logits of the masks that were added last are packed, which makes room for others.

        Args:
            kept_masks: As the decoder gives them, with their points in pixels of the image.
            prompts: Of the crop.
            settings: The settings.
            candidates: The masks kept so far.
        """
        table, logits, have_numbers = kept_masks
        candidates.have_numbers &= have_numbers
        if not len(logits):
            return None
        threshold, offset, frame = settings.mask_threshold, settings.stability_score_offset, prompts.place.frame
        step = self.budget.masks_per_step(frame.image, frame.crop)
        thresholds = threshold, threshold + offset, threshold - offset
        measures = measure(logits, frame, thresholds, step, self.use_triton)
        candidates.settle()
        return partial(self._add, table, logits, measures, prompts, settings, candidates, step)

    @staticmethod
    def _add(
        table: torch.Tensor,
        logits: torch.Tensor,
        measures: torch.Tensor,
        prompts: CropPrompts,
        settings: MaskGenerationSettings,
        candidates: Candidates,
        step: int,
    ):
        """Add the masks that are stable and do not end at the border of their crop to the candidates."""
        frame = prompts.place.frame
        stability, boxes = measures[:, 0].float() / measures[:, 1].float(), measures[:, 2:].float()
        if settings.stability_score_thresh > 0:
            kept = stability > settings.stability_score_thresh
        else:
            kept = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if frame.crop != frame.image:
            boxes = boxes + prompts.edges[0, :2].repeat(2)
            kept = kept & ~_ends_at_crop(boxes, *prompts.edges)
        candidates.add(torch.cat([table, stability[:, None], boxes], dim=1), kept, prompts.place, logits, step)

    @without_autocast
    @torch.inference_mode()
    def _select_beside(self, running: Running) -> GeneratedMasks:
        """Compute `_select` on a stream of its own, beside what has been launched since the image's last points."""
        if running.end is None:
            return self._select(running)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device, priority=-1)  # short steps before long ones
        self._stream.wait_event(running.end)
        with torch.cuda.stream(self._stream):
            return self._select(running)

    def _select(self, running: Running) -> GeneratedMasks:
        """Suppress duplicates, and copy the masks that are left to the CPU."""
        size, candidates = running.size, running.candidates
        if not candidates.have_numbers:
            raise ValueError(self._not_numbers())
        step = self.budget.masks_per_step(size, size)
        # The logits of this image's last batch of points are gone by now, and leave room for as many.
        return choose(candidates, running.settings.crops_nms_thresh, step, 3 * self.budget.points_per_batch)

    def _not_numbers(self) -> str:
        dtype = self.decoder.dtype
        advice = "" if dtype == torch.float32 else ": its numbers may not fit into it. Use a model in float32"
        if dtype != self.model.dtype:
            advice += f", or decoder_dtype={self.model.dtype}"
        return f"the model's scores are NaN, with a mask decoder in {dtype}{advice}."


def _own(image: ImageInput) -> ImageInput:
    """Copy an image whose pixels may be overwritten by those of the next one, which is taken before this one is read.

    Frames of a video may be in one array, and those of an animation are in one PIL image.
    """
    if isinstance(image, torch.Tensor):
        return image.clone()
    if isinstance(image, np.ndarray):
        return image if isinstance(image, np.memmap) else image.copy()
    if type(image) is Image:  # in memory
        return image.copy()
    if getattr(image, "is_animated", False):
        with contextlib.suppress(*IMAGE_ERRORS):  # which come again in the place of its result
            return to_rgb(cast(Image, image), "the image", upright=True)
    return image


def _read(image: ImageInput) -> tuple[ImageInput, torch.Tensor | None, Exception | None]:
    """Return the image, its pixels or None, and the error that reading it raised or None: other images go on."""
    try:
        return image, image_tensor(image), None
    except IMAGE_ERRORS as error:
        return image, None, error


def _settings(settings: MaskGenerationSettings | None, changes: dict) -> MaskGenerationSettings:
    if settings is None:
        if unknown := [name for name in changes if name not in SETTING_NAMES]:
            raise TypeError(f"{unknown[0]} is no setting of mask generation. They are {', '.join(SETTING_NAMES)}.")
        return MaskGenerationSettings(**changes)
    if changes:
        raise ValueError(f"give settings as one object or by name ({', '.join(changes)}), not both.")
    return settings


def _ends_at_crop(boxes: torch.Tensor, crop_box: torch.Tensor, image_box: torch.Tensor) -> torch.Tensor:
    """Return which boxes have a side near the crop's border that is not near the image's border: bool (n,)."""
    near_crop, near_image = ((boxes - box).abs() <= _CROP_EDGE_TOLERANCE for box in (crop_box, image_box))
    return (near_crop & ~near_image).any(dim=1)
