"""A model with a fast decoder predicts what it predicts by itself."""

from types import SimpleNamespace

import pytest
import torch

from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.evaluation.models import PromptableModel


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def plain_and_fast(request, promptable, monkeypatch):
    """Both decode up to three prompts at once, the fast one on a GPU from CUDA graphs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, processor = promptable.model.to(request.param), promptable.processor
    decoder = FastMaskDecoder(model, cuda_graphs=request.param == "cuda")
    return [PromptableModel(model, processor, prompts_per_batch=3, decoder=each) for each in (None, decoder)]


def assert_equal(found, expected):
    assert found.masks.shape == expected.masks.shape and found.masks.dtype == torch.bool
    assert (found.masks == expected.masks).float().mean() > 0.999
    torch.testing.assert_close(found.predicted_iou, expected.predicted_iou, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("multimask_output", [False, True])
def test_clicks_and_logits_that_are_fed_back(plain_and_fast, dataset, multimask_output):
    points = torch.rand(7, 2, 2, generator=torch.Generator().manual_seed(0)) * 30
    labels = torch.tensor([[1, 0]]).repeat(7, 1)
    first, second = [], []
    for promptable in plain_and_fast:
        encoded = promptable.encode([dataset[0].image])[0]
        options = {"multimask_output": multimask_output}
        first.append(promptable.predict(encoded, points_xy=points[:, :1], labels=labels[:, :1], **options))
        logits = first[0].logits[:, :1]
        second.append(promptable.predict(encoded, points_xy=points, labels=labels, logits=logits, **options))
        assert promptable.count["decoder"] == 2 * 3
    assert_equal(*first[::-1])
    assert_equal(*second[::-1])


def test_boxes_of_several_images(plain_and_fast, dataset):
    """The first and the last image have the most boxes; the one between has one."""
    images = [dataset[index].image for index in range(3)]
    boxes = [torch.tensor([[2.0, 3, 20, 18]]).repeat(count, 1) + torch.arange(count)[:, None] for count in (4, 1, 5)]
    plain, fast = (list(promptable.predict_boxes(promptable.encode(images), boxes)) for promptable in plain_and_fast)
    assert [len(prediction.masks) for prediction in fast] == [4, 1, 5]
    for found, expected in zip(fast, plain, strict=True):
        assert_equal(found, expected)


def test_an_image_without_boxes(plain_and_fast, dataset):
    images, boxes = [dataset[0].image, dataset[1].image], [torch.zeros(0, 4), torch.tensor([[2.0, 3, 20, 18]])]
    for promptable in plain_and_fast:
        nothing, one = promptable.predict_boxes(promptable.encode(images), boxes)
        assert nothing.masks.shape == (0, 3, *images[0].size[::-1]) and len(one.masks) == 1


def test_an_optimized_model_encodes_and_decodes_fast(promptable, dataset):
    fast = PromptableModel.optimized(promptable.model, promptable.processor, batch_size=2)
    assert isinstance(fast.decoder, FastMaskDecoder) and hasattr(fast.model, "report")
    assert fast.model.dtype == promptable.model.dtype and fast.fingerprint() == promptable.fingerprint()
    box = torch.tensor([[2.0, 3, 20, 18]])
    predictions = [each.predict(each.encode([dataset[0].image])[0], box) for each in (fast, promptable)]
    assert_equal(*predictions)


def test_a_model_without_a_fast_decoder_is_refused():
    model = torch.nn.Module()
    model.config, model.device, model.dtype = SimpleNamespace(model_type="sam2"), torch.device("cpu"), torch.float32
    with pytest.raises(ValueError, match="mask decoder"):
        PromptableModel.optimized(model, None)
