"""Everything mode gives the masks of the stock pipeline, mask for mask."""

import gc
import multiprocessing
import pickle
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MaskGenerationPipeline, SamHQConfig, SamHQModel, SamImageProcessor, SamProcessor

from samlight_hf import ImageError, MaskGenerationSettings, MaskGenerator, Predictor, SamLighteningModel
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.engine.memory_budget import DEFAULT_MEMORY_MB, MemoryBudget
from samlight_hf.engine.plain_decoder import PlainMaskDecoder
from samlight_hf.images.preprocessing import image_tensor
from samlight_hf.inference.candidates import Candidates
from samlight_hf.inference.crops import crop_boxes, point_grid
from samlight_hf.inference.single_calls import segment_everything
from samlight_hf.loading import load_model, quiet_transformers
from samlight_hf.masks.boxes import mask_boxes
from samlight_hf.masks.results import GeneratedMasks
from tests.conftest import default_dtype

from .conftest import random_model


KEEP_MANY = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.65}
KEEP_MORE = {"pred_iou_thresh": 0.2, "stability_score_thresh": 0.3, "crops_nms_thresh": 0.99}
KEEP_ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "mask_threshold": 30.0}  # see the fixture `tiny`


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """By default cuDNN rounds float32 to TF32, and so does the stock pipeline's decoder."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with random weights: scores around 0.5, and logits like a trained model's, above 30 in some spots."""
    folder = tmp_path_factory.mktemp("tiny")
    model = random_model()
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.5)
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(1000)
            mlp.proj_out.bias.mul_(1000)
    model.save_pretrained(folder)
    return load_model(folder, "cpu")


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED_CHECKPOINT, "cpu")


def random_image(width, height, seed=0):
    """Make an image of coarse patches, which a model of 8 x 8 tokens can tell apart."""
    levels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)


def stock(model, processor, image, **settings) -> dict:
    pipeline = MaskGenerationPipeline(model=model, image_processor=processor.image_processor, device=model.device)
    with quiet_transformers():
        try:
            return pipeline(image, points_per_batch=16, output_rle_mask=True, output_bboxes_mask=True, **settings)
        except RuntimeError as error:
            # transformers 5.17 stacks crops although their sizes differ.
            if settings.get("crops_n_layers") and "stack expects each tensor to be equal size" in str(error):
                pytest.skip("the stock pipeline of this transformers cannot take crops")
            raise


def intersection_over_union(first, second) -> float:
    union = (first | second).sum()
    return (first & second).sum() / union if union else 1.0


def assert_equal_to_stock(generated: GeneratedMasks, expected: dict):
    """Check that each mask has one partner in the other result; equal scores may be in any order."""
    assert len(generated) == len(expected["masks"])
    masks, left = [np.asarray(mask) for mask in expected["masks"]], set(range(len(generated)))
    boxes = np.asarray(expected["bounding_boxes"].cpu()).reshape(-1, 4)
    scores = np.asarray(expected["scores"].cpu())
    for index, mask in enumerate(generated.masks):
        near = [other for other in left if abs(scores[other] - generated.scores[index]) < 1e-4]
        partner = max(near, key=lambda other: intersection_over_union(mask, masks[other]))
        left.remove(partner)
        assert intersection_over_union(mask, masks[partner]) >= 0.999
        edges = boxes[partner] + np.array([0, 0, 1, 1]) * mask.any()
        assert np.abs(generated.boxes_xyxy[index] - edges).max() <= 1


