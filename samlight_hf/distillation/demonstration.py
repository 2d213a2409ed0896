"""A demonstration that runs in three minutes on a CPU: a small SAM trained on synthetic shapes, and a smaller student.

It uses the stages, settings and files of any other run; only the models and the images are small.
"""

import time
from pathlib import Path

from transformers import PreTrainedModel, SamConfig, SamVisionConfig, pipeline, set_seed

from ..data import ImageDataset
from ..evaluation.models import PromptableModel
from ..loading import load_model, quiet_transformers
from ..modeling.configuration_sam_lightening import SamLighteningConfig
from ..modeling.modeling_sam_lightening import make_processor
from ..utils.atomic_files import atomic_write
from ..utils.processes import is_main_process, tell
from .arguments import parse_arguments
from .callbacks import draw_masks
from .open_data import open_eval_images
from .run import distill, make_student
from .validation import mask_records, mean_records


_IMAGE_SIZE, _PATCH_SIZE, _WIDTH = 64, 8, 64


def demonstrate(teacher_config: Path, config: Path) -> Path:
    """Train a small teacher and its student, and print a table of their scores.

    Args:
        teacher_config: YAML file of the teacher's training.
        config: YAML file of the distillation.

    Returns:
        The student's folder.
    """
    start = time.time()
    run, stages = parse_arguments(["--config", str(teacher_config), "--resume", "true"])
    _write_config(Path(run.student), demonstration_teacher())
    tell("1. A small SAM, trained from scratch on scenes of shapes: the teacher.")
    teacher_folder = distill(run, stages)
    run, stages = parse_arguments(["--config", str(config), "--resume", "true"])
    _write_config(Path(run.student), demonstration_student())
    tell("2. A student of a third of its image encoder: encoder, decoder, end to end.")
    images = open_eval_images(run, ())
    assert images is not None, f"{config} names no eval_data"
    teacher, _ = load_model(teacher_folder, device="cpu")
    set_seed(stages[0].seed)
    before = make_student(run, teacher)  # as `distill` creates it
    folder = distill(run, stages)
    if not is_main_process():
        return folder
    student, processor = load_model(folder, device="cpu")
    print("3. On scenes that none of them has seen:")
    rows = {
        "filling the box": (None, {"box_miou": filled_box_miou(images)}),
        "teacher": (teacher, measure(teacher, images)),
        "student before": (before, measure(before, images)),
        "student after": (student, measure(student, images)),
    }
    _print_table(rows)
    samples = [images[index] for index in range(6)]
    sheet = folder.parent / "masks.png"
    draw_masks(PromptableModel(student, processor), samples, "The student's masks for boxes").save(sheet)
    with quiet_transformers():
        generator = pipeline("mask-generation", model=str(folder), device="cpu")
        thresholds = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
        masks = generator(samples[0].image, points_per_crop=8, **thresholds)["masks"]
    print(f'pipeline("mask-generation", model="{folder}") finds {len(masks)} masks in the first of them.')
    print(f"Masks: {sheet}. Learning curves: curves.png of each stage. {time.time() - start:.0f} s.")
    return folder


def demonstration_teacher() -> SamConfig:
    """Return the config of a SAM of 0.7 million parameters for images of 64 px."""
    num_layers = 4
    vision = SamVisionConfig(
        hidden_size=96, num_hidden_layers=num_layers, num_attention_heads=4, mlp_dim=384, image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE, output_channels=_WIDTH, num_pos_feats=_WIDTH // 2, window_size=0,
        global_attn_indexes=list(range(num_layers)), use_rel_pos=False, initializer_range=0.02,
    )  # fmt: skip
    return SamConfig(vision_config=vision, **_decoder_configs())


def demonstration_student() -> SamLighteningConfig:
    """Return the config of a student half as deep and two thirds as wide.

    Its 64 tokens are split into bands, and into one dilated segment over the image, as in the published models.
    """
    vision = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": _IMAGE_SIZE,
        "patch_size": _PATCH_SIZE, "output_channels": _WIDTH, "num_pos_feats": _WIDTH // 2,
        "segment_length": (32, None), "dilation_rate": (1, 2),
    }  # fmt: skip
    return SamLighteningConfig(vision_config=vision, **_decoder_configs())


def _decoder_configs() -> dict[str, dict]:
    prompt_encoder = {"hidden_size": _WIDTH, "image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE}
    mask_decoder = {"hidden_size": _WIDTH, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": _WIDTH}
    return {"prompt_encoder_config": prompt_encoder, "mask_decoder_config": mask_decoder}


def _write_config(path: Path, config: SamConfig):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = config.to_json_string(use_diff=False)
    atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))  # other processes read and write it too


def measure(model: PreTrainedModel, images: ImageDataset, max_instances: int = 16) -> dict[str, float]:
    """Return the mIoU for boxes and single points over the objects of `images`."""
    promptable = PromptableModel(model, make_processor(model.config.vision_config))
    return mean_records(
        [record for i in range(len(images)) for record in mask_records(promptable, images[i], max_instances)]
    )


def filled_box_miou(images: ImageDataset, max_instances: int = 16) -> float:
    """Return the mIoU of a model that fills every prompted box completely."""
    ious = []
    for index in range(len(images)):
        for instance in images[index].instances[:max_instances]:
            width, height = instance.bbox_xywh[2:]
            ious.append(instance.area / (width * height))
    return float(sum(ious) / len(ious))


def _print_table(rows: dict[str, tuple[PreTrainedModel | None, dict[str, float]]]):
    names = list(rows["teacher"][1])
    print(f"{'':18}{'parameters':>12}" + "".join(f"{name:>20}" for name in names))
    for title, (model, metrics) in rows.items():
        size = f"{model.num_parameters():,}" if model is not None else ""
        values = "".join(f"{metrics[name]:20.3f}" if name in metrics else " " * 20 for name in names)
        print(f"{title:18}{size:>12}{values}".rstrip())
