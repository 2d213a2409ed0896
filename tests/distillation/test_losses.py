import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from samlight_hf.distillation.losses import bce_loss, dice_loss, feature_loss, focal_loss, true_iou


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 2, 12, 9, generator=generator)
    return logits, torch.rand(5, 2, 12, 9, generator=generator) < 0.3


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.5, 3.5)])
def test_focal_loss_is_torchvisions(masks, alpha, gamma):
    logits, targets = masks
    expected = sigmoid_focal_loss(logits, targets.float(), alpha, gamma).mean(dim=(-2, -1))
    torch.testing.assert_close(focal_loss(logits, targets, alpha, gamma), expected)


def test_dice_loss_is_the_formula_written_out(masks):
    logits, targets = masks
    for i in range(5):
        for j in range(2):
            overlap = probability = area = 0.0
            for logit, target in zip(logits[i, j].flatten().tolist(), targets[i, j].flatten().tolist()):
                p = 1 / (1 + 2.718281828459045**-logit)
                overlap, probability, area = overlap + p * target, probability + p, area + target
            expected = 1 - (2 * overlap + 1) / (probability + area + 1)
            assert dice_loss(logits, targets)[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_dice_loss_rewards_the_right_mask():
    target = torch.zeros(8, 8)
    target[2:5, 2:5] = 1
    sure = 20 * (2 * target - 1)
    assert dice_loss(sure, target) < 1e-5 < 0.9 < dice_loss(-sure, target)
    assert dice_loss(torch.full((8, 8), -20.0), torch.zeros(8, 8)) < 1e-5  # both empty


def test_bce_loss_is_torchs(masks):
    logits, targets = masks
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), targets.float(), reduction="none")
    torch.testing.assert_close(bce_loss(logits, targets), expected.mean(dim=(-2, -1)))


def test_true_iou_counts_pixels(masks):
    logits, targets = masks
    ious = true_iou(logits, targets)
    predicted, target = logits[3, 1].numpy() > 0, targets[3, 1].numpy()
    assert ious.shape == (5, 2)
    assert ious[3, 1].item() == pytest.approx((predicted & target).sum() / (predicted | target).sum())
    empty = torch.zeros(1, 4, 4)
    assert true_iou(empty - 1, empty).item() == 1
    assert true_iou(empty + 1, empty).item() == 0


@pytest.mark.parametrize("loss", [focal_loss, bce_loss, dice_loss])
def test_losses_are_computed_in_float32(masks, loss):
    logits, targets = masks
    half = logits.bfloat16()
    assert torch.equal(loss(half, targets), loss(half.float(), targets))
    large = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss(large, torch.tensor([[1, 0]])).backward()
    assert torch.isfinite(large.grad).all()


def test_feature_loss_is_the_mean_square():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]], dtype=torch.bfloat16)
    assert feature_loss(student, teacher).item() == 2.5