def well_formed(result: GeneratedMasks, image, count=None):
    count = len(result) if count is None else count
    assert len(result) == len(result.masks) == count
    assert (result.masks.height, result.masks.width) == (image.height, image.width)
    for name, width in (
        ("scores", 0),
        ("stability_scores", 0),
        ("boxes_xyxy", 4),
        ("points_xy", 2),
        ("crop_boxes_xyxy", 4),
    ):
        values = getattr(result, name)
        assert (values.dtype, values.shape) == (np.float32, (count, width) if width else (count,))
    assert (np.diff(result.scores) <= 0).all()
    for mask, (x1, y1, x2, y2) in zip(result.masks, result.boxes_xyxy.astype(int), strict=True):
        outside = mask.copy()
        outside[y1:y2, x1:x2] = False
        assert not outside.any()
        assert not mask.any() or (mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any())


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (190, 150), (81, 303), (201, 60)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_crop": 4},
        {"points_per_crop": 5, "pred_iou_thresh": 0.44},
        {"points_per_crop": 5, "stability_score_thresh": 0.7, "crops_nms_thresh": 0.95},
        {"points_per_crop": 3, "crops_n_layers": 1, "crops_nms_thresh": 0.9},
        {"points_per_crop": 2, "crops_n_layers": 2, "crop_overlap_ratio": 0.1},
        {
            "points_per_crop": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5, "mask_threshold": 20.0,
            "stability_score_offset": 3.0,
        },
        {"points_per_crop": 4, "mask_threshold": 0.0, "crops_nms_thresh": 1.0},
    ],
)  # fmt: skip
def test_tiny_models_give_the_stock_pipelines_masks(tiny, size, settings):
    image, settings = random_image(*size, seed=size[0]), {**KEEP_ALL, **settings}
    expected = stock(*tiny, image, **settings)
    generated = MaskGenerator(*tiny)(image, **settings)
    well_formed(generated, image)
    assert len(generated) > 0
    assert_equal_to_stock(generated, expected)
    # On the CPU the masks and their order are identical, but for single pixels whose logits are at the threshold.
    masks = np.stack([np.asarray(mask) for mask in expected["masks"]])
    assert (generated.masks.to_masks() != masks).sum() <= 1e-5 * masks.size


@pytest.mark.parametrize(
    "name, size, settings",
    [
        pytest.param("coffee", None, {"points_per_crop": 5}, marks=pytest.mark.slow),
        ("rocket", (333, 501), {"points_per_crop": 3}),
    ],
)
def test_photographs_give_the_stock_pipelines_masks(bundled, name, size, settings):
    image = Image.open(EXAMPLE_IMAGES / f"{name}.jpg")
    image = image if size is None else image.resize(size)
    settings = {**KEEP_MORE, **settings}
    generated = MaskGenerator(*bundled)(image, **settings)
    well_formed(generated, image)
    assert len(generated) >= {"coffee": 36, "rocket": 12}[name]
    assert_equal_to_stock(generated, stock(*bundled, image, **settings))


@pytest.mark.parametrize("settings", [{"crops_nms_thresh": 0.95}, {"pred_iou_thresh": 0.44, "crops_n_layers": 1}])
def test_results_do_not_depend_on_batches(tiny, settings):
    image, settings = random_image(164, 141), {**KEEP_ALL, "points_per_crop": 5, **settings}
    results = [MaskGenerator(*tiny, points_per_batch=batch)(image, **settings) for batch in (1, 3, 7, 25, 64)]
    assert len({len(result) for result in results}) == 1
    assert len(results[0]) > 3
    for result in results[1:]:
        assert np.allclose(result.scores, results[0].scores, atol=1e-5)
        assert [a["counts"] for a in result.masks.to_coco()] == [a["counts"] for a in results[0].masks.to_coco()]


def test_the_plain_decoder_is_held_to_the_same(tiny):
    model, processor = tiny
    fast, plain = MaskGenerator(model, processor), MaskGenerator(model, processor)
    assert isinstance(fast.decoder, FastMaskDecoder)
    plain.decoder = plain.encoder.decoder = PlainMaskDecoder(model)
    image = random_image(50, 40)
    first, second = (
        generator(image, points_per_crop=4, **KEEP_ALL, crops_nms_thresh=1.0) for generator in (fast, plain)
    )
    assert first.masks.to_coco() == second.masks.to_coco()


def test_models_of_another_build_run_as_they_are():
    torch.manual_seed(0)
    vision_config = {
        "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "num_pos_feats": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [0, 1],
    }  # fmt: skip
    config = SamHQConfig(
        vision_config=vision_config,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "image_embedding_size": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32, "vit_dim": 32},
    )
    model = SamHQModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    processor = SamProcessor(SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}))
    generator, image = MaskGenerator(model, processor), random_image(70, 50)
    assert isinstance(generator.decoder, PlainMaskDecoder)
    settings = {"points_per_crop": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 1.0}
    generated, expected = generator(image, **settings), stock(model, processor, image, **settings)
    assert len(generated) == 27
    assert generated.masks.to_coco(compressed=False) == expected["rle_mask"]


