"""An exported model, small enough to be exported once for all tests of a folder."""

import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import SamLighteningModel
from tests.conftest import tiny_config


pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'samlight-hf[export]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'samlight-hf[export]'")


def small_model() -> SamLighteningModel:
    """Return a model whose random weights give masks of every size: with those of `tiny_config` they are all empty."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return (folder, model, processor) of a small model, exported in float32."""
    from samlight_hf.export import export_onnx

    model = small_model()
    processor = make_processor(model.config.vision_config)
    folder = tmp_path_factory.mktemp("export") / "onnx model"
    export_onnx(model, processor, folder)
    return folder, model, processor
