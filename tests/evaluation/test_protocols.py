import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from samlight_hf.data.clicks import deepest_point
from samlight_hf.evaluation.fidelity import Fidelity
from samlight_hf.evaluation.models import PromptableModel, PromptedMasks
from samlight_hf.evaluation.protocols import InstanceProtocols, ProtocolSettings
from samlight_hf.masks.boxes import xywh_to_xyxy


ALL = ProtocolSettings(with_crowd=True, with_boundary_iou=True)


class Scripted:
    """A model that answers prompts with masks that the test chooses, and records its calls."""

    def __init__(self, sample, masks_of):
        self.targets = sample.masks()
        self.masks_of = masks_of  # (targets, multimask, call number) -> (bool (n, m, H, W), predicted IoU (n, m))
        self.asked = []
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")

    def predict(self, encoded, boxes_xyxy=None, points_xy=None, labels=None, logits=None, multimask_output=True):
        self.asked.append(
            {
                "boxes": boxes_xyxy,
                "points": points_xy,
                "labels": labels,
                "logits": logits,
                "multimask": multimask_output,
            }
        )
        masks, predicted_iou = self.masks_of(self.targets, multimask_output, len(self.asked))
        numbered = torch.arange(masks.shape[1]).float().view(1, -1, 1, 1).expand(len(masks), -1, 8, 8)
        return PromptedMasks(
            torch.from_numpy(masks), torch.tensor(predicted_iou).float(), numbered + 10 * len(self.asked)
        )

    def predict_boxes(self, encoded, boxes_xyxy, multimask_output=True):
        for each, boxes in zip(encoded, boxes_xyxy, strict=True):
            yield self.predict(each, boxes, multimask_output=multimask_output)


class Encoded:
    reshaped_size = (32, 32)


def three(targets, multimask, call):
    """Masks of which the second is the target, and the third has the highest predicted IoU but is empty."""
    n = len(targets)
    empty, full = np.zeros_like(targets), np.ones_like(targets)
    if not multimask:
        return targets[:, None], np.full((n, 1), 0.5)
    return np.stack([full, targets, empty], 1), np.tile([0.1, 0.2, 0.9], (n, 1))


def test_which_mask_counts(dataset):
    sample = dataset[1]
    records = InstanceProtocols(ALL)(Scripted(sample, three), Encoded(), sample)
    assert [record["instance"] for record in records] == [instance.id for instance in sample.instances]
    for record in records:
        for prompt in ("box", "1 click", "3 clicks", "5 clicks"):
            assert record["iou"][f"{prompt}/single"] == 1.0
            assert record["iou"][f"{prompt}/predicted"] == 0.0
            assert record["predicted_iou"][f"{prompt}/predicted"] == pytest.approx(0.9)
            assert record["iou"][f"{prompt}/oracle"] == 1.0
            assert record["predicted_iou"][f"{prompt}/oracle"] == pytest.approx(0.2)
            assert record["boundary_iou"][f"{prompt}/oracle"] == 1.0


def test_which_of_three_masks_is_recorded_with_their_areas(dataset):
    sample = dataset[1]
    records = InstanceProtocols(ALL)(Scripted(sample, three), Encoded(), sample)
    for record, target in zip(records, sample.masks(), strict=True):
        prompts = ("box", "1 click", "3 clicks", "5 clicks")
        assert record["mask_index"] == {f"{p}/{c}": i for p in prompts for c, i in (("predicted", 2), ("oracle", 1))}
        areas = (target.size / target.sum(), 1, 0)  # later clicks depend on the mask that was taken
        expected = {f"{p}/{n}": a for p in prompts[:2] for n, a in zip(("first", "second", "third"), areas)}
        assert record["relative_area"] == pytest.approx(expected)
    alone = ProtocolSettings(mask_choices=("single",), num_clicks=(1,))
    for record in InstanceProtocols(alone)(Scripted(sample, three), Encoded(), sample):
        assert record["mask_index"] == record["relative_area"] == {}


def test_a_model_that_is_wrong_scores_nothing(dataset):
    """The protocol does not compare masks with themselves: the opposite of the target has an IoU of 0."""
    sample = dataset[0]
    wrong = Scripted(
        sample,
        lambda t, multimask, _: (
            np.repeat(~t[:, None], 3 if multimask else 1, 1),
            np.ones((len(t), 3 if multimask else 1)),
        ),
    )
    for record in InstanceProtocols(ALL)(wrong, Encoded(), sample):
        assert set(record["iou"].values()) == {0.0}


def test_boxes_are_the_annotated_corners(dataset):
    sample = dataset[0]
    model = Scripted(sample, three)
    InstanceProtocols(ProtocolSettings(("box",), ("single",), with_crowd=True))(model, Encoded(), sample)
    expected = [[x, y, x + w, y + h] for x, y, w, h in (instance.bbox_xywh for instance in sample.instances)]
    assert model.asked[0]["boxes"].tolist() == expected
    assert xywh_to_xyxy((3, 4, 10, 20)) == (3, 4, 13, 24)


