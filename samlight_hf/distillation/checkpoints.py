"""Checkpoints that are complete or absent, and the settings that a resumed run must share with them."""

import hashlib
import json
import os
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..loading import computed_settings, weights_fingerprint
from ..utils.atomic_files import atomic_write
from ..utils.json_files import read_json
from .arguments import DistillationArguments
from .feature_teacher import FeatureTeacher
from .stages import TRAINABLE
from .teacher import Teacher


SETTINGS_NAME = "distillation_settings.json"
STAGING_NAME = ".saving"

# Settings that determine the examples, the schedules or the losses.
# The number of processes may change if the global batch size does not.
_RUN_DEFINING = (
    "stage", "max_steps", "global_batch_size", "seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "muon", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "bf16", "fp16", "num_focus_layers", "layer_weights", "ramp_fraction", "teacher_dtype",
    "num_prompts", "box_share", "point_targets", "num_refinements", "focal_weight", "bce_weight", "dice_weight",
    "iou_weight",
)  # fmt: skip
# What the settings that are hashes stand for.
_HASHED = {
    "data": "the training data, their augmentation, views and prompts",
    "teacher": "the teacher's weights and layers",
    "feature_teacher": "the feature_teacher's weights, input size and weight",
    "student": "the weights and the config of the student that the stage begins with",
    "frozen": "the student's config, and the weights that the stage does not train",
}
_OF_THE_PROCESSES = ("world_size", "per_device_train_batch_size", "dataloader_num_workers")


class CheckpointNotSavedError(RuntimeError):
    """A checkpoint could not be written. The message names the last whole one."""


class CheckpointChangedError(ValueError):
    """A run cannot resume from a checkpoint, because that was made with other settings."""


def run_settings(
    args: DistillationArguments,
    examples: Dataset,
    teacher: Teacher | None,
    student: PreTrainedModel,
    feature_teacher: FeatureTeacher | None = None,
) -> dict:
    """Return the settings that define a run, as a checkpoint stores them.

    Reads the names of all images.

    Args:
        args: the stage's settings.
        examples: the training data, identified by their methods `preprocessing` and `order` where they have these.
        teacher: the teacher, identified by its weights and layers.
        student: the student before training, identified by its weights and configuration.
        feature_teacher: the teacher of features beside the masks, identified by its weights and input size.
    """
    data = [getattr(examples, name)() for name in ("preprocessing", "order") if hasattr(examples, name)]
    settings = {name: getattr(args, name) for name in (*_RUN_DEFINING, *_OF_THE_PROCESSES)}
    settings["data"] = _digest(data)
    settings["teacher"] = None if teacher is None else _digest([teacher.fingerprint, teacher.layers])
    if feature_teacher is not None:
        features = [feature_teacher.fingerprint, feature_teacher.image_size, args.feature_weight]
        settings["feature_teacher"] = _digest(features)
    architecture = computed_settings(student.config.vision_config.to_dict())
    parts = {name: weights_fingerprint(part) for name, part in student.named_children()}
    frozen = {name: fingerprint for name, fingerprint in parts.items() if name not in TRAINABLE[args.stage]}
    settings["student"], settings["frozen"] = _digest([parts, architecture]), _digest([frozen, architecture])
    return json.loads(json.dumps(settings, default=str))


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_settings(checkpoint: str | os.PathLike) -> dict:
    """Return the settings that a checkpoint was saved with.

    Raises:
        CheckpointChangedError: for a folder that this trainer cannot resume from.
    """
    missing = [name for name in (SETTINGS_NAME, TRAINER_STATE_NAME) if not (Path(checkpoint) / name).is_file()]
    if missing:
        raise CheckpointChangedError(
            f"{checkpoint}: not a checkpoint of this trainer: it has no {' and no '.join(missing)}."
        )
    return read_json(Path(checkpoint) / SETTINGS_NAME, dict)


def check_same_run(
    where: str | os.PathLike, saved: dict, current: dict, streams: bool, is_finished: bool = False
) -> str | None:
    """Compare two runs' settings, both as returned by `run_settings`.

    Args:
        where: the folder of the saved settings, for the error message.
        saved: the settings of the checkpoint or of the finished stage.
        current: the settings of this run.
        streams: whether the examples are streamed. Their order depends on the processes too.
        is_finished: whether `saved` belongs to a finished stage, which must have begun with the same student. A
            checkpoint contains the trained weights, so only the frozen ones must agree.

    Returns:
        A notice for the user where only the number of processes has changed, otherwise None.

    Raises:
        CheckpointChangedError: where a setting that defines the run has changed.
    """
    names = (
        *_RUN_DEFINING,
        "data",
        "teacher",
        "feature_teacher",
        "student" if is_finished else "frozen",
        *(_OF_THE_PROCESSES if streams else ()),
    )
    changed = [name for name in names if saved.get(name) != current.get(name)]
    if changed:
        values = ", ".join(f"{name}={current.get(name)} (was {saved.get(name)})" for name in changed)
        hashed = "".join(f" Here {name} is a hash of {_HASHED[name]}." for name in changed if name in _HASHED)
        raise CheckpointChangedError(
            f"{where} was made with other settings: {values}.{hashed} Schedules, data or losses depend on them: "
            "resume with the old ones, or start a new output_dir."
        )
    if saved["world_size"] != current["world_size"]:
        return (
            f"Resuming on {current['world_size']} processes what {saved['world_size']} began: the images of each step "
            "are the same, their sums may differ in the last bits."
        )
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest complete checkpoint, or None."""
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """Return the optimizer step at which a checkpoint was saved."""
    return read_json(Path(checkpoint) / TRAINER_STATE_NAME, dict)["global_step"]


def find_best_again(checkpoint: str | os.PathLike, output_dir: str | os.PathLike):
    """Correct the path of the best checkpoint in a trainer state whose folder was moved."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = read_json(path, dict)
    best = state["best_model_checkpoint"]
    if best and not os.path.isdir(best) and (moved := Path(output_dir) / Path(best).name).is_dir():
        text = json.dumps({**state, "best_model_checkpoint": str(moved)}, indent=2)
        atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))
