"""Tests that the Triton kernels of the decoder's attention compute the same as the step-by-step reference."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import SamConfig, SamModel

from samlight_hf.engine.build import PlainMaskDecoder
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.kernels import image_attention, shared_attention
from samlight_hf.kernels.image_attention import (
    fits,
    launch_seen,
    launch_update,
    seen,
    seen_reference,
    update,
    update_reference,
    why_not_triton,
)
from samlight_hf.kernels.layer_norm import add_layer_norm_reference
from samlight_hf.kernels.support import triton

from .interpreter import run_in_tritons_interpreter


CASES = [  # prompts, images, tokens of a prompt, heads, image tokens, channels
    (2, 2, 7, 8, 200, 128),  # no multiple of a block
    (2, 1, 8, 8, 64, 256),
    (1, 1, 13, 4, 130, 128),
    (1, 1, 3, 8, 300, 128),
    (3, 3, 7, 1, 64, 128),
]
ON_A_GPU = [(1, 1, 7, 8, 4096, 256), (64, 64, 7, 8, 4096, 256), (70, 1, 7, 8, 4096, 256), (5, 5, 8, 8, 4096, 256)]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_errors(case, dtype, device="cpu") -> list[float]:
    """Return the errors of attended tokens and of new image tokens, against the reference in float32."""
    prompts, images, own, heads, tokens, channels = case
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    image, positions = numbers(images, tokens, channels), numbers(tokens, channels)
    queries, keys, values = (numbers(prompts, heads * own, channels, scale=0.15) for _ in range(3))
    biases, norm = numbers(prompts, heads * own), nn.LayerNorm(channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.to(device, dtype)
    with torch.no_grad():
        found = [
            launch_seen(queries, image, positions),
            launch_update(image, positions, keys, biases, values, norm, heads),
        ]
        image, positions, queries, keys, values, biases = (
            tensor.float() for tensor in (image, positions, queries, keys, values, biases)
        )
        expected = [
            seen_reference(queries, image, positions),
            update_reference(
                image, positions, keys, biases, values, norm.float(), heads, add_layer_norm_reference
            ),
        ]  # fmt: skip
    assert all(a.shape == b.shape and a.dtype == dtype for a, b in zip(found, expected))
    own = image.to(dtype).expand_as(found[1]).clone()
    sides = keys.to(dtype), biases.to(dtype), values.to(dtype), norm.to(dtype)
    apart = launch_update(own, positions.to(dtype), *sides, heads)
    again = launch_update(own, positions.to(dtype), *sides, heads, in_place=True)
    assert again.data_ptr() == own.data_ptr() and torch.equal(again, apart)
    assert ((apart - found[1]).norm() / found[1].norm()).item() < TOLERANCES[dtype]  # images of which all are the same
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]


def check_decoder(device="cpu"):
    """Check the whole decoder in float16 for every kind of prompt, against the model's own in float32."""
    vision = {"hidden_size": 32, "output_channels": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 64, "num_pos_feats": 64, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [0]}
    prompt_encoder = {"hidden_size": 128, "image_size": 64, "image_embedding_size": 4}
    decoder = {"hidden_size": 128, "mlp_dim": 64, "iou_head_hidden_dim": 32, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder, mask_decoder_config=decoder)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    model = model.to(device)
    plain, fast = PlainMaskDecoder(model), FastMaskDecoder(model, dtype=torch.float16)
    if device == "cpu":  # Triton's interpreter
        fast.use_attention_kernels = fast.use_head_kernel = True
    assert fast.use_attention_kernels and fast.use_head_kernel
    points, labels = 64 * torch.rand(3, 1, 2), torch.ones(3, 1, dtype=torch.int64)
    boxes = (64 * torch.rand(3, 2, 2)).sort(dim=1).values.flatten(1)
    for prompts in (
        {"points": points, "labels": labels},
        {"boxes": boxes},
        {"points": points, "labels": labels, "boxes": boxes, "mask_logits": torch.randn(3, 16, 16)},
        {"points": points.repeat(1, 12, 1), "labels": labels.repeat(1, 12)},  # too many for the kernels of attention
    ):
        for num_images in (1, 3):
            prompts = {name: prompt.to(device) for name, prompt in prompts.items()}
            image = torch.randn(num_images, 128, 4, 4, device=device)
            with patch.object(shared_attention, "launch_attend", wraps=shared_attention.launch_attend) as shared:
                found = fast.decode(fast.prepare(image), **prompts)
            assert shared.called is (num_images == 1 and "mask_logits" not in prompts)
            expected = plain.decode(plain.prepare(image), **prompts)
            assert found.logits.shape == expected.logits.shape
            assert (found.logits - expected.logits).norm() < 5e-3 * expected.logits.norm(), (
                prompts.keys(),
                num_images,
            )


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES + ON_A_GPU, ids=str)
def test_the_kernels_on_a_gpu(case, dtype):
    assert why_not_triton(torch.device("cuda"), dtype, case[-1], case[3]) is None
    assert max(relative_errors(case, dtype, "cuda")) < TOLERANCES[dtype]


@pytest.mark.gpu
def test_the_decoder_on_a_gpu():
    check_decoder("cuda")


