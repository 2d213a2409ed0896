import math
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from samlight_hf.data import PromptSampling, SyntheticScenes, TrainingExamples
from samlight_hf.distillation import (
    CheckpointChangedError,
    Teacher,
    TrainingDivergedError,
)
from samlight_hf.distillation.checkpoints import STAGING_NAME, last_checkpoint
from samlight_hf.loading import load_model
from tests.launcher import ROOT

from .conftest import (
    assert_equal,
    count_steps,
    logged,
    make_arguments,
    make_student,
    make_teacher,
    make_trainer,
    weights,
)


@pytest.mark.parametrize(
    ("stage", "muon"),
    [("encoder", False), pytest.param("end_to_end", False, marks=pytest.mark.slow), ("end_to_end", True)],
)
def test_resuming_is_bit_exact(tmp_path, stage, muon):
    options = {
        "stage": stage,
        "muon": muon,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "warmup_steps": 2,
        "save_total_limit": None,
    }
    whole = make_trainer(make_arguments(tmp_path / "whole", **options))
    whole.train()
    first = make_trainer(make_arguments(tmp_path / "parts", **options))
    first.train()
    for folder in (tmp_path / "parts").glob("checkpoint-[!3]*"):
        shutil.rmtree(folder)
    resumed = make_trainer(make_arguments(tmp_path / "parts", **options))
    steps = count_steps(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert len(steps) == 5
    assert_equal(weights(whole), weights(resumed))
    assert logged(whole, "loss")[3:] == logged(resumed, "loss")[3:]


_KILLED = """
import os, signal, sys
import torch
from tests.distillation.conftest import make_arguments, make_trainer
from tests.distillation.test_checkpoints import OPTIONS

save, calls = torch.save, 0
def killed_at(number):
    def saving(content, path, *args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            with open(path, "wb") as file:
                file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, path, *args, **kwargs)
    return saving
torch.save = killed_at(int(sys.argv[2]))
make_trainer(make_arguments(sys.argv[1], **OPTIONS)).train()
"""
OPTIONS = {"stage": "encoder", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    "call", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(6, marks=pytest.mark.slow)]
)  # in the first save; later in it; in the second
def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_last_whole_checkpoint(tmp_path, call):
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, tmp_path / "killed", str(call)], cwd=ROOT, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "killed" / STAGING_NAME).is_dir()
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint == (str(tmp_path / "killed/checkpoint-2") if call == 6 else None)
    whole = make_trainer(make_arguments(tmp_path / "whole", **OPTIONS))
    whole.train()
    resumed = make_trainer(make_arguments(tmp_path / "killed", **OPTIONS))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal(weights(whole), weights(resumed))
    assert not (tmp_path / "killed" / STAGING_NAME).exists()


