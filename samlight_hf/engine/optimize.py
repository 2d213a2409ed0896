"""The image encoder and the mask decoder as everything mode and the predictor run them; and `optimize`, a whole model."""

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.sam.modeling_sam import SamImageSegmentationOutput, SamVisionEncoderOutput

from ..utils.turns import turn
from .build import SAM_TYPES, _tell, check_floating_point, decoder_dtype_of, make_decoder, make_encoder
from .image_encoder import why_not_fast_encoder
from .mask_decoder import FastMaskDecoder, why_not_fast


@dataclass
class OptimizationReport:
    """What `optimize` did: how encoder and decoder run, and what the graphs cost."""

    encoder: str  # "fused", or "plain" and why
    decoder: str = "fused"
    num_graphs: int = 0
    warm_up_seconds: float = 0.0
    graph_memory_mb: float = 0.0  # what torch keeps for the graphs, in MB of 2**20 bytes

    def __str__(self) -> str:
        return (
            f"encoder: {self.encoder}; decoder: {self.decoder}; {self.num_graphs} CUDA graphs in {self.graph_memory_mb:.0f} MB, made in "
            f"{self.warm_up_seconds:.1f} s"
        )


def optimize(
    model: PreTrainedModel,
    dtype: torch.dtype = torch.bfloat16,
    image_batch_sizes: Sequence[int] = (1, 8),
    prompt_counts: Sequence[int] = (1, 16, 64),
    decoder_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model for inference with the same calls and outputs, its encoder and decoder fused and replayed from CUDA graphs.

        model = optimize(AutoModel.from_pretrained("org/sam-lightening").cuda())
        model(pixel_values=..., input_points=...)
        print(model.report)

    Graphs are made here for batches of `image_batch_sizes` images, and for `prompt_counts` prompts on an image, which are
    a point or a box each, with three masks and with one. Other shapes run too, fused and without graphs; what the
    fast paths do not know (gradients, hidden states, attention weights, PerSAM's arguments) runs as in `model`, and a
    warning tells once why. So does a part with other modules than its config's, with adapters or hooks for example.

    The mask decoder computes in `decoder_dtype`, with weights that come straight from `model`'s: by default in `dtype`, and
    in float16 for bfloat16, whose three more bits make masks those of float32 much more often, where the weights fit into it.

    Returned is a copy of `model`, which later changes of `model` do not reach, and whose own weights are not to be changed:
    load_state_dict raises RuntimeError. Its memory is that of the weights in `dtype`, and once more of what is fused. It may be called from several threads and on several streams, one call after the other; outputs belong to the caller.
    On other devices than CUDA the dtype stays, there are no graphs, and the encoder is the plain one.

    Raises ValueError for a model that is no SAM, and for sizes below 1.
    """
    if isinstance(model, _OptimizedModel):
        raise ValueError("this model is optimized already: optimize the one that it was made of.")
    reason = why_not_fast(model)
    if reason and getattr(getattr(model, "config", None), "model_type", None) not in SAM_TYPES:
        raise ValueError(f"optimize needs a SAM: {reason}")
    for name, values in (("image_batch_sizes", image_batch_sizes), ("prompt_counts", prompt_counts)):
        if isinstance(values, Integral) or any(
            isinstance(value, bool) or not isinstance(value, Integral) or value < 1 for value in values
        ):
            raise ValueError(f"{name}={values!r} must be integers of 1 and more, such as (1, 8).")
    check_floating_point("dtype", dtype)
    on_cuda = model.device.type == "cuda"
    dtype = dtype if on_cuda else model.dtype
    decoder_dtype = decoder_dtype_of(model, dtype, decoder_dtype)
    optimized = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for module in optimized.modules():
        module.register_load_state_dict_pre_hook(_refuse_weights)
    for module, kind in ((optimized.vision_encoder, _OptimizedEncoder), (optimized, _OptimizedModel)):
        module.__class__ = _optimized_class(kind, type(module))
    decoder = None if reason else make_decoder(optimized if decoder_dtype == dtype else model, dtype=decoder_dtype)
    if reason:
        _tell("mask decoder", reason, model)
    paths = _FastPaths(optimized, decoder, image_batch_sizes, prompt_counts)
    paths.report.decoder = f"plain: {reason}" if reason else "fused"
    optimized._paths = optimized.vision_encoder._paths = paths
    return optimized


def _refuse_weights(*_):
    raise RuntimeError("an optimized model keeps its weights: load them into the model itself, and optimize it again.")


class _FastPaths:
    """What runs instead of a model's encoder and decoder. Graphs have one set of buffers: callers take turns, see `turn`."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: FastMaskDecoder | None,
        image_batch_sizes: Sequence[int],
        prompt_counts: Sequence[int],
    ):
        self.device, self.dtype = model.device, model.dtype
        self.told: set[str] = set()
        config = model.config.vision_config
        self.image_shape = config.num_channels, config.image_size, config.image_size
        self.decoder = decoder
        on_cuda = self.device.type == "cuda"
        self.encode, self.copied = make_encoder(model, on_cuda, decoder.pool if decoder else None)
        self._weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._weights]
        self.encode.max_graphs = len(image_batch_sizes) or 1
        all_masks = list(decoder.all_masks.values()) if decoder else []
        for function in all_masks:
            function.max_graphs = 2 * len(prompt_counts) or 1  # points, and boxes
        reason = why_not_fast_encoder(model)
        self.report = OptimizationReport(encoder=f"plain: {reason}" if reason else "fused")
        start = time.perf_counter()
        if on_cuda:
            self._capture(image_batch_sizes, prompt_counts)
        for function in (self.encode, *all_masks):
            function.freeze()
            self.report.num_graphs += len(function)
        self.report.warm_up_seconds = time.perf_counter() - start

    @torch.inference_mode()
    def _capture(self, image_batch_sizes: Sequence[int], prompt_counts: Sequence[int]):
        torch.cuda.empty_cache()
        before, size = torch.cuda.memory_reserved(self.device), self.image_shape[-1]
        if self.encode.enabled:
            for batch_size in image_batch_sizes:
                self.encode(torch.zeros(batch_size, *self.image_shape, device=self.device, dtype=self.dtype))
        for count in prompt_counts if self.decoder else ():
            tokens = torch.zeros_like(self.decoder.positions)[None]
            boxes = torch.tensor([[0.0, 0.0, size / 2, size / 2]], device=self.device).expand(count, -1).contiguous()
            points = boxes[:, None, 2:].contiguous()
            labels = torch.ones(count, 1, dtype=torch.int32, device=self.device)
            for multimask_output in (True, False):
                self.decoder.all_masks[multimask_output, False](tokens, points, labels)
                self.decoder.all_masks[multimask_output, False](tokens, boxes)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.report.graph_memory_mb = (torch.cuda.memory_reserved(self.device) - before) / 2**20

    def check_weights(self):
        """Raises RuntimeError where the model's own weights, which run now, are no longer those that were copied."""
        if any(tensor._version != version for tensor, version in zip(self._weights, self._versions)):
            raise RuntimeError(
                "the weights of an optimized model have been changed: change the model itself, and optimize it again."
            )

    def tell(self, part: str, reason: str):
        """Warns, once, that a part runs as in the model."""
        message = f"The {part} of this optimized model runs as in the model, and slower: {reason}"
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message, stacklevel=5)

    def embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.copied is None:
            self.check_weights()
        with turn(self.device):
            return self.encode(pixel_values).clone()

    def masks(
        self, embeddings: torch.Tensor, prompts: list[torch.Tensor], masks: torch.Tensor | None, multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, C, h, w) and prompts (B, P, ...) to scores (B, P, M) and logits (B, P, M, 4h, 4w)."""
        decode, found = self.decoder.all_masks[multimask_output, masks is not None], []
        images = embeddings.to(self.decoder.dtype).flatten(2).transpose(1, 2)  # (B, N, C)
        for index in range(len(images)):
            inputs = [images[index : index + 1], *(prompt[index] for prompt in prompts)]
            if masks is not None:
                inputs.insert(1, masks[index].expand(len(inputs[-1]), -1, -1))
            with turn(self.device):
                scores, logits = decode(*inputs)
                found.append(
                    (scores.to(self.dtype, copy=True), logits.unflatten(0, scores.shape).to(self.dtype, copy=True))
                )
        if len(found) == 1:
            return found[0][0][None], found[0][1][None]
        return tuple(torch.stack(tensors) for tensors in zip(*found))


class _Optimized:
    """What an optimized model and its encoder have in common: the paths, for the device and the dtype they were made for."""

    _paths: _FastPaths

    def _apply(self, fn, *args, **kwargs):
        probe = fn(next(self.parameters()).detach()[:0])  # before weights that the original may share are moved
        if (probe.device, probe.dtype) != (self._paths.device, self._paths.dtype):
            raise RuntimeError(
                f"an optimized model stays on {self._paths.device} in {self._paths.dtype}: move the model itself, and "
                "optimize it again."
            )
        return super()._apply(fn, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        raise ValueError("an optimized model is for inference alone: save the model that it was made of.")

    def __reduce_ex__(self, protocol):  # copy, deepcopy, pickle
        raise TypeError(
            "an optimized model holds CUDA graphs: copy or pickle the model that it was made of, and optimize that."
        )


class _OptimizedEncoder(_Optimized):
    def plain_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As the model that this one was made of computes them."""
        return super().forward(pixel_values).last_hidden_state

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> SamVisionEncoderOutput:
        reason = _why_more(self.config, kwargs) or self._why_not(pixel_values)
        if reason is None:
            return SamVisionEncoderOutput(last_hidden_state=self._paths.embeddings(pixel_values.to(self._paths.dtype)))
        self._paths.check_weights()
        outputs = super().forward(pixel_values, **kwargs)  # which knows what to say of a wrong size, too
        self._paths.tell("image encoder", reason)
        return outputs

    def _why_not(self, pixel_values: torch.Tensor | None) -> str | None:
        if pixel_values is None or not pixel_values.is_floating_point():
            return "there are no pixel_values in floating point."
        if pixel_values.shape[1:] != self._paths.image_shape:
            return f"pixel_values are not (B, {', '.join(map(str, self._paths.image_shape))})."
        return "pixel_values require a gradient." if pixel_values.requires_grad else None


