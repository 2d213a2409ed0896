"""The trained module of each stage: a wrapper of the student whose `forward` takes a batch and returns its losses.

Gradients flow only through this module's `forward`, which DDP and FSDP wrap.

- "encoder": the image encoder learns the teacher's features. Prompt encoder and mask decoder are frozen.
- "decoder": the mask decoder learns masks on the student's features. Image and prompt encoder are frozen.
- "end_to_end": everything learns masks, which also trains a teacher from scratch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .losses import bce_loss, dice_loss, feature_loss, focal_loss, pairwise_mask_losses, true_iou


# The trained parts of each stage, by the names of the student's children.
TRAINABLE = {
    "encoder": ("vision_encoder",),
    "decoder": ("mask_decoder",),
    "end_to_end": ("vision_encoder", "prompt_encoder", "mask_decoder"),
}
STAGES = tuple(TRAINABLE)
POINT_TARGETS = ("own", "all")
POSITIVE = 1


class Stage(nn.Module):
    """Base of the stages: a student of which only the parts in `trainable` are trained.

    `forward` returns {"loss": scalar, name: scalar without gradient, ...}.
    """

    trainable: tuple[str, ...] = ()

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student: Any = student
        for name, part in student.named_children():
            part.requires_grad_(name in self.trainable)
        # Random features that encode coordinates. The prompt encoder shares them: a constant in SAM, a parameter here.
        student.shared_image_embedding.requires_grad_(False)
        self.projections = nn.ModuleList()  # of the student's layers to a teacher's; a stage may have some

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Return trained tensors that are not part of the student: saved to resume, and never exported."""
        return self.projections.state_dict()

    def load_extra_state(self, state: dict[str, torch.Tensor]):
        self.projections.load_state_dict(state)

    # Trainer calls one or the other, depending on its release.
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs)


