"""The two ONNX graphs of a SAM, by torch's own exporter: the image encoder, and prompt encoder with mask decoder.

Names, inputs and outputs are those that transformers.js expects of a SAM. The decoder takes boxes and masks too, with
no required input more than transformers.js gives it:

- A box is two points with the labels 2 (upper left corner) and 3 (lower right corner), as in Meta's own ONNX models.
- `input_masks` and `has_input_masks` are inputs with a default value (in ONNX: inputs that are initializers too).
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    import onnx


ENCODER, DECODER = "vision_encoder", "prompt_encoder_mask_decoder"  # transformers.js's names of the files
OLDEST_OPSET, DEFAULT_OPSET, NEWEST_OPSET = 18, 18, 23  # torch's exporter writes 18 and newer
BOX_LABELS = (2, 3)  # of a box's upper left and lower right corner
MASK_INPUTS = ("input_masks", "has_input_masks")


class ImageEncoderGraph(nn.Module):
    """Pixel values (B, 3, S, S) -> image embeddings and their positional embeddings, (B, 256, S/16, S/16) each."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.model.vision_encoder(pixel_values).last_hidden_state
        positions = self.model.get_image_wide_positional_embeddings()
        return embeddings, positions.expand(embeddings.shape[0], -1, -1, -1)


class MaskDecoderGraph(nn.Module):
    """Prompts and image embeddings -> predicted IoU (B, P, 3) and logits of the masks (B, P, 3, S/4, S/4)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder

    def forward(
        self,
        input_points: torch.Tensor,
        input_labels: torch.Tensor,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        input_masks: torch.Tensor,
        has_input_masks: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._embed_prompts(input_points, input_labels)  # (B, P, N, 256)
        without = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = torch.where(has_input_masks > 0, self.prompt_encoder.mask_embed(input_masks), without)
        batch_size, num_prompts = tokens.shape[:2]

        def for_each_prompt(images: torch.Tensor) -> torch.Tensor:
            # SAM's own repeat_interleave by a dynamic number is exported wrongly for B > 1 (torch 2.14).
            return images[:, None].expand(-1, num_prompts, -1, -1, -1).flatten(0, 1)

        masks, scores = self.mask_decoder(
            image_embeddings=for_each_prompt(image_embeddings + dense),
            image_positional_embeddings=for_each_prompt(image_positional_embeddings),
            sparse_prompt_embeddings=tokens.flatten(0, 1)[:, None],
            dense_prompt_embeddings=0.0,  # added above
            multimask_output=True,
        )
        shape = (batch_size, num_prompts)
        return scores[:, 0].unflatten(0, shape), masks[:, 0].unflatten(0, shape)

    def _embed_prompts(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embed points and corners of boxes; without any box, SAM adds a point that is none."""
        encoder = self.prompt_encoder
        tokens = encoder._embed_points(points, labels, pad=False)
        for label in BOX_LABELS:
            tokens = torch.where((labels == label)[..., None], tokens + encoder.point_embed[label].weight, tokens)
        num_points = tokens.shape[2]
        no_point = encoder.not_a_point_embed.weight.expand(*tokens.shape[:2], 1, -1)
        has_box = (labels == BOX_LABELS[0]) | (labels == BOX_LABELS[1])
        length = (num_points + 1 - has_box.any().to(torch.int64)).item()
        torch._check(length >= 1)
        torch._check(length <= num_points + 1)
        return torch.cat([tokens, no_point], dim=2)[:, :, :length]


def check_opset(opset: int):
    """Raise ValueError for an opset that torch's exporter does not write."""
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ValueError(
            f"opset={opset} must be from {OLDEST_OPSET} to {NEWEST_OPSET}: torch's exporter writes no other. "
            f"Use {DEFAULT_OPSET}, which onnxruntime reads from version 1.14 on."
        )


