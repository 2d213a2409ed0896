"""The image encoder and the mask decoder as everything mode and the predictor run them."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, SamImageProcessor

from .cuda_graphs import GraphedFunction
from .mask_decoder import Decoded, FastMaskDecoder, places_above, why_not_fast
from .preprocessing import preprocess


PLAIN_MODEL_TYPES = ("sam", "sam_lightening", "sam_hq")


def make_decoder(
    model: PreTrainedModel, cuda_graphs: bool | None = None, triton_kernels: bool | None = None
) -> "Decoder":
    """The fastest decoder that can run this model, with CUDA graphs by default on CUDA devices, and Triton kernels.

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
        return PlainMaskDecoder(model)
    return FastMaskDecoder(model, on_cuda if cuda_graphs is None else cuda_graphs, triton_kernels)


class PlainMaskDecoder:
    """A SAM's prompt encoder and mask decoder as they are in the model; `FastMaskDecoder` tells shapes and meaning.

    The reference that the fast one is held to, and the way for models of another build, such as SAM-HQ.
    """

    cuda_graphs, pool = False, None

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def prepare(self, embedding):
        return embedding

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
            if len(image["image_embeddings"]) > 1:  # a picture and its prompt for each element of the batch
                prompts = {k: v if k == "input_masks" else v.transpose(0, 1) for k, v in prompts.items()}
        outputs = self.model(**image, **prompts, multimask_output=multimask_output)
        iou, logits = outputs.iou_scores.flatten(0, 1).float(), outputs.pred_masks.flatten(0, 2)
        kept = places_above(iou, min_iou)
        return Decoded(iou, kept, logits[kept])


Decoder = FastMaskDecoder | PlainMaskDecoder


class PictureEncoder:
    """Pictures, uint8 (3, H, W), to what a decoder prepares of the image encoder's output, one by one."""

    def __init__(self, model: PreTrainedModel, image_processor: SamImageProcessor, decoder: Decoder):
        self.model, self.image_processor, self.decoder = model, image_processor, decoder
        # Other encoders than ours may copy from the CPU while they run, which no graph can hold.
        graphed = decoder.cuda_graphs and model.config.model_type == "sam_lightening"
        self.encode = GraphedFunction(model.get_image_embeddings, graphed, pool=decoder.pool)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[torch.Tensor]) -> list:
        pixel_values = preprocess(self.image_processor, pictures, self.model.device).to(self.model.dtype)
        embeddings = self.encode(pixel_values)
        if isinstance(embeddings, tuple):  # SAM-HQ
            final, between = embeddings
            return [
                self.decoder.prepare((final[i : i + 1], [tensor[i : i + 1] for tensor in between]))
                for i in range(len(pictures))
            ]
        return list(self.decoder.prepare(embeddings).split(1))
