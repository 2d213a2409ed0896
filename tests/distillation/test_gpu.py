"""The stages on a GPU: bfloat16, compiled, with a teacher in half precision; and a run that is resumed there."""

import shutil

import pytest
import torch

from samlight_hf.distillation import Teacher
from samlight_hf.distillation.trainer import focus_layers
from samlight_hf.loading import load_model
from tests.launcher import torchrun

from .conftest import count_steps, logged, make_arguments, make_examples, make_student, make_teacher, make_trainer


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
    # Sums have another order. Where a gradient is almost 0, Adam's step may change its sign: compare the losses.
    assert logged(resumed, "loss")[6:] == pytest.approx(logged(whole, "loss")[6:], rel=0.02)


# Near 0 rounding changes the sign of a pixel's logit, and so the drawn click, and the sign of a gradient, which Adam
# turns into a whole step. So convolutions round as little as in float32, and small gradients make small steps.
SMOOTH = {"use_cpu": False, "max_steps": 6, "tf32": False, "adam_epsilon": 1e-4}

_FSDP = """
import sys
from samlight_hf.utils.processes import leave_process_group
from tests.distillation.conftest import count_steps, make_arguments, make_trainer
from tests.distillation.test_gpu import SMOOTH

settings = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["SamLighteningVisionLayer"],
    "state_dict_type": "FULL_STATE_DICT",
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": settings}
for checkpoint, steps in ((None, 6), (sys.argv[1] + "/checkpoint-3", 3)):
    args = make_arguments(sys.argv[1], stage=sys.argv[2], save_strategy="steps", save_steps=3, save_total_limit=None,
        **SMOOTH, **fsdp)
    trainer = make_trainer(args)
    counted = count_steps(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.is_fsdp_enabled and len(counted) == steps, (trainer.is_fsdp_enabled, len(counted))
    trainer.export(f"{sys.argv[1]}/student-{steps}")
del trainer
leave_process_group()
"""


@pytest.mark.parametrize("stage", ["encoder", "end_to_end"])
def test_fsdp_trains_saves_and_resumes_as_one_process_does(tmp_path, stage):
    (tmp_path / "fsdp.py").write_text(_FSDP)
    torchrun(tmp_path / "fsdp.py", 1, tmp_path / "out", stage, cuda=True)
    plain = make_trainer(make_arguments(tmp_path / "plain", stage=stage, **SMOOTH))
    plain.train()
    for name in ("student-6", "student-3"):
        state = load_model(tmp_path / "out" / name, "cpu")[0].state_dict()
        for key, tensor in plain.student.state_dict().items():
            apart = ~torch.isclose(state[key], tensor.cpu(), atol=1e-4, rtol=1e-2)
            assert apart.float().mean() < 1e-3, key
            assert (state[key] - tensor.cpu()).abs().max() < 7e-3, key  # twice the sum of the learning rates
