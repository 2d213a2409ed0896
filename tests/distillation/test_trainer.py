from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch.utils.data import Dataset
from transformers import TrainerCallback, pipeline

from samlight_hf.data import SyntheticScenes
from samlight_hf.distillation import (
    CachedExamples,
    DistillationTrainer,
    EmbeddingCache,
    LayerWeightCallback,
    MaskImageCallback,
    Teacher,
    fill_cache,
)
from samlight_hf.loading import load_model
from tests.launcher import torchrun

from .conftest import (
    assert_equal,
    logged,
    make_arguments,
    make_examples,
    make_student,
    make_teacher,
    make_trainer,
    weights,
)


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
from samlight_hf.data import SyntheticScenes
from tests.distillation.conftest import *

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


@pytest.mark.slow
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
