"""`samlight export`: files, check, and one line for each error."""

import json
import sys

import pytest

from samlight_hf import SamLighteningModel
from samlight_hf.commands import cli
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'samlight-hf[export]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'samlight-hf[export]'")


@pytest.mark.slow
def test_exports_checks_and_measures_miou(checkpoint, tmp_path, capsys):
    arguments = ["export", checkpoint, "--format", "onnx", "--out", str(tmp_path / "out"), "--dtype", "fp32", "int8"]
    assert cli.main([*arguments, "--check", "--limit", "2"]) == 0
    stdout = capsys.readouterr().out
    assert "onnx/vision_encoder_int8.onnx" in stdout and "opset 18, input 32x32" in stdout
    assert "fp32: onnx.checker accepts both graphs" in stdout and "IoU >= " in stdout and "OK." in stdout
    assert "torch 0." in stdout and "a loss of " in stdout


@pytest.mark.slow
def test_exports_at_another_image_size_with_the_models_own_normalisation(checkpoint, tmp_path, capsys):
    model, processor = load_model(checkpoint, "cpu")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--image-size", "16", "--check"]
    assert cli.main(arguments) == 0
    assert "input 16x16" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]
    assert written["size"] == {"longest_edge": 16} and written["mask_size"] == {"longest_edge": 16}


def test_errors_are_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    def error(*arguments, status=2):
        assert cli.main(["export", *arguments, "--out", str(tmp_path / "out")]) == status
        assert not (tmp_path / "out").exists()
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1
        return stderr

    assert "--opset 11: opset=11 must be from 18 to 23" in error(checkpoint, "--opset", "11")
    assert "--calibrate goes with --dtype int8 or uint8" in error(checkpoint, "--calibrate", str(tmp_path))
    assert "--image-size 18: patch_size=4 must divide image_size=18" in error(checkpoint, "--image-size", "18")
    assert "no photograph.jpg: no such file" in error(checkpoint, "--check", "--image", "no photograph.jpg")
    for option in ("--image", "--dataset", "--annotations"):
        assert f"{option} is for --check" in error(checkpoint, option, "nowhere")
    assert "mIoU is measured of int8 and uint8" in error(checkpoint, "--check", "--dataset", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error(str(tmp_path / "empty"), status=1)
    (tmp_path / "without weights").mkdir()
    SamLighteningModel(tiny_config()).config.save_pretrained(tmp_path / "without weights")
    assert "has no model.safetensors" in error(str(tmp_path / "without weights"), status=1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'samlight-hf[export]'" in error(checkpoint)


def test_an_image_that_cannot_be_read_is_told_and_left_out_of_the_calibration(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    options = ["--dtype", "int8", "--calibrate", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert cli.main(["export", checkpoint, *options]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("samlight: --calibrate: left out ") and "broken.jpg" in first
    assert "calibration has no images" in last