def check_model(model: PreTrainedModel):
    """Raise ValueError for a model that is no SAM, that is optimized, or that has tensors without values."""
    if not all(hasattr(model, part) for part in ("vision_encoder", "prompt_encoder", "mask_decoder")):
        raise ValueError(f"{type(model).__name__} is no SAM: it needs vision_encoder, prompt_encoder and mask_decoder.")
    if hasattr(type(model), "optimized_from"):
        raise ValueError("this model is optimized and cannot be exported: export the model that it was made from.")
    if meta := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(
            f"{len(meta)} weights are meta tensors, which hold no values, first {meta[0]}. Load the model with "
            "from_pretrained, without device_map='meta' and outside of torch.device('meta')."
        )


def export_encoder(model: PreTrainedModel, opset: int = DEFAULT_OPSET) -> "onnx.ModelProto":
    """Export the image encoder; the number of images is dynamic.

    Args:
        model: a SAM in float32 on the CPU, in evaluation mode.
        opset: version of ONNX's operators.
    """
    size = model.config.vision_config.image_size
    return _export(
        ImageEncoderGraph(model),
        {"pixel_values": torch.zeros(2, model.config.vision_config.num_channels, size, size)},
        {"pixel_values": {0: torch.export.Dim("batch_size")}},
        ["image_embeddings", "image_positional_embeddings"],
        opset,
    )


def export_decoder(model: PreTrainedModel, opset: int = DEFAULT_OPSET) -> "onnx.ModelProto":
    """Export prompt encoder and mask decoder; the numbers of images, of prompts and of points are dynamic.

    Args:
        model: a SAM in float32 on the CPU, in evaluation mode.
        opset: version of ONNX's operators.
    """
    grid = model.config.prompt_encoder_config.image_embedding_size
    channels = model.config.prompt_encoder_config.hidden_size
    batch, prompts, points = (
        torch.export.Dim(name) for name in ("batch_size", "point_batch_size", "nb_points_per_image")
    )
    return _export(
        MaskDecoderGraph(model),
        {
            "input_points": torch.zeros(2, 3, 4, 2),
            "input_labels": torch.ones(2, 3, 4, dtype=torch.int64),
            "image_embeddings": torch.zeros(2, channels, grid, grid),
            "image_positional_embeddings": torch.zeros(2, channels, grid, grid),
            # One mask, which ONNX broadcasts over the images; `make_masks_optional` makes their number dynamic.
            "input_masks": torch.zeros(1, 1, 4 * grid, 4 * grid),
            "has_input_masks": torch.zeros(1),
        },
        {
            "input_points": {0: batch, 1: prompts, 2: points},
            "input_labels": {0: batch, 1: prompts, 2: points},
            "image_embeddings": {0: batch},
            "image_positional_embeddings": {0: batch},
            "input_masks": {},
            "has_input_masks": {},
        },
        ["iou_scores", "pred_masks"],
        opset,
    )


def make_masks_optional(graph: "onnx.ModelProto"):
    """Give the decoder's mask inputs default values, "no mask", so that a caller may leave them out. In place."""
    import numpy as np
    from onnx import numpy_helper

    del graph.graph.value_info[:]  # they say that there is one mask; onnxruntime infers shapes by itself
    for value in graph.graph.input:
        if value.name in MASK_INPUTS:
            shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            graph.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), value.name))
        if value.name == MASK_INPUTS[0]:
            value.type.tensor_type.shape.dim[0].dim_param = "mask_batch_size"  # 1 or the number of images


@torch.no_grad()
def _export(graph: nn.Module, inputs: dict, dynamic_shapes: dict, outputs: list[str], opset: int) -> "onnx.ModelProto":
    check_opset(opset)
    with _quiet():
        program = torch.onnx.export(
            graph.eval(), kwargs=inputs, dynamo=True, opset_version=opset, dynamic_shapes=dynamic_shapes,
            input_names=list(inputs), output_names=outputs, external_data=False,
        )  # fmt: skip
    assert program is not None
    exported = program.model_proto
    written = next(entry.version for entry in exported.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise ValueError(f"torch's exporter wrote opset {written} instead of {opset}. Use {DEFAULT_OPSET}.")
    for node in exported.graph.node:
        del node.metadata_props[:]  # lines of source code, with the paths of this machine
        node.doc_string = ""
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its warnings of names that several dimensions share."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