def test_a_disk_that_fills_up_names_the_last_whole_checkpoint(tmp_path):
    script = (
        "import resource, signal\n"
        "from tests.distillation.test_checkpoints import *\n"
        "trainer = make_trainer(make_arguments(sys.argv[1], **OPTIONS))\n"
        "check, saved = trainer._check_finite, []\n"
        "def limited():\n"
        "    check()\n"
        "    saved.append(1)\n"
        "    if len(saved) == 2:  # no file may grow beyond 50 kB from here on\n"
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "trainer._check_finite = limited\n"
        "trainer.train()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 1
    assert f"CheckpointNotSavedError: the checkpoint of step 4 could not be saved in {tmp_path}" in process.stderr
    assert f"one is {tmp_path}/checkpoint-2: make room, and resume from it" in process.stderr
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_loss_that_turns_nan_stops_with_the_last_good_checkpoint(tmp_path):
    args = make_arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=2)
    trainer = make_trainer(args)
    forward = trainer.model.forward

    def failing(**batch):
        outputs = forward(**batch)
        return {**outputs, "loss": outputs["loss"] * (math.nan if trainer.state.global_step == 5 else 1)}

    trainer.model.forward = failing
    with pytest.raises(TrainingDivergedError, match=r"loss=nan at step 6: .* last good checkpoint is .*checkpoint-4"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_weights_that_are_nan_are_never_saved(tmp_path):
    trainer = make_trainer(make_arguments(tmp_path, save_strategy="steps", save_steps=2, logging_steps=100))
    trainer.student.mask_decoder.iou_token.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingDivergedError, match=r"weights in .* No checkpoint had been saved"):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    args = make_arguments(
        tmp_path, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="box_miou", greater_is_better=True, load_best_model_at_end=True, eval_max_instances=2,
    )  # fmt: skip
    trainer = make_trainer(args, eval_images=SyntheticScenes(2, 32))
    values = iter([0.1, 0.9, 0.3, 0.2])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_box_miou": next(values)}
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert_equal(trainer.student.state_dict(), load_model(best, "cpu")[0].state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 16}, r"max_steps=16 \(was 8\)"),
        ({"per_device_train_batch_size": 2}, r"global_batch_size=2 \(was 4\)"),
        ({"learning_rate": 5e-4}, r"learning_rate=0.0005 \(was 0.001\)"),
        ({"stage": "decoder"}, r"stage=decoder \(was end_to_end\)"),
        ({"adam_epsilon": 1e-6}, r"adam_epsilon=1e-06 \(was 1e-08\)"),
    ],
)
def test_settings_that_define_the_run_may_not_change(tmp_path, options, message):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    make_trainer(make_arguments(tmp_path, **settings)).train()
    trainer = make_trainer(make_arguments(tmp_path, **{**settings, **options}))
    with pytest.raises(CheckpointChangedError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_the_teacher_may_not_change(tmp_path):
    settings = {"stage": "encoder", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_arguments(tmp_path, **settings)).train()
    other = make_trainer(
        make_arguments(tmp_path, **settings), teacher=Teacher(make_teacher(seed=5), (2, 4), torch.float32)
    )
    with pytest.raises(CheckpointChangedError, match=r"teacher=.* \(was "):
        other.train(str(tmp_path / "checkpoint-2"))


def test_what_is_frozen_may_not_change_and_what_is_trained_comes_from_the_checkpoint(tmp_path):
    settings = {"stage": "decoder", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_arguments(tmp_path, **settings)).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = make_trainer(make_arguments(tmp_path, **settings), student=load_model(checkpoint, "cpu")[0])
    resumed.train(checkpoint)
    student = make_student()
    with torch.no_grad():
        student.vision_encoder.neck.conv2.weight.mul_(2)
    with pytest.raises(
        CheckpointChangedError,
        match=r"frozen=.* \(was .*Here frozen is a hash of the student.s config, and the weights",
    ):
        make_trainer(make_arguments(tmp_path, **settings), student=student).train(checkpoint)


def test_prompts_may_not_change(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_arguments(tmp_path, **settings)).train()
    examples = TrainingExamples(
        SyntheticScenes(20, 32), 16, 32, mask_size=32, prompts=PromptSampling(4, 4, box_noise=0.9)
    )
    with pytest.raises(CheckpointChangedError, match=r"data=.* \(was "):
        make_trainer(make_arguments(tmp_path, **settings), examples).train(str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path):
    settings = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True, "eval_max_instances": 2,
    }  # fmt: skip

    def trainer(folder):
        made = make_trainer(make_arguments(folder, **settings), eval_images=SyntheticScenes(1, 32, seed=1))
        assert made.args.metric_for_best_model == "box_miou"
        return made

    first = trainer(tmp_path / "old")
    first.evaluate = lambda *args, **kwargs: scored(first, 1.0 / first.state.global_step)  # the first is the best
    first.args.max_steps = 4
    first.train()
    shutil.move(tmp_path / "old", tmp_path / "new")
    resumed = trainer(tmp_path / "new")
    resumed.evaluate = lambda *args, **kwargs: scored(resumed, 0.0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "new/checkpoint-2")
    best = load_model(tmp_path / "new/checkpoint-2", "cpu")[0].state_dict()
    assert_equal(resumed.student.state_dict(), best)


def scored(trainer, score: float) -> dict[str, float]:
    metrics = {"eval_box_miou": score}
    trainer.log(metrics)
    return metrics


def test_a_checkpoint_without_optimizer_is_refused(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(make_arguments(tmp_path, **settings)).train()
    with pytest.raises(CheckpointChangedError, match="has no optimizer.pt .save_only_model=true."):
        make_trainer(make_arguments(tmp_path, **settings)).train(resume_from_checkpoint=True)


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        make_trainer(make_arguments(tmp_path)).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(CheckpointChangedError, match="not a checkpoint of this trainer"):
        make_trainer(make_arguments(tmp_path)).train(resume_from_checkpoint=True)
