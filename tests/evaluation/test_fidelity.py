import copy

import pytest
import torch

from samlight_hf import SamLighteningModel
from samlight_hf.evaluation.fidelity import Fidelity, linear_cka, summarize_fidelity
from samlight_hf.evaluation.models import PromptableModel
from tests.conftest import tiny_config


def test_a_model_is_faithful_to_itself(promptable, dataset):
    sample = dataset[1]
    (encoded,) = promptable.encode([sample.image])
    (record,) = Fidelity(promptable)(promptable, encoded, sample)
    scores = summarize_fidelity([record])
    assert scores["embedding cosine"] == pytest.approx(1.0)
    assert scores["embedding MSE"] == 0.0
    assert [name for name in scores if name.startswith("CKA")] == [
        f"CKA, student layer {i} ~ teacher layer {i}" for i in (1, 2, 3)
    ]
    assert all(scores[name] == pytest.approx(1.0) for name in scores if name.startswith("CKA"))
    assert len(record["mask_iou"]["box/single"]) == len(sample.instances)


def test_optimized_models_have_the_same_fidelity(promptable, dataset):
    """Their decoders read embeddings in another layout; their embeddings are compared in the model's own."""
    torch.manual_seed(1)
    other = PromptableModel(SamLighteningModel(tiny_config()), promptable.processor)
    records = []
    for make in (lambda each: each, lambda each: PromptableModel.optimized(each.model, each.processor)):
        model, teacher = make(promptable), make(other)
        (encoded,) = model.encode([dataset[1].image])
        records += Fidelity(teacher)(model, encoded, dataset[1])
    plain, optimized = records
    assert optimized["cosine"] == pytest.approx(plain["cosine"], abs=1e-6) and optimized["cosine"] < 0.9
    assert optimized["mse"] == pytest.approx(plain["mse"])
    assert optimized["layers"] == pytest.approx(plain["layers"], abs=1e-5)


def test_another_model_is_not(promptable, dataset):
    torch.manual_seed(1)
    other = PromptableModel(
        SamLighteningModel(tiny_config(num_hidden_layers=2, segment_length=None, dilation_rate=1, hidden_size=64)),
        promptable.processor,
    )
    sample = dataset[1]
    (encoded,) = promptable.encode([sample.image])
    (record,) = Fidelity(other)(promptable, encoded, sample)
    assert record["cosine"] < 0.9
    assert record["mse"] > 0
    assert list(record["layers"]) == [
        "student layer 1 ~ teacher layer 1", "student layer 2 ~ teacher layer 1", "student layer 3 ~ teacher layer 2",
    ]  # fmt: skip


def test_a_teacher_of_another_embedding_is_refused(promptable, dataset):
    config = tiny_config(output_channels=16, num_pos_feats=8)
    other = PromptableModel(SamLighteningModel(config), promptable.processor)
    (encoded,) = promptable.encode([dataset[0].image])
    with pytest.raises(ValueError, match=r"student's image embeddings are \(32, 8, 8\), the teacher's \(16, 8, 8\)"):
        Fidelity(other)(promptable, encoded, dataset[0])


def test_linear_cka():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 5).item() == pytest.approx(1.0)
    assert linear_cka(x, torch.randn(200, 12, generator=generator)).item() < 0.2
    gram = [(f - f.mean(0)) @ (f - f.mean(0)).T for f in (x, x[:, :3])]
    expected = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert linear_cka(x, x[:, :3]).item() == pytest.approx(expected.item())


def test_masks_are_compared_with_the_teachers(promptable, dataset):
    """A teacher with another mask decoder agrees less, though the embeddings are the same."""
    other = copy.deepcopy(promptable)
    torch.manual_seed(9)
    for parameter in other.model.mask_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sample = dataset[1]
    (encoded,) = promptable.encode([sample.image])
    (record,) = Fidelity(other, max_instances=2)(promptable, encoded, sample)
    assert record["cosine"] == pytest.approx(1.0)
    assert len(record["mask_iou"]["1 click/predicted"]) == 2
    assert min(record["mask_iou"]["box/single"]) < 1.0
