"""A common interface of transformers' promptable SAMs: encode images, then prompt in pixels of the image."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..engine.build import decoder_dtype_of, make_decoder
from ..engine.mask_decoder import FastMaskDecoder, why_not_fast
from ..engine.optimize import optimize
from ..images.preprocessing import check_size
from ..loading import computed_settings, weights_fingerprint
from .timing import ForwardTimer


# model_type -> whether the image keeps its aspect ratio (SAM, padded) or is stretched to a square (SAM 2)
SUPPORTED = {"sam_lightening": True, "sam": True, "sam_hq": True, "sam2": False, "edgetam": False}


@dataclass(eq=False)
class Encoded:
    """An encoded image.

    Attributes:
        embeddings: keyword arguments of the model, with a batch of one.
        size: (height, width) of the image.
        reshaped_size: (height, width) of the image within the model's input.
    """

    embeddings: dict[str, torch.Tensor | list[torch.Tensor]]
    size: tuple[int, int]
    reshaped_size: tuple[int, int]

    def scale_on(self, device: torch.device) -> torch.Tensor:
        """Return the factors along x and y from pixels of the image to pixels of the model's input, float32 (2,)."""
        factors = [self.reshaped_size[1] / self.size[1], self.reshaped_size[0] / self.size[0]]
        return to_device(torch.tensor(factors, dtype=torch.float32, device="cpu"), device)


@dataclass
class PromptedMasks:
    """The masks for n prompts, m for each.

    Attributes:
        masks: bool (n, m, H, W), at the image's size.
        predicted_iou: float32 (n, m).
        logits: (n, m, h, w), at the decoder's size, to be fed back.
    """

    masks: torch.Tensor
    predicted_iou: torch.Tensor
    logits: torch.Tensor


