"""Two processes train as one does: DDP and FSDP, compiled and not, on two CPU processes and on two GPUs."""

import json
from pathlib import Path

import pytest
import torch

from samlight_hf.loading import load_model
from tests.launcher import backends, torchrun

from .conftest import make_student


_RANK = """
import json, os, sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from samlight_hf.utils.processes import leave_process_group
from tests.distillation.conftest import count_steps, make_arguments, make_trainer

folder, settings = sys.argv[1], json.loads(sys.argv[2])
checkpoint, is_fsdp = settings.pop("checkpoint"), "fsdp" in settings
world = int(os.environ["WORLD_SIZE"])
# Rounding changes which pixel of an error region is clicked, and the sign of a gradient near 0, which Adam turns into a
# whole step where epsilon is small.
args = make_arguments(folder, max_steps=6, num_refinements=0, adam_epsilon=1e-4, save_strategy="steps", save_steps=3,
    save_total_limit=None, per_device_train_batch_size=4 // world, **settings)
if is_fsdp and args.use_cpu:
    # accelerate shards weights on GPUs alone, and asks this name; torch shards those of a CPU as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
trainer = make_trainer(args)
steps = count_steps(trainer)
trainer.train(resume_from_checkpoint=checkpoint)
assert trainer.is_fsdp_enabled == is_fsdp and args.world_size == world
assert trainer.student.device.type == ("cpu" if args.use_cpu else "cuda")
trainer.export(folder + "/student")
if trainer.is_world_process_zero():
    print(json.dumps({"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": len(steps), "devices": world}))
del trainer
leave_process_group()
"""
_FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["SamLighteningVisionLayer"],
        "state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": False,
    },
}  # fmt: skip


def train(folder: Path, num_processes: int, backend: str, strategy: str, checkpoint: Path | None = None, **settings):
    """Train six steps of four images in so many processes; return what the script prints, and the student's weights."""
    is_cuda = backend == "nccl"
    settings = {"checkpoint": checkpoint and str(checkpoint), "use_cpu": not is_cuda, **settings}
    if strategy == "fsdp":
        settings |= _FSDP
    if settings.get("torch_compile") and not is_cuda:  # traced only: compiling for a CPU takes minutes
        settings["torch_compile_backend"] = "eager"
    script = folder.parent / "rank.py"
    script.write_text(_RANK)
    printed = torchrun(script, num_processes, folder, json.dumps(settings), cuda=is_cuda)
    (line,) = (line for line in printed.splitlines() if line.startswith('{"losses"'))
    found = json.loads(line)
    assert found["devices"] == num_processes and found["steps"] == (3 if checkpoint else 6)
    return found["losses"], load_model(folder / "student", "cpu")[0].state_dict()


def assert_alike(first, second, backend: str):
    """Compare the losses and the students of two runs."""
    assert first[0] == pytest.approx(second[0], rel=1e-4 if backend == "gloo" else 1e-2)
    assert_trained_alike(make_student().state_dict(), first[1], second[1], backend)


def assert_trained_alike(before: dict, first: dict, second: dict, backend: str):
    """Compare how far apart two students are with how far they were trained.

    The order of sums differs, and GPUs round products to TF32 in convolutions, and all of them where compiled.
    """
    assert before.keys() == first.keys() == second.keys()
    trained, apart = (
        torch.cat([(first[name] - other[name]).flatten() for name in before]).norm() for other in (before, second)
    )
    assert trained > 0 and apart < (1e-3 if backend == "gloo" else 5e-2) * trained, (apart, trained)


VARIANTS = {
    "ddp": ("ddp", {"stage": "end_to_end"}),
    "ddp, compiled": ("ddp", {"stage": "end_to_end", "torch_compile": True}),
    "ddp, encoder, compiled": ("ddp", {"stage": "encoder", "torch_compile": True}),
    "fsdp": ("fsdp", {"stage": "end_to_end"}),
    "fsdp, encoder": ("fsdp", {"stage": "encoder"}),
    "fsdp, compiled": ("fsdp", {"stage": "end_to_end", "torch_compile": True}),
}


@pytest.mark.parametrize("backend", backends(pytest.mark.slow))
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_as_one_does(tmp_path, backend, variant):
    strategy, settings = VARIANTS[variant]
    one, two = (train(tmp_path / str(count), count, backend, strategy, **settings) for count in (1, 2))
    assert_alike(one, two, backend)


@pytest.mark.parametrize("backend", backends(pytest.mark.slow))
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_is_resumed_on_another_number_of_processes(tmp_path, backend, strategy, before, after):
    # Without refinements nothing trains the part that reads masks, and torch resumes no such parameter with FSDP.
    stage = "encoder" if strategy == "fsdp" else "end_to_end"
    losses, whole = train(tmp_path / "whole", before, backend, strategy, stage=stage)
    checkpoint = tmp_path / "whole/checkpoint-3"
    resumed = train(tmp_path / "resumed", after, backend, strategy, checkpoint, stage=stage)
    assert_alike((losses, whole), resumed, backend)  # a resumed run keeps the log of its steps before