def test_where_masks_come_from(tiny):
    image = random_image(800, 600)
    settings = MaskGenerationSettings(points_per_crop=3, crops_n_layers=1, **KEEP_ALL, crops_nms_thresh=1.0)
    result = MaskGenerator(*tiny)(image, settings)
    crops = {crop.box_xyxy for crop in crop_boxes(600, 800, settings)}
    assert len(crops) == 5
    assert {tuple(map(int, box)) for box in result.crop_boxes_xyxy} == crops
    for (x, y), (x1, y1, x2, y2) in zip(result.points_xy, result.crop_boxes_xyxy):
        assert x1 < x < x2
        assert y1 < y < y2
    assert len(np.unique(result.points_xy, axis=0)) > 20


def test_grids_may_differ_between_layers_which_the_stock_pipeline_cannot_take(tiny):
    image = random_image(640, 640)
    settings = {"points_per_crop": 4, "crops_n_layers": 1, "crop_n_points_downscale_factor": 2, **KEEP_ALL}
    result = MaskGenerator(*tiny)(image, **settings, crops_nms_thresh=1.0)
    inside = (result.crop_boxes_xyxy != [0, 0, 640, 640]).any(axis=1)
    assert len(np.unique(result.points_xy[~inside], axis=0)) <= 16
    assert 0 < len(np.unique(result.points_xy[inside], axis=0)) <= 4 * 4


def test_images_of_every_kind_one_and_many(tiny, tmp_path):
    image = random_image(50, 30)
    image.save(tmp_path / "x.png")
    levels = np.asarray(image)
    kinds = [image, levels, torch.tensor(levels).permute(2, 0, 1), tmp_path / "x.png", str(tmp_path / "x.png")]
    generator = MaskGenerator(*tiny)
    one = generator(image, points_per_crop=3, **KEEP_ALL)
    many = generator(kinds, points_per_crop=3, **KEEP_ALL)
    assert len(many) == len(kinds)
    assert all(result.masks.to_coco() == one.masks.to_coco() for result in many)
    assert generator([]) == []


def test_any_number_of_images_are_taken_as_they_are_needed(tiny):
    taken = []

    def images():
        for number in range(1000):
            taken.append(number)
            yield random_image(20, 20, number)

    results = MaskGenerator(*tiny).generate_many(images(), points_per_crop=2, **KEEP_ALL)
    assert len([next(results) for _ in range(3)]) == 3
    results.close()
    assert len(taken) < 10


def test_nothing_found_is_well_formed(tiny):
    image = random_image(50, 30)
    for settings in ({"pred_iou_thresh": 1.0}, {"pred_iou_thresh": 0.0, "stability_score_thresh": 1.0}):
        result = MaskGenerator(*tiny)(image, points_per_crop=2, **settings)
        well_formed(result, image, count=0)
        assert result.masks.to_masks().shape == result.to_result().masks.shape == (0, 30, 50)
        assert result.masks.to_coco() == []


@pytest.mark.parametrize("is_lean", [True, False])
def test_masks_are_added_while_the_next_batch_is_decoded(tiny, monkeypatch, is_lean):
    """Measured before it is launched, and added behind; where there is room for the logits of one batch, before it."""
    generator, steps = MaskGenerator(*tiny, points_per_batch=3), []
    monkeypatch.setitem(vars(generator.decoder), "is_lean", is_lean)
    decode_ahead, measured, add = generator.decoder.decode_ahead, generator._measured, generator._add

    def ahead(*arguments, meanwhile, **options):
        steps.append("decode" if meanwhile is None else "decode and")
        return decode_ahead(*arguments, meanwhile=meanwhile, **options)

    monkeypatch.setattr(generator.decoder, "decode_ahead", ahead)
    monkeypatch.setattr(generator, "_measured", lambda *args: (steps.append("measure"), measured(*args))[1])
    monkeypatch.setattr(generator, "_add", lambda *args: (steps.append("add"), add(*args))[1])
    result = generator(random_image(50, 30), points_per_crop=3, **KEEP_ALL)
    if is_lean:
        assert steps == ["decode", "measure", "decode and", "add", "measure", "decode and", "add", "measure", "add"]
    else:
        assert steps == ["decode", "measure", "add"] * 3
    assert (
        result.masks.to_coco()
        == MaskGenerator(*tiny)(random_image(50, 30), points_per_crop=3, **KEEP_ALL).masks.to_coco()
    )


