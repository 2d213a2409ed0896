import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskGeneration, SamProcessor

from samlight_hf import Predictor, SamLighteningModel
from samlight_hf.commands.cli import main
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return folder


def test_convert_writes_a_folder_that_loads_and_predicts(folder, tmp_path, capsys):
    out = tmp_path / "new" / "larger"
    assert main(["convert", "--model", str(folder), "--image-size", "64", "--out", str(out)]) == 0
    assert "layer 1: bands of 4 of 16 rows of tokens, dilation rate 1" in capsys.readouterr().out
    assert {"modeling_sam_lightening.py", "processor_config.json", "model.safetensors"} <= {
        p.name for p in out.iterdir()
    }
    model, processor = load_model(out, "cpu")
    assert model.config.vision_config.image_size == processor.image_processor.size["longest_edge"] == 64
    image = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8)
    predictor = Predictor(model, processor)
    assert predictor.predict([[(3, 4)]], image=predictor.encode(image)).masks.shape == (1, 3, 50, 40)
    remote = AutoModelForMaskGeneration.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(remote.vision_encoder.pos_embed, model.vision_encoder.pos_embed)
    assert isinstance(SamProcessor.from_pretrained(out), SamProcessor)


def test_convert_keeps_the_stored_dtype(folder, tmp_path):
    model, _ = load_model(folder, "cpu")
    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    assert main(["convert", "--model", str(half), "--image-size", "48", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_another_command_makes_meanwhile_stays(folder, tmp_path, monkeypatch, capsys):
    save = SamLighteningModel.save_pretrained

    def save_beside_another(self, *arguments, **options):
        save(self, *arguments, **options)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(SamLighteningModel, "save_pretrained", save_beside_another)
    assert main(["convert", "--model", str(folder), "--image-size", "64", "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_convert_never_rounds_weights_that_a_config_calls_half(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    for name, size in (("same", "32"), ("larger", "64")):
        assert (
            main(["convert", "--model", str(tmp_path / "model"), "--image-size", size, "--out", str(tmp_path / name)])
            == 0
        )
        assert "the weights are not float16" in capsys.readouterr().err
        weights, expected = (load_model(path, "cpu")[0].state_dict() for path in (tmp_path / name, folder))
        assert all(
            torch.equal(weights[key], expected[key]) for key in expected if weights[key].shape == expected[key].shape
        )


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--image-size", "30"], 1, "patch_size=4 must divide image_size=30: use 28 or 32"),
        (["--image-size", "0"], 2, "'0' is not a positive integer"),
        (["--image-size", "100000"], 1, "use at most 1024, and tiles"),
        (["--image-size", "64", "--out", "{folder}"], 2, "exists already. Choose a new folder."),
        (["--image-size", "64", "--model", "{folder}/none"], 1, "no such folder"),
        (["--out", "{folder}/config.json/out"], 1, "config.json is a file. Choose another folder."),
    ],
)
def test_bad_options_of_convert(folder, tmp_path, capsys, options, status, message):
    options = [option.format(folder=folder) for option in options]
    base = ["convert", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main(base + options) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
