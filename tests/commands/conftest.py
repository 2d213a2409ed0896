import pytest
import torch

from samlight_hf import SamLighteningModel
from samlight_hf.commands import cli
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with random weights, by its folder's name."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def samlight(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # what loading and saving in fixtures has said
        status = cli.main([str(argument) for argument in arguments])
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stdout + stderr
        return status, stdout, stderr

    return run