@pytest.mark.parametrize("feed_back", [True, False])
def test_clicks_follow_the_mask_that_counts(dataset, feed_back):
    """The first click is in the deepest point; the next ones correct the chosen mask, whose logits are fed back."""
    sample = dataset[0]
    settings = ProtocolSettings(("clicks",), ("predicted",), (1, 3), feed_back, with_crowd=True)
    model = Scripted(sample, three)
    InstanceProtocols(settings)(model, Encoded(), sample)
    first, second, third = model.asked
    deepest = [list(deepest_point(mask)[0]) for mask in sample.masks()]
    assert first["points"][:, 0].tolist() == deepest
    assert first["logits"] is None
    # The chosen mask is empty, so all of the target is missing: a positive click at its deepest point again.
    assert second["points"].tolist() == [[point, point] for point in deepest]
    assert second["labels"].tolist() == [[1, 1]] * len(deepest)
    assert third["points"].shape == (len(deepest), 3, 2)
    if feed_back:
        assert second["logits"].shape == (len(deepest), 1, 8, 8)
        assert set(second["logits"].unique().tolist()) == {12.0}  # mask 2 of call 1
        assert set(third["logits"].unique().tolist()) == {22.0}
    else:
        assert second["logits"] is third["logits"] is None


def test_negative_clicks(dataset):
    sample = dataset[0]
    full = Scripted(sample, lambda t, *_: (np.ones_like(t)[:, None], np.ones((len(t), 1))))
    InstanceProtocols(ProtocolSettings(("clicks",), ("single",), (2,), with_crowd=True))(full, Encoded(), sample)
    assert full.asked[1]["labels"].tolist() == [[1, 0]] * len(sample.instances)


def test_crowds_and_limits(dataset):
    sample = dataset[2]
    crowds = sum(instance.is_crowd for instance in sample.instances)
    assert crowds == 1

    def records(**settings):
        protocols = InstanceProtocols(ProtocolSettings(("box",), ("single",), **settings))
        chosen = [i for i in sample.instances if settings.get("with_crowd") or not i.is_crowd][
            : settings.get("max_instances")
        ]
        scripted = Scripted(sample, three)
        scripted.targets = np.stack([instance.mask() for instance in chosen])
        return protocols(scripted, Encoded(), sample)

    assert len(records()) == len(sample.instances) - 1
    assert len(records(with_crowd=True)) == len(sample.instances)
    assert len(records(max_instances=1)) == 1


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="prompts=.*circles"):
        ProtocolSettings(prompts=("circles",))
    with pytest.raises(ValueError, match="mask_choices=.*best"):
        ProtocolSettings(mask_choices=("best",))
    with pytest.raises(ValueError, match="num_clicks"):
        ProtocolSettings(num_clicks=(0, 1))


@pytest.mark.parametrize("max_instances", [0, -1])
def test_fewer_than_one_instance_is_refused(max_instances):
    """A limit of -1 would leave out the last one."""
    for work in (ProtocolSettings, partial(Fidelity, None)):
        with pytest.raises(ValueError, match=f"max_instances={max_instances} must be at least 1"):
            work(max_instances=max_instances)


def test_many_instances_go_in_chunks_with_the_same_result(promptable, dataset, monkeypatch):
    from samlight_hf.evaluation import protocols

    sample = dataset[1]
    (encoded,) = promptable.encode([sample.image])
    together = InstanceProtocols(ALL)(promptable, encoded, sample)
    monkeypatch.setattr(protocols, "_CHUNK_BYTES", 1)
    one_by_one = InstanceProtocols(ALL)(promptable, encoded, sample)
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert ours["iou"] == pytest.approx(theirs["iou"], abs=1e-3)


def test_images_together_have_the_records_of_each_alone(promptable, dataset):
    """Prompts of four images of different sizes share calls of three prompts; one image has no instance."""
    protocols = InstanceProtocols(ProtocolSettings(num_clicks=(1,), with_boundary_iou=True))
    samples = [dataset[index] for index in range(4)]
    samples[2] = dataclasses.replace(samples[2], instances=samples[2].instances[-1:])  # only a crowd
    encoded = promptable.encode([sample.image for sample in samples])
    alone = [protocols(promptable, *pair) for pair in zip(encoded, samples, strict=True)]
    promptable.prompts_per_batch = 3
    together = protocols.batch(promptable, encoded, [protocols.prepare(sample) for sample in samples])
    assert [len(records) for records in together] == [len(records) for records in alone]
    assert together[2] == []
    for ours, theirs in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert list(ours["iou"]) == list(theirs["iou"])
        for measure in ("iou", "predicted_iou", "boundary_iou"):
            assert ours.pop(measure) == pytest.approx(theirs.pop(measure), abs=1e-3)
        assert ours == theirs
    assert protocols.batch(promptable, encoded[2:3], [protocols.prepare(samples[2])]) == [[]]


