"""One of two processes fails: every process says so in one line, and the run goes on from its checkpoint."""

import pytest

from samlight_hf.distillation import distill, parse_arguments
from samlight_hf.distillation.checkpoints import STAGING_NAME, last_checkpoint
from samlight_hf.loading import load_model
from tests.data.files import write_tar
from tests.launcher import TWO_GPUS, launch, output_of

from .test_bad_data import good_samples
from .test_several_processes import assert_trained_alike


_FAILING = """
import os, runpy, signal, sys
import torch
from samlight_hf.data import TrainingExamples
from samlight_hf.distillation import DistillationTrainer

how, is_second = sys.argv[1], os.environ["RANK"] == "1"
step, get, save = DistillationTrainer.training_step, TrainingExamples.__getitem__, torch.save

def failing_step(self, *arguments, **options):
    if is_second and self.state.global_step == 3:
        if how == "error":
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        if how == "bug":
            raise KeyError("a bug")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **options)

def failing_read(self, index):
    if how == "data" and is_second and index >= 12:
        raise OSError(5, "Input/output error", "photographs.tar")
    return get(self, index)

def failing_save(content, path, *arguments, **options):
    if how == "saving" and is_second and "checkpoint-4" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(content, path, *arguments, **options)

DistillationTrainer.training_step, TrainingExamples.__getitem__, torch.save = failing_step, failing_read, failing_save
sys.argv = ["distill.py", *sys.argv[2:]]
runpy.run_path("examples/distill.py", run_name="__main__")
"""


SAID = {
    "error": "samlight: error: CUDA error: uncorrectable ECC error encountered. The last whole checkpoint is ",
    "killed": None,
    "saving": None,
    "bug": "samlight: internal error: KeyError: 'a bug'",
    "data": "samlight: error: photographs.tar: Input/output error",
}


def arguments_of(folder, tmp_path, out: str, batch_size: int, backend: str) -> list[str]:
    return [
        "--student", str(folder / "student.json"), "--stages", "end_to_end", "--train_data", str(tmp_path / "good.tar"),
        "--output_dir", str(tmp_path / out), "--max_steps", "6", "--save_steps", "2", "--num_prompts", "2",
        "--per_device_train_batch_size", str(batch_size), "--disable_tqdm", "true", "--num_refinements", "0",
        "--optim", "sgd", "--learning_rate", "0.05", "--dataloader_num_workers", "1", "--save_total_limit", "2",
        *(["--use_cpu"] if backend == "gloo" else []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("error", "gloo"),
        *(pytest.param(how, "gloo", marks=pytest.mark.slow) for how in ("killed", "saving", "bug", "data")),
        *(pytest.param(how, "nccl", marks=TWO_GPUS) for how in ("error", "killed", "data")),
    ],
)
def test_one_of_two_fails_and_the_run_goes_on_from_the_last_checkpoint(folder, tmp_path, how, backend):
    write_tar(tmp_path / "good.tar", good_samples())
    (tmp_path / "failing.py").write_text(_FAILING)
    arguments = arguments_of(folder, tmp_path, "out", 2, backend)
    process = launch(tmp_path / "failing.py", 2, how, *arguments, cuda=backend == "nccl")
    _, complaints = output_of(process)
    assert process.returncode != 0
    lines = [line for line in complaints.splitlines() if "samlight: " in line]
    checkpoint = f"{tmp_path}/out/end_to_end/checkpoint-2"
    advice = f"The last whole checkpoint is {checkpoint}: the same command with --resume goes on from it."
    (first,) = [line for line in lines if not line.startswith("process 1: ")]
    assert first.startswith("samlight: error: ") and "another process" in first and first.endswith(advice), complaints
    second = [line for line in lines if line.startswith("process 1: ")]
    said = SAID[how]
    assert [line.startswith(f"process 1: {said}") for line in second] == ([] if said is None else [True]), complaints
    assert last_checkpoint(tmp_path / "out/end_to_end") == checkpoint
    before = load_model(checkpoint, "cpu")[0].state_dict()

    distill(*parse_arguments([*arguments_of(folder, tmp_path, "out", 4, backend), "--resume"]))  # in one process
    assert not (tmp_path / "out/end_to_end" / STAGING_NAME).exists()
    distill(*parse_arguments(arguments_of(folder, tmp_path, "whole", 4, backend)))
    resumed, whole = (load_model(tmp_path / name / "student", "cpu")[0].state_dict() for name in ("out", "whole"))
    assert_trained_alike(before, resumed, whole, backend)
