"""Encode once, prompt often: points, boxes and masks in pixels of the original images, ragged and batched."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, SamImageProcessor

from ..engine.build import make_decoder
from ..engine.image_encoder import ImageEncoder
from ..engine.memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from ..engine.plain_decoder import Decoder, PlainMaskDecoder
from ..images.errors import check_errors, error_of_image
from ..images.preprocessing import ImageInput, check_size, image_tensor, resized_size
from ..images.reading import ImageError
from ..kernels import upscaled_masks
from ..masks.boxes import mask_edges
from ..masks.results import MaskResult
from ..utils.turns import turn
from .encoded_image import EncodedImage
from .mask_prompts import logits_of_prompt, tensor_of
from .prompts import Prompt, clip_prompts, parse_prompts, prompt_batches


@dataclass(frozen=True)
class Prediction:
    """What n prompts on one image of H x W pixels gave, m masks each: numpy arrays, or tensors on the model's device.

    Tensors are those of torch's inference mode: `clone()` what is to be changed in place or to take part in a gradient.

    Attributes:
        masks: bool (n, m, H, W), or None where they were not asked for.
        scores: float32 (n, m), the IoU with the true mask that the model predicts.
        logits: float32 (n, m, h, w), the masks at the decoder's size before the threshold at 0; one for each prompt,
            (n, h, w), can be fed back.
    """

    masks: np.ndarray | torch.Tensor | None
    scores: np.ndarray | torch.Tensor
    logits: np.ndarray | torch.Tensor

    def __len__(self) -> int:
        return len(self.scores)


class Predictor:
    """Masks for prompts on images that are encoded once.

        predictor = Predictor(model, processor)
        image = predictor.encode("photo.jpg")
        first = predictor.predict(boxes_xyxy=[(10, 20, 300, 200)], multimask_output=False, image=image)
        better = predictor.predict([[(50, 60), (90, 80)]], [[1, 0]], logits=first.logits[:, 0], image=image)

    For one image after the other there is `set_image`, whose image the next calls of `predict` take where none is given.

    `output` is "numpy" or "torch". `max_memory_mb` and `cuda_graphs` are those of `MaskGenerator`: on a CUDA device the
    encoder, and the decoder for a single prompt, are replayed from CUDA graphs.

    The model's weights are copied when this is made, and later changes of the model do not reach it; where
    a part runs in the model itself (an image encoder of another kind, adapters, hooks, other modules than the config's),
    a changed model raises ValueError. The copies cost up to the memory of a SAM-Lightening's weights once more.

    Raises ValueError for a model with another decoder than SAM's.

    Threads may share a predictor: `encode`, `predict` with `image`, and `to_masks` with `image` may be called at any time.
    On a CUDA device calls take turns, on any streams; on a CPU they run side by side. `set_image`, `set_images` and `reset`
    change what the predictor itself holds, for all threads: leave them to one.

    A predictor can be pickled, for processes that are spawned: the model, the settings and the images are; kernels and
    graphs are made anew. A model that `optimize` made cannot.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: SamImageProcessor | ProcessorMixin,
        output: str = "numpy",
        max_memory_mb: float = DEFAULT_MEMORY_MB,
        cuda_graphs: bool | None = None,
    ):
        if output not in ("numpy", "torch"):
            raise ValueError(f"output={output!r} must be 'numpy' or 'torch'.")
        if model.config.model_type not in ("sam", "sam_lightening"):
            raise ValueError(f"model_type={model.config.model_type!r} has another decoder than SAM's: use a SAM.")
        self.model, self.output = model.eval(), output
        self.image_processor = getattr(image_processor, "image_processor", image_processor)
        self._settings = {"output": output, "max_memory_mb": max_memory_mb, "cuda_graphs": cuda_graphs}
        self.decoder: Decoder = make_decoder(model, cuda_graphs)
        self.encoder = ImageEncoder(model, self.image_processor, self.decoder)
        self.budget = MemoryBudget(model, max_memory_mb)
        side = 4 * model.config.prompt_encoder_config.image_embedding_size
        self.logits_size = (side, side)
        self.reset()

    def __getstate__(self) -> dict:
        return {"model": self.model, "image_processor": self.image_processor, **self._settings, "held": self._held}

    def __setstate__(self, state: dict):
        held = state.pop("held")
        self.__init__(**state)
        self._held = held

    def encode(self, images: ImageInput | Sequence[ImageInput]) -> EncodedImage | list[EncodedImage]:
        """Encodes one image, see `image_tensor`, or a list of images of any sizes, for `predict` as `image`.

        Raises ValueError for one that cannot be read or is too thin; of a list it is named.
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
        parts = [self.encoder(tensors[start : start + step]) for start in range(0, len(tensors), step)]
        pad_size, longest_edge = self.image_processor.pad_size, self.image_processor.size["longest_edge"]
        padded = pad_size["height"], pad_size["width"]
        sizes = [tuple(tensor.shape[-2:]) for tensor in tensors]
        return [
            EncodedImage(embedding, size, resized_size(*size, longest_edge), padded)
            for size, embedding in zip(sizes, (embedding for part in parts for embedding in part), strict=True)
        ]

    @property
    def images(self) -> list[EncodedImage]:
        """Those that were set."""
        return self._held[0]

    def reset(self):
        """Forgets the images that were set."""
        # The images, and whether they are a list: read and written as one, whatever other threads do.
        self._held: tuple[list[EncodedImage], bool] = ([], False)

    def set_image(self, image: ImageInput) -> "Predictor":
        """Encodes one image, see `image_tensor`, and keeps it. `predict` then takes its prompts, and returns one `Prediction`."""
        self.reset()  # whatever comes: masks of the last images would be taken for those of these
        if isinstance(image, list | tuple):
            raise ValueError("set_image takes one image; set_images takes a list.")
        self._held = [self.encode(image)], False
        return self

    def set_images(self, images: Sequence[ImageInput]) -> "Predictor":
        """Encodes images of any sizes, and keeps them. `predict` then takes and returns lists with one entry for each image."""
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
        """Masks for n prompts on the image that `encode` made, or that was set.

        For a list of images, or after `set_images`, each argument is a list too, with None for no prompts, and so is what
        is returned. A prompt is some points, a box, a mask, or several of these, for one object. In pixels of the image:

        points_xy: (n, k, 2), or n lists of any number of (x, y), with 0 <= x < width and 0 <= y < height. What lies less
            than a pixel outside is moved inside.
        labels: (n, k), or lists as long as those of the points: 1 on the object (the default), 0 beside it.
        boxes_xyxy: (n, 4): x1, y1, x2, y2 with x1 < x2 and y1 < y2. What sticks out of the image is cut off.
        logits: (n, h, w) of an earlier `Prediction`, to be refined. Masks are taken as `masks`.
        masks: (n, H, W), as large as the image, or as an earlier prediction's logits: bool, or 0 and 1, or 0 and 255.

        Each prompt gives three masks, or one without `multimask_output`, which suits boxes and several points. Without
        `full_size` there are logits alone, and no masks at the image's size.

        Raises ValueError, naming the value, for prompts that cannot be, and where there is no image. Of a list of images
        those with such prompts have the error in place of their prediction, a ImageError, which a warning tells too, and
        the others their masks; `errors="raise"` raises it instead.
        """
        check_errors(errors)
        images, is_list = self._images(image)
        if all(argument is None for argument in (points_xy, boxes_xyxy, logits, masks)):
            raise ValueError("there is no prompt: give points_xy, boxes_xyxy, logits or masks.")
        if not is_list:
            prompts = self._parse(images[0], 0, points_xy, labels, boxes_xyxy, logits, masks)
            return self._result(images[0], *self._decode(images, prompts, multimask_output), full_size)
        arguments = {
            "points_xy": points_xy, "labels": labels, "boxes_xyxy": boxes_xyxy, "logits": logits, "masks": masks,
        }  # fmt: skip
        _check_lists(arguments, len(images))
        prompts, failed = [], {}
        for place, each in enumerate(images):
            try:
                own = {k: None if v is None else v[place] for k, v in arguments.items()}
                prompts.append(self._parse(each, place, **own))
            except ValueError as error:
                failed[place] = error_of_image(place, error)
                if errors == "raise":
                    raise failed[place] from error
                warnings.warn(str(failed[place]), stacklevel=2)
                prompts.append([])
        scores, all_logits = self._decode(images, [prompt for part in prompts for prompt in part], multimask_output)
        counts = [len(part) for part in prompts]
        parts = zip(images, scores.split(counts), all_logits.split(counts))
        return [failed.get(place) or self._result(*part, full_size) for place, part in enumerate(parts)]

    def to_masks(
        self, logits: np.ndarray | torch.Tensor, index: int = 0, image: EncodedImage | None = None
    ) -> torch.Tensor:
        """Logits (n, h, w) of a `Prediction` as masks of that image, bool (n, H, W), where the logits are.

        The image is `image`, or number `index` of those that were set.
        """
        image, logits = self.images[index] if image is None else image, tensor_of(logits)
        if logits.ndim != 3:
            raise ValueError(
                f"logits have the shape {tuple(logits.shape)}, and must be (n, h, w): logits[:, i] of a prediction."
            )
        step = self.budget.masks_per_step(image.size, image.size)
        return upscaled_masks.masks(logits, image.frame, 0.0, step, upscaled_masks.why_not_triton(logits) is None)

    def _images(self, image: EncodedImage | Sequence[EncodedImage] | None) -> tuple[list[EncodedImage], bool]:
        """Those that are given, or else were set, and whether they are a list."""
        images, is_list = self._held
        if image is not None:
            is_list = isinstance(image, list | tuple)
            images = list(image) if is_list else [image]
        elif not images:
            raise ValueError("there is no image yet: call set_image or set_images first, or give image=encode(...).")
        if not images:
            raise ValueError("image is an empty list: give what encode returned.")
        config = self.model.config.prompt_encoder_config
        num_numbers = config.image_embedding_size**2 * config.hidden_size
        for each in images:
            if not isinstance(each, EncodedImage):
                raise ValueError(f"image is a {type(each).__name__}, and must be what encode returned.")
            if each.embedding.device != self.model.device or each.embedding.numel() != num_numbers:
                raise ValueError(
                    f"the image was encoded by another model, on {each.embedding.device}: encode it with this predictor, on "
                    f"{self.model.device}."
                )
        return images, is_list

    def _parse(
        self, image: EncodedImage, place: int, points_xy=None, labels=None, boxes_xyxy=None, logits=None, masks=None
    ) -> list[Prompt]:
        if logits is not None and masks is not None:
            raise ValueError("logits and masks are given: a prompt has one of them.")
        name, given = ("logits", logits) if masks is None else ("masks", masks)
        if given is not None:
            given = logits_of_prompt(given, image, self.logits_size, self.model.device, name)
        return parse_prompts(place, image.size, points_xy, labels, boxes_xyxy, given, name)

    def _decode(
        self, images: list[EncodedImage], prompts: list[Prompt], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (n, m) and logits (n, m, h, w), float32, of prompts in any order; `Prompt.image` is a place in `images`."""
        if isinstance(self.decoder, PlainMaskDecoder):  # which is the model's as it is now; the embeddings are older
            self.encoder.check_weights()
        batches = list(prompt_batches(prompts, self.budget.points_per_batch))
        parts = [self._decode_batch(images, [prompts[place] for place in batch], multimask_output) for batch in batches]
        if not parts:
            num_masks = self.model.config.mask_decoder_config.num_multimask_outputs if multimask_output else 1
            empty = torch.zeros(0, num_masks, *self.logits_size, device=self.model.device)
            return empty[..., 0, 0], empty
        scores, logits = map(_cat, zip(*parts))
        order = [place for batch in batches for place in batch]
        if order != sorted(order):
            back = torch.tensor(order).argsort().to(scores.device, non_blocking=True)
            scores, logits = scores[back], logits[back]
        return scores, logits

    def _decode_batch(
        self, images: list[EncodedImage], prompts: list[Prompt], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_decode`, of prompts of one kind."""
        first = prompts[0]
        own = [images[prompt.image] for prompt in prompts]
        if all(encoded is own[0] for encoded in own):
            embedding, scales = own[0].read(), own[0].scale
        else:
            scales = np.array([encoded.scale for encoded in own])
            with turn(self.model.device):  # after the encoder, on whatever stream it ran
                embedding = torch.cat([encoded.read() for encoded in own])
        # Prompts stay on the CPU: the decoder copies them to where they are read, without waiting.
        arguments = {}
        if first.points is not None:
            points = np.array([prompt.points for prompt in prompts], dtype=np.float32) * scales[..., None, :2]
            labels = np.array([prompt.labels for prompt in prompts], dtype=np.int64)
            arguments = {"points": torch.from_numpy(points), "labels": torch.from_numpy(labels)}
        if first.box is not None:
            boxes = np.array([prompt.box for prompt in prompts], dtype=np.float32) * scales
            arguments["boxes"] = torch.from_numpy(boxes)
        decoded = self.decoder.decode(
            embedding,
            **arguments,
            mask_logits=None if first.logits is None else torch.stack([prompt.logits for prompt in prompts]),
            multimask_output=multimask_output,
            prompts_per_upscaling=self.budget.points_per_upscaling,
            repeated=len(prompts) == 1,
        )
        return decoded.iou, decoded.logits.unflatten(0, decoded.iou.shape).float()

    def _result(self, image: EncodedImage, scores: torch.Tensor, logits: torch.Tensor, full_size: bool) -> Prediction:
        masks = None
        if full_size:
            masks = self.to_masks(logits.flatten(0, 1), image=image).unflatten(0, scores.shape)
        if self.output == "torch":
            return Prediction(masks, scores, logits)
        return Prediction(None if masks is None else masks.cpu().numpy(), scores.cpu().numpy(), logits.cpu().numpy())


@torch.inference_mode()
def predict_prompts(
    predictor: Predictor,
    boxes_xyxy: Sequence = (),
    points_xy: Sequence = (),
    index: int = 0,
    image: EncodedImage | None = None,
) -> MaskResult:
    """One mask for each prompt on `image`, or on one of the images that were set: first those of the boxes, then of the points.

    Boxes and points are those of `clip_prompts`. Each point is a prompt of its own, on the object; of its three masks the
    one with the highest predicted IoU is taken.
    Raises ValueError for a prompt outside the image, and for a reversed or empty box.
    """
    image = predictor.images[index] if image is None else image
    height, width = image.size
    clip_prompts((width, height), boxes_xyxy, points_xy)  # all are checked before the work is done
    masks, scores = [np.zeros((0, height, width), dtype=bool)], [np.zeros(0, dtype=np.float32)]
    for kind, prompts in (("boxes_xyxy", boxes_xyxy), ("points_xy", [[point] for point in points_xy])):
        if len(prompts):
            parsed = predictor._parse(image, 0, **{kind: prompts})
            predicted_iou, logits = predictor._decode([image], parsed, multimask_output=kind == "points_xy")
            predicted_iou, best = predicted_iou.max(dim=1)
            logits = logits[torch.arange(len(best), device=best.device), best]
            masks.append(predictor.to_masks(logits, image=image).cpu().numpy())
            scores.append(predicted_iou.cpu().numpy())
    masks = np.concatenate(masks)
    return MaskResult(masks, np.concatenate(scores), mask_edges(masks))


def segment_prompts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: ImageInput,
    boxes_xyxy: Sequence[Sequence[float]] = (),
    points_xy: Sequence[Sequence[float]] = (),
) -> MaskResult:
    """`predict_prompts` on an image that is encoded for this once; ValueError for one that is too thin, too."""
    image = image_tensor(image)
    clip_prompts((image.shape[2], image.shape[1]), boxes_xyxy, points_xy)  # before the work is done
    predictor = Predictor(model, processor, output="torch", cuda_graphs=False)
    return predict_prompts(predictor, boxes_xyxy, points_xy, image=predictor.encode(image))


def _check_lists(arguments: dict, num_images: int):
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, list | tuple) or len(value) != num_images):
            given = len(value) if isinstance(value, list | tuple) else f"a {type(value).__name__}"
            raise ValueError(f"{name} must be a list of {num_images}, one entry for each image, not {given}.")


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` without a copy of a tensor that is alone."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