def test_boxes_of_several_images_are_predicted_as_those_of_one(dataset):
    """Predictions work for any SAM; an image may occur twice, and its prompts may be split between calls."""
    boxes = [torch.tensor([[3.0, 4.0, 30.0, 20.0]] * n) + torch.arange(n)[:, None] for n in (2, 4, 1)]
    for model, processor in other_sams():
        promptable = PromptableModel(model, processor, prompts_per_batch=3)
        first, second = promptable.encode([dataset[0].image, dataset[3].image])
        encoded = [first, second, first]
        together = list(promptable.predict_boxes(encoded, boxes))
        assert promptable.count["decoder"] == 3
        for prediction, each, its_boxes in zip(together, encoded, boxes, strict=True):
            alone = promptable.predict(each, boxes_xyxy=its_boxes)
            torch.testing.assert_close(prediction.logits, alone.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(prediction.predicted_iou, alone.predicted_iou, rtol=1e-4, atol=1e-5)
            assert (prediction.masks == alone.masks).float().mean() > 0.999


def test_prompts_and_masks_are_in_pixels_of_the_image(promptable, dataset):
    """Predictions equal those of transformers' own processor and model, prompt by prompt."""
    sample = dataset[3]
    model, processor = promptable.model, promptable.processor
    box, point = [3.0, 4.0, 30.0, 20.0], [12, 9]
    (encoded,) = promptable.encode([sample.image])
    ours = promptable.predict(
        encoded, boxes_xyxy=torch.tensor([box, box]), points_xy=torch.tensor([[point]] * 2), labels=torch.ones(2, 1)
    )
    inputs = processor(
        images=sample.image, input_boxes=[[box]], input_points=[[[point]]], input_labels=[[[1]]], return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(
            inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(),
            input_points=inputs["input_points"].float(),
            input_labels=inputs["input_labels"],
        )  # fmt: skip
    masks = processor.post_process_masks(theirs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0]
    assert ours.masks.shape == (2, 3, sample.height, sample.width)
    torch.testing.assert_close(ours.logits[0], theirs.pred_masks[0, 0], rtol=1e-4, atol=1e-5)
    assert (ours.masks[0] == masks[0]).float().mean() > 0.999
    torch.testing.assert_close(ours.predicted_iou[0], theirs.iou_scores[0, 0], rtol=1e-4, atol=1e-5)


def other_sams():
    """SAM, SAM-HQ and SAM 2 of transformers, tiny and random."""
    from transformers import (
        Sam2Config,
        Sam2ImageProcessor,
        Sam2Model,
        Sam2Processor,
        SamConfig,
        SamHQConfig,
        SamHQModel,
        SamHQProcessor,
        SamImageProcessor,
        SamModel,
        SamProcessor,
    )  # fmt: skip

    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        "window_size": 4, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16,
    }  # fmt: skip
    prompt, decoder = (
        {"hidden_size": 32, "image_size": 32, "patch_size": 4},
        {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    image_processor = SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    parts = {"vision_config": vision, "prompt_encoder_config": prompt}
    yield SamModel(SamConfig(**parts, mask_decoder_config=decoder)), SamProcessor(image_processor)
    yield (
        SamHQModel(SamHQConfig(**parts, mask_decoder_config={**decoder, "vit_dim": 32})),
        SamHQProcessor(image_processor),
    )
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 12, "num_attention_heads": 1, "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 1, 1], "embed_dim_per_stage": [12, 24, 48, 96],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 4, 2, 2], "global_attention_blocks": [2],
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [96, 48, 24, 12], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }  # fmt: skip
    config = Sam2Config(
        vision_config=vision, prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config=decoder,
    )  # fmt: skip
    image_processor = Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    yield Sam2Model(config), Sam2Processor(image_processor, target_size=64)


def test_any_sam_of_transformers(dataset):
    for model, processor in other_sams():
        promptable = PromptableModel(model, processor)
        samples = [dataset[0], dataset[3]]
        for sample, encoded in zip(samples, promptable.encode([sample.image for sample in samples]), strict=True):
            records = InstanceProtocols(ProtocolSettings(num_clicks=(1, 2)))(promptable, encoded, sample)
            assert len(records) == len(sample.instances)
            assert len(records[0]["iou"]) == 9
            assert all(0 <= iou <= 1 for record in records for iou in record["iou"].values())


def test_a_model_of_another_kind_is_refused():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="model_type='clip_vision_model' cannot be evaluated.*multimask_output"):
        PromptableModel(model, None)
