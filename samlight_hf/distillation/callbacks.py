"""Callbacks of the training: stop at a loss that is not finite, measure throughput, draw masks."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from ..data import Sample, decode_masks
from ..evaluation.metrics.mask_iou.iou import mask_iou
from ..masks.boxes import xywh_to_xyxy
from ..masks.drawing import Panel, contact_sheet, draw_overlay
from ..masks.results import MaskResult
from ..utils.atomic_files import atomic_write
from .checkpoints import last_checkpoint


class TrainingDivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite."""


class FiniteLossCallback(TrainerCallback):
    """Callback that stops a training whose loss is NaN or infinite, and names the last good checkpoint.

    It checks the loss only where it is logged, so the GPU does not wait at every step.
    """

    def on_log(self, args, state, control, logs, **kwargs):
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise diverged(f"loss={loss}", args.output_dir, state.global_step)


def diverged(what: str, output_dir: str, step: int) -> TrainingDivergedError:
    checkpoint = last_checkpoint(output_dir)
    good = f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint had been saved"
    return TrainingDivergedError(
        f"{what} at step {step}: the training diverged, and nothing was saved from there on. {good}. Lower "
        "learning_rate, or raise warmup_steps, in a new output_dir."
    )


class ThroughputCallback(TrainerCallback):
    """Callback that logs `images_per_second` over all devices since the last log, without evaluation and saving."""

    def __init__(self):
        self._since, self._step, self._paused = None, 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._since is None:
            self._since, self._step = now, state.global_step
        elif self._paused:  # the step before ended with evaluating or saving
            self._since += now - self._paused
        self._paused = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self._paused = time.perf_counter()

    def logs(self, state, args) -> dict[str, float]:
        now = self._paused or time.perf_counter()
        seconds, steps = now - self._since, state.global_step - self._step
        self._since, self._step = now, state.global_step
        return {"images_per_second": steps * args.global_batch_size / seconds} if seconds > 0 and steps else {}


class MaskImageCallback(TrainerCallback):
    """Callback that draws the student's masks for the boxes of a few images with objects at every evaluation.

    It writes `output_dir`/pictures/step-N.png, and passes the image to tensorboard, trackio and wandb where these are
    in use.
    """

    def __init__(self, samples: Sequence[Sample], max_instances: int = 8):
        self.samples, self.max_instances = [sample for sample in samples if sample.instances], max_instances
        self.trainer: Any = None  # set by DistillationTrainer

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.samples:
            return
        sheet = draw_masks(self.trainer.promptable(), self.samples, f"step {state.global_step}", self.max_instances)
        folder = Path(args.output_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"step-{state.global_step}.png", lambda path: sheet.save(path, format="PNG"))
        self._track(sheet, state.global_step)

    def _track(self, sheet: Image.Image, step: int):
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image("masks", np.asarray(sheet), step, dataformats="HWC")
            for name in ("_wandb", "_trackio"):
                tracker = getattr(callback, name, None)
                if tracker is not None:
                    tracker.log({"masks": tracker.Image(np.asarray(sheet)), "train/global_step": step})


@torch.inference_mode()
def draw_masks(promptable, samples: Sequence[Sample], title: str, max_instances: int = 8) -> Image.Image:
    """Draw a sheet with two panels for each sample: the annotated masks, and the masks predicted for their boxes."""
    panels = []
    for sample in samples:
        instances = sorted(sample.instances, key=lambda instance: -instance.area)[:max_instances]
        if not instances:
            continue
        boxes = torch.tensor([xywh_to_xyxy(instance.bbox_xywh) for instance in instances])
        prediction = promptable.predict(promptable.encode([sample.image])[0], boxes_xyxy=boxes, multimask_output=False)
        targets, masks = decode_masks(instances), prediction.masks[:, 0].cpu().numpy()
        iou = mask_iou(masks, targets).mean()
        zeros = np.zeros(len(instances), dtype=np.float32)
        for subtitle, drawn in (
            (f"{len(instances)} annotated masks", targets),
            (f"for their boxes: IoU {iou:.2f}", masks),
        ):
            result = MaskResult(np.ascontiguousarray(drawn), zeros, boxes.numpy().astype(np.float32))
            image = draw_overlay(sample.image, result, boxes.tolist(), max_size=(360, 360))
            panels.append(Panel(image, sample.id, subtitle))
    return contact_sheet(panels, title, columns=4)
