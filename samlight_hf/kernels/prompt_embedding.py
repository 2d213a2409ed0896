"""Embedding of points and boxes as tokens of SAM's mask decoder."""

import math

import torch
from transformers.models.sam.modeling_sam import SamPromptEncoder


class PromptEmbedding:
    """SAM's embedding of points and boxes in float32, with few kernel launches, which dominate a prompt's time."""

    def __init__(self, encoder: SamPromptEncoder):
        frequencies = encoder.shared_embedding.positional_embedding.float()  # (2, C / 2)
        size, num_frequencies = encoder.input_image_size, frequencies.shape[1]
        # Pixel centres in coordinates from -1 to 1; then sines, and cosines as sines shifted by a quarter of a period.
        self.scale, self.shift = 2 / size, frequencies.new_tensor(1 / size - 1)
        self.weight = 2 * math.pi * frequencies.repeat(1, 2)  # (2, C)
        self.phase = frequencies.new_tensor([0.0, math.pi / 2]).repeat_interleave(num_frequencies)
        off, on, *corners = (embedding.weight.float() for embedding in encoder.point_embed[:4])
        self.corners, self.no_point = torch.cat(corners), encoder.not_a_point_embed.weight.float()
        # Factor of a point's position and summand, by label: rows 0, 1, 2, -2 and -1. Labels beyond 2 and -2 are
        # clamped. Negative labels are padding and have no position.
        nothing = torch.zeros_like(off)
        added = torch.cat([off, on, nothing, nothing, self.no_point])
        factor = added.new_tensor([1, 1, 1, 0, 0])[:, None].expand_as(added)
        self.by_label = torch.cat([factor, added], dim=1)  # (5, 2 * C)

    def __call__(self, *prompts: torch.Tensor) -> list[torch.Tensor]:
        """Embed prompts.

        Args:
            prompts: points (P, k, 2) and labels (P, k), or boxes (P, 4), or points, labels and boxes. Coordinates are
                pixels of the resized image; boxes are x1, y1, x2, y2.

        Returns:
            Float32 tokens (P, t, C) in parts: of the points, then of the boxes' corners or the padding point.
        """
        parts = []
        if len(prompts) > 1:
            points, labels = prompts[:2]
            factor, added = self.by_label[labels.long().clamp(-2, 2)].chunk(2, dim=-1)
            parts.append(torch.addcmul(added, factor, self._positions(points)))
        if len(prompts) != 2:
            parts.append(self._positions(prompts[-1].unflatten(1, (2, 2))) + self.corners)
        else:
            parts.append(self.no_point.expand(len(points), 1, -1))
        return parts

    def _positions(self, points: torch.Tensor) -> torch.Tensor:
        """Encode points (P, k, 2), in pixels of the resized image, as (P, k, C)."""
        x, y = torch.add(self.shift, points, alpha=self.scale).split(1, dim=-1)
        return torch.addcmul(torch.addcmul(self.phase, x, self.weight[0]), y, self.weight[1]).sin()
