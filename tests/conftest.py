import contextlib
import os
from collections.abc import Iterator


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need nothing from the Hub
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and pytest-xdist runs the tests side by side

import pytest
import torch
from samlight_hf.modeling.dilated_attention import DILATED_FLASH_ATTENTION, dilated_flash_attention_forward
from transformers.modeling_utils import AttentionInterface

from samlight_hf import SamLighteningConfig, SamLighteningModel


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_attention_function():
    """Register the package's attention function again: code loaded with trust_remote_code has registered its copy."""
    yield
    AttentionInterface.register(DILATED_FLASH_ATTENTION, dilated_flash_attention_forward)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors without a dtype in another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_config(**vision_config) -> SamLighteningConfig:
    """Return the published architecture at a small size: 8x8 = 64 tokens of 4x4 pixels, 3 layers, 4 heads."""
    vision_config = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "output_channels": 32,
        "num_pos_feats": 16,
        "segment_length": (None, 16, None),
        "dilation_rate": (2, 1, 4),
        **vision_config,
    }
    return SamLighteningConfig(
        vision_config=vision_config, mask_decoder_config={"mlp_dim": 64, "iou_head_hidden_dim": 32}
    )


@pytest.fixture
def config() -> SamLighteningConfig:
    return tiny_config()


@pytest.fixture
def model(config) -> SamLighteningModel:
    torch.manual_seed(0)
    return SamLighteningModel(config).eval()


@pytest.fixture
def pixel_values(config) -> torch.Tensor:
    size = config.vision_config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