def test_progress_is_told_in_points(tiny):
    class Bar:
        total = 0

        def update(self, count):
            self.total += count

    bar = Bar()
    segment_everything(*tiny, random_image(40, 30), 5, progress=bar, points_per_batch=7)
    assert bar.total == 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(bundled, dtype, tmp_path):
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu", dtype)
    image = Image.open(EXAMPLE_IMAGES / "coffee.jpg")
    settings = {**KEEP_MORE, "points_per_crop": 3}
    result = MaskGenerator(model, processor)(image, **settings)
    well_formed(result, image)
    exact = list(MaskGenerator(*bundled)(image, **settings).masks)
    near = [max(intersection_over_union(mask, other) for other in exact) for mask in result.masks]
    assert len(near) >= 5
    assert np.mean(near) > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (63, 1), (3, 3), (1, 2)])
def test_very_small_images(tiny, size, capfd):
    image = Image.new("RGB", size, "orange")
    well_formed(MaskGenerator(*tiny)(image, points_per_crop=2, **KEEP_ALL), image)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "size, settings, words",
    [
        ((20_000, 100), {}, r"20000x100 pixels is too thin.*64:1"),
        ((1, 1), {"crops_n_layers": 2, "crop_overlap_ratio": 0.0}, "too small for crops_n_layers=2"),
    ],
)
def test_images_that_cannot_be_segmented(tiny, size, settings, words):
    with pytest.raises(ValueError, match=words):
        MaskGenerator(*tiny)(Image.new("RGB", size), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_crop": 0},
        {"points_per_crop": 2.5},
        {"crops_n_layers": -1},
        {"crops_n_layers": True},
        {"pred_iou_thresh": 1.5},
        {"stability_score_thresh": float("nan")},
        {"crops_nms_thresh": -0.1},
        {"crop_overlap_ratio": 2.0},
        {"mask_threshold": float("inf")},
        {"stability_score_offset": -1.0},
        {"crop_n_points_downscale_factor": 0.5},
        {"crop_n_points_downscale_factor": 8, "points_per_crop": 4, "crops_n_layers": 1},
    ],
    ids=str,
)
def test_settings_outside_their_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MaskGenerationSettings(**settings)


def test_arguments_that_cannot_be(tiny):
    for arguments, words in (
        ({"points_per_batch": 0}, "points_per_batch=0"),
        ({"points_per_batch": 1.5}, "points_per_batch=1.5"),
        ({"max_memory_mb": -1}, "max_memory_mb=-1"),
        ({"max_memory_mb": float("nan")}, "max_memory_mb=nan"),
        ({"cuda_graphs": True}, "cuda_graphs=True needs"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskGenerator(*tiny, **arguments)
    with pytest.raises(ValueError, match="points_per_side=0"):
        segment_everything(*tiny, random_image(9, 9), 0)
    with pytest.raises(ValueError, match="not both"):
        MaskGenerator(*tiny)(random_image(9, 9), MaskGenerationSettings(), pred_iou_thresh=0.1)
    with pytest.raises(TypeError, match="points_per_side is no setting .* points_per_crop, crops_n_layers"):
        MaskGenerator(*tiny)(random_image(9, 9), points_per_side=8)


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_torchs_defaults_change_nothing(tiny, default):
    """Code that builds a model in bfloat16, or on a GPU, may leave these as defaults."""

    def found() -> list[np.ndarray]:
        clear_caches()
        image, predictor = random_image(50, 60), Predictor(*tiny)
        settings = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5, "crops_nms_thresh": 1.0}
        everything = MaskGenerator(*tiny)(image, points_per_crop=4, crops_n_layers=1, **settings)
        assert len(everything.scores) > 2
        prompts = {"points_xy": [[[20, 30]], [[1, 2], [3, 4]]]}
        points, none = (predictor.set_image(image).predict(**p) for p in (prompts, {"boxes_xyxy": np.zeros((0, 4))}))
        arrays = [everything.scores, everything.stability_scores, everything.boxes_xyxy, everything.points_xy]
        return [*arrays, points.scores, points.logits, none.scores, none.logits]

    expected = found()
    with torch.device("meta") if default == "meta" else default_dtype(getattr(torch, default)):
        for now, before in zip(found(), expected):
            assert now.dtype == before.dtype and np.array_equal(now, before)


def clear_caches():
    """Forget what the package's functions have computed."""
    for name, module in list(sys.modules.items()):
        for function in vars(module).values() if name.startswith("samlight_hf") else ():
            getattr(function, "cache_clear", lambda: None)()


def test_the_grid_and_boxes():
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 5, 2], [0, 4, 0, 4], [0, 0, 0, 0]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