class _OptimizedModel(_Optimized):
    @property
    def report(self) -> OptimizationReport:
        return self._paths.report

    def forward(
        self, pixel_values=None, input_points=None, input_labels=None, input_boxes=None, input_masks=None,
        image_embeddings=None, multimask_output: bool = True, **kwargs,
    ) -> SamImageSegmentationOutput:  # fmt: skip
        prompts = _prompts(input_points, input_labels, input_boxes)
        reason = self._why_not(pixel_values, image_embeddings, prompts, input_masks, kwargs)
        if reason is not None:
            self._paths.check_weights()
            outputs = super().forward(
                pixel_values=pixel_values, input_points=input_points, input_labels=input_labels,
                input_boxes=input_boxes, input_masks=input_masks, image_embeddings=image_embeddings,
                multimask_output=multimask_output, **kwargs,
            )  # fmt: skip
            if self._paths.decoder is not None:  # or it was told when this was made
                self._paths.tell("mask decoder", reason)
            return outputs
        if image_embeddings is None:
            image_embeddings = self.vision_encoder(pixel_values).last_hidden_state
        scores, logits = self._paths.masks(image_embeddings, prompts, input_masks, multimask_output)
        return SamImageSegmentationOutput(iou_scores=scores, pred_masks=logits)

    def _why_not(self, pixel_values, image_embeddings, prompts, masks, kwargs: dict) -> str | None:
        """Why the mask decoder of such a call runs as in the model: a sentence, or None where it does not."""
        if self._paths.decoder is None:
            return self.report.decoder
        if reason := _why_more(self.config, kwargs):
            return reason
        if (pixel_values is None) == (image_embeddings is None):
            return "it needs either pixel_values or image_embeddings."
        if pixel_values is not None and (reason := _why_more(self.config.vision_config, {})):
            return reason
        image = pixel_values if image_embeddings is None else image_embeddings
        if not prompts or any(prompt.shape[:2] != (len(image), prompts[0].shape[1]) for prompt in prompts):
            return "there are not as many points (B, P, k, 2), labels (B, P, k) or boxes (B, P, 4) for each image."
        if masks is not None and masks.shape[:2] != (len(image), 1):
            return "input_masks are not (B, 1, h, w)."
        if any(tensor is not None and tensor.requires_grad for tensor in (image, masks, *prompts)):
            return "an input requires a gradient."
        return None