class PromptableModel:
    """A model and its processor in evaluation mode, with counts and times of the model's encoder and decoder.

    Args:
        model: a model whose `model_type` is one of `SUPPORTED`.
        processor: the model's processor.
        prompts_per_batch: number of prompts in one call of the decoder.
        decoder: decodes instead of the model: a fast copy of its mask decoder.

    Raises:
        ValueError: for a model of another type.
    """

    def __init__(self, model, processor, prompts_per_batch: int = 64, decoder: FastMaskDecoder | None = None):
        model_type = getattr(model.config, "model_type", None)
        if model_type not in SUPPORTED:
            raise ValueError(
                f"model_type={model_type!r} cannot be evaluated: it must take points and boxes and offer "
                f"multimask_output, as {', '.join(SUPPORTED)} do."
            )
        self.model, self.processor = model.eval(), processor
        self.keeps_aspect = SUPPORTED[model_type]
        self.prompts_per_batch, self.decoder = prompts_per_batch, decoder
        self.timer = ForwardTimer()
        self.count = {"encoder": 0, "decoder": 0}  # images, and calls of up to `prompts_per_batch` prompts

    @classmethod
    def optimized(cls, model, processor, batch_size: int = 1) -> "PromptableModel":
        """Make one that runs as with `optimize`, in the model's dtype: faster, with the same masks up to rounding.

        Args:
            model: a SAM-Lightening or a SAM.
            processor: the model's processor.
            batch_size: number of images that are encoded at once, except the last ones.

        Raises:
            ValueError: for a model that has no fast mask decoder.
        """
        decoder = make_decoder(model, dtype=decoder_dtype_of(model, model.dtype))
        if not isinstance(decoder, FastMaskDecoder):
            raise ValueError(why_not_fast(model))
        encoding = optimize(model, model.dtype, image_batch_sizes=(batch_size,), prompt_counts=())
        return cls(encoding, processor, decoder=decoder)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in the model's forward calls so far. Waits for running ones."""
        return {part: self.timer.seconds(part) for part in self.count}

    @contextlib.contextmanager
    def _measured(self, part: str, number: int = 1) -> Iterator[None]:
        """Time a call of the encoder or decoder, and count it, or its images."""
        with self.timer.measure(part, self.model.device):
            yield
        self.count[part] += number

    def latency_ms(self) -> dict[str, float | None]:
        """Return the mean time of the encoder for an image, and of the decoder for a call of up to `prompts_per_batch`
        prompts.
        """
        return {part: 1e3 * spent / n if (n := self.count[part]) else None for part, spent in self.seconds.items()}

    def fingerprint(self) -> str:
        """Return a fingerprint of the weights, which identifies the model of an interrupted run."""
        return weights_fingerprint(self.model)

    def settings_digest(self) -> str:
        """Return a digest of the config and the image processor, by which masks differ though the weights are the same.

        The pattern of the attention is one of these settings.
        """
        parts = [computed_settings(part.to_dict()) for part in (self.model.config, self.processor.image_processor)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def is_too_thin(self, width: int, height: int) -> bool:
        """Return whether an image would be 0 pixels thick in the model's frame."""
        if not self.keeps_aspect:
            return False
        try:
            check_size(self.processor.image_processor, height, width)
        except ValueError:
            return True
        return False

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[Encoded]:
        """Encode a batch of RGB images of any sizes."""
        inputs = self.preprocess(images)
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        with self._measured("encoder", len(images)):
            embeddings = self.model.get_image_embeddings(pixel_values)
        square = tuple(pixel_values.shape[-2:])
        reshaped = inputs["reshaped_input_sizes"].tolist() if self.keeps_aspect else [square] * len(images)
        return [
            Encoded(self._image(embeddings, i), (image.height, image.width), tuple(reshaped[i]))
            for i, image in enumerate(images)
        ]

    @torch.inference_mode()
    def predict(
        self,
        encoded: Encoded,
        boxes_xyxy: torch.Tensor | None = None,
        points_xy: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        multimask_output: bool = True,
    ) -> PromptedMasks:
        """Predict masks for n prompts, one object each. Coordinates are pixels of the image.

        Prompts are on the CPU or on the model's device.

        Args:
            encoded: the encoded image.
            boxes_xyxy: (n, 4).
            points_xy: (n, k, 2), with `labels`.
            labels: (n, k), 1 for points of the object and 0 for background.
            logits: (n, 1, h, w) of an earlier prediction, to be refined.
            multimask_output: whether three masks are predicted for each prompt, or one.
        """
        prompts = {}
        if boxes_xyxy is not None:
            prompts["input_boxes"] = (boxes_xyxy.float() * encoded.scale_on(boxes_xyxy.device).repeat(2))[:, None]
        if points_xy is not None:
            prompts["input_points"] = (points_xy.float() * encoded.scale_on(points_xy.device))[:, None]  # (n, 1, k, 2)
            assert labels is not None
            prompts["input_labels"] = labels[:, None]
        if logits is not None:
            prompts["input_masks"] = logits.to(self.model.dtype)
        parts = []
        for chunk in self._chunks(prompts):
            logits, predicted_iou = self._decode_image(encoded.embeddings, chunk, multimask_output)
            parts.append((self._upscale(logits, encoded), predicted_iou, logits))
        return PromptedMasks(*(torch.cat(tensors) for tensors in zip(*parts)))

    @torch.inference_mode()
    def predict_boxes(
        self, encoded: Sequence[Encoded], boxes_xyxy: Sequence[torch.Tensor], multimask_output: bool = True
    ) -> Iterator[PromptedMasks]:
        """Predict masks for the boxes of several images, with prompts of several images in one call.

        The same image may be given several times. Predictions are made one by one as they are consumed, because masks
        are large.

        Args:
            encoded: the encoded images.
            boxes_xyxy: (n, 4) for each of them, in its pixels.
            multimask_output: whether three masks are predicted for each box, or one.

        Yields:
            The predictions of each image.
        """
        if self.decoder is not None:  # which is faster with the prompts of one image
            for image, boxes in zip(encoded, boxes_xyxy, strict=True):
                yield self.predict(image, boxes, multimask_output=multimask_output)
        elif encoded:
            yield from self._predict_boxes_together(encoded, boxes_xyxy, multimask_output)

    def _predict_boxes_together(
        self, encoded: Sequence[Encoded], boxes_xyxy: Sequence[torch.Tensor], multimask_output: bool
    ) -> Iterator[PromptedMasks]:
        images = list(dict.fromkeys(encoded))
        batch = _apply(lambda tensors: torch.cat(tuple(tensors)), *(image.embeddings for image in images))
        place = {image: index for index, image in enumerate(images)}
        counts = [len(boxes) for boxes in boxes_xyxy]
        places = torch.tensor([place[image] for image in encoded]).repeat_interleave(torch.tensor(counts))
        boxes = torch.cat(
            [boxes.float() * e.scale_on(boxes.device).repeat(2) for e, boxes in zip(encoded, boxes_xyxy, strict=True)]
        )

        def decoded():
            for chunk in self._chunks({"places": places, "input_boxes": boxes[:, None]}):
                yield self._decode(_select(batch, chunk.pop("places")), chunk, multimask_output)

        for image, (logits, predicted_iou) in zip(encoded, _regroup(decoded(), counts), strict=True):
            yield PromptedMasks(self._upscale(logits, image), predicted_iou, logits)

    @torch.inference_mode()
    def hidden_states(self, image: Image.Image) -> list[torch.Tensor]:
        """Return the embedded patches and the output of every layer of the image encoder.

        Args:
            image: an RGB image.

        Returns:
            float32 tensors (1, h, w, C); an empty list for an encoder without layers.
        """
        pixel_values = self.preprocess([image])["pixel_values"]
        outputs = self.model.vision_encoder(
            pixel_values.to(self.model.device, self.model.dtype), output_hidden_states=True
        )
        return [state.float() for state in outputs.hidden_states or ()]

    def preprocess(self, images: Sequence[Image.Image]):
        """Preprocess images on the model's device: on a CPU, resizing takes longer than a small model."""
        return self.processor.image_processor(list(images), return_tensors="pt", device=self.model.device)

    def _chunks(self, prompts: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield chunks of up to `prompts_per_batch` prompts, on the model's device; an empty one if there are none."""
        prompts = {name: to_device(value, self.model.device) for name, value in prompts.items()}
        for start in range(0, len(next(iter(prompts.values()))), self.prompts_per_batch) or [0]:
            yield {name: value[start : start + self.prompts_per_batch] for name, value in prompts.items()}

    def _decode_image(
        self, embeddings: dict, prompts: dict[str, torch.Tensor], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (n, m, h, w) and predicted IoUs (n, m) of n prompts on the image of these embeddings."""
        if self.decoder is None:
            return self._decode(_expand(embeddings, len(next(iter(prompts.values())))), prompts, multimask_output)
        names = "input_points", "input_labels", "input_boxes", "input_masks"
        inputs = [prompts[name][:, 0] if name in prompts else None for name in names]
        with self._measured("decoder"):
            image = self.decoder.prepare(embeddings["image_embeddings"])
            decoded = self.decoder.decode(image, *inputs, multimask_output=multimask_output)
        return decoded.logits.unflatten(0, decoded.iou.shape), decoded.iou.float()

    def _decode(
        self, embeddings: dict, prompts: dict[str, torch.Tensor], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (n, m, h, w) and predicted IoUs (n, m) of n prompts, each with embeddings of its own.

        Each prompt is an element of the batch, because SAM feeds back logits for each element.
        """
        with self._measured("decoder"):
            outputs = self.model(**embeddings, **prompts, multimask_output=multimask_output)
        return outputs.pred_masks[:, 0], outputs.iou_scores[:, 0].float()

    def _upscale(self, logits: torch.Tensor, encoded: Encoded) -> torch.Tensor:
        """Convert logits (n, m, h, w) to bool (n, m, H, W) by the processor's own rule, as one image with n masks."""
        sizes = {"reshaped_input_sizes": [encoded.reshaped_size]} if self.keeps_aspect else {}
        processor = self.processor.image_processor
        return processor.post_process_masks([logits.float()], [encoded.size], **sizes)[0]

    def _image(self, embeddings, i: int) -> dict:
        """Return the embeddings of the i-th image in the result of `get_image_embeddings`."""
        if isinstance(embeddings, tuple):  # SAM-HQ
            final, intermediate = embeddings
            return {
                "image_embeddings": final[i : i + 1],
                "intermediate_embeddings": [tensor[i : i + 1] for tensor in intermediate],
            }
        if isinstance(embeddings, list):  # SAM 2: a pyramid
            return {"image_embeddings": [tensor[i : i + 1] for tensor in embeddings]}
        return {"image_embeddings": embeddings[i : i + 1]}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _apply(function: Callable[[Sequence[torch.Tensor]], torch.Tensor], *embeddings: dict) -> dict:
    """Apply `function` to each tensor in the embeddings of several images, with the tensors of all images at once."""

    def apply(values):
        return [function(tensors) for tensors in zip(*values)] if isinstance(values[0], list) else function(values)

    return {name: apply([image[name] for image in embeddings]) for name in embeddings[0]}


def _expand(embeddings: dict, size: int) -> dict:
    return _apply(lambda tensors: tensors[0].expand(size, *tensors[0].shape[1:]), embeddings)


def _select(embeddings: dict, places: torch.Tensor) -> dict:
    return _apply(lambda tensors: tensors[0].index_select(0, places), embeddings)


def _regroup(chunks: Iterable[tuple[torch.Tensor, ...]], counts: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Regroup rows of tensors that come in chunks of any size into groups of `counts` rows."""
    chunks = iter(chunks)
    rows = next(chunks)
    for count in counts:
        while len(rows[0]) < count:
            rows = tuple(map(torch.cat, zip(rows, next(chunks))))
        yield tuple(tensor[:count] for tensor in rows)
        rows = tuple(tensor[count:] for tensor in rows)