class _OnCuda:
    """The attributes that `MemoryBudget` reads of a model, as if the model were on a GPU."""

    def __init__(self, model):
        self.config, self.dtype, self.parameters, self.device = (
            model.config,
            model.dtype,
            model.parameters,
            torch.device("cuda"),
        )


def test_less_memory_means_smaller_steps(bundled):
    model = _OnCuda(bundled[0])
    budgets = [MemoryBudget(model, megabytes) for megabytes in (512, 1500, 100_000)]
    half, lean = (SimpleNamespace(dtype=torch.float16, is_lean=is_lean) for is_lean in (False, True))
    more = [MemoryBudget(model, 1500, None, *arguments) for arguments in ((None, True), (half,), (lean, True))]
    sizes = [budget.points_per_batch for budget in (budgets[1], *more)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    for name in ("points_per_batch", "points_per_upscaling", "images_per_encoding"):
        sizes = [getattr(budget, name) for budget in budgets]
        assert sizes == sorted(sizes)
        assert sizes[0] >= 1
    assert budgets[0].points_per_batch < budgets[1].points_per_batch <= budgets[2].points_per_batch == 192
    steps = [budget.masks_per_step((683, 1024), (683, 1024)) for budget in budgets]
    assert 1 <= steps[0] < steps[1] < steps[2]
    assert budgets[0].masks_per_step((10_000, 10_000), (10_000, 10_000)) == 1
    with pytest.raises(ValueError, match=r"max_memory_mb=60 is too small.*needs at least \d+"):
        MemoryBudget(model, 60)


def test_a_grid_of_32_points_a_side_is_six_batches_of_the_published_model():
    lean = SimpleNamespace(dtype=torch.float16, is_lean=True)
    model, _ = load_model(BUNDLED_CHECKPOINT, "cpu", torch.bfloat16)
    budget = MemoryBudget(_OnCuda(model), DEFAULT_MEMORY_MB, None, lean, True)
    assert 171 <= budget.points_per_batch < 205


@pytest.fixture(scope="module")
def photograph():
    return Image.open(EXAMPLE_IMAGES / "coffee.jpg").resize((1024, 683), Image.Resampling.LANCZOS)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"points_per_crop": 16}, {"points_per_crop": 8, "crops_n_layers": 1}], ids=str)
