"""The mask decoder as in the model: the reference for the fast one, and the decoder of models that have no fast one."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils.autocast import without_autocast
from ..utils.turns import takes_turns
from .decoded import Decoded, KeptMasks, decoded_at_once, places_above
from .mask_decoder import FastMaskDecoder
from .plain_modules import same_bits, weights_of


class PlainMaskDecoder:
    """The model's own prompt encoder and mask decoder, with the interface of `FastMaskDecoder`.

    The fast decoder is tested against it. It also runs models of another architecture, such as SAM-HQ, and models with
    adapters. The weights are the model's: a later change of the model changes the results, see `is_copy_of`.
    """

    cuda_graphs, is_lean, graph_memory = False, False, None

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype, self.device = model, model.dtype, model.device
        self._weights = [tensor.clone() for tensor in weights_of(model.prompt_encoder, model.mask_decoder)]

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Return whether the model still has the weights that it had when this decoder was made."""
        return same_bits(weights_of(model.prompt_encoder, model.mask_decoder), self._weights)

    def prepare(self, embedding):
        """Return the embedding unchanged: the model reads it as the image encoder wrote it."""
        return embedding

    @takes_turns
    @without_autocast
    @torch.inference_mode()
    def decode(
        self,
        embedding: torch.Tensor | tuple,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        mask_logits: torch.Tensor | None = None,
        multimask_output: bool = True,
        min_iou: float | None = None,
        prompts_per_upscaling: int | None = None,
        repeated: bool = False,
        visible: tuple[int, int] | None = None,
        num_used: int | None = None,
    ) -> Decoded:
        """Decode P prompts, see `FastMaskDecoder.decode`; `embedding` is (1 or P, C, h, w), or SAM-HQ's pair."""
        prompts = {"input_points": points, "input_labels": labels, "input_boxes": boxes}
        inputs: dict[str, Any] = {
            name: prompt[None].to(self.model.device) for name, prompt in prompts.items() if prompt is not None
        }
        if isinstance(embedding, tuple):  # SAM-HQ: embeddings of the last layer and of the layers between
            embeddings = {"image_embeddings": embedding[0], "intermediate_embeddings": list(embedding[1])}
        else:
            if mask_logits is not None:
                inputs["input_masks"] = mask_logits[:, None].to(self.model.dtype)
                embedding = embedding.expand(len(mask_logits), -1, -1, -1)
            if len(embedding) > 1:  # the batch then has one image and one prompt in each element
                inputs = {k: v if k == "input_masks" else v.transpose(0, 1) for k, v in inputs.items()}
            embeddings = {"image_embeddings": embedding}
        if not self.model.config.return_dict:
            inputs["return_dict"] = True
        outputs = self.model(**embeddings, **inputs, multimask_output=multimask_output)
        iou, logits = outputs.iou_scores.flatten(0, 1).float()[:num_used], outputs.pred_masks.flatten(0, 2)
        kept = places_above(iou, min_iou)
        return Decoded(iou, kept, logits[kept])

    def decode_ahead(self, embedding, prompts: torch.Tensor, num_used: int, **options) -> Callable[[], KeptMasks]:
        """Decode points, see `FastMaskDecoder.decode_ahead`."""
        return decoded_at_once(self, embedding, prompts, num_used, **options)


Decoder = FastMaskDecoder | PlainMaskDecoder
