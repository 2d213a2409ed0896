"""Encode once, prompt often: points, boxes and masks in pixels of the original pictures, ragged and batched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, SamImageProcessor

from . import upscaled_masks
from .inference import Decoder, PictureEncoder, PlainMaskDecoder, make_decoder
from .mask_generation import MaskResult
from .memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from .preprocessing import Picture, check_size, picture_tensor, resized_size
from .prompts import Prompt, check_prompts, parse_prompts, prompt_batches
from .upscaled_masks import Frame


@dataclass(frozen=True)
class Prediction:
    """What n prompts on one picture of H x W pixels gave, m masks each: numpy arrays, or tensors on the model's device.

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
    """Masks for prompts on pictures that are encoded once.

        predictor = Predictor(model, processor).set_image("photo.jpg")
        first = predictor.predict(boxes_xyxy=[(10, 20, 300, 200)], multimask_output=False)
        better = predictor.predict(points_xy=[[(50, 60), (90, 80)]], labels=[[1, 0]], logits=first.logits[:, 0])

    `output` is "numpy" or "torch". `max_memory_mb` and `cuda_graphs` are those of `MaskGenerator`: on a CUDA device the
    encoder, and the decoder for a single prompt, are replayed from CUDA graphs.

    The model's weights are copied when this is made, and later changes of the model do not reach it; where
    a part runs in the model itself (an image encoder of another kind, adapters, hooks, other modules than the config's),
    a changed model raises ValueError. The copies cost up to the memory of a SAM-Lightening's weights once more.

    Raises ValueError for a model with another decoder than SAM's.
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
        self.decoder: Decoder = make_decoder(model, cuda_graphs)
        self.encoder = PictureEncoder(model, self.image_processor, self.decoder)
        self.budget = MemoryBudget(model, max_memory_mb)
        side = 4 * model.config.prompt_encoder_config.image_embedding_size
        self.logits_size = (side, side)
        self.reset()

    def reset(self):
        """Forgets the pictures."""
        self.images: list[torch.Tensor] = []  # (1, ...) each, as the decoder prepares them
        self.sizes: list[tuple[int, int]] = []  # height, width of each picture
        self.scales = np.zeros((0, 4), dtype=np.float32)  # of x, y, x, y: to the resized picture, which the model sees
        self._is_list = False

    def set_image(self, picture: Picture) -> "Predictor":
        """Encodes one picture, see `picture_tensor`. `predict` then takes its prompts, and returns one `Prediction`."""
        self.set_images([picture])
        self._is_list = False
        return self

    def set_images(self, pictures: Sequence[Picture]) -> "Predictor":
        """Encodes pictures of any sizes. `predict` then takes and returns lists with one entry for each picture."""
        if isinstance(pictures, str) or not isinstance(pictures, Sequence) or not pictures:
            raise ValueError("set_images takes a list of at least one picture; set_image takes one picture.")
        self.reset()  # whatever comes: masks of the last pictures would be taken for those of these
        tensors = [picture_tensor(picture) for picture in pictures]
        for tensor in tensors:
            check_size(self.image_processor, *tensor.shape[-2:])
        step = self.budget.pictures_per_encoding
        parts = [self.encoder(tensors[start : start + step]) for start in range(0, len(tensors), step)]
        self.images = [image for part in parts for image in part]
        self.sizes = [tuple(tensor.shape[-2:]) for tensor in tensors]
        self.scales = np.array([self._scale(picture) for picture in range(len(tensors))], dtype=np.float32)
        self._is_list = True
        return self

    def predict(
        self,
        points_xy=None,
        labels=None,
        boxes_xyxy=None,
        logits=None,
        multimask_output: bool = True,
        full_size: bool = True,
    ) -> Prediction | list[Prediction]:
        """Masks for n prompts on the picture; after `set_images`, for a list of such arguments, with None for no prompts.

        A prompt is some points, or a box, or both, for one object. In pixels of the picture:

        points_xy: (n, k, 2), or n lists of any number of (x, y), with 0 <= x < width and 0 <= y < height.
        labels: (n, k), or lists as long as those of the points: 1 on the object (the default), 0 beside it.
        boxes_xyxy: (n, 4): x1, y1, x2, y2 with 0 <= x1 < x2 <= width, and likewise in y.
        logits: (n, h, w) of an earlier `Prediction`, to be refined.

        Each prompt gives three masks, or one without `multimask_output`, which suits boxes and several points. Without
        `full_size` there are logits alone, and no masks at the picture's size.

        Raises ValueError, naming the value, for prompts that cannot be, and before a picture is set.
        """
        if not self.images:
            raise ValueError("there is no picture yet: call set_image or set_images first.")
        if points_xy is None and boxes_xyxy is None:
            raise ValueError("there is no prompt: give points_xy, boxes_xyxy or both.")
        if not self._is_list:
            prompts = self._parse(0, points_xy, labels, boxes_xyxy, logits)
            return self._result(0, *self._decode(prompts, multimask_output), full_size)
        arguments = {"points_xy": points_xy, "labels": labels, "boxes_xyxy": boxes_xyxy, "logits": logits}
        self._check_lists(arguments)
        prompts = [
            self._parse(picture, **{k: None if v is None else v[picture] for k, v in arguments.items()})
            for picture in range(len(self.sizes))
        ]
        scores, all_logits = self._decode([prompt for part in prompts for prompt in part], multimask_output)
        counts = [len(part) for part in prompts]
        parts = zip(scores.split(counts), all_logits.split(counts))
        return [self._result(picture, *part, full_size) for picture, part in enumerate(parts)]

    def to_masks(self, logits: np.ndarray | torch.Tensor, picture: int = 0) -> torch.Tensor:
        """Logits (n, h, w) of a `Prediction` as masks of that picture, bool (n, H, W), where the logits are."""
        logits, size, pad_size = _tensor(logits), self.sizes[picture], self.image_processor.pad_size
        if logits.ndim != 3:
            raise ValueError(
                f"logits have the shape {tuple(logits.shape)}, and must be (n, h, w): logits[:, i] of a prediction."
            )
        frame = Frame((pad_size["height"], pad_size["width"]), self._resized(picture), size, (0, 0), size)
        step = self.budget.masks_per_step(size, size)
        return upscaled_masks.masks(logits, frame, 0.0, step, upscaled_masks.why_not_triton(logits) is None)

    def _resized(self, picture: int) -> tuple[int, int]:
        return resized_size(*self.sizes[picture], self.image_processor.size["longest_edge"])

    def _scale(self, picture: int) -> list[float]:
        (height, width), (new_height, new_width) = self.sizes[picture], self._resized(picture)
        return [new_width / width, new_height / height] * 2

    def _check_lists(self, arguments: dict):
        for name, value in arguments.items():
            if value is not None and (not isinstance(value, list | tuple) or len(value) != len(self.sizes)):
                given = len(value) if isinstance(value, list | tuple) else f"a {type(value).__name__}"
                raise ValueError(
                    f"{name} must be a list of {len(self.sizes)}, one entry for each picture, not {given}."
                )

    def _parse(self, picture: int, points_xy=None, labels=None, boxes_xyxy=None, logits=None) -> list[Prompt]:
        if logits is not None:
            logits = _tensor(logits).to(self.model.device, torch.float32)
            if logits.ndim != 3 or tuple(logits.shape[1:]) != self.logits_size:
                raise ValueError(
                    f"logits have the shape {tuple(logits.shape)}, and must be (prompts, {self.logits_size[0]}, "
                    f"{self.logits_size[1]}): one mask of an earlier prediction for each prompt, logits[:, i]."
                )
            if not torch.isfinite(logits).all():
                raise ValueError("logits hold NaN or infinite values.")
        try:
            return parse_prompts(picture, self.sizes[picture], points_xy, labels, boxes_xyxy, logits)
        except ValueError as error:
            raise ValueError(f"picture {picture}: {error}" if self._is_list else str(error)) from error

    def _decode(self, prompts: list[Prompt], multimask_output: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (n, m) and logits (n, m, h, w), float32, of prompts in any order."""
        if isinstance(
            self.decoder, PlainMaskDecoder
        ):  # which is the model's as it is now, and the embeddings are older
            self.encoder.check_weights()
        batches = list(prompt_batches(prompts, self.budget.points_per_batch))
        parts = [self._decode_batch([prompts[place] for place in batch], multimask_output) for batch in batches]
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

    def _decode_batch(self, prompts: list[Prompt], multimask_output: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_decode`, of prompts of one kind."""
        first = prompts[0]
        pictures = [prompt.picture for prompt in prompts]
        if len(set(pictures)) == 1:
            image, scales = self.images[first.picture], self.scales[first.picture]
        else:
            image, scales = torch.cat([self.images[picture] for picture in pictures]), self.scales[pictures]
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
            image,
            **arguments,
            mask_logits=None if first.logits is None else torch.stack([prompt.logits for prompt in prompts]),
            multimask_output=multimask_output,
            prompts_per_upscaling=self.budget.points_per_upscaling,
            repeated=len(prompts) == 1,
        )
        return decoded.iou, decoded.logits.unflatten(0, decoded.iou.shape).float()

    def _result(self, picture: int, scores: torch.Tensor, logits: torch.Tensor, full_size: bool) -> Prediction:
        masks = None
        if full_size:
            masks = self.to_masks(logits.flatten(0, 1), picture).unflatten(0, scores.shape)
        if self.output == "torch":
            return Prediction(masks, scores, logits)
        return Prediction(None if masks is None else masks.cpu().numpy(), scores.cpu().numpy(), logits.cpu().numpy())


@torch.inference_mode()
def predict_prompts(
    predictor: Predictor, boxes_xyxy: Sequence = (), points_xy: Sequence = (), picture: int = 0
) -> MaskResult:
    """One mask for each prompt on one of the predictor's pictures: first those of the boxes, then those of the points.

    Boxes are (x1, y1, x2, y2) with 0 <= x1 < x2 <= width, points (x, y) with 0 <= x < width, likewise in y. Each point
    is a prompt of its own, on the object; of its three masks the one with the highest predicted IoU is taken.
    Raises ValueError for a prompt outside the picture, and for a reversed or empty box.
    """
    height, width = predictor.sizes[picture]
    check_prompts((width, height), boxes_xyxy, points_xy)
    masks, scores = [np.zeros((0, height, width), dtype=bool)], [np.zeros(0, dtype=np.float32)]
    for kind, prompts in (("boxes_xyxy", boxes_xyxy), ("points_xy", [[point] for point in points_xy])):
        if len(prompts):
            parsed = predictor._parse(picture, **{kind: prompts})
            predicted_iou, logits = predictor._decode(parsed, multimask_output=kind == "points_xy")
            predicted_iou, best = predicted_iou.max(dim=1)
            logits = logits[torch.arange(len(best), device=best.device), best]
            masks.append(predictor.to_masks(logits, picture).cpu().numpy())
            scores.append(predicted_iou.cpu().numpy())
    masks = np.concatenate(masks)
    return MaskResult(masks, np.concatenate(scores), _edges(masks))


def segment_prompts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: Picture,
    boxes_xyxy: Sequence[Sequence[float]] = (),
    points_xy: Sequence[Sequence[float]] = (),
) -> MaskResult:
    """`predict_prompts` on a picture that is encoded for this once; ValueError for one that is too thin, too."""
    picture = picture_tensor(picture)
    check_prompts((picture.shape[2], picture.shape[1]), boxes_xyxy, points_xy)  # before the work is done
    predictor = Predictor(model, processor, output="torch", cuda_graphs=False).set_image(picture)
    return predict_prompts(predictor, boxes_xyxy, points_xy)


def _tensor(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Of any array, also of one that is flipped or read-only, which torch does not take."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` without a copy of a tensor that is alone."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _edges(masks: np.ndarray) -> np.ndarray:
    """bool (n, H, W) to the boxes of `MaskResult`, float32 (n, 4)."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