@pytest.mark.parametrize("size", [None, (333, 501)], ids=str)
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graph", "eager"])
def test_on_a_gpu_photographs_give_the_stock_pipelines_masks(photograph, settings, size, cuda_graphs):
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda")
    image = photograph if size is None else photograph.resize(size)
    settings = {**KEEP_MANY, **settings}
    generator = MaskGenerator(model, processor, cuda_graphs=cuda_graphs)
    generated = generator(image, **settings)
    assert generator.decoder.transform.last_ran == ("graph" if cuda_graphs else "eager")
    assert len(generated) >= 10
    assert_equal_to_stock(generated, stock(model, processor, image, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graph", "eager"])
def test_on_a_gpu_masks_are_those_of_the_cpu(bundled, photograph, cuda_graphs):
    """Crops are included, which the stock pipeline of the oldest transformers cannot process."""
    settings = {**KEEP_MANY, "points_per_crop": 6, "crops_n_layers": 1}
    expected = MaskGenerator(*bundled)(photograph, **settings)
    boxes = torch.from_numpy(expected.boxes_xyxy - [0, 0, 1, 1])
    expected = {"masks": list(expected.masks), "scores": torch.from_numpy(expected.scores), "bounding_boxes": boxes}
    result = MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda"), cuda_graphs=cuda_graphs)(photograph, **settings)
    assert len(result) >= 10
    assert_equal_to_stock(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu_half_precision_finds_the_same_masks(photograph, dtype):
    exact = list(MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda"))(photograph, points_per_crop=32).masks)
    result = MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda", dtype))(photograph, points_per_crop=32)
    near = np.array([max(intersection_over_union(mask, other) for other in result.masks) for mask in exact])
    print(f"{dtype}: {len(exact)} masks in float32, {len(result)} in {dtype}, {(near >= 0.95).mean():.3f} matched")
    assert (near >= 0.95).mean() >= 0.9


@pytest.mark.parametrize(
    ("device", "dtype", "points_per_crop", "least_chosen"),
    [
        pytest.param("cpu", "bfloat16", 8, 0.9, marks=pytest.mark.slow),
        pytest.param("cuda", "bfloat16", 16, 0.75, marks=pytest.mark.gpu),
        pytest.param("cuda", "float16", 16, 0.9, marks=pytest.mark.gpu),
    ],
)
def test_half_precision_finds_the_same_masks_before_one_is_chosen(device, dtype, points_per_crop, least_chosen):
    """Rounding decides only which of near duplicates stays and which scores are just above a threshold.

    It uses all bundled photographs, and the default thresholds, 0.88 and 0.95: below them are masks that are uncertain
    in any precision. So those that exist before the choice decide, and of the chosen ones only that most are the same.
    On a CPU, too, the decoder computes in float16, the default on a CUDA device.
    """
    settings = {"points_per_crop": points_per_crop}
    wider = {"pred_iou_thresh": 0.78, "stability_score_thresh": 0.85, "crops_nms_thresh": 1.0}
    exact = MaskGenerator(*load_model(BUNDLED_CHECKPOINT, device))
    rounded = MaskGenerator(*load_model(BUNDLED_CHECKPOINT, device, dtype), decoder_dtype=torch.float16)
    assert rounded.decoder.dtype == torch.float16
    near, chosen = [], []
    for path in sorted(EXAMPLE_IMAGES.glob("*.jpg")):
        masks = exact(path, **settings).masks
        for changes, best in (({}, chosen), (wider, near)):
            others = list(rounded(path, **settings | changes).masks)
            best += [max(intersection_over_union(mask, other) for other in others) for mask in masks]
    shares = [np.mean(np.array(best) >= 0.95) for best in (chosen, near)]
    print(f"{dtype}: of {len(near)} masks in float32 {shares[0]:.3f} are chosen too, {shares[1]:.3f} are there before")
    assert len(near) >= 12 and shares[0] >= least_chosen and shares[1] >= 0.99


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_is_decoded_in_float16_where_its_weights_fit():
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda", "bfloat16")
    assert MaskGenerator(model, processor).decoder.dtype == torch.float16
    assert MaskGenerator(model, processor, decoder_dtype=torch.bfloat16).decoder.dtype == torch.bfloat16
    model.mask_decoder.iou_token.weight.data[0, 0] = 1e5
    assert MaskGenerator(model, processor).decoder.dtype == torch.bfloat16
    assert MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda")).decoder.dtype == torch.float32


def test_numbers_that_leave_the_range_of_the_decoder_are_told(tiny):
    model, processor = tiny
    model = SamLighteningModel(model.config).bfloat16()
    model.load_state_dict(tiny[0].state_dict())
    for layer in model.mask_decoder.transformer.layers:
        layer.mlp.lin1.weight.data.mul_(1e3)
        layer.mlp.lin2.weight.data.mul_(1e3)
    image, settings = random_image(40, 30), {**KEEP_ALL, "points_per_crop": 3}
    well_formed(MaskGenerator(model, processor)(image, **settings), image)
    generator = MaskGenerator(model, processor, decoder_dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"NaN, with a mask decoder in torch.float16.*float32, or decoder_dtype=torch.bfl"
    ):
        generator(image, **settings)
    with pytest.raises(ValueError, match="decoder_dtype='float16' must be a floating point type"):
        MaskGenerator(model, processor, decoder_dtype="float16")


def test_a_decoder_in_another_dtype_than_the_model(tiny):
    """The decoder accepts embeddings that another one prepared, and is made and called under autocast."""
    model, processor = tiny
    model = SamLighteningModel(model.config).bfloat16()
    model.load_state_dict(tiny[0].state_dict())
    image, settings = random_image(40, 30), MaskGenerationSettings(**KEEP_ALL, points_per_crop=3)
    generator = MaskGenerator(model, processor, decoder_dtype=torch.float16)
    expected = generator(image, settings)
    prepared = Predictor(model, processor).encode(image)
    assert prepared.embedding.dtype == torch.bfloat16
    again = generator.generate(image_tensor(image), settings, encoded=prepared)
    np.testing.assert_array_equal(
        again.scores, generator.generate(image_tensor(image), settings, encoded=prepared.embedding).scores
    )
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = MaskGenerator(model, processor, decoder_dtype=torch.float16)(image, settings)
    for result in (again, under_autocast):
        np.testing.assert_array_equal(result.scores, expected.scores)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("megabytes", [512, 1500])
def test_on_a_gpu_the_memory_stays_below_the_budget_and_the_result_the_same(photograph, dtype, megabytes):
    settings = {**KEEP_MANY, "points_per_crop": 32}
    gc.collect()  # graphs of earlier tests
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda", dtype)
    result = MaskGenerator(model, processor, max_memory_mb=megabytes)(photograph, **settings)
    allocated = torch.cuda.max_memory_allocated() - before
    print(f"{dtype}: {allocated / 2**20:.0f} MB of {megabytes}, {before / 2**20:.0f} MB before")
    assert allocated <= megabytes * 2**20
    expected = MaskGenerator(model, processor, max_memory_mb=4000)(photograph, **settings)
    if dtype == "float32":
        assert len(result) == len(expected)
    near = [max(intersection_over_union(mask, other) for other in result.masks) for mask in expected.masks]
    assert np.mean(np.array(near) >= 0.95) >= (1.0 if dtype == "float32" else 0.95)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("crops", [0, 1])
def test_logits_wait_and_give_the_masks_of_outlines_made_at_once(tiny, photograph, monkeypatch, device, crops):
    """Without memory to wait in, outlines are made at once."""
    if device == "cpu":
        settings, image = {**KEEP_ALL, "points_per_crop": 6, "crops_nms_thresh": 0.99}, random_image(70, 41)
        generator = MaskGenerator(*tiny)
    else:  # the filters leave almost no mask out
        settings = {"points_per_crop": 32 // (crops + 1), "pred_iou_thresh": 0.3, "stability_score_thresh": 0.65}
        image, generator = photograph, MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda", "bfloat16"))
        assert generator.decoder.is_lean
    outlined, outline = [], Candidates._outlined
    monkeypatch.setattr(Candidates, "_outlined", lambda *arguments: (outlined.append(1), outline(*arguments))[1])
    waited = generator(image, crops_n_layers=crops, **settings)
    assert not outlined
    monkeypatch.setattr(generator.budget, "waiting_bytes", 0)
    expected = generator(image, crops_n_layers=crops, **settings)
    assert outlined and len(waited) >= (50 if device == "cuda" else 10)
    assert waited.masks.to_coco() == expected.masks.to_coco()
    np.testing.assert_array_equal(waited.scores, expected.scores)
    np.testing.assert_array_equal(waited.boxes_xyxy, expected.boxes_xyxy)


@pytest.mark.gpu
def test_on_a_gpu_one_generator_serves_images_of_any_size():
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda")
    images = [Image.open(path) for path in sorted(EXAMPLE_IMAGES.glob("*.jpg"))]
    settings = {**KEEP_MANY, "points_per_crop": 8}
    generator, eager = MaskGenerator(model, processor), MaskGenerator(model, processor, cuda_graphs=False)
    for one, image in zip(generator(images, **settings), images, strict=True):
        other = eager(image, **settings)
        assert one.masks.to_coco() == other.masks.to_coco()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{"points_per_crop": 16}, {"points_per_crop": 6, "crops_n_layers": 1}], ids=str)
def test_on_a_gpu_triton_kernels_give_what_torch_gives(photograph, dtype, settings):
    """In bfloat16 torch rounds values that the kernel keeps in float32: most masks are equal, but not all."""
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda", dtype)
    settings = {**KEEP_MANY, **settings}
    results = {use: MaskGenerator(model, processor, triton_kernels=use) for use in (True, False)}
    assert [generator.use_triton for generator in results.values()] == [True, False]
    assert results[True].decoder.is_lean == (dtype == "bfloat16")
    assert not results[False].decoder.is_lean
    actual, expected = (generator(photograph, **settings) for generator in results.values())
    assert len(expected) >= 10
    near = np.array([max(intersection_over_union(mask, other) for other in actual.masks) for mask in expected.masks])
    if dtype == "float32":
        assert len(actual) == len(expected)
        assert near.min() >= 0.999
    assert (near >= 0.95).mean() >= 0.9


def test_triton_kernels_that_are_asked_for_and_cannot_be(tiny):
    with pytest.raises(ValueError, match="triton_kernels=True is not possible: .*(cpu|not installed)"):
        MaskGenerator(*tiny, triton_kernels=True)
    assert not MaskGenerator(*tiny).use_triton


def test_a_damaged_file_does_not_end_the_others(tiny, tmp_path):
    good = [random_image(40, 30, seed) for seed in range(3)]
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    images = [
        good[0],
        tmp_path / "half.png",
        good[1],
        Image.new("RGB", (20_000, 100)),
        str(tmp_path / "gone.jpg"),
        good[2],
    ]
    generator, settings = MaskGenerator(*tiny), {**KEEP_ALL, "points_per_crop": 3}
    expected = [generator(image, **settings) for image in good]
    with pytest.warns(UserWarning) as caught:
        results = list(generator.generate_many(iter(images), **settings))
    words = {1: "image 1: .*half.png: not an image", 3: "image 3: .*too thin", 4: "image 4: .*gone.jpg: no such file"}
    assert [place for place, result in enumerate(results) if isinstance(result, ImageError)] == list(words)
    for place, pattern in words.items():
        assert re.search(pattern, str(results[place])) and results[place].__traceback__ is None
        assert str(results[place]) in [str(warning.message) for warning in caught]
    for result, own in zip((results[0], results[2], results[5]), expected, strict=True):
        assert result.masks.to_coco() == own.masks.to_coco()
    with pytest.warns(UserWarning, match="half.png"):
        assert len(generator(images[:3], **settings)) == 3
    for call in (
        lambda **kind: list(generator.generate_many(images, **kind)),
        lambda **kind: generator(images, **kind),
    ):
        with pytest.raises(ImageError, match=words[1]):
            call(errors="raise")
        with pytest.raises(ValueError, match="errors='ignore' must be 'return' or 'raise'"):
            call(errors="ignore")
    with pytest.raises(ImageError, match="half.png"):
        generator(images[1])


def test_an_image_that_does_not_fit_into_memory_does_not_end_the_others(tiny, monkeypatch):
    generator, images = MaskGenerator(*tiny), [random_image(*size) for size in ((40, 30), (99, 30), (40, 30))]
    encode = generator.encoder.encode

    def full(pixel_values):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(pixel_values)

    calls, full.empty, full.enabled = [], encode.empty, encode.enabled
    monkeypatch.setattr(generator.encoder, "encode", full)
    with pytest.warns(UserWarning, match="image 1: OutOfMemoryError: CUDA out of memory"):
        results = generator(images, **KEEP_ALL, points_per_crop=2)
    assert [isinstance(result, ImageError) for result in results] == [False, True, False]


def test_a_generator_in_a_process_that_is_spawned(tiny):
    generator, image = MaskGenerator(*tiny, max_memory_mb=1400, decoder_dtype=torch.float64), random_image(40, 30)
    generator.set_budget(1300, points_per_batch=3)
    settings = {**KEEP_ALL, "points_per_crop": 3}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        actual = pool.submit(generator, image, **settings).result(timeout=300)
    expected = generator(image, **settings)
    assert len(expected) > 0 and actual.masks.to_coco() == expected.masks.to_coco()
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-6)
    again = pickle.loads(pickle.dumps(generator))
    assert (again.decoder.dtype, again.budget.points_per_batch) == (torch.float64, 3)
    assert again._settings == generator._settings


def test_a_budget_of_its_own(tiny):
    generator = MaskGenerator(*tiny)
    other = generator.with_budget(900, points_per_batch=2)
    assert (other.budget.points_per_batch, other.decoder) == (2, generator.decoder)
    assert generator.budget.points_per_batch != 2 and "points_per_batch" in generator._settings
    assert generator._settings["points_per_batch"] is None


def test_a_result_is_sliced_and_not_walked_through(bundled, photograph):
    generated = MaskGenerator(*bundled)(photograph, **KEEP_MANY, points_per_crop=np.int64(2))
    assert len(generated[:1]) == 1
    for result in (generated, generated.to_result()):
        with pytest.raises(TypeError, match=r"use result.masks\[0\]"):
            list(result)
