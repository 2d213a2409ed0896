"""What mask decoders return, and which of a batch's masks that is."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Decoded(NamedTuple):
    """The masks of P prompts, M candidates each, of which K are computed.

    Attributes:
        iou: float32 (P, M), the predicted IoU of all masks.
        places: int64 (K,), see `kept`; None if all masks are computed.
        logits: float (K, h, w), the logits of the masks in `kept`.
    """

    iou: torch.Tensor
    places: torch.Tensor | None
    logits: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        """Indices of the computed masks in iou.flatten(), int64 (K,), ascending."""
        return places_above(self.iou, None) if self.places is None else self.places


class KeptMasks(NamedTuple):
    """The masks of a batch that `decode_ahead` was asked for.

    Attributes:
        table: float32 (K, 1 + E): the predicted IoU, and the numbers of the mask's prompt.
        logits: float (K, h, w).
        have_numbers: Whether no predicted IoU of the batch is NaN.
    """

    table: torch.Tensor
    logits: torch.Tensor
    have_numbers: bool


def decoded_at_once(
    decoder, embedding, prompts: torch.Tensor, num_used: int, meanwhile: Callable[[], None] | None = None, **options
) -> Callable[[], KeptMasks]:
    """Compute `decode_ahead` of a decoder by its `decode`, and return a function that does not wait."""
    if meanwhile is not None:
        meanwhile()
    points, labels = prompts[:, None, :2], torch.ones(len(prompts), 1, dtype=torch.int64, device=prompts.device)
    decoded = decoder.decode(embedding, points, labels, repeated=True, num_used=num_used, **options)
    kept, num_masks = decoded.kept, decoded.iou.shape[1]
    table = torch.cat([decoded.iou.flatten()[kept, None], prompts[kept // num_masks, 3:]], dim=1)
    masks = KeptMasks(table, decoded.logits, not decoded.iou.isnan().any())
    return lambda: masks


def places_above(iou: torch.Tensor, min_iou: float | None) -> torch.Tensor:
    """Return the indices in iou.flatten() of the masks whose IoU is above `min_iou`, or of all masks."""
    if min_iou is None:
        return torch.arange(iou.numel(), device=iou.device)
    return (iou.flatten() > min_iou).nonzero().squeeze(1)


def slots_above(iou: torch.Tensor, min_iou: float | torch.Tensor | None) -> torch.Tensor:
    """Return the index of each mask among those of `places_above`, or -1: int32, of the shape of `iou`.

    `min_iou` may also be a tensor with one for each prompt, (P, 1).
    """
    if min_iou is None:
        return torch.arange(iou.numel(), dtype=torch.int32, device=iou.device).view(iou.shape)
    above = iou > min_iou
    numbers = above.flatten().cumsum(0, dtype=torch.int32).view(iou.shape) - 1
    return numbers.masked_fill_(~above, -1)
