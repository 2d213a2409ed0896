"""Tests that the kernel of the attention to shared image tokens computes the same as the decoder's own module."""

import pytest
import torch
from torch import nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamAttention

from samlight_hf.kernels.shared_attention import (
    attend,
    attend_reference,
    fits,
    launch_attend,
    launch_project,
    why_not_triton,
)
from samlight_hf.kernels.support import triton

from .interpreter import run_in_tritons_interpreter


CASES = [  # prompts, tokens of a prompt, heads, features of a head, image tokens, channels
    (20, 7, 8, 16, 300, 256),  # several blocks of rows and of image tokens, none a multiple
    (1, 7, 8, 16, 512, 256),
    (3, 9, 4, 32, 64, 128),
    (2, 3, 1, 64, 129, 128),
]
ON_A_GPU = [(147, 7, 8, 16, 4096, 256), (64, 7, 8, 16, 4096, 256), (1, 7, 8, 16, 4096, 256)]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@torch.no_grad()
def relative_errors(case, dtype, device="cpu") -> list[float]:
    """Return the errors for tokens of this dtype, and for float32 tokens that a norm is applied to."""
    prompts, own, heads, head, image_tokens, channels = case
    torch.manual_seed(0)
    query, norm = nn.Linear(channels, heads * head), nn.LayerNorm(channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    query, norm = query.to(device, dtype), norm.to(device, dtype)
    tokens, embedded = torch.randn(2, prompts, own, channels).to(device)
    # As halves of wider rows, which is how one product computes both.
    image, weight = torch.randn(image_tokens, channels).to(device, dtype), torch.randn(2 * heads * head, channels)
    weight, terms = (0.05 * weight).to(device, dtype), torch.randn(image_tokens, 2 * heads * head).to(device, dtype)
    projected = launch_project(image, weight, terms)
    expected = image.float() @ weight.float().T + terms.float()
    assert projected.dtype == dtype and (projected - expected).norm() < TOLERANCES[dtype] * expected.norm()
    keys, values = projected.chunk(2, dim=1)
    tokens = tokens.to(dtype).float()  # the same in both kinds
    kinds = [(tokens.to(dtype), query, keys, values, heads), (tokens, query, keys, values, heads, norm, embedded)]
    found = [launch_attend(*kind) for kind in kinds]
    assert all(result.dtype == dtype and result.shape == (prompts, own, heads * head) for result in found)
    query, norm, keys, values = query.float(), norm.float(), keys.float(), values.float()
    kinds = [(tokens, query, keys, values, heads), (tokens, query, keys, values, heads, norm, embedded)]
    expected = [attend_reference(*kind) for kind in kinds]
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernel_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES + ON_A_GPU, ids=str)
def test_the_kernel_on_a_gpu(case, dtype):
    _, _, heads, head, _, channels = case
    assert why_not_triton(torch.device("cuda"), dtype, channels, heads, heads * head) is None
    assert max(relative_errors(case, dtype, "cuda")) < TOLERANCES[dtype]


def test_the_reference_is_the_decoders_attention():
    config = SamConfig(mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4}).mask_decoder_config
    attention = SamAttention(config)
    tokens, embedded, image = torch.randn(3, 5, 32), torch.randn(3, 5, 32), torch.randn(11, 32)
    norm, key_image = nn.LayerNorm(32), torch.randn(11, 32)
    with torch.no_grad():
        keys, values = attention.k_proj(key_image), attention.v_proj(image)
        for sides, given in (((), tokens), ((norm, embedded), norm(tokens) + embedded)):
            found = attend_reference(tokens, attention.q_proj, keys, values, 4, *sides)
            shared = key_image.expand(3, -1, -1)[None], image.expand(3, -1, -1)[None]
            expected = attention(query=given[None], key=shared[0], value=shared[1])[0][0]
            assert torch.allclose(attention.out_proj(found), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the Triton kernel for the attention to shared")
def test_where_the_kernel_cannot_be_compiled_the_steps_run():
    query, tokens = nn.Linear(128, 64), torch.randn(3, 5, 128)
    keys, values = torch.randn(2, 10, 64)
    with torch.no_grad():
        for _ in range(2):
            found = attend(tokens, query, keys, values, 4)
            assert torch.equal(found, attend_reference(tokens, query, keys, values, 4))


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_why_the_kernel_does_not_run():
    assert "on cpu" in why_not_triton(torch.device("cpu"), torch.float16, 256, 8, 128)
    assert "float32" in why_not_triton(torch.device("cuda"), torch.float32, 256, 8, 128)
    assert fits(8, 128) and not fits(8, 64)
    assert why_not_triton(torch.device("cpu"), torch.float16, 256, 8, 64) is None  # the decoder does without


if __name__ == "__main__":
    for case in CASES:
        errors = relative_errors(case, torch.float16)
        assert max(errors) < TOLERANCES[torch.float16], (case, errors)
    print(f"{len(CASES)} cases")