def _why_more(config: PreTrainedConfig, kwargs: dict) -> str | None:
    """Why a call is to return what the fast paths do not, or a tuple, or has what changes the masks: a sentence, or None.

    SAM takes any other keyword and passes it over, such as `original_sizes` and `reshaped_input_sizes` of its processor.
    """
    for name, value in kwargs.items():
        asks = (
            value is not None
            if name in ("attention_similarity", "target_embedding")
            else name.startswith("output_") and value
        )
        if asks or (name == "return_dict" and value is False):
            return f"it is called with {name}."
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name):
            return f"{name} is set in its config."
    return None if config.return_dict else "return_dict is not set in its config."


def _prompts(points, labels, boxes) -> list[torch.Tensor]:
    """Those that are there, in the decoder's order; an empty list for what the model itself must answer."""
    if points is None and labels is not None:
        return []
    found = []
    if points is not None:
        if points.ndim != 4 or (labels is not None and labels.shape != points.shape[:3]):
            return []
        # As the graphs were made, whatever the processor gives. From the CPU it is one copy, and no kernel before it.
        labels = torch.ones(points.shape[:3], dtype=torch.int32) if labels is None else labels.to(torch.int32)
        found += [points.float(), labels]
    if boxes is not None:
        if boxes.ndim != 3:
            return []
        found.append(boxes.float())
    return found


@lru_cache
def _optimized_class(optimized: type, cls: type) -> type:
    return type(cls.__name__, (optimized, cls), {"__module__": cls.__module__, "optimized_from": cls})
