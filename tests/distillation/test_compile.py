"""torch.compile captures each stage as one graph, with equal results. test_gpu.py runs the compiler itself."""

import pytest
import torch

from samlight_hf.distillation import EncoderStage, MaskStage, Teacher
from samlight_hf.distillation.stages import encode

from .conftest import make_examples, make_student, make_teacher
from .test_stages import LOSS_WEIGHTS


@pytest.fixture
def batch():
    examples = make_examples(2)
    return torch.utils.data.default_collate([examples[0], examples[1]])


@pytest.mark.parametrize(("stage", "point_targets"), [("decoder", "own"), ("end_to_end", "all")])
def test_masks(batch, stage, point_targets):
    module = MaskStage(make_student(), stage, LOSS_WEIGHTS, num_refinements=2, point_targets=point_targets)
    inputs = {name: batch[name] for name in ("masks", "boxes", "points", "uniforms")}
    pixel_values = batch["pixel_values"] / 255
    compiled = torch.compile(module, backend="eager", fullgraph=True)(pixel_values=pixel_values, **inputs)
    torch.testing.assert_close(compiled, module(pixel_values=pixel_values, **inputs))


def test_encoder(batch):
    pixel_values = batch["pixel_values"] / 255
    teacher = Teacher(make_teacher(), (2, 4), torch.float32)
    torch.compile(encode, backend="eager", fullgraph=True)(teacher.encoder, pixel_values, teacher.layers)
    module = EncoderStage(make_student(), (1, 2), 48)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    targets = teacher.targets(pixel_values)
    for weights in ([1.0, 0.0, 0.0], [1.0, 1.0, 0.5]):  # weights may change without another compilation
        module.layer_weights.copy_(torch.tensor(weights))
        with torch.compiler.set_stance("default"):
            torch.testing.assert_close(compiled(pixel_values, targets), module(pixel_values, targets))
