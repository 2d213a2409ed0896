"""Tests that the Triton kernels of a prompt's tokens compute the same as the mask decoder's own modules."""

from unittest.mock import patch

import pytest
import torch
from transformers import SamConfig, SamModel

from samlight_hf.engine.build import PlainMaskDecoder
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.kernels import image_attention, shared_attention
from samlight_hf.kernels import tokens as token_kernels
from samlight_hf.kernels.prompt_embedding import PromptEmbedding
from samlight_hf.kernels.support import triton
from samlight_hf.kernels.tokens import MOST_PROMPTS, TokenKernels, fits, reference, why_not_triton

from .interpreter import run_in_tritons_interpreter


CASES = [  # prompts, images, points of each, whether each has a box, masks
    (1, 1, 1, False, slice(1, None)),
    (2, 2, 2, False, slice(0, 1)),
    (2, 1, 0, True, slice(0, 1)),
    (3, 1, 1, True, slice(1, None)),
]
SHAPES = [  # of other decoders, with three points and a box: nine tokens and more
    {"channels": 128, "num_attention_heads": 4},
    {"num_attention_heads": 4, "attention_downsample_rate": 1, "num_multimask_outputs": 1, "num_hidden_layers": 3},
]
ON_A_GPU = [(1, 1, 1, False, slice(1, None)), (16, 1, 0, True, slice(0, 1)), (5, 5, 2, False, slice(1, None))]


def sam(mlp_dim=256, side=4, channels=256, **decoder) -> SamModel:
    """Make a SAM that is small except for its decoder, with weights that differ from the initial ones."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "window_size": 0}
    vision |= {"image_size": 16 * side, "output_channels": channels, "num_pos_feats": channels // 2}
    decoder = {"hidden_size": channels, "mlp_dim": mlp_dim, "iou_head_hidden_dim": channels, **decoder}
    prompt_encoder = {"hidden_size": channels, "image_size": 16 * side, "image_embedding_size": side}
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder, mask_decoder_config=decoder)
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prompts_of(num_prompts: int, num_points: int, with_box: bool, size: int) -> tuple[torch.Tensor, ...]:
    """Make random prompts; labels are from -1, for padding, to 2, which has no embedding of its own."""
    points, labels = size * torch.rand(num_prompts, num_points, 2), torch.randint(-1, 3, (num_prompts, num_points + 1))
    labels = labels[:, 1:]  # not contiguous
    boxes = (size * torch.rand(num_prompts, 2, 2)).sort(dim=1).values.flatten(1)
    return *((points, labels) if num_points else ()), *((boxes,) if with_box else ())


def test_keys_of_positions_are_a_linear_layer_of_them():
    """Computed without a product of matrices, which would load cuBLAS on a GPU."""
    decoder = sam().mask_decoder
    positions = torch.randn(16, 256)
    kernels = TokenKernels(decoder, PromptEmbedding(sam().prompt_encoder), positions)
    attention = decoder.transformer.layers[0].cross_attn_token_to_image
    weight, terms = kernels.shared_sides
    expected = attention.k_proj(positions), attention.v_proj.bias.expand(16, -1)
    assert torch.allclose(terms, torch.cat(expected, dim=1), atol=1e-5)
    assert torch.equal(weight, torch.cat([attention.k_proj.weight, attention.v_proj.weight]))


@torch.no_grad()
def relative_errors(case, device="cpu", dtype=torch.float16, **sizes) -> list[float]:
    """Return the errors of scores, hypernetworks and image tokens, against the modules in float32."""
    num_prompts, num_images, num_points, with_box, masks = case
    model = sam(**sizes).to(dtype)
    size, side = model.config.vision_config.image_size, model.prompt_encoder.image_embedding_size[0]
    prompts = tuple(prompt.to(device) for prompt in prompts_of(num_prompts, num_points, with_box, size))
    channels = model.config.mask_decoder_config.hidden_size
    image, positions = torch.randn(num_images, side**2, channels), torch.randn(side**2, channels)
    image, positions = image.to(device, dtype), positions.to(device, dtype)
    decoder, encoder = model.mask_decoder.to(device), model.prompt_encoder.to(device)
    found = TokenKernels(decoder, PromptEmbedding(encoder), positions)(image, prompts, masks)
    expected = reference(decoder.float(), encoder.float(), positions, image, prompts, masks)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected)]


def check_decoder(device="cpu", **sizes):
    """Check the whole decoder in float16 for every kind of prompt, against the model's own in float32."""
    model = sam(**sizes).to(device)
    plain, fast = PlainMaskDecoder(model), FastMaskDecoder(model, cuda_graphs=device == "cuda", dtype=torch.float16)
    if device == "cpu":  # Triton's interpreter
        fast.use_attention_kernels = fast.use_head_kernel = True
        fast.token_kernels = TokenKernels(fast.decoder, fast.embed, fast.positions)
    runs, kernels = [], fast.token_kernels
    fast.token_kernels = lambda *arguments: (runs.append(arguments), kernels(*arguments))[1]
    size, side = model.config.vision_config.image_size, model.prompt_encoder.image_embedding_size[0]
    for num_prompts, num_images, num_points, with_box, with_mask, multimask_output in (
        (1, 1, 1, False, False, True),
        (3, 1, 2, False, False, False),
        (1, 1, 0, True, False, False),
        (2, 2, 1, True, True, True),
        (1, 1, 0, False, True, True),  # a mask alone, which other kernels decode
    ):
        names = (*(("points", "labels") if num_points else ()), *(("boxes",) if with_box else ()))
        prompts = dict(zip(names, prompts_of(num_prompts, num_points, with_box, size)))
        logits = torch.randn(num_prompts, 4 * side, 4 * side, device=device) if with_mask else None
        image = torch.randn(num_images, 256, side, side, device=device)
        arguments = {**prompts, "mask_logits": logits, "multimask_output": multimask_output}
        runs.clear()
        with patch.object(shared_attention, "launch_attend", wraps=shared_attention.launch_attend) as shared:
            found = fast.decode(fast.prepare(image), **arguments, repeated=num_prompts == 1)  # as `Predictor` does
        assert bool(runs) is bool(names)  # in a graph's capture, too
        assert shared.called is (num_images == 1)
        expected = plain.decode(plain.prepare(image), **arguments)
        assert found.logits.shape == expected.logits.shape
        assert (found.logits - expected.logits).norm() < 5e-3 * expected.logits.norm(), names
        assert torch.allclose(found.iou, expected.iou, atol=5e-3), names
    assert kernels is not None


