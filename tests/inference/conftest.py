import pytest
import torch

from samlight_hf import SamLighteningModel
from tests.conftest import tiny_config


def random_model() -> SamLighteningModel:
    """Make a tiny model with random weights, larger than fresh ones."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint of `random_model`."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model().save_pretrained(folder)
    return folder
