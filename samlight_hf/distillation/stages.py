"""What is trained in each stage: a module around the student whose `forward` takes a batch and returns its losses.

Gradients flow through this module's `forward` alone, which is what DDP and FSDP wrap.

- "encoder": the image encoder learns the teacher's features. Prompt encoder and mask decoder are frozen.
- "decoder": the mask decoder learns masks on the student's features. Image and prompt encoder are frozen.
- "end_to_end": everything learns masks, which also trains a teacher from scratch.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .losses import bce_loss, dice_loss, feature_loss, focal_loss, pairwise_mask_losses, true_iou
from .mask_prediction import predict_masks


# What each trains: parts of the student, by the names of its children.
TRAINABLE = {
    "encoder": ("vision_encoder",),
    "decoder": ("mask_decoder",),
    "end_to_end": ("vision_encoder", "prompt_encoder", "mask_decoder"),
}
STAGES = tuple(TRAINABLE)
POINT_TARGETS = ("own", "all")
POSITIVE = 1


class Stage(nn.Module):
    """Common to both: the student, of which only `trainable` is trained.

    `forward` returns {"loss": scalar, name: scalar without gradient, ...}.
    """

    trainable: tuple[str, ...] = ()

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        for name, part in student.named_children():
            part.requires_grad_(name in self.trainable)
        # Random features that coordinates are written in. The prompt encoder shares them: a constant in SAM, a parameter here.
        student.shared_image_embedding.requires_grad_(False)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Trained tensors that are no part of the student: saved to resume, and never exported."""
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]):
        assert not state, sorted(state)

    # Trainer calls one or the other, by its release; both pass through to the student.
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs)


