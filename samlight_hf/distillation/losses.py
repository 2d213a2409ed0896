"""Losses of masks and embeddings, as pure functions: one value for each mask or layer, which the caller weights.

Section 2.2 of SAM-Lightening (arXiv 2403.09195); focal and dice loss as in Segment Anything (arXiv 2304.02643, appendix
A). Everything is computed in float32, whatever the input: sums over 65,536 pixels do not fit into half precision.
"""

import torch
from torch.nn import functional as F


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Compute the focal loss (arXiv 1708.02002), mean over pixels.

    Args:
        logits: (..., H, W).
        targets: (..., H, W), zeros and ones.
        alpha: weight of the pixels of the object; the others have 1 - alpha.
        gamma: exponent that reduces the loss of pixels that are already right.

    Returns:
        float32 (...).
    """
    targets = targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    wrong = (logits.float().sigmoid() - targets).abs()  # 1 - p_t
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return (balance * wrong**gamma * cross_entropy).mean(dim=(-2, -1))


def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the binary cross-entropy, mean over pixels: (..., H, W) -> (...)."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=(-2, -1))


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute 1 - Dice coefficient of the probabilities, with 1 added above and below: (..., H, W) -> (...)."""
    probabilities, targets = logits.float().sigmoid(), targets.float()
    overlap = (probabilities * targets).sum(dim=(-2, -1))
    total = probabilities.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def true_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the IoU of the mask (logits > 0) with the target, the target of the IoU head: (..., H, W) -> (...).

    It is 1 where both are empty.
    """
    predicted, targets = logits > 0, targets.bool()
    union = (predicted | targets).sum(dim=(-2, -1))
    return torch.where(union > 0, (predicted & targets).sum(dim=(-2, -1)) / union.clamp(min=1), 1.0)


def pairwise_mask_losses(
    logits: torch.Tensor, targets: torch.Tensor, weights: dict[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mask loss and the true IoU of every predicted mask with every target of its image.

    Matrix products replace the loops over pairs.

    For a target of zeros and ones, the sum over pixels of a loss f(x, t) is sum f(x, 0) + (f(x, 1) - f(x, 0)) . t.

    Args:
        logits: (B, m, M, M).
        targets: bool (B, P, M, M).
        weights: weights of "focal", "bce" and "dice", as in `MaskStage`.

    Returns:
        The weighted sum of `focal_loss`, `bce_loss` and `dice_loss`, and `true_iou`, each float32 (B, m, P).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets = logits.float().flatten(2), targets.flatten(2)
        columns = targets.float().transpose(1, 2)  # (B, M * M, P)
        num_pixels, sizes = logits.shape[-1], columns.sum(dim=1)[:, None]
        probabilities = logits.sigmoid()
        losses = torch.zeros((), device=logits.device)
        if weights["bce"]:
            outside = F.softplus(logits).sum(dim=2, keepdim=True)
            losses = losses + weights["bce"] * (outside - logits @ columns) / num_pixels
        if weights["focal"]:
            outside = 0.75 * probabilities**2 * F.softplus(logits)
            inside = 0.25 * (1 - probabilities) ** 2 * F.softplus(-logits)
            total = outside.sum(dim=2, keepdim=True) + (inside - outside) @ columns
            losses = losses + weights["focal"] * total / num_pixels
        if weights["dice"]:
            total = probabilities.sum(dim=2, keepdim=True) + sizes
            losses = losses + weights["dice"] * (1 - (2 * (probabilities @ columns) + 1) / (total + 1))
        predicted = (logits > 0).float()
        overlap = predicted @ columns
        union = predicted.sum(dim=2, keepdim=True) + sizes - overlap
        return losses, torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of two feature maps of one shape: a scalar."""
    return F.mse_loss(student.float(), teacher.float())
