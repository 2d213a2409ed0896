from pathlib import Path

import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import SamConfig, SamModel, SamVisionConfig

from samlight_hf import SamLighteningModel
from samlight_hf.data import PromptSampling, SyntheticScenes, TrainingExamples
from samlight_hf.distillation import DistillationArguments, DistillationTrainer, Teacher
from samlight_hf.distillation.trainer import focus_layers
from tests.conftest import tiny_config


IMAGE_SIZE, MASK_SIZE = 32, 32  # 8 x 8 tokens of 4 x 4 pixels


def make_teacher(seed: int = 0) -> SamModel:
    """A SAM like Meta's: windows, global layers, relative positions."""
    vision = SamVisionConfig(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=4, mlp_dim=96, image_size=IMAGE_SIZE, patch_size=4,
        output_channels=32, num_pos_feats=16, window_size=3, global_attn_indexes=[2, 4], initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(seed)
    parts = {
        "prompt_encoder_config": {"hidden_size": 32, "image_size": IMAGE_SIZE, "patch_size": 4},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    }
    model = SamModel(SamConfig(vision_config=vision, **parts))
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_student(seed: int = 1) -> SamLighteningModel:
    torch.manual_seed(seed)
    return SamLighteningModel(tiny_config())


def make_examples(num_examples: int, with_prompts: bool = True, num_prompts: int = 4, **options) -> TrainingExamples:
    prompts = PromptSampling(num_prompts, 4) if with_prompts else None
    return TrainingExamples(
        SyntheticScenes(20, IMAGE_SIZE), num_examples, IMAGE_SIZE, mask_size=MASK_SIZE, prompts=prompts, **options
    )


def make_arguments(output_dir, **options) -> DistillationArguments:
    settings = {
        "stage": "end_to_end", "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "num_prompts": 4,
        "num_focus_layers": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    return DistillationArguments(output_dir=str(output_dir), **{**settings, **options})


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


@pytest.fixture
def teacher() -> SamModel:
    return make_teacher()


@pytest.fixture
def student() -> SamLighteningModel:
    return make_student()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a teacher's folder and a student's config.json."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_teacher()
    teacher.save_pretrained(folder / "teacher")
    make_processor(teacher.config.vision_config).save_pretrained(folder / "teacher")
    # A prompt encoder and a mask decoder of the teacher's shape
    config = tiny_config()
    config.prompt_encoder_config, config.mask_decoder_config = (
        teacher.config.prompt_encoder_config,
        teacher.config.mask_decoder_config,
    )
    (folder / "student.json").write_text(config.to_json_string(use_diff=False))
    (folder / "sam.json").write_text(teacher.config.to_json_string(use_diff=False))
    return folder