def main():
    for case in CASES:
        errors = relative_errors(case)
        assert max(errors) < 4e-3, (case, errors)
    for shape in SHAPES:
        errors = relative_errors((1, 1, 3, True, slice(1, None)), **shape)
        assert max(errors) < 4e-3, (shape, errors)
    check_decoder()
    print(f"{len(CASES)} cases")


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("case", CASES + ON_A_GPU, ids=str)
def test_the_kernels_on_a_gpu(case, dtype, tolerance):
    assert max(relative_errors(case, "cuda", dtype, mlp_dim=2048, side=64)) < tolerance


@pytest.mark.gpu
def test_the_decoder_on_a_gpu():
    check_decoder("cuda", mlp_dim=2048, side=64)


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels_that_overlap_give_the_same_to_the_bit(monkeypatch):
    model = sam(mlp_dim=2048, side=64).to("cuda", torch.bfloat16)
    image, positions = torch.randn(2, 4096, 256, device="cuda", dtype=torch.bfloat16).unsqueeze(1)
    kernels = TokenKernels(model.mask_decoder, PromptEmbedding(model.prompt_encoder), positions[0])
    prompts = tuple(prompt.cuda() for prompt in prompts_of(3, 1, False, 1024))

    def run():
        return [tensor.clone() for tensor in kernels(image, prompts, slice(1, None))]

    found = [run() for _ in range(50)]
    for module in (token_kernels, image_attention, shared_attention):
        monkeypatch.setattr(module, "overlap_options", lambda tensor: {"OVERLAP": False})
    expected = run()
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected))


def test_which_prompts_fit():
    heads, output_tokens = 8, 5
    for count, points, boxes in ((MOST_PROMPTS, 2, False), (1, 1, True)):
        assert fits(heads, output_tokens, prompts_of(count, points, boxes, 64))
    assert not fits(heads, output_tokens, prompts_of(MOST_PROMPTS + 1, 1, False, 64))
    assert not fits(heads, output_tokens, prompts_of(1, 3, False, 64))  # nine tokens with output tokens and padding
    # With one head the image tokens' kernels allow 64 tokens, these 16.
    assert fits(1, output_tokens, prompts_of(1, 10, False, 64))
    assert not fits(1, output_tokens, prompts_of(1, 11, False, 64))


def test_where_they_cannot_run():
    on_a_gpu = torch.device("cuda"), torch.bfloat16
    assert "on cpu" in why_not_triton(sam().mask_decoder, torch.device("cpu"), torch.bfloat16)
    assert "float32" in why_not_triton(sam().mask_decoder, torch.device("cuda"), torch.float32)
    assert "mlp_dim=64" in why_not_triton(sam(mlp_dim=64).mask_decoder, *on_a_gpu)
    assert "have 8 channels" in why_not_triton(sam(channels=128).mask_decoder, *on_a_gpu)
    assert "16 masks" in why_not_triton(sam(num_multimask_outputs=15).mask_decoder, *on_a_gpu)
    assert "2 layers" in why_not_triton(sam(iou_head_depth=2).mask_decoder, *on_a_gpu)


if __name__ == "__main__":
    main()
