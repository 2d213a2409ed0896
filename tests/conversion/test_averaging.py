"""`average_models`, and examples/average.py on checkpoint folders."""

import copy
import json

import pytest
import torch

from samlight_hf import SamLighteningModel
from samlight_hf.conversion.averaging import average_models
from samlight_hf.loading import load_model
from tests.conftest import tiny_config
from tests.examples.in_process import run_example


@pytest.fixture
def models():
    return [SamLighteningModel(tiny_config()) for _ in range(3)]


def test_each_weight_is_the_mean_of_the_models(models):
    before = [copy.deepcopy(model.state_dict()) for model in models]
    average = average_models(models, [2, 1, 1])
    assert average is models[0]
    for name, weight in average.state_dict().items():
        expected = (2 * before[0][name] + before[1][name] + before[2][name]) / 4
        torch.testing.assert_close(weight, expected)


def test_tied_weights_are_averaged_once(models):
    first, second = models[:2]
    with torch.no_grad():
        second.shared_image_embedding.positional_embedding.add_(1)
        expected = (
            first.shared_image_embedding.positional_embedding + second.shared_image_embedding.positional_embedding
        ) / 2
    average = average_models([first, second])
    for embedding in (average.shared_image_embedding, average.prompt_encoder.shared_embedding):
        torch.testing.assert_close(embedding.positional_embedding.data, expected)


def test_in_half_precision_sums_are_in_float32(models):
    models = [model.half() for model in models]
    weights = [model.vision_encoder.layers[0].mlp.lin1.weight.float() for model in models]
    average = average_models(models).vision_encoder.layers[0].mlp.lin1.weight
    assert average.dtype == torch.float16
    torch.testing.assert_close(average.float(), sum(weights) / 3, rtol=2**-10, atol=2**-24)  # rounded once


def test_what_cannot_be_averaged(models):
    with pytest.raises(ValueError, match="1 model to average: give two or more"):
        average_models(models[:1])
    for shares in ([1, 1], [1, 1, 0], [1, 1, float("nan")]):
        with pytest.raises(ValueError, match="must be a positive number for each of the 3 models"):
            average_models(models, shares)
    other = SamLighteningModel(tiny_config(dilation_rate=(2, 1, 2)))
    with pytest.raises(ValueError, match=r"models 1 and 2 differ: vision_config.dilation_rate is .* and .*"):
        average_models([models[0], other])


def test_the_script_writes_a_checkpoint_that_loads(models, tmp_path):
    folders = [tmp_path / str(number) for number in range(2)]
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    command = ["average.py", *folders, "--out", tmp_path / "out", "--dtype", "float16", "--max-shard-size", "40KB"]
    run = run_example(*command)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{tmp_path / 'out'}: the average of 2 models\n"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "modeling_sam_lightening.py",
        "processor_config.json",
        "model.safetensors.index.json",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    average = average_models(models[:2]).half().state_dict()
    for name, weight in load_model(tmp_path / "out", "cpu", "float16")[0].state_dict().items():
        assert torch.equal(weight, average[name])
    run = run_example(*command)
    assert (run.returncode, run.stderr) == (
        1,
        f"error: --out {tmp_path / 'out'} is not empty. Choose another folder.\n",
    )
