import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import SamLighteningModel, optimize
from samlight_hf.conversion import change_image_size, resize_model, resize_processor
from samlight_hf.conversion.resizing import describe_pattern
from tests.conftest import tiny_config
from tests.conversion.test_student import sam_teacher


@pytest.mark.parametrize(
    "make", [lambda: SamLighteningModel(tiny_config()), lambda: sam_teacher(use_rel_pos=False, window_size=0)]
)
def test_another_image_size(make):
    model = make().eval()
    torch.nn.init.normal_(model.vision_encoder.pos_embed)
    larger = resize_model(model, 64)
    assert larger.config.vision_config.image_size == larger.config.prompt_encoder_config.image_size == 64
    assert larger.vision_encoder.pos_embed.shape[1:3] == (16, 16)
    weights = model.state_dict()
    for name, tensor in larger.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (name != "vision_encoder.pos_embed"), name
    outputs = larger(torch.randn(1, 3, 64, 64), input_points=torch.tensor([[[[20.0, 50.0]]]]))
    assert outputs.pred_masks.shape[-2:] == (64, 64)
    back = resize_model(larger, 32)  # smooth positions survive two interpolations
    assert back.config.to_dict() == model.config.to_dict()


def test_bands_keep_their_share_of_the_image_or_their_rows():
    model = SamLighteningModel(tiny_config())  # 8 rows, and bands of 2 rows, 16 tokens
    pattern = lambda size, bands: resize_model(model, size, bands).config.vision_config  # noqa: E731
    assert pattern(64, "image").segment_length == (None, 64, None)  # 4 of 16 rows
    assert pattern(64, "tokens").segment_length == (None, 32, None)  # 2 of 16 rows
    assert pattern(16, "image").segment_length == (None, 4, None)  # 1 of 4 rows
    assert pattern(24, "tokens").segment_length == (None, 12, None)  # 2 of 6 rows
    # 7 rows, a prime number: bands of 1 row are nearer to 1.75 than all 7. Their 49 tokens have no even segment.
    odd = pattern(28, "image")
    assert odd.segment_length == (None, 7, None)
    assert odd.dilation_rate == (1, 1, 1)
    assert change_image_size(model, 64).config.to_dict() == resize_model(model, 64).config.to_dict()


def test_other_patterns_follow_the_rule():
    one_value = SamLighteningModel(tiny_config(segment_length=32, dilation_rate=2))
    assert resize_model(one_value, 64).config.vision_config.segment_length == 128
    not_whole_rows = SamLighteningModel(tiny_config(segment_length=4, dilation_rate=2))  # half a row of 8
    assert resize_model(not_whole_rows, 64).config.vision_config.segment_length == 16
    assert resize_model(not_whole_rows, 64, "tokens").config.vision_config.segment_length == 4
    windows = tiny_config(window_size=4, segment_length=None, dilation_rate=1, global_attn_indexes=(2,))
    assert resize_model(SamLighteningModel(windows), 64).config.vision_config.window_size == 4
    per_head = SamLighteningModel(tiny_config(segment_length=None, dilation_rate=4, dilation_offsets="per_head"))
    assert resize_model(per_head, 24).config.vision_config.dilation_rate == 4  # divides 36 tokens
    assert resize_model(per_head, 40).config.vision_config.dilation_rate == 4
    assert resize_model(per_head, 20).config.vision_config.dilation_rate == 1


def test_the_pattern_in_words():
    assert describe_pattern(tiny_config().vision_config) == [
        "the whole image, 8 rows of tokens, dilation rate 2",
        "bands of 2 of 8 rows of tokens, dilation rate 1",
        "the whole image, 8 rows of tokens, dilation rate 4",
    ]
    assert describe_pattern(sam_teacher().config.vision_config) == []


def test_dtype_and_mode_stay():
    model = SamLighteningModel(tiny_config()).to(torch.bfloat16).train()
    resized = resize_model(model, 64)
    assert resized.dtype == torch.bfloat16
    assert resized.training
    assert not resize_model(model.eval(), 64).training


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (30, "patch_size=4 must divide image_size=30: use 28 or 32"),
        (3, "must divide image_size=3: use 4"),
        (0, "image_size=0 must be a positive multiple"),
        (-32, "image_size=-32 must be a positive multiple"),
        (64.0, "image_size=64.0 must be a positive multiple"),
        (100_000, "image_size=100000 is more than 256 patches of 4 px: use at most 1024, and tiles"),
    ],
)
def test_a_size_that_cannot_be(model, size, message):
    with pytest.raises(ValueError, match=message):
        resize_model(model, size)


def test_models_that_cannot_be_resized(model):
    with pytest.raises(ValueError, match="use_rel_pos=True cannot change its size"):
        resize_model(sam_teacher(), 64)
    with pytest.raises(ValueError, match="bands='rows' must be one of image, tokens"):
        resize_model(model, 64, "rows")
    with pytest.raises(ValueError, match="is optimized: resize the model that it was made from"):
        resize_model(optimize(model), 64)
    with pytest.raises(ValueError, match="is a Linear and must be"):
        resize_model(torch.nn.Linear(1, 1), 64)


def test_the_processor_keeps_the_rest(model):
    processor = make_processor(model.config.vision_config)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    resized = resize_processor(processor, 64, patch_size=4)
    expected = make_processor(resize_model(model, 64).config.vision_config).to_dict()
    expected["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    assert resized.to_dict() == expected
    assert processor.image_processor.size["longest_edge"] == 32


@pytest.mark.parametrize("part", ["vision_encoder", "mask_decoder"])
def test_what_a_config_does_not_have_is_not_lost(model, part):
    module = getattr(model, part)
    hook = module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{part} has a forward hook. Remove hooks, and merge adapters"):
        resize_model(model, 64)
    hook.remove()
    resize_model(model, 64)
