"""The predictor: images are encoded once and prompted often, with points, boxes and masks in pixels of the image."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, SamImageProcessor

from ..engine.build import make_decoder
from ..engine.image_encoder import ImageEncoder
from ..engine.mask_decoder import largest_batch
from ..engine.memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from ..engine.plain_decoder import Decoder, PlainMaskDecoder
from ..images.errors import check_errors, error_of_image
from ..images.preprocessing import ImageInput, check_size, image_tensor, resized_size
from ..images.reading import ImageError
from ..kernels import upscaled_masks
from ..kernels.tokens import MOST_PROMPTS
from ..utils.reprs import ShortRepr
from ..utils.turns import turn
from .encoded_image import EncodedImage
from .mask_prompts import logits_of_prompt, tensor_of
from .prompts import Prompt, PromptArrays, check_lists, parse_prompts, prompt_batches, regular_prompts


@dataclass(frozen=True, repr=False)
class Prediction(ShortRepr):
    """The masks of n prompts on one image of H x W pixels, m masks for each prompt.

    Values are numpy arrays, or tensors on the model's device. Tensors come from torch's inference mode: `clone()` one
    before changing it in place or using it in a computation with gradients.

    Attributes:
        masks: bool (n, m, H, W), or None without `full_size`.
        scores: float32 (n, m), the IoU with the true mask that the model predicts.
        logits: float32 (n, m, h, w), the masks at the decoder's size, before the threshold at 0. One mask of each
            prompt, (n, h, w), can be given to `Predictor.predict` to be refined.
    """

    masks: np.ndarray | torch.Tensor | None
    scores: np.ndarray | torch.Tensor
    logits: np.ndarray | torch.Tensor

    def __len__(self) -> int:
        return len(self.scores)


class Predictor:
    """Predicts masks for prompts: points, boxes and masks in pixels of the image.

    `encode` runs the image encoder once and returns the image as a value; `predict` then answers prompts on it. For one
    image after another, `set_image` keeps the encoded image, and `predict` uses it if no `image` is given.

    The weights are copied when the predictor is made: later changes of the model have no effect. Where a part runs in
    the model itself (another image encoder, adapters, hooks, modules that are not those of the config), changes have
    their effect in it. Calls then raise ValueError in training mode, and when a part that was copied, or the mask
    decoder, has other weights by now. The copies take the memory of a SAM-Lightening model's weights once more.

    Threads may share a predictor: `encode`, and `predict` and `to_masks` with `image`, may be called at any time. On a
    CUDA device calls take turns, on any streams; on a CPU they run side by side. `set_image`, `set_images` and `reset`
    change the predictor for all threads.

    A predictor can be pickled, as spawned processes need it: model, settings and images are stored, and kernels and
    graphs are made anew. What was copied of the model must not have changed, nor may `optimize` have made it.

    Args:
        model: A SAM of transformers or a `SamLighteningModel`, on its device. It is put into evaluation mode.
        image_processor: The model's image processor, or the processor that holds it.
        output: "numpy" for arrays, or "torch" for tensors on the model's device.
        max_memory_mb: The memory that a CUDA device may allocate, the model's weights included, in MB of 2**20 bytes.
            It bounds how many images and prompts are computed at once.
        cuda_graphs: Replay the image encoder, and the mask decoder for up to 64 prompts on an image, from CUDA graphs.
            Default: on CUDA devices.
        skip_padding: Compute only the rows of patches that hold image: a landscape image takes less time, and its masks
            are close to those of all rows, but not equal; see `engine.padding`. Not for the fused encoder on CUDA.

    Raises:
        ValueError: If the model is no SAM, if it does not fit into `max_memory_mb`, and for CUDA graphs that are asked
            for and impossible.

    Example:
        >>> predictor = Predictor(model, processor)
        >>> image = predictor.encode("photo.jpg")
        >>> first = predictor.predict(boxes_xyxy=[(10, 20, 300, 200)], multimask_output=False, image=image)
        >>> first.masks.shape  # one prompt, one mask
        (1, 1, 480, 640)
        >>> better = predictor.predict([[(50, 60), (90, 80)]], [[1, 0]], logits=first.logits[:, 0], image=image)
    """

    # The images, and whether they are a list: one attribute, so that other threads never see a mixture.
    _held: tuple[list[EncodedImage], bool]

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: SamImageProcessor | ProcessorMixin,
        output: str = "numpy",
        max_memory_mb: float = DEFAULT_MEMORY_MB,
        cuda_graphs: bool | None = None,
        skip_padding: bool = False,
    ):
        if output not in ("numpy", "torch"):
            raise ValueError(f"output={output!r} must be 'numpy' or 'torch'.")
        if model.config.model_type not in ("sam", "sam_lightening"):
            raise ValueError(f"model_type={model.config.model_type!r} has another decoder than SAM's: use a SAM.")
        self.model, self.output = model.eval(), output
        self.image_processor = getattr(image_processor, "image_processor", image_processor)
        self._settings = {"output": output, "max_memory_mb": max_memory_mb, "cuda_graphs": cuda_graphs}
        self._settings["skip_padding"] = skip_padding
        self.decoder: Decoder = make_decoder(model, cuda_graphs)
        self.encoder = ImageEncoder(model, self.image_processor, self.decoder, skip_padding)
        self.budget = MemoryBudget(model, max_memory_mb)
        self._short_at_once = self.budget.points_per_batch  # short prompts decoded at once
        if self.decoder.is_lean:
            lean = MemoryBudget(model, max_memory_mb, decoder=self.decoder, use_triton=True)
            self._short_at_once = min(lean.points_per_batch, MOST_PROMPTS)
        self.device, config = model.device, model.config.prompt_encoder_config
        side = 4 * config.image_embedding_size
        self.logits_size = (side, side)
        self.reset()

    def __getstate__(self) -> dict:
        self.encoder.check_weights(also_copies=True)  # copies are made anew, and images are stored
        return {"model": self.model, "image_processor": self.image_processor, **self._settings, "held": self._held}

    def __setstate__(self, state: dict):
        held = state.pop("held")
        self.__init__(**state)  # type: ignore[misc]  # as pickle would call it
        self._held = held

    @overload
    def encode(self, images: ImageInput) -> EncodedImage: ...

    @overload
    def encode(self, images: list[Any] | tuple[Any, ...]) -> list[EncodedImage]: ...

    def encode(self, images):
        """Encode images, for `predict` as `image`.

        Args:
            images: A path, PIL image, array (H, W, 3) or tensor (3, H, W), see `images.preprocessing.image_tensor`; or
                a list of images of any sizes.

        Returns:
            The encoded image, or a list of them.

        Raises:
            ValueError: If an image cannot be read or is too thin for the model. For a list it is an `ImageError` that
                names the image.
        """
        if not isinstance(images, list | tuple):
            return self._encode([self._tensor(images)])[0]
        if not images:
            raise ValueError("encode takes an image, or a list of at least one.")
        tensors = []
        for place, image in enumerate(images):
            try:
                tensors.append(self._tensor(image))
            except ValueError as error:
                raise error_of_image(place, error, image) from error
        return self._encode(tensors)

    def _tensor(self, image: ImageInput) -> torch.Tensor:
        tensor = image_tensor(image)
        check_size(self.image_processor, *tensor.shape[-2:])
        return tensor

    def _encode(self, tensors: list[torch.Tensor]) -> list[EncodedImage]:
        step = self.budget.images_per_encoding
        batches = [self.encoder(tensors[start : start + step]) for start in range(0, len(tensors), step)]
        embeddings = [embedding for batch in batches for embedding in batch]
        pad_size, longest_edge = self.image_processor.pad_size, self.image_processor.size["longest_edge"]
        padded = pad_size["height"], pad_size["width"]
        encoded = []
        for tensor, embedding in zip(tensors, embeddings, strict=True):
            height, width = tensor.shape[-2:]
            resized = resized_size(height, width, longest_edge)
            encoded.append(EncodedImage(embedding, (height, width), resized, padded))
        return encoded

    @property
    def images(self) -> list[EncodedImage]:
        """The encoded images that `set_image` or `set_images` keep."""
        return self._held[0]

    def reset(self) -> None:
        """Forget the images that were set."""
        self._held = ([], False)

    def set_image(self, image: ImageInput) -> "Predictor":
        """Encode one image, see `encode`, and keep it: `predict` without `image` then takes prompts on it.

        Returns:
            The predictor itself.
        """
        self.reset()  # also if encoding fails: prompts must not be answered on the previous image
        if isinstance(image, list | tuple):
            raise ValueError("set_image takes one image; set_images takes a list.")
        self._held = [self.encode(image)], False
        return self

    def set_images(self, images: Sequence[ImageInput]) -> "Predictor":
        """Encode a list of images of any sizes and keep them: `predict` without `image` then takes and returns lists.

        Returns:
            The predictor itself.
        """
        if isinstance(images, str) or not isinstance(images, Sequence) or not images:
            raise ValueError("set_images takes a list of at least one image; set_image takes one image.")
        self.reset()
        self._held = self.encode(list(images)), True
        return self

    def predict(
        self,
        points_xy=None,
        labels=None,
        boxes_xyxy=None,
        logits=None,
        multimask_output: bool = True,
        full_size: bool = True,
        *,
        masks=None,
        image: EncodedImage | Sequence[EncodedImage] | None = None,
        errors: str = "return",
    ) -> "Prediction | list[Prediction | ImageError]":
        """Predict the masks of n prompts on an image.

        A prompt has points, a box, a mask, or several of these for one object. All coordinates are in pixels of the
        image. For a list of images, given as `image` or kept by `set_images`, each of `points_xy`, `labels`,
        `boxes_xyxy`, `logits` and `masks` is a list with one entry for each image, or None for an image without any.

        Args:
            points_xy: (n, k, 2), or n lists of any number of points (x, y), with 0 <= x < width and 0 <= y < height. A
                point less than a pixel outside is moved inside.
            labels: (n, k), or n lists as long as those of the points: 1 on the object, 0 beside it. Default: all 1.
            boxes_xyxy: (n, 4), x1, y1, x2, y2 with x1 < x2 and y1 < y2. Boxes that stick out of the image are cut.
            logits: (n, h, w), logits of an earlier `Prediction`, to be refined. Masks are accepted too, see `masks`.
            multimask_output: True gives three masks for each prompt, which suits an ambiguous one such as one point;
                False gives one mask, which suits boxes and several points.
            full_size: Compute masks at the image's size; without it, logits and scores alone.
            masks: (n, H, W), as large as the image or as earlier logits: bool, or 0 and 1, or 0 and 255.
            image: What `encode` returned, an image or a list of them. Default: what `set_image` or `set_images` keeps.
            errors: "return" gives an image of a list whose prompts are wrong an `ImageError` in place of its
                prediction, with a warning; "raise" raises it.

        Returns:
            The prediction, or for a list of images a list of predictions.

        Raises:
            ValueError: If there is no image or no prompt, or a prompt is wrong; the message names the value.
        """
        check_errors(errors)
        images, is_list = self._images(image)
        if points_xy is None and boxes_xyxy is None and logits is None and masks is None:
            raise ValueError("there is no prompt: give points_xy, boxes_xyxy, logits or masks.")
        if not is_list and logits is None and masks is None:
            regular = regular_prompts(images[0].size, points_xy, labels, boxes_xyxy)
            if regular is not None:
                return self._result(images[0], *self._decode_arrays(images[0], regular, multimask_output), full_size)
        arguments = {
            "points_xy": points_xy, "labels": labels, "boxes_xyxy": boxes_xyxy, "logits": logits, "masks": masks,
        }  # fmt: skip
        if not is_list:
            decoded = self._decode(images, self._parse(images[0], 0, **arguments), multimask_output)
            return self._result(images[0], *decoded, full_size)
        prompts_of_images, failed = self._parse_lists(images, arguments, errors)
        prompts = [prompt for part in prompts_of_images for prompt in part]
        scores, all_logits = self._decode(images, prompts, multimask_output)
        counts = [len(part) for part in prompts_of_images]
        parts = zip(images, scores.split(counts), all_logits.split(counts))
        return [failed.get(place) or self._result(*part, full_size) for place, part in enumerate(parts)]

    def to_masks(
        self, logits: np.ndarray | torch.Tensor, index: int = 0, image: EncodedImage | None = None
    ) -> torch.Tensor:
        """Resize logits to masks of the image's size.

        Args:
            logits: (n, h, w), logits of a `Prediction`.
            index: The index of the image among those that were set.
            image: The encoded image, instead of `index`.

        Returns:
            bool (n, H, W), on the device of the logits.

        Raises:
            ValueError: If the logits have another number of dimensions.
        """
        image, logits = self.images[index] if image is None else image, tensor_of(logits)
        if logits.ndim != 3:
            raise ValueError(
                f"logits have the shape {tuple(logits.shape)}, and must be (n, h, w): logits[:, i] of a prediction."
            )
        if upscaled_masks.why_not_triton(logits, image.frame) is None:
            return upscaled_masks.launch_masks(logits, image.frame, 0.0)
        step = self.budget.masks_per_step(image.size, image.size)
        return upscaled_masks.masks(logits, image.frame, 0.0, step, use_triton=False)

    @property
    def _embedding_shape(self) -> tuple[int, ...]:
        """The shape of an image's embedding, without the batch, as the decoder prepares it."""
        config = self.model.config.prompt_encoder_config
        side, width = config.image_embedding_size, config.hidden_size
        return (width, side, side) if isinstance(self.decoder, PlainMaskDecoder) else (side * side, width)

    def _images(self, image: EncodedImage | Sequence[EncodedImage] | None) -> tuple[list[EncodedImage], bool]:
        """Return the images to use, given or kept, and whether they are a list."""
        kept, is_list = self._held
        if image is not None:
            is_list = isinstance(image, list | tuple)
        elif not kept:
            raise ValueError("there is no image yet: call set_image or set_images first, or give image=encode(...).")
        images: list[Any] = kept if image is None else list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise ValueError("image is an empty list: give what encode returned.")
        for encoded in images:
            if not isinstance(encoded, EncodedImage):
                raise ValueError(f"image is a {type(encoded).__name__}, and must be what encode returned.")
            embedding = encoded.embedding
            if embedding.device != self.device or embedding.shape[1:] != self._embedding_shape:
                raise ValueError(
                    f"the image was encoded by another model, on {embedding.device}: encode it with this "
                    f"predictor, on {self.device}."
                )
        return images, is_list

    def _parse(
        self, image: EncodedImage, place: int, points_xy=None, labels=None, boxes_xyxy=None, logits=None, masks=None
    ) -> list[Prompt]:
        if logits is not None and masks is not None:
            raise ValueError("logits and masks are given: a prompt has one of them.")
        name, values = ("logits", logits) if masks is None else ("masks", masks)
        prompt_logits = None
        if values is not None:
            prompt_logits = logits_of_prompt(values, image, self.logits_size, self.device, name)
        return parse_prompts(place, image.size, points_xy, labels, boxes_xyxy, prompt_logits, name)

    def _parse_lists(
        self, images: list[EncodedImage], arguments: dict[str, Any], errors: str
    ) -> tuple[list[list[Prompt]], dict[int, ImageError]]:
        """Check the prompts on several images: return those of each image, and the errors by the image's index."""
        check_lists(arguments, len(images))
        prompts: list[list[Prompt]] = []
        failed: dict[int, ImageError] = {}
        for place, encoded in enumerate(images):
            own = {name: None if values is None else values[place] for name, values in arguments.items()}
            try:
                prompts.append(self._parse(encoded, place, **own))
            except ValueError as error:
                failed[place] = error_of_image(place, error)
                if errors == "raise":
                    raise failed[place] from error
                warnings.warn(str(failed[place]), stacklevel=3)
                prompts.append([])
        return prompts, failed

    def _decode(
        self, images: list[EncodedImage], prompts: list[Prompt], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts in any order, float32: scores (n, m) and logits (n, m, h, w)."""
        self._check_weights()
        most = self._at_once(all(prompt.is_short for prompt in prompts))
        batches = list(prompt_batches(prompts, most))
        parts = [self._decode_batch(images, [prompts[place] for place in batch], multimask_output) for batch in batches]
        if not parts:
            num_masks = self.model.config.mask_decoder_config.num_multimask_outputs if multimask_output else 1
            empty = torch.zeros(0, num_masks, *self.logits_size, dtype=torch.float32, device=self.device)
            return empty[..., 0, 0], empty
        scores, logits = map(_cat, zip(*parts))
        order = [place for batch in batches for place in batch]
        if order != sorted(order):
            back = torch.tensor(order).argsort().to(scores.device, non_blocking=True)
            scores, logits = scores[back], logits[back]
        return scores, logits

    def _decode_arrays(
        self, image: EncodedImage, prompts: PromptArrays, multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts of one kind on one image, see `_decode`."""
        self._check_weights()
        step, count = self._at_once(prompts.is_short), len(prompts)
        try:
            if count <= step:
                return self._decode_part(image.embedding, image.scale, prompts, multimask_output)
            parts = [
                self._decode_part(image.embedding, image.scale, prompts.part(start, start + step), multimask_output)
                for start in range(0, count, step)
            ]
        finally:
            image.read()  # the device need not wait for it: the caller holds the image
        scores, logits = map(_cat, zip(*parts))
        return scores, logits

    def _at_once(self, are_short: bool) -> int:
        """Return how many prompts are decoded at once; with CUDA graphs batches are filled up, within the budget."""
        most = self._short_at_once if are_short else self.budget.points_per_batch
        return largest_batch(most) if self.decoder.cuda_graphs else most

    def _check_weights(self):
        if isinstance(self.decoder, PlainMaskDecoder):  # the model's own weights must still fit to the embeddings
            self.encoder.check_weights()

    def _decode_batch(
        self, images: list[EncodedImage], prompts: list[Prompt], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts of one kind, see `_decode`."""
        encoded = [images[prompt.image] for prompt in prompts]
        if all(image is encoded[0] for image in encoded):
            embedding, scales = encoded[0].read(), encoded[0].scale
        else:
            scales = np.array([image.scale for image in encoded])
            with turn(self.device):  # after the encoder, on whatever stream it ran
                embedding = torch.cat([image.read() for image in encoded])
        return self._decode_part(embedding, scales, PromptArrays.of(prompts), multimask_output)

    def _decode_part(
        self, embedding: torch.Tensor, scales: np.ndarray, prompts: PromptArrays, multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts of one kind with their image embedding, or with one for each; `scales` are (4,) or (n, 4)."""
        # Prompts stay on the CPU: the decoder copies them to the device without waiting.
        arguments = {}
        if prompts.points is not None:
            arguments["points"] = torch.from_numpy(prompts.points * scales[..., None, :2])
            arguments["labels"] = torch.from_numpy(prompts.labels)
        if prompts.boxes is not None:
            arguments["boxes"] = torch.from_numpy(prompts.boxes * scales)
        decoded = self.decoder.decode(
            embedding,
            **arguments,
            mask_logits=prompts.logits,
            multimask_output=multimask_output,
            prompts_per_upscaling=self.budget.points_per_upscaling,
            repeated=len(prompts) == 1,
        )
        iou, logits = decoded.iou, decoded.logits
        return iou, logits.view(iou.shape + logits.shape[1:]).float()

    def _result(self, image: EncodedImage, scores: torch.Tensor, logits: torch.Tensor, full_size: bool) -> Prediction:
        masks = None
        if full_size:
            masks = self.to_masks(logits.flatten(0, 1), image=image).view(*scores.shape, *image.size)
        if self.output == "torch":
            return Prediction(masks, scores, logits)
        return Prediction(None if masks is None else masks.cpu().numpy(), scores.cpu().numpy(), logits.cpu().numpy())


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors, without a copy if there is one alone."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
