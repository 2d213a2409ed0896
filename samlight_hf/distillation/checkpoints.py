"""Checkpoints of a training that are whole or not there, and what a resumed run must have in common with them."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .arguments import DistillationArguments


SETTINGS_NAME = "distillation_settings.json"
STAGING_NAME = ".saving"

# Of these the examples, the schedules or the losses are made. The number of processes may change, if the global batch does not.
_RUN_DEFINING = (
    "stage", "max_steps", "global_batch_size", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "optim", "adam_beta1", "adam_beta2", "max_grad_norm", "num_focus_layers", "layer_weights", "ramp_fraction", "num_prompts",
    "box_share", "num_refinements", "focal_weight", "bce_weight", "dice_weight", "iou_weight",
)  # fmt: skip


class CheckpointChangedError(ValueError):
    """A run that cannot go on from a checkpoint, because it was made with other settings."""


def run_settings(args: DistillationArguments) -> dict:
    """What a checkpoint remembers of its run."""
    settings = {name: getattr(args, name) for name in _RUN_DEFINING}
    return json.loads(json.dumps({**settings, "world_size": args.world_size}, default=str))


def check_same_run(checkpoint: str | os.PathLike, args: DistillationArguments) -> str | None:
    """Raises CheckpointChangedError where a setting that defines the run has changed; a sentence where the world size has."""
    path = Path(checkpoint) / SETTINGS_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointChangedError(
            f"{checkpoint}: not a checkpoint of this trainer ({SETTINGS_NAME}: {error})."
        ) from error
    current = run_settings(args)
    changed = [name for name in _RUN_DEFINING if saved.get(name) != current[name]]
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
