"""Checkpoints of a training that are whole or not there, and what a resumed run must have in common with them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from torch.utils.data import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .arguments import DistillationArguments


SETTINGS_NAME = "distillation_settings.json"
STAGING_NAME = ".saving"

# Of these the examples, the schedules or the losses are made. The number of processes may change, if the global batch does not.
_RUN_DEFINING = (
    "stage", "max_steps", "global_batch_size", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "optim", "adam_beta1", "adam_beta2", "max_grad_norm", "num_focus_layers", "layer_weights", "ramp_fraction", "num_prompts",
    "box_share", "num_refinements", "focal_weight", "bce_weight", "dice_weight", "iou_weight", "data",
)  # fmt: skip


class CheckpointChangedError(ValueError):
    """A run that cannot go on from a checkpoint, because it was made with other settings."""


def run_settings(args: DistillationArguments, train_dataset: Dataset) -> dict:
    """What a checkpoint remembers of its run. The data are known by what `preprocessing` says of them, where they have it."""
    examples = getattr(train_dataset, "examples", train_dataset)
    data = examples.preprocessing() if hasattr(examples, "preprocessing") else None
    text = json.dumps(data, sort_keys=True, default=str)
    settings = {name: getattr(args, name) for name in _RUN_DEFINING if name != "data"}
    about_processes = {name: getattr(args, name) for name in ("world_size", "dataloader_num_workers")}
    settings = {**settings, "data": hashlib.sha256(text.encode()).hexdigest()[:16], **about_processes}
    return json.loads(json.dumps(settings, default=str))


def check_same_run(checkpoint: str | os.PathLike, current: dict, streams: bool) -> str | None:
    """Raises CheckpointChangedError where a setting that defines the run has changed; a sentence where the world size has.

    `current` is as `run_settings` gives it. The order of examples that are streamed depends on the number of processes and of
    workers too.
    """
    path = Path(checkpoint) / SETTINGS_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointChangedError(
            f"{checkpoint}: not a checkpoint of this trainer ({SETTINGS_NAME}: {error})."
        ) from error
    names = _RUN_DEFINING
    if streams:
        names = (*names, "world_size", "dataloader_num_workers")
    changed = [name for name in names if saved.get(name) != current[name]]
    if changed:
        listed = ", ".join(f"{name}={current[name]} (was {saved.get(name)})" for name in changed)
        raise CheckpointChangedError(
            f"{checkpoint} was made with other settings: {listed}. Schedules and data depend on them: resume with the old "
            "ones, or start a new output_dir whose student is this checkpoint."
        )
    if saved["world_size"] != current["world_size"]:
        return (
            f"Resuming on {current['world_size']} processes what {saved['world_size']} began: the pictures of each step are "
            "the same, their sums may differ in the last bits."
        )
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint, or None."""
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """The optimizer step at which it was saved."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def publish_checkpoint(staged: Path, final: Path):
    """Moves a finished checkpoint to where it is looked for; after a power cut too, it is there whole or not at all."""
    for path in [*staged.rglob("*"), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():  # of an earlier run in this folder that had gone on from an earlier checkpoint
        shutil.rmtree(final)
    os.replace(staged, final)
