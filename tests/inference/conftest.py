import pytest
import torch

from samlight_hf import SamLighteningModel
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with random weights, larger than fresh ones."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
