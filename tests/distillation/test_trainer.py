import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch.utils.data import Dataset
from transformers import TrainerCallback, pipeline

from samlight_hf.data import PromptSampling, SyntheticScenes, TrainingExamples
from samlight_hf.distillation import (
    CachedExamples,
    CheckpointChangedError,
    DistillationTrainer,
    EmbeddingCache,
    LayerWeightCallback,
    MaskImageCallback,
    Teacher,
    TrainingDivergedError,
    fill_cache,
)
from samlight_hf.distillation.checkpoints import STAGING_NAME, last_checkpoint
from samlight_hf.distillation.trainer import focus_layers
from samlight_hf.loading import load_model
from tests.launcher import ROOT, torchrun

from .conftest import make_arguments, make_examples, make_student, make_teacher


def make_trainer(args, examples=None, teacher=None, student=None, **options) -> DistillationTrainer:
    student = student or make_student()
    if args.stage == "encoder" and teacher is None:
        layers = [
            layer for _, layer in focus_layers(student, make_teacher().config.vision_config, args.num_focus_layers)
        ]
        teacher = Teacher(make_teacher(), layers, torch.float32)
    if examples is None:
        examples = make_examples(args.max_steps * args.global_batch_size, args.stage != "encoder")
    return DistillationTrainer(
        student, args, examples, make_processor(student.config.vision_config), teacher, **options
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }


