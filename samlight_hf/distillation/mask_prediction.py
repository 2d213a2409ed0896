"""SAM's mask decoder for training: the same function of the same weights, with fewer moves of large tensors."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def predict_masks(
    student: nn.Module, embeddings: torch.Tensor, prompts: dict[str, torch.Tensor], multimask_output: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict masks for one prompt of each image, as `student(image_embeddings=..., **prompts)` does.

    transformers' decoder transposes the image tokens to channels first, and upscales them by transposed convolutions.
    Their stride is their kernel size, so each is a product with one matrix, which needs no transposition. The pixels
    are interleaved only in the finished masks, a sixteenth of the data.

    Args:
        student: a SamLighteningModel or a SamModel.
        embeddings: image embeddings (n, C, h, w).
        prompts: the prompts as the student's own `forward` takes them, with one object each.
        multimask_output: whether three masks are predicted, or one.

    Returns:
        Logits (n, m, 4h, 4w) and predicted IoUs (n, m).
    """
    model: Any = student
    decoder = model.mask_decoder
    inputs = {name: prompts.get(name) for name in ("input_points", "input_labels", "input_boxes", "input_masks")}
    sparse, dense = model.prompt_encoder(**inputs)
    num_images, _, height, width = embeddings.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(num_images, 1, -1, -1)
    tokens, pixels = decoder.transformer(
        point_embeddings=torch.cat([tokens, sparse.to(tokens.dtype)], dim=2),
        image_embeddings=embeddings + dense,
        image_positional_embeddings=model.get_image_wide_positional_embeddings(),
        attention_similarity=None,
    )
    tokens, pixels = tokens[:, 0], pixels[:, 0]  # (n, tokens, C), (n, h * w, C)
    chosen = slice(1, None) if multimask_output else slice(0, 1)
    iou = decoder.iou_prediction_head(tokens[:, 0])[:, chosen]
    # All of them, so that each has a gradient: DDP waits for all gradients.
    hypernetworks = decoder.output_hypernetworks_mlps
    filters = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(hypernetworks)], dim=1)[:, chosen]
    return _masks(decoder, pixels, filters, height, width), iou


def _masks(decoder: Any, pixels: torch.Tensor, filters: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert pixels (n, h * w, C) and filters (n, m, C / 8) to logits (n, m, 4h, 4w)."""
    norm = decoder.upscale_layer_norm
    pixels = _enlarge(decoder.upscale_conv1, pixels)  # (n, h * w * 4, C / 4)
    pixels = decoder.activation(F.layer_norm(pixels, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    pixels = decoder.activation(_enlarge(decoder.upscale_conv2, pixels))  # (n, h * w * 4 * 4, C / 8)
    logits = filters @ pixels.transpose(1, 2)
    # Row 4 y + 2 i + k, column 4 x + 2 j + l: entry (i, j) of the 2 x 2 at (y, x), then (k, l) of the 2 x 2 in it.
    logits = logits.view(*filters.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(*filters.shape[:2], 4 * height, 4 * width)


def _enlarge(convolution: nn.ConvTranspose2d, pixels: torch.Tensor) -> torch.Tensor:
    """Upscale each pixel of (n, p, C) to its 2 x 2 pixels, row by row: (n, p * 4, C')."""
    # (C, C', 2, 2) -> (2 * 2 * C', C)
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert convolution.bias is not None
    enlarged = F.linear(pixels, weight, convolution.bias.repeat(4))
    return enlarged.reshape(pixels.shape[0], -1, convolution.out_channels)
