import pytest
import torch
from torch.nn import functional as F

from samlight_hf.distillation import EncoderStage, MaskStage, Teacher, match_layers
from samlight_hf.distillation.losses import bce_loss, dice_loss, focal_loss, true_iou
from samlight_hf.distillation.stages import encode, sample_clicks

from .conftest import IMAGE_SIZE, MASK_SIZE, make_arguments, make_student, make_teacher


LOSS_WEIGHTS = {"focal": 20.0, "bce": 0.5, "dice": 1.0, "iou": 2.0}


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def batch(pixel_values):
    """Two images with four square objects each."""
    masks = torch.zeros(2, 4, MASK_SIZE, MASK_SIZE, dtype=torch.bool)
    boxes = torch.zeros(2, 4, 4)
    for i in range(2):
        for j in range(4):
            left, top = 4 + 5 * j, 3 + 6 * i
            masks[i, j, top : top + 8, left : left + 7] = True
            boxes[i, j] = torch.tensor([left, top, left + 7, top + 8])
    points = boxes[..., :2] + 3
    uniforms = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(4))
    return {"pixel_values": pixel_values, "masks": masks, "boxes": boxes, "points": points, "uniforms": uniforms}


@pytest.mark.parametrize("make", [make_teacher, make_student])
def test_encode_is_the_encoders_own_forward(make, pixel_values):
    model = make().eval()
    states, embeddings = encode(
        model.vision_encoder, pixel_values, (0, 2, 2)
    )  # a shallow teacher's layer may occur twice
    assert len(states) == 3
    assert states[1] is states[2]
    outputs = model.vision_encoder(pixel_values, output_hidden_states=True)
    assert torch.equal(embeddings, outputs.last_hidden_state)
    assert torch.equal(states[0], outputs.hidden_states[1])  # hidden_states[0] is the input of the first layer
    assert torch.equal(states[1], outputs.hidden_states[3])


def test_layers_are_matched_by_their_share_of_the_depth():
    assert match_layers(6, 32, 3) == [(3, 20), (4, 26), (5, 31)]
    assert match_layers(3, 5, 3) == [(0, 1), (1, 2), (2, 4)]
    assert match_layers(4, 4, 2) == [(2, 2), (3, 3)]
    assert match_layers(6, 2, 6)[0] == (0, 0)
    assert match_layers(6, 32, 0) == []
    with pytest.raises(ValueError, match="num_focus_layers=7 must be from 0 to the student's num_hidden_layers=6"):
        match_layers(6, 32, 7)


def test_the_encoder_loss_is_the_formula(teacher, student, pixel_values):
    pairs = match_layers(3, 5, 2)
    stage = EncoderStage(student, [i for i, _ in pairs], teacher_width=48)
    stage.layer_weights.copy_(torch.tensor([1.0, 0.5, 0.25]))
    targets = Teacher(teacher, [j for _, j in pairs], torch.float32).targets(pixel_values)
    outputs = stage(pixel_values, targets)
    mine = student.vision_encoder(pixel_values, output_hidden_states=True)
    theirs = teacher.vision_encoder(pixel_values, output_hidden_states=True)
    expected = 0.0
    for weight, projection, (i, j) in zip((1.0, 0.5), stage.projections, pairs):
        h = theirs.hidden_states[j + 1]
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected += weight * (projection(mine.hidden_states[i + 1]) - normed).square().mean()
    expected += 0.25 * (mine.last_hidden_state - theirs.last_hidden_state).square().mean()
    torch.testing.assert_close(outputs["loss"], expected)
    assert set(outputs) == {"loss", "layer_loss/1", "layer_loss/2", "layer_loss/3", "embedding_cosine"}
    assert outputs["loss"] > 0.01  # the student is not compared with itself


