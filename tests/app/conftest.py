import numpy as np
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.image_processing_sam_lightening import SamLighteningImageProcessor

from samlight_hf import SamLighteningModel
from samlight_hf.app.limits import Limits
from samlight_hf.app.segmenter import Segmenter
from samlight_hf.app.session import Session
from tests.conftest import tiny_config


SIZE = 96, 64  # width, height


def processor_of(model) -> SamLighteningImageProcessor:
    side = model.config.vision_config.image_size
    low = 4 * model.config.prompt_encoder_config.image_embedding_size
    sizes = {"size": {"longest_edge": side}, "pad_size": {"height": side, "width": side}}
    masks = {"mask_size": {"longest_edge": low}, "mask_pad_size": {"height": low, "width": low}}
    return SamLighteningImageProcessor(**sizes, **masks)


def noise(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return an image that no other seed gives."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="session")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config()).eval()
    return Segmenter(model, processor_of(model))


@pytest.fixture
def limits() -> Limits:
    return Limits(clicks=4, objects=3, steps=6, points_per_side=8)


@pytest.fixture
def session(segmenter, limits) -> Session:
    return Session(segmenter, noise(), "../photo of me.jpg", limits)