def assert_equal(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def count_steps(trainer) -> list:
    """Return a list that gets an entry at each training step."""
    steps, compute_loss = [], trainer.compute_loss

    def counting(*args, **kwargs):
        steps.append(1)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = counting
    return steps


def logged(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("stage", ["encoder", "decoder", "end_to_end"])
def test_each_stage_trains_its_part(tmp_path, stage):
    trainer = make_trainer(make_arguments(tmp_path, stage=stage, max_steps=30, learning_rate=3e-3))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "encoder": {"vision_encoder", "0", "1"},  # and the projections
        "decoder": {"mask_decoder"},
        "end_to_end": {"vision_encoder", "prompt_encoder", "mask_decoder"},
    }
    assert changed == expected[stage]
    losses = logged(
        trainer, "layer_loss/3" if stage == "encoder" else "loss"
    )  # the weighted sum rises with its weights
    assert sum(losses[-5:]) < sum(losses[:5])
    if stage == "encoder":
        assert logged(trainer, "layer_weight/1") == [1.0] * 30
        assert logged(trainer, "layer_weight/3")[:8] == [0.0] * 8
        assert logged(trainer, "layer_weight/3")[15:] == [1.0] * 15
        assert len(logged(trainer, "layer_loss/2")) == 30
    assert all(rate > 0 for rate in logged(trainer, "images_per_second")[1:])


def test_the_logged_loss_is_the_weighted_sum_of_the_layers(tmp_path):
    trainer = make_trainer(make_arguments(tmp_path, stage="encoder", max_steps=6))
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        expected = sum(entry[f"layer_weight/{n}"] * entry[f"layer_loss/{n}"] for n in (1, 2, 3))
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_ones_own_layer_weights_take_the_place_of_the_default_ones(tmp_path):
    callback = LayerWeightCallback(lambda step, max_steps, num_layers: [0.25] * num_layers)
    trainer = make_trainer(make_arguments(tmp_path, stage="encoder", max_steps=2), callbacks=[callback])
    trainer.train()
    for number in (1, 2, 3):
        assert logged(trainer, f"layer_weight/{number}") == [0.25, 0.25]


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    results = []
    for batch_size, steps in ((8, 1), (2, 4)):
        args = make_arguments(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, optim="sgd"
        )
        trainer = make_trainer(args)
        trainer.train()
        results.append((weights(trainer), logged(trainer, "loss"), logged(trainer, "iou/box")))
    for name in results[0][0]:
        torch.testing.assert_close(results[0][0][name], results[1][0][name], atol=1e-6, rtol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for options in ({}, {"gradient_checkpointing": True}):
        trainer = make_trainer(make_arguments(tmp_path, **options))
        trainer.train()
        results.append(weights(trainer))
        assert trainer.student.vision_encoder.gradient_checkpointing == bool(options)
    assert_equal(*results)


def test_cached_targets_train_as_live_ones_do(tmp_path):
    examples = make_examples(16, with_prompts=False, num_views=1)
    losses = []
    for cached in (False, True):
        args = make_arguments(tmp_path / "out", stage="encoder")
        trainer = make_trainer(args, examples)
        if cached:
            cache = EmbeddingCache(tmp_path, trainer.teacher, examples.num_ids, examples.preprocessing())
            fill_cache(cache, examples.views(), trainer.teacher, torch.device("cpu"), 4, 0)
            trainer = make_trainer(args, CachedExamples(examples, cache), trainer.teacher)
            trainer.teacher.targets = None  # must not be called
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_evaluation_measures_masks_and_embeddings_and_draws(tmp_path):
    args = make_arguments(tmp_path, stage="encoder", eval_strategy="steps", eval_steps=2, eval_max_instances=3)
    scenes = SyntheticScenes(3, 64, seed=7)
    trainer = make_trainer(args, eval_images=scenes, callbacks=[MaskImageCallback([scenes[0], scenes[1]])])
    trainer.train()
    metrics = trainer.evaluate()
    assert set(metrics) >= {"eval_box_miou", "eval_point_miou", "eval_point_oracle_miou", "eval_embedding_cosine"}
    assert metrics["eval_point_oracle_miou"] >= metrics["eval_point_miou"]
    assert len(logged(trainer, "eval_embedding_cosine")) == 3
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == ["step-2.png", "step-4.png"]
    # the same numbers as in an evaluation of the saved student without a trainer
    trainer.export(tmp_path / "student")
    from samlight_hf.distillation.demonstration import measure

    expected = measure(load_model(tmp_path / "student", "cpu")[0], scenes, max_instances=3)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6)


def test_the_exported_student_is_complete_and_knows_nothing_of_the_training(tmp_path):
    trainer = make_trainer(make_arguments(tmp_path, stage="encoder", save_strategy="steps", save_steps=4))
    trainer.train()
    trainer.export(tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "modeling_sam_lightening.py"} <= names
    assert not {"projections.safetensors", "distillation_settings.json", "training_args.bin", "optimizer.pt"} & names
    assert not any(
        "projection" in name and "patch" not in name for name in load_file(tmp_path / "student/model.safetensors")
    )
    assert (tmp_path / "checkpoint-4/projections.safetensors").is_file()
    loaded, _ = load_model(tmp_path / "student", "cpu")
    assert_equal(loaded.state_dict(), trainer.student.state_dict())
    generator = pipeline("mask-generation", model=str(tmp_path / "student"), device="cpu")
    output = generator(
        SyntheticScenes(1, 64)[0].image, points_per_crop=2, pred_iou_thresh=-1.0, stability_score_thresh=-1.0
    )
    assert len(output["masks"]) > 0


@pytest.mark.parametrize(("stage", "muon"), [("encoder", False), ("end_to_end", False), ("end_to_end", True)])
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
from tests.distillation.conftest import make_arguments
from tests.distillation.test_trainer import OPTIONS, make_trainer

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


@pytest.mark.parametrize("call", [1, 2, 6])  # in the first save; later in it; in the second
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
        "from tests.distillation.test_trainer import *\n"
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
    assert f"the checkpoint of step 4 could not be saved in {tmp_path}" in process.stderr
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
    with pytest.raises(CheckpointChangedError, match=r"frozen=.* \(was "):
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


class _Tracker:
    Image = staticmethod(lambda pixels: ("image", pixels.shape))

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)

    def add_image(self, name, pixels, step, dataformats):
        self.logged.append({name: ("image", pixels.shape), "train/global_step": step})


@pytest.mark.parametrize("attribute", ["tb_writer", "_wandb", "_trackio"])
def test_images_go_to_the_trackers(tmp_path, attribute):
    callback, scenes, tracker = TrainerCallback(), SyntheticScenes(1, 64, seed=7), _Tracker()
    setattr(callback, attribute, tracker)  # as transformers' callbacks store them
    args = make_arguments(tmp_path, eval_max_instances=2)
    trainer = make_trainer(args, eval_images=scenes, callbacks=[MaskImageCallback([scenes[0]]), callback])
    trainer.evaluate()
    (values,) = tracker.logged
    assert values["train/global_step"] == 0
    assert values["masks"][1][2] == 3


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        make_trainer(make_arguments(tmp_path)).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(CheckpointChangedError, match="not a checkpoint of this trainer"):
        make_trainer(make_arguments(tmp_path)).train(resume_from_checkpoint=True)