def test_a_teacher_that_is_its_own_student_has_no_loss_but_the_projections(student, pixel_values):
    stage = EncoderStage(student, [], teacher_width=32)
    outputs = stage(pixel_values, Teacher(make_student(), [], torch.float32).targets(pixel_values))
    assert outputs["loss"].item() < 1e-12
    assert outputs["embedding_cosine"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("make_stage", "trained"),
    [
        (lambda student: EncoderStage(student, [1, 2], 48), {"vision_encoder"}),
        (lambda student: MaskStage(student, "decoder", LOSS_WEIGHTS), {"mask_decoder"}),
        (
            lambda student: MaskStage(student, "end_to_end", LOSS_WEIGHTS),
            {"vision_encoder", "prompt_encoder", "mask_decoder"},
        ),
    ],
)
def test_gradients_reach_what_is_trained_and_nothing_else(make_stage, trained, student, batch):
    stage = make_stage(student)
    if isinstance(stage, EncoderStage):
        targets = [torch.randn(2, 8, 8, 48), torch.randn(2, 8, 8, 48), torch.randn(2, 32, 8, 8)]
        outputs = stage(batch["pixel_values"], targets)
        assert all(parameter.requires_grad for parameter in stage.projections.parameters())
    else:
        outputs = stage(**batch)
    outputs["loss"].backward()
    for name, parameter in student.named_parameters():
        expected = name.split(".")[0] in trained and "positional_embedding" not in name
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
    reached = {
        name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == trained


def test_the_mask_loss_is_the_formula(student, batch):
    """Without refinements: half boxes with the single mask, half points with the best of three."""
    stage = MaskStage(student, "end_to_end", LOSS_WEIGHTS, box_share=0.5, num_refinements=0)
    outputs = stage(**batch)
    embeddings = student.vision_encoder(batch["pixel_values"]).last_hidden_state
    losses = []
    for i in range(2):
        for j in range(4):
            prompt = (
                {"input_boxes": batch["boxes"][i : i + 1, j : j + 1]}
                if j < 2
                else {"input_points": batch["points"][i : i + 1, j : j + 1, None]}
            )
            predicted = student(image_embeddings=embeddings[i : i + 1], multimask_output=j >= 2, **prompt)
            logits, target = predicted.pred_masks[0, 0], batch["masks"][i, j]
            mask_losses = [
                20 * focal_loss(mask, target) + 0.5 * bce_loss(mask, target) + dice_loss(mask, target)
                for mask in logits
            ]
            ious = torch.stack([true_iou(mask, target) for mask in logits])
            losses.append(min(mask_losses) + 2 * F.mse_loss(predicted.iou_scores[0, 0], ious))
    torch.testing.assert_close(outputs["loss"], sum(losses) / 8)


def test_a_point_can_train_on_every_object_that_it_lies_in(student, batch):
    """The loss equals a loop over points, targets and masks; the IoU head learns the IoU of the best fitting target."""
    batch["points"] = batch["boxes"][..., 2:] - 1  # where one object begins before another ends
    stage = MaskStage(student, "end_to_end", LOSS_WEIGHTS, box_share=0.0, num_refinements=0, point_targets="all")
    outputs = stage(**batch)
    embeddings = student.vision_encoder(batch["pixel_values"]).last_hidden_state
    losses, num_nested = [], 0
    for i in range(2):
        for j in range(4):
            point, targets = batch["points"][i, j], batch["masks"][i]
            predicted = student(image_embeddings=embeddings[i : i + 1], input_points=point[None, None, None])
            logits = predicted.pred_masks[0, 0]
            x, y = (point * targets.shape[-1] / batch["pixel_values"].shape[-1]).int().tolist()
            holding = [target for target in targets if target[y, x]]
            num_nested += len(holding) > 1
            mask_losses = [
                min(
                    20 * focal_loss(mask, target) + 0.5 * bce_loss(mask, target) + dice_loss(mask, target)
                    for mask in logits
                )
                for target in holding
            ]
            ious = torch.stack([torch.stack([true_iou(mask, target) for target in targets]).max() for mask in logits])
            losses.append(sum(mask_losses) / len(mask_losses) + 2 * F.mse_loss(predicted.iou_scores[0, 0], ious))
    assert num_nested  # otherwise the test would show nothing
    torch.testing.assert_close(outputs["loss"], sum(losses) / 8)


def test_of_three_masks_the_best_takes_the_gradient(student, batch):
    stage = MaskStage(student, "decoder", {**LOSS_WEIGHTS, "iou": 0.0}, box_share=0.0, num_refinements=0)
    one = {name: value[:1, :1] if name != "pixel_values" else value[:1] for name, value in batch.items()}
    stage(**one)["loss"].backward()
    touched = [
        mlp.proj_out.weight.grad is not None and bool(mlp.proj_out.weight.grad.abs().sum() > 0)
        for mlp in student.mask_decoder.output_hypernetworks_mlps
    ]
    assert touched[0] is False  # the single mask's
    assert sum(touched) == 1


@pytest.mark.parametrize("num_refinements", [1, 3])
def test_refinements_train_the_mask_prompt_and_negative_clicks(student, batch, num_refinements):
    stage = MaskStage(student, "end_to_end", LOSS_WEIGHTS, num_refinements=num_refinements)
    outputs = stage(**batch)
    outputs["loss"].backward()
    assert student.prompt_encoder.mask_embed.conv1.weight.grad.abs().sum() > 0
    clicks = {name for name in outputs if "_click_" in name}
    assert clicks == {f"iou/{kind}_click_{step}" for kind in ("box", "point") for step in range(1, num_refinements + 1)}


def test_a_batch_is_the_mean_of_its_images(student, batch):
    stage = MaskStage(student, "end_to_end", LOSS_WEIGHTS, num_refinements=2)
    whole = stage(**batch)["loss"]
    parts = [stage(**{name: value[i : i + 1] for name, value in batch.items()})["loss"] for i in range(2)]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_clicks_are_drawn_evenly_from_the_error():
    target = torch.zeros(1, 6, 5, dtype=torch.bool)
    target[0, 1:4, 1:4] = True
    predicted = target.clone()
    predicted[0, 1, 1] = False  # missed
    predicted[0, 5, 4] = True  # excess
    draws = torch.linspace(0, 0.999, 40)
    clicks, labels = sample_clicks(predicted.expand(40, -1, -1), target.expand(40, -1, -1), draws)
    found = {(x, y, label) for (x, y), label in zip(clicks.int().tolist(), labels.tolist())}
    assert found == {(1, 1, 1), (4, 5, 0)}
    assert labels.sum() == 20


def test_clicks_are_the_wrong_pixels_in_raster_order():
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.rand(1, 7, 9, generator=generator) < 0.4 for _ in range(2))
    wrong = (predicted ^ target)[0].nonzero().flip(1).tolist()  # (x, y) in raster order
    draws = (torch.arange(len(wrong)) + 0.5) / len(wrong)
    clicks, labels = sample_clicks(*(mask.expand(len(wrong), -1, -1) for mask in (predicted, target)), draws)
    assert clicks.int().tolist() == wrong
    assert labels.tolist() == [int(target[0, y, x]) for x, y in wrong]


def test_where_nothing_is_wrong_the_target_is_clicked():
    target = torch.zeros(2, 6, 5, dtype=torch.bool)
    target[:, 2, 3] = True
    clicks, labels = sample_clicks(target, target, torch.tensor([0.0, 0.9999]))
    assert clicks.tolist() == [[3, 2], [3, 2]]
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize("box_share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_refinements", [0, 1])
@pytest.mark.parametrize("stage", ["decoder", "end_to_end"])
def test_what_is_said_to_train_every_parameter_does(tmp_path, student, batch, stage, box_share, num_refinements):
    """DDP waits forever for a missing gradient if it was told that every parameter gets one."""
    settings = {"stage": stage, "box_share": box_share, "num_refinements": num_refinements}
    MaskStage(student, stage, LOSS_WEIGHTS, box_share, num_refinements)(**batch)["loss"].backward()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    every = all(parameter.grad is not None for parameter in trained)
    assert make_arguments(tmp_path, **settings).trains_every_parameter == every


def test_an_unknown_stage_is_refused(student):
    with pytest.raises(ValueError, match="stage='encoder' must be"):
        MaskStage(student, "encoder", LOSS_WEIGHTS)
