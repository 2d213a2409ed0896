"""The fastest image encoder and mask decoder that can run a model, and the plain ones beside them."""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, SamImageProcessor

from ..images.preprocessing import preprocess
from ..utils.autocast import without_autocast
from ..utils.turns import takes_turns
from .cuda_graphs import GraphedFunction
from .image_encoder import FastVisionEncoder, why_not_fast_encoder
from .mask_decoder import Decoded, FastMaskDecoder, places_above, why_not_fast
from .plain_modules import same_bits, weights_of, why_not_plain_encoder


SAM_TYPES = ("sam", "sam_lightening")


PLAIN_MODEL_TYPES = (*SAM_TYPES, "sam_hq")


def make_decoder(
    model: PreTrainedModel,
    cuda_graphs: bool | None = None,
    triton_kernels: bool | None = None,
    dtype: torch.dtype | None = None,
) -> "Decoder":
    """The fastest decoder that can run this model, with CUDA graphs by default on CUDA devices, and Triton kernels.

    It computes in `dtype`, by default the model's; a decoder that only the model itself can run, always in the model's.
    Raises ValueError for a model that is no SAM in its decoder, and where `cuda_graphs` or `triton_kernels` is True and
    cannot be.
    """
    on_cuda, reason = model.device.type == "cuda", why_not_fast(model)
    if cuda_graphs and not on_cuda:
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, and this one is on {model.device}.")
    if cuda_graphs and reason:
        raise ValueError(f"cuda_graphs=True is not possible: {reason}")
    if reason and model.config.model_type not in PLAIN_MODEL_TYPES:
        raise ValueError(f"model_type={model.config.model_type!r} cannot be used here: {reason}")
    if reason:
        _tell("mask decoder", reason, model)
        return PlainMaskDecoder(model)
    return FastMaskDecoder(model, on_cuda if cuda_graphs is None else cuda_graphs, triton_kernels, dtype)


def decoder_dtype_of(model: PreTrainedModel, dtype: torch.dtype, asked: torch.dtype | None = None) -> torch.dtype:
    """What the decoder of a model that is to run in `dtype` computes in: what is `asked` for, `decoder_dtype` by name, or the best.

    That is `dtype`, but float16 for bfloat16 on a CUDA device, where its weights fit: most of what bfloat16 changes in masks
    is its rounding of the decoder's weights. Raises ValueError where no floating point type is asked for.
    """
    if asked is not None:
        check_floating_point("decoder_dtype", asked)
        return asked
    if dtype != torch.bfloat16 or model.device.type != "cuda" or why_not_fast(model):
        return dtype
    weights = [weight for part in (model.prompt_encoder, model.mask_decoder) for weight in part.parameters()]
    largest = torch.stack([weight.detach().abs().max() for weight in weights]).max()
    return torch.float16 if largest < torch.finfo(torch.float16).max else dtype


def check_floating_point(name: str, dtype: torch.dtype):
    """Raises ValueError for what is no floating point type of torch's."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name}={dtype!r} must be a floating point type, such as torch.bfloat16.")


class PlainMaskDecoder:
    """A SAM's prompt encoder and mask decoder as they are in the model; `FastMaskDecoder` tells shapes and meaning.

    The reference that the fast one is held to, and the way for models of another build, such as SAM-HQ or one with adapters.
    """

    cuda_graphs, is_lean, pool = False, False, None

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype, self.device = model, model.dtype, model.device
        self._weights = [tensor.clone() for tensor in weights_of(model.prompt_encoder, model.mask_decoder)]

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Whether the model, whose decoder runs, has the weights that it had when this was made."""
        return same_bits(weights_of(model.prompt_encoder, model.mask_decoder), self._weights)

    def prepare(self, embedding):
        return embedding

    @takes_turns
    @without_autocast
    @torch.inference_mode()
    def decode(
        self,
        image,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        mask_logits: torch.Tensor | None = None,
        multimask_output: bool = True,
        min_iou: float | None = None,
        prompts_per_upscaling: int | None = None,
        repeated: bool = False,
    ) -> Decoded:
        prompts = {"input_points": points, "input_labels": labels, "input_boxes": boxes}
        prompts = {name: prompt[None].to(self.model.device) for name, prompt in prompts.items() if prompt is not None}
        if isinstance(image, tuple):  # SAM-HQ: the last layer's embeddings, and those between
            image = {"image_embeddings": image[0], "intermediate_embeddings": list(image[1])}
        else:
            image = {"image_embeddings": image}
            if mask_logits is not None:
                prompts["input_masks"] = mask_logits[:, None].to(self.model.dtype)
                image["image_embeddings"] = image["image_embeddings"].expand(len(mask_logits), -1, -1, -1)
            if len(image["image_embeddings"]) > 1:  # an image and its prompt for each element of the batch
                prompts = {k: v if k == "input_masks" else v.transpose(0, 1) for k, v in prompts.items()}
        outputs = self.model(**image, **prompts, multimask_output=multimask_output)
        iou, logits = outputs.iou_scores.flatten(0, 1).float(), outputs.pred_masks.flatten(0, 2)
        kept = places_above(iou, min_iou)
        return Decoded(iou, kept, logits[kept])


