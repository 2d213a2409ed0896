"""Any promptable SAM of transformers behind one pair of calls: encode pictures, then prompt in pixels of the picture."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..loading import weights_fingerprint


# model_type -> whether the picture keeps its aspect ratio (SAM, padded) or is stretched to a square (SAM 2)
SUPPORTED = {"sam_lightening": True, "sam": True, "sam_hq": True, "sam2": False, "edgetam": False}


@dataclass
class Encoded:
    """One encoded picture: keyword arguments of the model with a batch of one, and what its coordinates mean."""

    embeddings: dict[str, torch.Tensor | list[torch.Tensor]]
    size: tuple[int, int]  # height, width of the picture
    reshaped_size: tuple[int, int]  # height, width of the picture within the model's input


@dataclass
class Prediction:
    """What n prompts gave, m masks each."""

    masks: torch.Tensor  # bool (n, m, H, W), at the picture's size
    predicted_iou: torch.Tensor  # float32 (n, m)
    logits: torch.Tensor  # (n, m, h, w) at the decoder's size, to feed back


class PromptableModel:
    """A model and its processor, in evaluation mode; `seconds` counts the time spent in the model's own forward calls.

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
        self.seconds = {"encoder": 0.0, "decoder": 0.0}
        self.count = {"encoder": 0, "decoder": 0}  # pictures, and calls of up to `prompts_per_batch` prompts

    def latency_ms(self) -> dict[str, float | None]:
        """Mean time of the encoder for a picture, and of the decoder for a call of up to `prompts_per_batch` prompts."""
        return {part: 1e3 * self.seconds[part] / n if (n := self.count[part]) else None for part in self.seconds}

    def fingerprint(self) -> str:
        """Of the weights, to tell an interrupted run of this model from one of another."""
        return weights_fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[Encoded]:
        """Encodes a batch of RGB pictures of any sizes."""
        inputs = self.preprocess(images)
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        with self._timed("encoder"):
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
    ) -> Prediction:
        """One object for each prompt: boxes (n, 4), or points (n, k, 2) with labels (n, k) of 1 and 0; pixels of the picture.

        `logits` (n, 1, h, w) of an earlier prediction refine it. Returns n x 3 masks, or n x 1 without `multimask_output`.
        """
        device, (height, width) = self.model.device, encoded.size
        scale = torch.tensor([encoded.reshaped_size[1] / width, encoded.reshaped_size[0] / height])
        prompts = {}
        if boxes_xyxy is not None:
            prompts["input_boxes"] = (boxes_xyxy.float() * scale.repeat(2))[:, None]  # (n, 1, 4)
        if points_xy is not None:
            prompts["input_points"] = (points_xy.float() * scale)[:, None]  # (n, 1, k, 2)
            prompts["input_labels"] = labels[:, None]
        if logits is not None:
            prompts["input_masks"] = logits.to(self.model.dtype)
        num_prompts = len(next(iter(prompts.values())))
        parts = []
        for start in range(0, num_prompts, self.prompts_per_batch):
            chunk = {name: value[start : start + self.prompts_per_batch].to(device) for name, value in prompts.items()}
            # One prompt for each element of the batch: fed-back logits are per picture in SAM, and here per object.
            size = len(next(iter(chunk.values())))
            with self._timed("decoder"):
                outputs = self.model(**_expand(encoded.embeddings, size), **chunk, multimask_output=multimask_output)
            self.count["decoder"] += 1
            logits = outputs.pred_masks[:, 0]
            parts.append((self._upscale(logits, encoded), outputs.iou_scores[:, 0].float(), logits))
        return Prediction(*(torch.cat(tensors) for tensors in zip(*parts)))

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

    def _upscale(self, logits: torch.Tensor, encoded: Encoded) -> torch.Tensor:
        """(n, m, h, w) -> bool (n, m, H, W), by the processor's own rule, as one picture with n masks."""
        sizes = {"reshaped_input_sizes": [encoded.reshaped_size]} if self.keeps_aspect else {}
        processor = self.processor.image_processor
        return processor.post_process_masks([logits.float()], [encoded.size], **sizes)[0]

    def _image(self, embeddings, i: int) -> dict:
        """The i-th picture's share of what get_image_embeddings returned."""
        if isinstance(embeddings, tuple):  # SAM-HQ
            final, intermediate = embeddings
            return {
                "image_embeddings": final[i : i + 1],
                "intermediate_embeddings": [tensor[i : i + 1] for tensor in intermediate],
            }
        if isinstance(embeddings, list):  # SAM 2: a pyramid
            return {"image_embeddings": [tensor[i : i + 1] for tensor in embeddings]}
        return {"image_embeddings": embeddings[i : i + 1]}

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start


def _expand(embeddings: dict, size: int) -> dict:
    def expand(tensor):
        return tensor.expand(size, *tensor.shape[1:])

    return {
        name: [expand(tensor) for tensor in value] if isinstance(value, list) else expand(value)
        for name, value in embeddings.items()
    }
