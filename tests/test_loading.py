"""Check that every fault of a checkpoint raises a one-line error, and never gives a model with random weights."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from samlight_hf import SamLighteningModel
from samlight_hf.loading import CheckpointError, find_device, load_model, weights_fingerprint

from .conftest import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder, *words):
    with pytest.raises(CheckpointError) as raised:
        load_model(folder, "cpu")
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message, message


def test_loads_in_eval_mode_with_the_saved_weights(folder):
    model, processor = load_model(folder, "cpu", "bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert processor.image_processor.size["longest_edge"] == 32
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value.bfloat16())


def test_loads_a_sam_of_transformers(tmp_path):
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "num_pos_feats": 128,
    }
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 64}))
    model.save_pretrained(tmp_path)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamProcessor(SamImageProcessor(**sizes)).save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "cpu")
    assert isinstance(loaded, SamModel)


def test_nothing_is_printed(folder, capfd):
    load_model(folder, "cpu")
    assert capfd.readouterr() == ("", "")


def test_missing_weights(folder):
    edit_weights(folder, lambda weights: weights.pop("vision_encoder.layers.0.attn.qkv.weight"))
    refused(folder, "1 weights are missing", "vision_encoder.layers.0.attn.qkv.weight")


def test_unexpected_weights(folder):
    edit_weights(folder, lambda weights: weights.update(surprise=torch.zeros(2)))
    refused(folder, "1 weights do not belong", "surprise")


def test_mismatched_shapes(folder):
    name = "vision_encoder.layers.0.mlp.lin1.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    refused(folder, "other shapes", name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(folder, value):
    edit_weights(folder, lambda weights: weights["vision_encoder.pos_embed"].flatten()[3:4].fill_(value))
    refused(folder, "NaN or infinite", "vision_encoder.pos_embed")


def test_values_too_large_for_float16(folder):
    edit_weights(folder, lambda weights: weights["vision_encoder.pos_embed"].fill_(1e6))
    with pytest.raises(CheckpointError, match="too large for float16"):
        load_model(folder, "cpu", "float16")


@pytest.mark.parametrize("end", [0, 4, 100, 5000, -10])
def test_truncated_weights(folder, end):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:end])
    refused(folder, "truncated or damaged")


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pickled", "pytorch_model.bin")


@pytest.mark.parametrize("part", ["processor_class", "image_processor_type"])
def test_nobody_is_asked_whether_code_of_a_checkpoint_may_run(folder, monkeypatch, part):
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")  # whoever sits at the terminal
    (folder / "mine.py").write_text(
        f"open({str(folder / 'was-run')!r}, 'w')\nfrom transformers import SamImageProcessor, SamProcessor\n"
        "class Mine(SamProcessor): pass\nclass Images(SamImageProcessor): pass\n"
    )
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    if part == "processor_class":
        config |= {"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}}
    else:
        config["image_processor"] |= {
            "image_processor_type": "Images", "auto_map": {"AutoImageProcessor": "mine.Images"},
        }  # fmt: skip
    file.write_text(json.dumps(config))
    refused(folder, "needs code of its own, which is never run here")
    assert not (folder / "was-run").exists()


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")


def test_a_shard_that_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"vision_encoder.pos_embed": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00001-of-00002.safetensors")


def test_shards_that_were_saved_over_a_whole_file(folder):
    """transformers would go on to load the whole file, which is older."""
    torch.manual_seed(1)
    newer = SamLighteningModel(tiny_config())
    newer.save_pretrained(folder, max_shard_size="50KB")
    refused(folder, "two sets of weights", "model-00001-of-")
    (folder / "model.safetensors").unlink()  # as the message says
    for name, weight in load_model(folder, "cpu")[0].state_dict().items():
        assert torch.equal(weight, newer.state_dict()[name]), name
    newer.save_pretrained(folder)  # here it is the shards that go
    load_model(folder, "cpu")


@pytest.mark.parametrize("model_type", ["bert", "sam_lightening_vision_model", None])
def test_another_kind_of_model(folder, model_type):
    edit_config(folder, model_type=model_type)
    refused(folder, f"model_type={model_type!r}", "sam_lightening")


def test_a_config_that_no_model_can_have(folder):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_config(folder, vision_config={**vision, "segment_length": [None, 15, None]})
    refused(folder, "segment_length=15", "64 tokens")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_no_processor(folder):
    (folder / "processor_config.json").unlink()
    refused(folder, "processor_config.json")


def test_a_processor_for_another_size(folder):
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_config(folder, "processor_config.json", image_processor={**processor, "size": {"longest_edge": 1024}})
    refused(folder, "longest_edge=1024", "image_size=32")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"size": {"height": 32, "width": 32}}, "longest_edge=None"),
        ({"pad_size": None}, "pad_size.height=None"),
        ({"do_resize": False}, "do_resize"),
        ({"do_pad": False}, "do_pad"),
    ],
    ids=str,
)
def test_a_processor_that_does_not_fit_any_image_to_the_model(folder, setting, words):
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_config(folder, "processor_config.json", image_processor={**processor, **setting})
    refused(folder, words)


@pytest.mark.parametrize(
    "setting",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"attn_implementation": "flash_attention_2"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_a_package_that_is_not_installed(folder, setting):
    if find_spec("bitsandbytes") or find_spec("flash_attn"):
        pytest.skip("bitsandbytes or flash_attn is installed")
    edit_config(folder, **setting)
    refused(folder, "cannot be loaded", "installed" if "attn_implementation" in setting else "pip install")


def test_an_adapter_beside_the_weights(folder, model, tmp_path):
    """transformers would add it, and say nothing of weights that the model itself lacks and that are random then."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    edit_weights(folder, lambda weights: weights.pop("vision_encoder.pos_embed"))
    refused(folder, "adapter_config.json", "merge_and_unload")
    merged = adapted.merge_and_unload()  # as the message says
    merged.save_pretrained(tmp_path / "merged")
    loaded, _ = load_model(tmp_path / "merged", "cpu")
    for name, weight in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_paths_that_are_not_there(tmp_path):
    for name in ("nowhere/", "a/b/c", "org/.name"):  # not asked of the Hub
        with pytest.raises(CheckpointError, match=f"^{name}: no such folder. Give a checkpoint's folder"):
            load_model(name, "cpu")
    refused(tmp_path / "nowhere", "no such folder")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(file, "is a file")
    with pytest.raises(CheckpointError, match="no such folder here, and from the Hub"):
        load_model("nobody/nothing", "cpu")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model("nothing", "cpu")


def test_devices_and_dtypes(folder):
    for device in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=device):
            load_model(folder, device)
    with pytest.raises(ValueError, match="int8"):
        load_model(folder, "cpu", "int8")
    assert find_device("auto").type in ("cpu", "cuda")


def test_a_fingerprint_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 1000)
    before, fingerprints = torch.get_num_threads(), set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        fingerprints.add(weights_fingerprint(model))
    torch.set_num_threads(before)
    assert len(fingerprints) == 1
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert weights_fingerprint(model) not in fingerprints