def test_the_steps_are_attention():
    """The reference equals torch's attention, head by head."""
    prompts, own, heads, tokens, channels = 3, 5, 2, 11, 8
    image, positions = torch.randn(prompts, tokens, channels), torch.randn(tokens, channels)
    queries, keys, values = torch.randn(3, prompts, heads * own, channels)
    biases, norm = torch.randn(prompts, heads * own), nn.LayerNorm(channels)
    attention = nn.functional.scaled_dot_product_attention
    expected = attention(queries, image + positions, image, scale=1.0)
    assert torch.allclose(seen_reference(queries, image, positions), expected, atol=1e-5)
    attended = sum(
        attention(image + positions, keys[:, part], values[:, part], attn_mask=biases[:, None, part], scale=1.0)
        for part in (slice(0, own), slice(own, None))
    )
    with torch.no_grad():
        found = update_reference(image, positions, keys, biases, values, norm, heads)
        assert torch.allclose(found, norm(image + attended), atol=1e-5)


@pytest.mark.filterwarnings("ignore:the Triton kernel for the attention")
@pytest.mark.parametrize("num_images", [1, 3])
def test_where_the_kernels_cannot_be_compiled_the_steps_run(num_images):
    image, positions, norm = torch.randn(num_images, 10, 128), torch.randn(10, 128), nn.LayerNorm(128)
    queries, keys, values = torch.randn(3, 3, 2 * 4, 128)
    biases = torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(seen(queries, image, positions), seen_reference(queries, image, positions))
            given = image, positions, keys, biases, values, norm, 2
            assert torch.equal(update(*given), update_reference(*given))


@pytest.mark.gpu
def test_more_prompts_than_the_second_axis_of_a_grid_has_programs():
    generator = torch.Generator("cuda").manual_seed(0)
    image, positions = torch.randn(2, 1, 32, 128, device="cuda", generator=generator).half()
    queries, keys, values = 0.15 * torch.randn(3, 70_000, 8, 128, device="cuda", generator=generator).half()
    biases, norm = torch.zeros(70_000, 8, device="cuda").half(), nn.LayerNorm(128, device="cuda").half()
    some = [0, 65_534, 65_535, 65_536, 69_999]
    with torch.no_grad():
        found = launch_seen(queries, image, positions[0])[some]
        expected = seen_reference(queries[some].float(), image.float(), positions[0].float())
        assert (found - expected).norm() < TOLERANCES[torch.float16] * expected.norm()
        found = launch_update(image, positions[0], keys, biases, values, norm, 8)[some]
        few = (tensor[some].float() for tensor in (keys, biases, values))
        expected = update_reference(
            image.float(), positions[0].float(), *few, norm.float(), 8, add_layer_norm_reference
        )
        assert (found - expected).norm() < TOLERANCES[torch.float16] * expected.norm()


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("num_prompts", [1, 4, 16, 64, 100, 131, 132, 147, 264, 1000])
def test_thread_blocks_for_whole_prompts_fill_the_gpu_and_the_rest_is_divided(num_prompts):
    whole, blocks_of_part = image_attention._whole_prompts(num_prompts, blocks=64, resident=132)
    assert whole % 132 == 0 and 0 <= num_prompts - whole < 132
    parts = -(-64 // blocks_of_part)
    assert (num_prompts - whole) * parts <= 132  # all at the same time
    assert num_prompts == whole or (num_prompts - whole) * (parts + 1) > 66 or blocks_of_part <= 2


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [((9, 0), "13.0", True), ((8, 6), "13.0", False), ((12, 0), "13.0", False), ((9, 0), None, False)],
)
def test_only_hopper_gpus_have_the_shared_memory_for_large_blocks(monkeypatch, version, cuda, expected):
    """GPUs of AMD say that they are 9.0 or 9.4, and have less shared memory than any other."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    assert image_attention._is_hopper(torch.device("cuda", 0)) == expected


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_why_the_kernels_do_not_run():
    assert "on cpu" in why_not_triton(torch.device("cpu"), torch.float16, 256, 8)
    assert "float32" in why_not_triton(torch.device("cuda"), torch.float32, 256, 8)
    assert "64 channels" in why_not_triton(torch.device("cuda"), torch.float16, 64, 8)
    assert "6 heads" in why_not_triton(torch.device("cuda"), torch.float16, 256, 6)
    assert fits(8, 8) and not fits(8, 9)


if __name__ == "__main__":
    for case in CASES:
        errors = relative_errors(case, torch.float16)
        assert max(errors) < TOLERANCES[torch.float16], (case, errors)
    for count in (1, 4):  # as with many prompts: thread blocks process all of one, and parts of several
        image_attention._resident = lambda device, shape, count=count: count
        assert max(relative_errors(CASES[0], torch.float16)) < TOLERANCES[torch.float16]
    image_attention._SEEN, image_attention._UPDATE = image_attention._SMALL_SEEN, image_attention._SMALL_UPDATE
    assert max(relative_errors(CASES[0], torch.float16)) < TOLERANCES[torch.float16]
    check_decoder()
    print(f"{len(CASES)} cases")
