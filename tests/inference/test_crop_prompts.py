"""The prompts of a crop, which are kept for the next images of its size."""

import pytest
import torch
from transformers import SamImageProcessor

from samlight_hf.inference.crop_prompts import CropPrompts, _prompts_on
from samlight_hf.inference.crops import Crop


def test_those_of_a_size_are_made_once():
    """Images of a folder, and of a camera, have few sizes."""

    def make(min_iou: float = 0.5, width: int = 70) -> CropPrompts:
        crop = Crop((3, 5, 43, 35), 1)
        return CropPrompts.make(crop, (60, width), 3, min_iou, 4, 64, SamImageProcessor(), torch.device("cpu"))

    _prompts_on.cache_clear()
    assert make().rows is make().rows and make(0.6).rows is not make().rows and make(width=71).edges is not make().edges
    assert make(0.6).rows[0, 2] == torch.tensor(0.6) and make(width=71).edges[1, 2] == 71
    assert _prompts_on.cache_info().misses == 3


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_they_do_not_depend_on_defaults_of_torch(default):
    """Else those of the first image of a size would be kept."""

    def make() -> CropPrompts:
        crop = Crop((3, 5, 43, 35), 1)
        return CropPrompts.make(crop, (60, 70), 3, 0.5, 4, 64, SamImageProcessor(), torch.device("cpu"))

    _prompts_on.cache_clear()
    expected = make()
    _prompts_on.cache_clear()
    if default == "device":
        with torch.device("meta"):
            prompts = make()
    else:
        torch.set_default_dtype(torch.float64)
        try:
            prompts = make()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(prompts.rows, expected.rows) and torch.equal(prompts.edges, expected.edges)
    for own, other in zip(prompts.place[1:], expected.place[1:], strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, other)
