"""pipeline("fast-mask-generation") takes the arguments of the stock task and gives the same dictionary."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers import pipeline

import samlight_hf
from samlight_hf import FastMaskGenerationPipeline, SamLighteningModel
from samlight_hf.images.preprocessing import image_tensor
from tests.conftest import tiny_config


SETTINGS = {"points_per_crop": 4, "points_per_batch": 5, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fast(checkpoint):
    return pipeline("fast-mask-generation", model=checkpoint, device="cpu")


@pytest.fixture(scope="module")
def stock(checkpoint):
    return pipeline("mask-generation", model=checkpoint, device="cpu")


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"output_rle_mask": True, "output_bboxes_mask": True},
        {"crops_n_layers": 1, "crop_overlap_ratio": 0.2, "crop_n_points_downscale_factor": 1, "output_rle_mask": True},
        {"mask_threshold": 0.001, "stability_score_offset": 0.0001, "crops_nms_thresh": 1.0, "timeout": 3.0},
        {"pred_iou_thresh": 1.0, "output_rle_mask": True, "output_bboxes_mask": True},
    ],
    ids=str,
)
def test_the_dictionary_is_the_stock_tasks(fast, stock, image, settings):
    ours = fast(image, **{**SETTINGS, **settings})
    try:
        expected = stock(image, **{**SETTINGS, **settings})
    except RuntimeError as error:
        if "crops_n_layers" in settings and "stack expects each tensor to be equal size" in str(error):
            pytest.skip("the stock pipeline of this transformers cannot take crops")
        raise
    assert list(ours) == list(expected)
    assert len(ours["masks"]) == len(expected["masks"])
    for mask, other in zip(ours["masks"], expected["masks"]):
        assert mask.dtype == other.dtype == torch.bool
        assert torch.equal(mask, other)
    assert torch.allclose(ours["scores"], expected["scores"])
    assert (ours["scores"].dtype, ours["scores"].device) == (expected["scores"].dtype, expected["scores"].device)
    assert ours.get("rle_mask") == expected.get("rle_mask")
    if "bounding_boxes" in ours:
        assert ours["bounding_boxes"].dtype == torch.int64
        assert torch.equal(ours["bounding_boxes"], expected["bounding_boxes"].reshape(-1, 4).long())


def test_a_list_gives_a_list_of_paths_too(fast, image, tmp_path):
    image.save(tmp_path / "x.png")
    results = fast([image, str(tmp_path / "x.png")], **SETTINGS, batch_size=2)
    assert len(results) == 2
    assert all(torch.equal(*pair) for pair in zip(*(result["masks"] for result in results)))


def test_turned_tiffs_are_turned_upright_and_drawings_are_not_opened(fast, tmp_path):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33), dtype=np.uint8))
    pixels.save(tmp_path / "turned.tif", tiffinfo={ExifTags.Base.Orientation: 6})
    turned = fast.preprocess(str(tmp_path / "turned.tif"))["image"]
    assert torch.equal(turned, image_tensor(pixels.rotate(-90, expand=True)))
    pixels.save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.jpg")
    with pytest.raises(UnidentifiedImageError):
        fast(str(tmp_path / "drawing.jpg"))


def test_masks_may_be_left_out_and_the_documented_name_works(fast, image):
    result = fast(image, **SETTINGS, output_masks=False, output_rle_masks=True)
    assert list(result) == ["scores", "rle_mask"]
    assert len(result["rle_mask"]) == len(result["scores"]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(checkpoint, image, dtype):
    task = pipeline("fast-mask-generation", model=checkpoint, dtype=dtype, device="cpu")
    assert task.model.dtype == dtype
    assert len(task(image, **SETTINGS)["masks"]) > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"points_per_crop": 0}, "points_per_crop=0"),
        ({"points_per_batch": 0}, "points_per_batch=0"),
        ({"max_hole_area": 5}, "max_hole_area is not possible"),
        ({"colour": "red"}, "colour is no argument"),
    ],
)
def test_arguments_that_cannot_be(fast, image, settings, words):
    with pytest.raises(ValueError, match=words):
        fast(image, **{**SETTINGS, **settings})
    assert len(fast(image, **SETTINGS, max_hole_area=None, max_sprinkle_area=0)["masks"]) > 0


def test_arguments_of_the_model_are_given_with_it(checkpoint):
    task = pipeline("fast-mask-generation", model=checkpoint, device="cpu", max_memory_mb=700, points_per_crop=3)
    assert isinstance(task, FastMaskGenerationPipeline)
    assert task.max_memory_mb == 700
    assert task._forward_params == {"points_per_crop": 3}
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a CUDA device"):
        pipeline("fast-mask-generation", model=checkpoint, device="cpu", cuda_graphs=True)


def test_pickled_it_gives_the_same(fast, image):
    again = pickle.loads(pickle.dumps(fast))
    assert again.generator.model is again.model is not fast.model
    actual, expected = (task(image, **SETTINGS, output_rle_mask=True) for task in (again, fast))
    assert actual["rle_mask"] == expected["rle_mask"] and len(actual["masks"]) > 0


def test_a_saved_pipeline_asks_for_no_code_of_a_pipeline(fast, tmp_path):
    """The task belongs to this package: the file of one class alone could not run."""
    fast.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "pipelines.py").exists()
    assert (
        type(pipeline("fast-mask-generation", model=str(tmp_path), trust_remote_code=False))
        is FastMaskGenerationPipeline
    )


def test_registered_once():
    from transformers.pipelines import PIPELINE_REGISTRY

    assert PIPELINE_REGISTRY.check_task("fast-mask-generation")[1]["impl"] is samlight_hf.FastMaskGenerationPipeline
