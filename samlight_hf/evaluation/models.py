"""Any promptable SAM of transformers behind one pair of calls: encode images, then prompt in pixels of the image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..loading import weights_fingerprint
from .timing import ForwardTimer


# model_type -> whether the image keeps its aspect ratio (SAM, padded) or is stretched to a square (SAM 2)
SUPPORTED = {"sam_lightening": True, "sam": True, "sam_hq": True, "sam2": False, "edgetam": False}


@dataclass(eq=False)
class Encoded:
    """One encoded image: keyword arguments of the model with a batch of one, and what its coordinates mean."""

    embeddings: dict[str, torch.Tensor | list[torch.Tensor]]
    size: tuple[int, int]  # height, width of the image
    reshaped_size: tuple[int, int]  # height, width of the image within the model's input

    @property
    def scale(self) -> torch.Tensor:
        """Along x and y, from pixels of the image to pixels of the model's input, float32 (2,)."""
        return torch.tensor([self.reshaped_size[1] / self.size[1], self.reshaped_size[0] / self.size[0]])


@dataclass
class PromptedMasks:
    """What n prompts gave, m masks each."""

    masks: torch.Tensor  # bool (n, m, H, W), at the image's size
    predicted_iou: torch.Tensor  # float32 (n, m)
    logits: torch.Tensor  # (n, m, h, w) at the decoder's size, to feed back


