"""The stages on a GPU: bfloat16, compiled, with a teacher in half precision. Also that a resumed run goes on there."""

import shutil

import pytest
import torch

from samlight_hf.distillation import Teacher
from samlight_hf.distillation.trainer import focus_layers

from .conftest import make_arguments, make_examples, make_student, make_teacher
from .test_trainer import count_steps, logged, make_trainer, weights


pytestmark = pytest.mark.gpu


def gpu_arguments(folder, **options):
    return make_arguments(folder, **{"use_cpu": False, "bf16": True, "max_steps": 40, "learning_rate": 3e-3, **options})


@pytest.mark.parametrize("stage", ["encoder", "decoder", "end_to_end"])
def test_compiled_bfloat16_training_follows_eager_float32(tmp_path, stage):
    losses = []
    for options in ({"bf16": False}, {"torch_compile": True}):
        args = gpu_arguments(tmp_path, stage=stage, **options)
        teacher = None
        if stage == "encoder":
            student, model = make_student(), make_teacher()
            layers = [layer for _, layer in focus_layers(student, model.config.vision_config, args.num_focus_layers)]
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            teacher = Teacher(model, layers, dtype, compile=args.torch_compile)
        trainer = make_trainer(args, make_examples(160, stage != "encoder"), teacher)
        trainer.train()
        assert all(parameter.is_cuda and parameter.dtype == torch.float32 for parameter in trainer.student.parameters())
        losses.append(logged(trainer, "layer_loss/3" if stage == "encoder" else "loss"))
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=0.05)
    for curve in losses:
        assert sum(curve[-5:]) < sum(curve[:5])


def test_a_resumed_run_goes_on(tmp_path):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "torch_compile": True}
    whole = make_trainer(gpu_arguments(tmp_path, **options))
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    resumed = make_trainer(gpu_arguments(tmp_path, **options))
    steps = count_steps(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert len(steps) == 6
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, atol=5e-3, rtol=0.05)
