"""Checkpoints of a training that are whole or not there, and what a resumed run must have in common with them."""

import hashlib
import json
import os
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..loading import weights_fingerprint
from ..utils.atomic_files import atomic_write
from ..utils.json_files import read_json
from .arguments import DistillationArguments
from .stages import TRAINABLE
from .teacher import Teacher


SETTINGS_NAME = "distillation_settings.json"
STAGING_NAME = ".saving"

# Of these the examples, the schedules or the losses are made. The number of processes may change, if the global batch does not.
_RUN_DEFINING = (
    "stage", "max_steps", "global_batch_size", "seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "muon", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
    "fp16", "num_focus_layers", "layer_weights", "ramp_fraction", "teacher_dtype", "num_prompts", "box_share", "point_targets",
    "num_refinements", "focal_weight", "bce_weight", "dice_weight", "iou_weight",
)  # fmt: skip
# What a config says of where its weights were, and not of what is computed.
_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "transformers_version")
_OF_THE_PROCESSES = ("world_size", "per_device_train_batch_size", "dataloader_num_workers")


class CheckpointChangedError(ValueError):
    """A run that cannot go on from a checkpoint, because it was made with other settings."""


def run_settings(
    args: DistillationArguments, examples: Dataset, teacher: Teacher | None, student: PreTrainedModel
) -> dict:
    """What defines a run, as a checkpoint remembers it: settings, and what is known of data, teacher, and the student as it began.

    Reads the names of all images. The data are known by what `preprocessing` and `order` say of them, where they have these.
    """
    data = [getattr(examples, name)() for name in ("preprocessing", "order") if hasattr(examples, name)]
    settings = {name: getattr(args, name) for name in (*_RUN_DEFINING, *_OF_THE_PROCESSES)}
    settings["data"] = _digest(data)
    settings["teacher"] = None if teacher is None else _digest([teacher.fingerprint, teacher.layers])
    config = student.config.vision_config.to_dict()
    architecture = {name: value for name, value in config.items() if name not in _OF_THE_FILE}
    parts = {name: weights_fingerprint(part) for name, part in student.named_children()}
    frozen = {name: fingerprint for name, fingerprint in parts.items() if name not in TRAINABLE[args.stage]}
    settings["student"], settings["frozen"] = _digest([parts, architecture]), _digest([frozen, architecture])
    return json.loads(json.dumps(settings, default=str))


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_settings(checkpoint: str | os.PathLike) -> dict:
    """The settings that a checkpoint was saved with. Raises CheckpointChangedError for one that this trainer cannot resume."""
    missing = [name for name in (SETTINGS_NAME, TRAINER_STATE_NAME) if not (Path(checkpoint) / name).is_file()]
    if missing:
        raise CheckpointChangedError(
            f"{checkpoint}: not a checkpoint of this trainer: it has no {' and no '.join(missing)}."
        )
    return read_json(Path(checkpoint) / SETTINGS_NAME, dict)


def check_same_run(
    where: str | os.PathLike, saved: dict, current: dict, streams: bool, is_finished: bool = False
) -> str | None:
    """Raises CheckpointChangedError where a setting that defines the run has changed; a sentence where the world size has.

    Both are as `run_settings` gives them. The order of examples that are streamed depends on the processes too. A checkpoint
    brings the weights that are trained, and so the student must have its others; a stage that is finished, all of those it began with.
    """
    names = (
        *_RUN_DEFINING,
        "data",
        "teacher",
        "student" if is_finished else "frozen",
        *(_OF_THE_PROCESSES if streams else ()),
    )
    changed = [name for name in names if saved.get(name) != current[name]]
    if changed:
        listed = ", ".join(f"{name}={current[name]} (was {saved.get(name)})" for name in changed)
        raise CheckpointChangedError(
            f"{where} was made with other settings: {listed}. Schedules, data or losses depend on them: resume with the old "
            "ones, or start a new output_dir."
        )
    if saved["world_size"] != current["world_size"]:
        return (
            f"Resuming on {current['world_size']} processes what {saved['world_size']} began: the images of each step are "
            "the same, their sums may differ in the last bits."
        )
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint, or None."""
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """The optimizer step at which it was saved."""
    return read_json(Path(checkpoint) / TRAINER_STATE_NAME, dict)["global_step"]


def find_best_again(checkpoint: str | os.PathLike, output_dir: str | os.PathLike):
    """The best checkpoint is remembered by its path: in a folder that was moved, it is made the one that is there."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = read_json(path, dict)
    best = state["best_model_checkpoint"]
    if best and not os.path.isdir(best) and (moved := Path(output_dir) / Path(best).name).is_dir():
        text = json.dumps({**state, "best_model_checkpoint": str(moved)}, indent=2)
        atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))