class EncoderStage(Stage):
    """Decoupled feature distillation: L = sum_n a_n * MSE(P_n h_n, target_n).

    Focus layers are the student's last `num_focus_layers` layers, each with a linear projection P_n to the teacher's
    width, and the encoder's output, which is compared as it is: the decoder will read it without a projection.

    Args:
        student: a SamLighteningModel or a SamModel.
        focus_layers: indexes of student layers, in order; see `match_layers`.
        teacher_width: of the teacher's hidden states.
    """

    trainable = TRAINABLE["encoder"]

    def __init__(self, student: nn.Module, focus_layers: Sequence[int], teacher_width: int):
        super().__init__(student)
        self.focus_layers = tuple(focus_layers)
        width = student.config.vision_config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, teacher_width) for _ in self.focus_layers)
        self.register_buffer("layer_weights", torch.ones(len(self.focus_layers) + 1), persistent=False)

    def forward(self, pixel_values: torch.Tensor, targets: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Normalized pixels (B, 3, S, S); targets as `Teacher.targets` gives them."""
        states, embeddings = encode(self.student.vision_encoder, pixel_values, self.focus_layers)
        features = [projection(state) for projection, state in zip(self.projections, states, strict=True)]
        losses = torch.stack([feature_loss(*pair) for pair in zip([*features, embeddings], targets, strict=True)])
        logs = {f"layer_loss/{n}": loss for n, loss in enumerate(losses.detach(), start=1)}
        with torch.no_grad():
            cosine = nn.functional.cosine_similarity(embeddings.float(), targets[-1].float(), dim=1).mean()
        return {"loss": (self.layer_weights * losses).sum(), **logs, "embedding_cosine": cosine}

    def extra_state(self) -> dict[str, torch.Tensor]:
        return self.projections.state_dict()

    def load_extra_state(self, state: dict[str, torch.Tensor]):
        self.projections.load_state_dict(state)


def match_layers(num_student_layers: int, num_teacher_layers: int, num_focus_layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer) for the last `num_focus_layers` of the student, teacher layers spread evenly.

    Layer i of S is matched to the teacher layer that ends at the same share of the depth, so the last to the last.
    Raises ValueError where the student has fewer layers than that.
    """
    if not 0 <= num_focus_layers <= num_student_layers:
        raise ValueError(
            f"num_focus_layers={num_focus_layers} must be from 0 to the student's num_hidden_layers={num_student_layers}."
        )
    layers = range(num_student_layers - num_focus_layers, num_student_layers)
    return [(i, max(0, round((i + 1) * num_teacher_layers / num_student_layers) - 1)) for i in layers]


def encode(
    vision_encoder: nn.Module, pixel_values: torch.Tensor, layers: Sequence[int] = ()
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of `layers`, (B, h, w, C) each in that order, and the image embeddings (B, 256, h, w), with gradients.

    The encoder's own `forward`, written out: the hooks behind `output_hidden_states` would keep all layers alive, and
    `SamModel.get_image_embeddings` cuts the gradient.
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
    """Masks for boxes and points, then for refinement clicks with the previous logits fed back.

    Of an image's P prompts the first are boxes, the others points (`box_share`). A box trains the single mask; a point,
    which is ambiguous, trains three, of which the one with the lowest mask loss takes the gradient. Each of
    `num_refinements` rounds adds one click, drawn evenly from the pixels that are wrong, and trains the single mask.
    The IoU head learns the IoU of every predicted mask.

    With `point_targets="all"` a point trains its three masks on every object of the image that it lies in, a part and
    the whole alike: each takes the mask that fits it best. The IoU head then learns the IoU with the object that a mask
    fits best, whichever of the image that is.

    Args:
        student: a SamLighteningModel or a SamModel.
        stage: "decoder" or "end_to_end".
        loss_weights: of "focal", "bce", "dice" and "iou".
        point_targets: one of `POINT_TARGETS`.
    """

    def __init__(
        self,
        student: nn.Module,
        stage: str,
        loss_weights: dict[str, float],
        box_share: float = 0.5,
        num_refinements: int = 1,
        point_targets: str = "own",
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

    def forward(
        self,
        pixel_values: torch.Tensor,
        masks: torch.Tensor,
        boxes: torch.Tensor,
        points: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Normalized pixels (B, 3, S, S); targets (B, P, M, M); boxes (B, P, 4) and points (B, P, 2) in pixels of the S x S
        frame; uniforms (B, P, K) in [0, 1), of which round k takes the k-th to place its click.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            _, embeddings = encode(self.student.vision_encoder, pixel_values)
        num_prompts = masks.shape[1]
        num_boxes = round(self.box_share * num_prompts)
        logs: dict[str, torch.Tensor] = {}
        parts = []
        for kind, start, stop in (("box", 0, num_boxes), ("point", num_boxes, num_prompts)):
            if start == stop:
                continue
            # One prompt for each element of the batch: SAM takes one fed-back mask for each of them.
            flat = [tensor[:, start:stop].flatten(0, 1) for tensor in (masks, boxes, points, uniforms)]
            losses = self._rounds(kind, embeddings.repeat_interleave(stop - start, 0), *flat, masks, logs)
            parts.append(losses.mean() * (stop - start) / num_prompts)
        return {"loss": sum(parts), **logs}

    def _rounds(self, kind, embeddings, targets, boxes, points, uniforms, image_targets, logs) -> torch.Tensor:
        """The loss of each of n prompts (n,), a mean over its rounds. `image_targets` are all of an image's, (B, P, M, M)."""
        scale = self.student.config.vision_config.image_size / targets.shape[-1]
        prompts = {"input_boxes": boxes[:, None]} if kind == "box" else {"input_points": points[:, None, None]}
        if kind == "point":
            prompts["input_labels"] = torch.full_like(points[:, None, None, 0], POSITIVE, dtype=torch.long)
        total = 0
        for step in range(self.num_refinements + 1):
            multimask = kind == "point" and step == 0
            logits, predicted_iou = predict_masks(self.student, embeddings, prompts, multimask)  # (n, m, M, M), (n, m)
            if multimask and self.point_targets == "all":
                loss, ious = self._loss_of_all(logits, predicted_iou, targets, points / scale, image_targets)
            else:
                loss, ious = self._loss(logits, predicted_iou, targets)
            total = total + loss
            chosen = predicted_iou.argmax(dim=1)
            each = torch.arange(len(chosen), device=chosen.device)
            name = f"iou/{kind}" if step == 0 else f"iou/{kind}_click_{step}"
            logs[name] = ious[each, chosen].mean()
            if step == self.num_refinements:
                break
            logits = logits[each, chosen].detach()
            clicks, labels = sample_clicks(logits > 0, targets, uniforms[:, step])
            clicks = ((clicks + 0.5) * scale - 0.5)[:, None, None]  # the centre of a mask's pixel, in the frame
            prompts = _add_clicks(prompts, clicks, labels[:, None, None])
            prompts["input_masks"] = logits[:, None].to(embeddings.dtype)
        return total / (self.num_refinements + 1)

    def _loss(self, logits, predicted_iou, targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Of n prompts with m masks each: the loss (n,), and the true IoU (n, m)."""
        targets = targets[:, None].expand_as(logits)
        mask_loss = 0
        for name, function in (("focal", focal_loss), ("bce", bce_loss), ("dice", dice_loss)):
            if self.loss_weights[name]:
                mask_loss = mask_loss + self.loss_weights[name] * function(logits, targets)
        ious = true_iou(logits.detach(), targets)
        # All the masks' IoUs are learned, not the best one's alone: at inference they choose between the three.
        iou_loss = (predicted_iou.float() - ious).square().mean(dim=1)
        return mask_loss.min(dim=1).values + self.loss_weights["iou"] * iou_loss, ious

    def _loss_of_all(self, logits, predicted_iou, targets, cells, image_targets) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_loss`, for points in `cells` (n, 2) of the masks, on every target of their image that holds them."""
        num_images, size = len(image_targets), logits.shape[-1]
        per_image = (num_images, -1, *logits.shape[1:2])  # (B, k, m)
        losses, ious = pairwise_mask_losses(
            logits.reshape(num_images, -1, size, size), image_targets, self.loss_weights
        )  # (B, k * m, P)
        best = losses.unflatten(1, per_image[1:]).min(dim=2).values.flatten(0, 1)  # (n, P)
        column, row = cells.long().clamp(0, size - 1).unflatten(0, (num_images, -1)).unbind(-1)  # (B, k)
        each = torch.arange(num_images, device=cells.device)[:, None]
        holds = image_targets.bool()[each, :, row, column].flatten(0, 1).float()  # (n, P)
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
    """One click for each of n masks, drawn evenly from the pixels where the prediction is wrong.

    Masks are bool (n, H, W); `uniforms` (n,) in [0, 1) are the draws. Returns float (n, 2), the pixel's (x, y), and int64
    (n,), 1 where the object was missed, 0 where there is too much. Where nothing is wrong, the target is clicked.
    """
    targets = targets.bool()
    wrong = predicted ^ targets
    wrong = torch.where(wrong.any(dim=2).any(dim=1)[:, None, None], wrong, targets)
    # Which of the wrong pixels, then in which row, then in which column. (One cumulative sum over all pixels is what
    # Inductor of torch 2.11 fails to compile.)
    rows = wrong.sum(dim=2).cumsum(dim=1)  # (n, H)
    rank = (uniforms.double() * rows[:, -1]).floor().long()[:, None]
    row = (rows <= rank).sum(dim=1, keepdim=True).clamp(max=rows.shape[1] - 1)
    before = torch.where(row > 0, rows.gather(1, (row - 1).clamp(min=0)), 0)
    each = torch.arange(len(row), device=row.device)
    columns = wrong[each, row[:, 0]].cumsum(dim=1)  # (n, W)
    column = (columns <= rank - before).sum(dim=1, keepdim=True).clamp(max=columns.shape[1] - 1)
    labels = targets[each, row[:, 0], column[:, 0]].long()
    return torch.cat([column, row], dim=1).float(), labels