class PromptableModel:
    """A model and its processor, in evaluation mode; it counts its own forward calls and the time spent in them.

    Raises ValueError for a model that is none of `SUPPORTED`.
    """

    def __init__(self, model, processor, prompts_per_batch: int = 64):
        model_type = getattr(model.config, "model_type", None)
        if model_type not in SUPPORTED:
            raise ValueError(
                f"model_type={model_type!r} cannot be evaluated: it must take points and boxes and offer multimask_output, "
                f"as {', '.join(SUPPORTED)} do."
            )
        self.model, self.processor = model.eval(), processor
        self.keeps_aspect = SUPPORTED[model_type]
        self.prompts_per_batch = prompts_per_batch
        self.timer = ForwardTimer()
        self.count = {"encoder": 0, "decoder": 0}  # images, and calls of up to `prompts_per_batch` prompts

    @property
    def seconds(self) -> dict[str, float]:
        """Spent in the model's forward calls so far; waits for those under way."""
        return {part: self.timer.seconds(part) for part in self.count}

    def latency_ms(self) -> dict[str, float | None]:
        """Mean time of the encoder for an image, and of the decoder for a call of up to `prompts_per_batch` prompts."""
        return {part: 1e3 * spent / n if (n := self.count[part]) else None for part, spent in self.seconds.items()}

    def fingerprint(self) -> str:
        """Of the weights, to tell an interrupted run of this model from one of another."""
        return weights_fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[Encoded]:
        """Encodes a batch of RGB images of any sizes."""
        inputs = self.preprocess(images)
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        with self.timer.measure("encoder", self.model.device):
            embeddings = self.model.get_image_embeddings(pixel_values)
        self.count["encoder"] += len(images)
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
        """One object for each prompt: boxes (n, 4), or points (n, k, 2) with labels (n, k) of 1 and 0; pixels of the image.

        `logits` (n, 1, h, w) of an earlier prediction refine it. Returns n x 3 masks, or n x 1 without `multimask_output`.
        """
        prompts = {}
        if boxes_xyxy is not None:
            prompts["input_boxes"] = (boxes_xyxy.float() * encoded.scale.repeat(2))[:, None]  # (n, 1, 4)
        if points_xy is not None:
            prompts["input_points"] = (points_xy.float() * encoded.scale)[:, None]  # (n, 1, k, 2)
            prompts["input_labels"] = labels[:, None]
        if logits is not None:
            prompts["input_masks"] = logits.to(self.model.dtype)
        parts = []
        for chunk in self._chunks(prompts):
            embeddings = _expand(encoded.embeddings, len(next(iter(chunk.values()))))
            logits, predicted_iou = self._decode(embeddings, chunk, multimask_output)
            parts.append((self._upscale(logits, encoded), predicted_iou, logits))
        return PromptedMasks(*(torch.cat(tensors) for tensors in zip(*parts)))

    @torch.inference_mode()
    def predict_boxes(
        self, encoded: Sequence[Encoded], boxes_xyxy: Sequence[torch.Tensor], multimask_output: bool = True
    ) -> Iterator[PromptedMasks]:
        """`predict` for each encoded image and its boxes (n, 4), in calls that prompts of several images share.

        The same image may come several times. Predictions are made as they are asked for: masks are large.
        """
        if not encoded:
            return
        images = list(dict.fromkeys(encoded))
        together = _apply(torch.cat, *(image.embeddings for image in images))
        place = {image: index for index, image in enumerate(images)}
        counts = [len(boxes) for boxes in boxes_xyxy]
        places = torch.tensor([place[each] for each in encoded]).repeat_interleave(torch.tensor(counts))
        boxes = torch.cat([boxes.float() * e.scale.repeat(2) for e, boxes in zip(encoded, boxes_xyxy, strict=True)])

        def decoded():
            for chunk in self._chunks({"places": places, "input_boxes": boxes[:, None]}):
                yield self._decode(_select(together, chunk.pop("places")), chunk, multimask_output)

        for each, (logits, predicted_iou) in zip(encoded, _regroup(decoded(), counts), strict=True):
            yield PromptedMasks(self._upscale(logits, each), predicted_iou, logits)

    @torch.inference_mode()
    def hidden_states(self, image: Image.Image) -> list[torch.Tensor]:
        """Patches with positions and the output of every layer of the image encoder, (1, h, w, C) each; [] without layers."""
        pixel_values = self.preprocess([image])["pixel_values"]
        outputs = self.model.vision_encoder(
            pixel_values.to(self.model.device, self.model.dtype), output_hidden_states=True
        )
        return [state.float() for state in outputs.hidden_states or ()]

    def preprocess(self, images: Sequence[Image.Image]):
        """On the model's device: resizing on a CPU takes longer than a small model does."""
        return self.processor.image_processor(list(images), return_tensors="pt", device=self.model.device)

    def _chunks(self, prompts: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Of up to `prompts_per_batch` prompts, on the model's device."""
        prompts = {name: to_device(value, self.model.device) for name, value in prompts.items()}
        for start in range(0, len(next(iter(prompts.values()))), self.prompts_per_batch):
            yield {name: value[start : start + self.prompts_per_batch] for name, value in prompts.items()}

    def _decode(
        self, embeddings: dict, prompts: dict[str, torch.Tensor], multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, m, h, w) and predicted IoU (n, m) of n prompts, each with embeddings of its own.

        One prompt for each element of the batch: fed-back logits are per image in SAM, and here per object.
        """
        with self.timer.measure("decoder", self.model.device):
            outputs = self.model(**embeddings, **prompts, multimask_output=multimask_output)
        self.count["decoder"] += 1
        return outputs.pred_masks[:, 0], outputs.iou_scores[:, 0].float()

    def _upscale(self, logits: torch.Tensor, encoded: Encoded) -> torch.Tensor:
        """(n, m, h, w) -> bool (n, m, H, W), by the processor's own rule, as one image with n masks."""
        sizes = {"reshaped_input_sizes": [encoded.reshaped_size]} if self.keeps_aspect else {}
        processor = self.processor.image_processor
        return processor.post_process_masks([logits.float()], [encoded.size], **sizes)[0]

    def _image(self, embeddings, i: int) -> dict:
        """The i-th image's share of what get_image_embeddings returned."""
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
    """Of a tensor on the CPU; neither side waits for the other."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _apply(function: Callable[[Sequence[torch.Tensor]], torch.Tensor], *embeddings: dict) -> dict:
    """`function` of each tensor in several images' embeddings, all images' at once."""

    def apply(values):
        return [function(tensors) for tensors in zip(*values)] if isinstance(values[0], list) else function(values)

    return {name: apply([each[name] for each in embeddings]) for name in embeddings[0]}


def _expand(embeddings: dict, size: int) -> dict:
    return _apply(lambda tensors: tensors[0].expand(size, *tensors[0].shape[1:]), embeddings)


def _select(embeddings: dict, places: torch.Tensor) -> dict:
    return _apply(lambda tensors: tensors[0].index_select(0, places), embeddings)


def _regroup(chunks: Iterable[tuple[torch.Tensor, ...]], counts: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of tensors that come in chunks of any size, in groups of `counts` rows."""
    chunks = iter(chunks)
    rows = next(chunks)
    for count in counts:
        while len(rows[0]) < count:
            rows = tuple(map(torch.cat, zip(rows, next(chunks))))
        yield tuple(tensor[:count] for tensor in rows)
        rows = tuple(tensor[count:] for tensor in rows)