def test_a_stage_without_what_it_needs_is_refused(tmp_path):
    args = make_arguments(tmp_path, stage="encoder")
    student = make_student()
    processor = make_processor(student.config.vision_config)
    with pytest.raises(ValueError, match='stage="encoder" needs a teacher'):
        DistillationTrainer(student, args, make_examples(16, False), processor)
    with pytest.raises(ValueError, match=r"the teacher's layers=\(0,\) must be those"):
        DistillationTrainer(student, args, make_examples(16, False), processor, Teacher(make_teacher(), [0]))
    teacher = make_teacher()
    teacher.config.vision_config.output_channels = 64
    with pytest.raises(ValueError, match="the student's output_channels=32 must equal the teacher's 64"):
        DistillationTrainer(student, args, make_examples(16, False), processor, Teacher(teacher, [2, 4]))
    with pytest.raises(ValueError, match="evaluation needs eval_images"):
        make_trainer(make_arguments(tmp_path)).evaluate()


def test_what_is_frozen_is_proven_before_the_first_step(tmp_path):
    trainer = make_trainer(make_arguments(tmp_path, stage="decoder"))
    trainer.student.prompt_encoder.no_mask_embed.weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"prompt_encoder.no_mask_embed.weight must be frozen in this stage, and is not"
    ):
        trainer.train()


class _Order(Dataset):
    """Examples that record which process loaded them."""

    def __init__(self, examples):
        self.examples, self.asked = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, n):
        self.asked.append(n)
        return self.examples[n]


def test_examples_are_trained_in_their_order_and_skipped_without_being_read(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    dataset = _Order(make_examples(16))
    make_trainer(make_arguments(tmp_path, **settings), dataset).train()
    assert dataset.asked == list(range(16))
    dataset = _Order(make_examples(16))
    make_trainer(make_arguments(tmp_path, **settings), dataset).train(str(tmp_path / "checkpoint-2"))
    assert dataset.asked == list(range(8, 16))


_RANK = """
import os, sys
import torch
from samlight_hf.utils.processes import leave_process_group
from tests.distillation.conftest import make_arguments
from tests.distillation.test_trainer import *

args = make_arguments(sys.argv[1], stage=sys.argv[2], max_steps=4,
    per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]), optim="sgd",
    learning_rate=0.05, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    eval_max_instances=2, ddp_backend="gloo")
trainer = make_trainer(args, eval_images=SyntheticScenes(3, 32))
trainer.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
trainer.export(sys.argv[1] + "/student")
if trainer.is_world_process_zero():
    torch.save({"weights": weights(trainer), "log": trainer.state.log_history, "world": args.world_size},
        sys.argv[1] + "/result.pt")
del trainer
leave_process_group()
"""


def run_ranks(folder: Path, num_ranks: int, stage: str, *more: str) -> dict:
    script = folder.parent / "rank.py"
    script.write_text(_RANK)
    printed = torchrun(script, num_ranks, folder, stage, *more)
    result = torch.load(folder / "result.pt", weights_only=False)
    assert result["world"] == num_ranks
    return {**result, "stdout": printed}


@pytest.mark.parametrize("stage", ["encoder", "end_to_end"])
def test_two_ranks_are_one_at_the_same_global_batch(tmp_path, stage):
    one, two = (run_ranks(tmp_path / str(number), number, stage) for number in (1, 2))
    for name in one["weights"]:
        torch.testing.assert_close(one["weights"][name], two["weights"][name], atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(one["log"], two["log"], strict=True):
        for name in set(mine) - {
            "images_per_second",
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second",
            "total_flos",
        }:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    loaded = load_file(tmp_path / "2/student/model.safetensors")
    torch.testing.assert_close(
        loaded["mask_decoder.iou_token.weight"], two["weights"]["student.mask_decoder.iou_token.weight"]
    )
    if stage == "encoder":  # a run of two processes is resumed by one
        again = run_ranks(tmp_path / "2", 1, stage, str(tmp_path / "2/checkpoint-2"))
        assert "Resuming on 1 processes what 2 began" in again["stdout"]
        for name in one["weights"]:
            torch.testing.assert_close(one["weights"][name], again["weights"][name], atol=1e-5, rtol=1e-4)
