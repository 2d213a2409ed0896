import copy
import itertools
import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from samlight_hf.modeling.configuration_sam_lightening import PRESETS, LayerPattern, alternating_pattern
from transformers import AutoConfig, SamVisionConfig

from samlight_hf import SamLighteningConfig, SamLighteningModel, SamLighteningVisionConfig
from tests.conftest import tiny_config


IMPOSSIBLE = [
    # (vision config, what the error must say)
    ({"segment_length": 500}, ["segment_length=500", "4096", "image_size=1024"]),
    ({"segment_length": (512, None, 500, None, 512, None)}, ["segment_length=500", "layer 2", "4096"]),
    ({"segment_length": None, "dilation_rate": 3}, ["dilation_rate=3", "segment_length=4096"]),
    ({"dilation_rate": (1, 2, 5, 2, 1, 2)}, ["dilation_rate=5", "layer 2", "segment_length=512"]),
    ({"num_hidden_layers": 9}, ["6 entries", "num_hidden_layers=9", "alternating_pattern"]),
    ({"dilation_rate": (1, 2)}, ["dilation_rate has 2 entries", "num_hidden_layers=6"]),
    ({"dilation_offsets": ("all",) * 5}, ["dilation_offsets has 5 entries"]),
    ({"segment_length": 0}, ["segment_length=0", "positive"]),
    ({"segment_length": -512}, ["segment_length=-512", "positive"]),
    ({"segment_length": None, "dilation_rate": 0}, ["dilation_rate=0", "positive"]),
    ({"segment_length": None, "dilation_rate": -2}, ["dilation_rate=-2", "positive"]),
    ({"dilation_offsets": "some"}, ["'some'", "all", "per_head"]),
    ({"dilation_rate": 4, "dilation_offsets": "per_head"}, ["dilation_rate=4", "num_attention_heads=6"]),
    ({"use_rel_pos": True}, ["use_rel_pos=True", "position bias"]),
    ({"image_size": 1000}, ["patch_size=16", "image_size=1000"]),
    ({"image_size": 0}, ["image_size=0"]),
    ({"hidden_size": 100}, ["num_attention_heads=6", "hidden_size=100"]),
    ({"num_channels": 0}, ["num_channels=0"]),
    ({"output_channels": 0}, ["output_channels=0"]),
    ({"attention_dropout": 2.0}, ["attention_dropout=2.0"]),
    ({"window_size": -1}, ["window_size=-1"]),
    ({"window_size": 14}, ["segment_length=512", "layer 0", "14x14=196"]),
    (
        {"window_size": 14, "segment_length": None, "dilation_rate": 1, "global_attn_indexes": (2, 6)},
        ["contains 6", "=6"],
    ),
    ({"window_size": 14, "segment_length": None, "dilation_rate": 3}, ["dilation_rate=3", "segment_length=196"]),
]  # fmt: skip