Decoder = FastMaskDecoder | PlainMaskDecoder


class CopiedEncoder:
    """A SAM-Lightening model's image encoder as it was when this was made; `FastVisionEncoder` tells shapes and meaning."""

    def __init__(self, model: PreTrainedModel):
        self.encoder = copy.deepcopy(model.vision_encoder)

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        own, copies = weights_of(model.vision_encoder), weights_of(self.encoder)
        return why_not_plain_encoder(model) is None and same_bits(own, copies)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values)[0]


def copy_encoder(model: PreTrainedModel) -> FastVisionEncoder | CopiedEncoder | None:
    """The fastest copy of a model's image encoder, or None for one that only the model itself can run."""
    if why_not_fast_encoder(model) is None:
        return FastVisionEncoder(model.vision_encoder)
    if model.config.model_type != "sam_lightening":  # another encoder, which may be large
        return None
    if reason := why_not_plain_encoder(model):
        _tell("image encoder", reason, model)
        return None
    # An optimized one does not change.
    return None if hasattr(model.vision_encoder, "plain_embeddings") else CopiedEncoder(model)


def make_encoder(
    model: PreTrainedModel, cuda_graphs: bool, pool=None
) -> tuple[GraphedFunction, FastVisionEncoder | CopiedEncoder | None]:
    """The fastest image encoder that can run this model: pixel values (B, 3, S, S) to embeddings, replayed from graphs; and its copy."""
    copied = copy_encoder(model)
    # Other encoders than ours may copy from the CPU while they run, and hooks and adapters run Python: no graph holds that.
    is_ours = model.config.model_type == "sam_lightening" and why_not_plain_encoder(model) is None
    return GraphedFunction(copied or _plain_encoder(model), cuda_graphs and is_ours, pool=pool), copied


def _plain_encoder(model: PreTrainedModel) -> Callable:
    """The model's own way to embeddings, which an optimized model has beside its fast one."""
    encoder = model.vision_encoder
    return getattr(encoder, "plain_embeddings", model.get_image_embeddings)


def _tell(part: str, reason: str, model: PreTrainedModel):
    """Warns that a part of a SAM, which would have a fast path, runs as in the model."""
    if model.config.model_type in SAM_TYPES:
        warnings.warn(f"The {part} runs as in the model, and slower: {reason}", stacklevel=4)


class ImageEncoder:
    """Images, uint8 (3, H, W), to what a decoder prepares of the image encoder's output, one by one. Threads may share it."""

    def __init__(self, model: PreTrainedModel, image_processor: SamImageProcessor, decoder: Decoder):
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.image_processor, self.decoder = image_processor, decoder
        self.encode, self.copied = make_encoder(model, decoder.cuda_graphs, decoder.pool)

    @without_autocast
    def check_weights(self):
        """Raises ValueError where a part runs in the model itself, and the model has changed since this was made."""
        if self.copied is not None and not isinstance(self.decoder, PlainMaskDecoder):
            return  # copies are what they were
        if not all(part.is_copy_of(self.model) for part in (self.copied, self.decoder) if part is not None):
            raise ValueError(
                "the model has changed, and some of it was read before: make another of what encodes and decodes, such as the "
                "Predictor or the MaskGenerator."
            )

    @takes_turns  # from where pixel values are written to where embeddings are copied
    @torch.inference_mode()
    def __call__(self, images: Sequence[torch.Tensor]) -> list:
        self.check_weights()
        pixel_values = preprocess(self.image_processor, images, self.device, self.dtype, self.encode.empty)
        embeddings = self.encode(pixel_values)
        if isinstance(embeddings, tuple):  # SAM-HQ
            final, between = embeddings
            return [
                self.decoder.prepare((final[i : i + 1], [tensor[i : i + 1] for tensor in between]))
                for i in range(len(images))
            ]
        return list(self.decoder.prepare(embeddings).split(1))