class EncoderStage(Stage):
    """Decoupled feature distillation: L = sum_n a_n * MSE(P_n h_n, target_n).

    Focus layers are the student's last `num_focus_layers` layers, each with a linear projection P_n to the teacher's
    width, and the encoder's output, which is compared without a projection, because the decoder will read it without
    one.

    Args:
        student: a SamLighteningModel or a SamModel.
        focus_layers: indexes of student layers, in order; see `match_layers`.
        teacher_width: width of the teacher's hidden states.
    """

    trainable = TRAINABLE["encoder"]

    def __init__(self, student: nn.Module, focus_layers: Sequence[int], teacher_width: int):
        super().__init__(student)
        self.focus_layers = tuple(focus_layers)
        width = self.student.config.vision_config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, teacher_width) for _ in self.focus_layers)
        self.layer_weights: torch.Tensor
        self.register_buffer("layer_weights", torch.ones(len(self.focus_layers) + 1), persistent=False)

    def forward(self, pixel_values: torch.Tensor, targets: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: normalized pixels (B, 3, S, S).
            targets: the teacher's targets, as `Teacher.targets` returns them.

        Returns:
            "loss", the unweighted "layer_loss/N" of each focus layer, and "embedding_cosine", the mean cosine
            similarity of the
            embeddings: all scalars.
        """
        states, embeddings = encode(self.student.vision_encoder, pixel_values, self.focus_layers)
        features = [projection(state) for projection, state in zip(self.projections, states, strict=True)]
        losses = torch.stack([feature_loss(*pair) for pair in zip([*features, embeddings], targets, strict=True)])
        logs = {f"layer_loss/{n}": loss for n, loss in enumerate(losses.detach(), start=1)}
        with torch.no_grad():
            cosine = nn.functional.cosine_similarity(embeddings.float(), targets[-1].float(), dim=1).mean()
        return {"loss": (self.layer_weights * losses).sum(), **logs, "embedding_cosine": cosine}


def match_layers(num_student_layers: int, num_teacher_layers: int, num_focus_layers: int) -> list[tuple[int, int]]:
    """Match the last layers of the student to layers of the teacher that are spread evenly.

    A student layer is matched to the teacher layer that ends at the same share of the depth, so the last to the last.

    Returns:
        A (student layer, teacher layer) pair for each of the last `num_focus_layers` layers.

    Raises:
        ValueError: where the student has fewer layers than that.
    """
    if not 0 <= num_focus_layers <= num_student_layers:
        raise ValueError(
            f"num_focus_layers={num_focus_layers} must be from 0 to the student's "
            f"num_hidden_layers={num_student_layers}."
        )
    layers = range(num_student_layers - num_focus_layers, num_student_layers)
    return [(i, max(0, round((i + 1) * num_teacher_layers / num_student_layers) - 1)) for i in layers]


def focus_layers(
    student: PreTrainedModel, teacher_config: PreTrainedConfig, num_focus_layers: int
) -> list[tuple[int, int]]:
    """Return the (student layer, teacher layer) pairs that the stage "encoder" compares.

    Raises:
        ValueError: where the embeddings of the two cannot be compared, or the student has fewer layers than that.
    """
    student_config = student.config.vision_config
    for name in ("image_size", "patch_size", "output_channels"):
        size, teacher_size = getattr(student_config, name), getattr(teacher_config, name)
        if size != teacher_size:
            raise ValueError(
                f"the student's {name}={size} must equal the teacher's {teacher_size} in the stage encoder: their "
                "embeddings are compared. Use a student with the teacher's, such as a preset; image_size may be "
                "changed afterwards, in a run of the stage end_to_end."
            )
    num_layers = student_config.num_hidden_layers
    return match_layers(num_layers, teacher_config.num_hidden_layers, num_focus_layers)


def check_trained_parameters(stage: Stage, optimizer: torch.optim.Optimizer, is_fsdp: bool):
    """Check that an optimizer holds exactly the parameters that a stage trains.

    Args:
        stage: the module that is trained.
        optimizer: its optimizer, before the first step.
        is_fsdp: whether FSDP has replaced the parameters, so that the optimizer's cannot be compared.

    Raises:
        RuntimeError: for a parameter that is frozen and should be trained, or the other way round.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in stage.named_parameters():
        trains = not name.startswith("student.") or name.split(".")[1] in stage.trainable
        in_optimizer = trains if is_fsdp else id(parameter) in held
        if (parameter.requires_grad, in_optimizer) != (trains, trains):
            raise RuntimeError(f"{name} must be {'trained' if trains else 'frozen'} in this stage, and is not.")


def encode(
    vision_encoder: Any, pixel_values: torch.Tensor, layers: Sequence[int] = ()
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run an image encoder with gradients, and return the outputs of some layers.

    This is the encoder's own `forward`, written out: the hooks behind `output_hidden_states` would keep all layers in
    memory, and `SamModel.get_image_embeddings` cuts the gradient.

    Args:
        vision_encoder: the image encoder of a SamLighteningModel or a SamModel.
        pixel_values: normalized pixels (B, 3, S, S).
        layers: indexes of the layers to return.

    Returns:
        The outputs of `layers`, (B, h, w, C) each in that order, and the image embeddings (B, 256, h, w).
    """
    hidden_states = vision_encoder.patch_embed(pixel_values)
    if vision_encoder.pos_embed is not None:
        hidden_states = hidden_states + vision_encoder.pos_embed
    states = {}
    for index, layer in enumerate(vision_encoder.layers):
        hidden_states = layer(hidden_states)
        if index in layers:
            states[index] = hidden_states
    return [states[index] for index in layers], vision_encoder.neck(hidden_states)


class MaskStage(Stage):
    """Training on masks for boxes and points, then for refinement clicks with the previous logits fed back.

    The first of an image's P prompts are boxes, the others points (`box_share`). A box trains the single mask. A point
    is ambiguous: it trains three masks, of which the one with the lowest mask loss takes the gradient. Each of
    `num_refinements` rounds adds one click, drawn uniformly from the wrong pixels, and trains the single mask. The IoU
    head learns the IoU of every predicted mask.

    With `point_targets="all"` a point trains its three masks on every object of the image that contains it, a part and
    the whole alike: each object takes the mask that fits it best. The IoU head then learns the highest IoU of a mask
    with any object of the image.

    Args:
        student: a SamLighteningModel or a SamModel.
        stage: "decoder" or "end_to_end".
        loss_weights: weights of "focal", "bce", "dice" and "iou".
        box_share: share of the prompts that are boxes.
        num_refinements: number of clicks that are added one by one.
        point_targets: one of `POINT_TARGETS`.
        feature_widths: channels of each map of `FeatureTeacher.targets`. Linear projections of the encoder's last layer
            learn these maps.
        feature_weight: weight of their mean squared error.
    """

    def __init__(
        self,
        student: nn.Module,
        stage: str,
        loss_weights: dict[str, float],
        box_share: float = 0.5,
        num_refinements: int = 1,
        point_targets: str = "own",
        feature_widths: Sequence[int] = (),
        feature_weight: float = 1.0,
    ):
        if stage not in ("decoder", "end_to_end"):
            raise ValueError(f'stage={stage!r} must be "decoder" or "end_to_end".')
        self.trainable = TRAINABLE[stage]
        super().__init__(student)
        self.encoder_is_frozen = stage == "decoder"
        self.loss_weights = loss_weights
        self.box_share = box_share
        self.num_refinements = num_refinements
        self.point_targets = point_targets
        config = self.student.config.vision_config
        self.last_layer, self.feature_weight = config.num_hidden_layers - 1, feature_weight
        self.projections = nn.ModuleList(nn.Linear(config.hidden_size, width) for width in feature_widths)

    def forward(
        self,
        pixel_values: torch.Tensor,
        masks: torch.Tensor,
        boxes: torch.Tensor,
        points: torch.Tensor,
        uniforms: torch.Tensor,
        features: Sequence[torch.Tensor] = (),
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: normalized pixels (B, 3, S, S).
            masks: targets (B, P, M, M).
            boxes: (B, P, 4), XYXY in pixels of the S x S frame.
            points: (B, P, 2), XY in pixels of the S x S frame.
            uniforms: (B, P, K) in [0, 1); round k places its click by the k-th of them.
            features: the maps of `FeatureTeacher.targets`, one for each of `feature_widths`.

        Returns:
            "loss", the mean "iou/KIND" and "iou/KIND_click_N" for boxes and points, and with `features` the unweighted
            "feature_loss": all scalars.
        """
        layers = (self.last_layer,) if self.projections else ()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            states, embeddings = encode(self.student.vision_encoder, pixel_values, layers)
        num_prompts = masks.shape[1]
        num_boxes = round(self.box_share * num_prompts)
        logs: dict[str, torch.Tensor] = {}
        parts: list[torch.Tensor] = []
        for kind, start, stop in (("box", 0, num_boxes), ("point", num_boxes, num_prompts)):
            if start == stop:
                continue
            # One prompt for each element of the batch: SAM takes one fed-back mask for each element.
            prompts = [tensor[:, start:stop].flatten(0, 1) for tensor in (masks, boxes, points, uniforms)]
            losses = self._rounds(kind, embeddings.repeat_interleave(stop - start, 0), prompts, masks, logs)
            parts.append(losses.mean() * (stop - start) / num_prompts)
        if self.projections:
            state = nn.functional.layer_norm(states[0], states[0].shape[-1:])
            pairs = zip(self.projections, features, strict=True)
            loss = torch.stack([feature_loss(projection(state), target) for projection, target in pairs]).mean()
            parts.append(self.feature_weight * loss)
            logs["feature_loss"] = loss.detach()
        return {"loss": torch.stack(parts).sum(), **logs}

    def _rounds(
        self,
        kind: str,
        embeddings: torch.Tensor,
        prompt_tensors: Sequence[torch.Tensor],
        image_targets: torch.Tensor,
        logs: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the loss of each of n prompts (n,), a mean over its rounds.

        `prompt_tensors` are targets, boxes, points and uniforms with n rows each. `image_targets` (B, P, M, M) are all
        targets of each image. The IoUs are added to `logs`.
        """
        targets, boxes, points, uniforms = prompt_tensors
        scale = self.student.config.vision_config.image_size / targets.shape[-1]
        prompts = {"input_boxes": boxes[:, None]} if kind == "box" else {"input_points": points[:, None, None]}
        if kind == "point":
            prompts["input_labels"] = torch.full_like(points[:, None, None, 0], POSITIVE, dtype=torch.long)
        total = torch.zeros((), device=embeddings.device)
        for step in range(self.num_refinements + 1):
            multimask = kind == "point" and step == 0
            outputs = self.student(image_embeddings=embeddings, multimask_output=multimask, **prompts)
            logits, predicted_iou = outputs.pred_masks[:, 0], outputs.iou_scores[:, 0]  # (n, m, M, M), (n, m)
            if multimask and self.point_targets == "all":
                loss, ious = self._loss_of_all(logits, predicted_iou, targets, points / scale, image_targets)
            else:
                loss, ious = self._loss(logits, predicted_iou, targets)
            total = total + loss
            chosen = predicted_iou.argmax(dim=1)
            rows = torch.arange(len(chosen), device=chosen.device)
            name = f"iou/{kind}" if step == 0 else f"iou/{kind}_click_{step}"
            logs[name] = ious[rows, chosen].mean()
            if step == self.num_refinements:
                break
            logits = logits[rows, chosen].detach()
            clicks, labels = sample_clicks(logits > 0, targets, uniforms[:, step])
            clicks = ((clicks + 0.5) * scale - 0.5)[:, None, None]  # the center of a mask's pixel, in the frame
            prompts = _add_clicks(prompts, clicks, labels[:, None, None])
            prompts["input_masks"] = logits[:, None].to(embeddings.dtype)
        return total / (self.num_refinements + 1)

    def _loss(self, logits, predicted_iou, targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss (n,) and the true IoU (n, m) of n prompts with m masks each."""
        targets = targets[:, None].expand_as(logits)
        mask_loss = torch.zeros((), device=logits.device)
        for name, function in (("focal", focal_loss), ("bce", bce_loss), ("dice", dice_loss)):
            if self.loss_weights[name]:
                mask_loss = mask_loss + self.loss_weights[name] * function(logits, targets)
        ious = true_iou(logits.detach(), targets)
        # The IoUs of all masks are learned, not only the best one's: at inference they choose between the three.
        iou_loss = (predicted_iou.float() - ious).square().mean(dim=1)
        return mask_loss.min(dim=1).values + self.loss_weights["iou"] * iou_loss, ious

    def _loss_of_all(self, logits, predicted_iou, targets, cells, image_targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the same as `_loss` for points in cells (n, 2) of the masks, on every target that contains them."""
        num_images, size = len(image_targets), logits.shape[-1]
        per_image = (num_images, -1, *logits.shape[1:2])  # (B, k, m)
        losses, ious = pairwise_mask_losses(
            logits.reshape(num_images, -1, size, size), image_targets, self.loss_weights
        )  # (B, k * m, P)
        best = losses.unflatten(1, per_image[1:]).min(dim=2).values.flatten(0, 1)  # (n, P)
        column, row = cells.long().clamp(0, size - 1).unflatten(0, (num_images, -1)).unbind(-1)  # (B, k)
        images = torch.arange(num_images, device=cells.device)[:, None]
        holds = image_targets.bool()[images, :, row, column].flatten(0, 1).float()  # (n, P)
        mask_loss = (best * holds).sum(dim=1) / holds.sum(dim=1).clamp(min=1)
        fit = ious.detach().max(dim=2).values.reshape(predicted_iou.shape)
        iou_loss = (predicted_iou.float() - fit).square().mean(dim=1)
        own = true_iou(logits.detach(), targets[:, None].expand_as(logits))
        return mask_loss + self.loss_weights["iou"] * iou_loss, own


def _add_clicks(prompts: dict, clicks: torch.Tensor, labels: torch.Tensor) -> dict:
    if "input_points" in prompts:
        clicks = torch.cat([prompts["input_points"], clicks], dim=2)
        labels = torch.cat([prompts["input_labels"], labels], dim=2)
    return {**prompts, "input_points": clicks, "input_labels": labels}


def sample_clicks(
    predicted: torch.Tensor, targets: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one click for each of n masks, uniformly from the pixels where the prediction is wrong.

    Args:
        predicted: bool (n, H, W).
        targets: (n, H, W). Where no pixel is wrong, the target is clicked.
        uniforms: (n,) in [0, 1), the random draws.

    Returns:
        float (n, 2), the (x, y) of a pixel, and int64 (n,): 1 where the object was missed, 0 where the prediction is
        too large.
    """
    targets = targets.bool()
    wrong = predicted ^ targets
    wrong = torch.where(wrong.any(dim=2).any(dim=1)[:, None, None], wrong, targets)
    # Choose a number among the wrong pixels, then its row, then its column. (Inductor of torch 2.11 fails to compile
    # one cumulative sum over all pixels.)
    rows = wrong.sum(dim=2).cumsum(dim=1)  # (n, H)
    rank = (uniforms.double() * rows[:, -1]).floor().long()[:, None]
    row = (rows <= rank).sum(dim=1, keepdim=True).clamp(max=rows.shape[1] - 1)
    before = torch.where(row > 0, rows.gather(1, (row - 1).clamp(min=0)), 0)
    masks = torch.arange(len(row), device=row.device)
    columns = wrong[masks, row[:, 0]].cumsum(dim=1)  # (n, W)
    column = (columns <= rank - before).sum(dim=1, keepdim=True).clamp(max=columns.shape[1] - 1)
    labels = targets[masks, row[:, 0], column[:, 0]].long()
    return torch.cat([column, row], dim=1).float(), labels