@pytest.mark.parametrize(("vision_config", "said"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_impossible_combination_is_refused_with_both_numbers(vision_config, said):
    for make in (
        lambda: SamLighteningVisionConfig(**vision_config),
        lambda: SamLighteningConfig(vision_config=vision_config),
    ):
        with pytest.raises(ValueError) as error:
            make()
        for words in said:
            assert words in str(error.value)


@pytest.mark.parametrize("field", ["segment_length", "dilation_rate", "num_attention_heads", "window_size"])
@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_value_of_another_type_is_refused_by_name(field, value):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
        SamLighteningVisionConfig(**{field: value})
    if field != "window_size":
        with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
            SamLighteningVisionConfig(**{field: (value,) * 6})


def test_field_assigned_later_is_refused_when_the_model_is_made(config):
    config.vision_config.segment_length = 48
    with pytest.raises(ValueError, match="segment_length=48"):
        SamLighteningModel(config)


def test_parts_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"prompt_encoder_config\.image_size=512 .*vision_config\.image_size=1024"):
        SamLighteningConfig(prompt_encoder_config={"image_size": 512})
    with pytest.raises(ValueError, match=r"num_pos_feats=64"):
        SamLighteningConfig(vision_config={"num_pos_feats": 32})
    config = tiny_config()
    config.mask_decoder_config.hidden_size = 64
    with pytest.raises(ValueError, match=r"mask_decoder_config\.hidden_size=64"):
        SamLighteningModel(config)


def test_a_plain_sams_vision_config_is_converted_or_refused():
    with pytest.raises(ValueError, match="use_rel_pos=True"):
        SamLighteningConfig(vision_config=SamVisionConfig())
    plain = SamVisionConfig(use_rel_pos=False, window_size=0, num_hidden_layers=6)
    converted = SamLighteningConfig(vision_config=plain).vision_config
    assert type(converted) is SamLighteningVisionConfig
    ours = SamLighteningVisionConfig()  # not SAM's defaults, with which a fresh model does not learn
    assert (converted.scale, converted.initializer_range) == (ours.scale, ours.initializer_range)
    plain = SamVisionConfig(use_rel_pos=False, window_size=0, num_hidden_layers=6, scale=3.0, initializer_range=0.1)
    converted = SamLighteningConfig(vision_config=plain).vision_config
    assert (converted.scale, converted.initializer_range) == (3.0, 0.1)


def test_parts_agree_on_what_the_vision_config_says():
    config = SamLighteningConfig(vision_config={"image_size": 512, "segment_length": None})
    assert config.prompt_encoder_config.image_size == 512
    assert config.prompt_encoder_config.image_embedding_size == 32


def test_default_is_the_published_tiny_shape():
    config = SamLighteningConfig()
    assert config.to_dict() == SamLighteningConfig.from_preset("tiny").to_dict()
    local, whole = LayerPattern(512, 1, "all", 0), LayerPattern(4096, 2, "all", 0)
    assert config.vision_config.layer_patterns() == [local, whole] * 3


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset):
    patterns = SamLighteningConfig.from_preset(preset).vision_config.layer_patterns()
    assert patterns[-1] == LayerPattern(4096, 2, "all", 0)
    assert all(first.segment_length != second.segment_length for first, second in itertools.pairwise(patterns))


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'huge'.*tiny, small, base"):
        SamLighteningConfig.from_preset("huge")


def test_preset_takes_overrides():
    config = SamLighteningConfig.from_preset("tiny", image_size=512, **alternating_pattern(6, 128, 4))
    assert config.vision_config.layer_patterns()[:2] == [
        LayerPattern(128, 1, "all", 0),
        LayerPattern(1024, 4, "all", 0),
    ]


def test_windowed_layers():
    config = SamLighteningVisionConfig(
        window_size=14, global_attn_indexes=(2, 5), segment_length=(None, 196, 512, None, None, None), dilation_rate=2
    )
    assert config.layer_patterns()[:3] == [
        LayerPattern(196, 2, "all", 14),
        LayerPattern(196, 2, "all", 14),
        LayerPattern(512, 2, "all", 0),
    ]


def test_mlp_ratio_may_be_an_int():
    assert SamLighteningVisionConfig(mlp_ratio=4).mlp_dim == 1536


def test_round_trips(config, tmp_path):
    assert SamLighteningConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SamLighteningConfig
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert type(loaded.vision_config) is SamLighteningVisionConfig
    assert loaded.vision_config.layer_patterns() == config.vision_config.layer_patterns()
    vision_config = SamLighteningVisionConfig.from_pretrained(tmp_path)
    assert vision_config.layer_patterns() == config.vision_config.layer_patterns()
    assert vision_config.scale == 1.0


def test_override_while_loading_is_checked(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, vision_config={"segment_length": 8, "dilation_rate": 1})
    assert loaded.vision_config.layer_patterns() == [LayerPattern(8, 1, "all", 0)] * 3
    with pytest.raises(ValueError, match="segment_length=7"):
        AutoConfig.from_pretrained(tmp_path, vision_config={"segment_length": 7})


def test_config_with_keys_of_another_version_loads(config, tmp_path):
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["transformers_version"] = "6.0.0"
    saved["key_of_a_later_version"] = 1
    saved["vision_config"]["key_of_a_later_version"] = 1
    del saved["vision_config"]["dilation_offsets"]  # a key that an earlier version did not have
    path.write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).vision_config.layer_patterns() == config.vision_config.layer_patterns()
