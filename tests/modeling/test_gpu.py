"""Tests on a CUDA device: each kernel against the float64 reference, forward and backward; the default's choice."""

import copy

import pytest
import torch
from samlight_hf.modeling.dilated_attention import dilated_attention, dilated_attention_reference, why_not

from samlight_hf import SamLighteningConfig, SamLighteningModel


pytestmark = pytest.mark.gpu

# segment length, dilation rate, offsets of 2048 tokens
PATTERNS = [(2048, 1, "all"), (2048, 2, "all"), (512, 1, "all"), (512, 4, "all"), (2048, 2, "per_head")]


def random_tokens(seed, requires_grad=False, head_dim=64):
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    return [torch.randn(2, 2048, 6, head_dim, **options).requires_grad_(requires_grad) for _ in range(3)]


def relative_error(output, expected):
    return ((output.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "flash_attention_4", "cudnn", "flash", "sdpa"])
def test_backend_equals_the_reference(backend, pattern):
    tokens = random_tokens(seed=PATTERNS.index(pattern))
    if reason := why_not(backend, *tokens):
        pytest.skip(reason)
    expected, _ = dilated_attention_reference(*(t.double() for t in tokens), *pattern)
    assert relative_error(dilated_attention(*tokens, *pattern, backend=backend), expected) < 5e-3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "flash_attention_4", "cudnn", "flash", "sdpa"])
def test_gradients_equal_the_reference(backend, pattern):
    tokens = random_tokens(seed=PATTERNS.index(pattern), requires_grad=True)
    if reason := why_not(backend, *tokens):
        pytest.skip(reason)
    doubles = [t.detach().double().requires_grad_() for t in tokens]
    output = dilated_attention(*tokens, *pattern, backend=backend)
    direction = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tokens, direction)
    expected = torch.autograd.grad(dilated_attention_reference(*doubles, *pattern)[0], doubles, direction.double())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-2


def kernels(function):
    """Return the names of the CUDA kernels that `function` launches."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return " ".join(event.name.lower() for event in profile.events())


def captured(function, *tokens):
    """Capture `function` in a CUDA graph and return its replay function."""
    graph = torch.cuda.CUDAGraph()
    function(*tokens)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function(*tokens)
    return graph.replay


def test_default_runs_the_kernel_that_its_rule_names():
    """FlashAttention-4, if installed, runs captured or large calls except short forwards; cuDNN runs the others."""
    tokens = random_tokens(0)
    if reason := why_not("cudnn", *tokens):
        pytest.skip(reason)
    longest = [t.repeat(32, 1, 1, 1) for t in tokens]
    short = [t[:, :512] for t in tokens]
    training = random_tokens(0, requires_grad=True)
    large = [t.repeat(16, 1, 1, 1).detach().requires_grad_() for t in tokens]
    fastest = "cudnn" if why_not("flash_attention_4", *tokens) else "flashattentionforward"
    assert fastest in kernels(captured(dilated_attention, *tokens))
    assert fastest in kernels(lambda: dilated_attention(*longest))
    assert "cudnn" in kernels(lambda: dilated_attention(*tokens))
    assert "cudnn" in kernels(captured(dilated_attention, *short))
    assert "cudnn" in kernels(lambda: dilated_attention(*training).sum().backward())
    backward = "cudnn" if fastest == "cudnn" else "flashattentionbackward"
    assert backward in kernels(lambda: dilated_attention(*large).sum().backward())


def test_float32_and_odd_heads_fall_back():
    for tokens in ([t.float() for t in random_tokens(0)], random_tokens(0, head_dim=12)):
        assert why_not("flash_attention_4", *tokens)
        expected, _ = dilated_attention_reference(*(t.double() for t in tokens), 512, 2)
        assert relative_error(dilated_attention(*tokens, 512, 2), expected) < 5e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_choice_is_made_when_it_runs(mode):
    """Single launches use cuDNN, launches in a CUDA graph FlashAttention-4."""
    tokens = random_tokens(0)
    if reason := why_not("flash_attention_4", *tokens):
        pytest.skip(reason)
    expected = dilated_attention(*tokens, 2048, 2, backend="sdpa")
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: dilated_attention(q, k, v, 2048, 2), fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            output = compiled(*tokens)
        ran = kernels(lambda: compiled(*tokens))
    assert relative_error(output, expected.double()) < 5e-3
    assert ("cudnn" if mode == "default" else "flashattentionforward") in ran


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return SamLighteningModel(SamLighteningConfig()).eval().cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "attn_implementation",
    ["dilated_flash_attention", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"],
)
def test_every_implementation_of_the_model_equals_float32(published, attn_implementation, dtype):
    pixel_values = torch.randn(2, 3, 1024, 1024, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    published.set_attn_implementation("eager")
    expected = published.get_image_embeddings(pixel_values)
    half = copy.deepcopy(published).to(dtype)
    try:
        half.set_attn_implementation(attn_implementation)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    embeddings = half.get_image_embeddings(pixel_values)
    assert embeddings.dtype == dtype
    assert relative_error(embeddings, expected.double()) < 3e-2
    boxes = torch.tensor([[[100.0, 100.0, 600.0, 700.0]]] * 2, device="cuda")
    assert half(pixel_values, input_boxes=boxes).pred_masks.isfinite().all()


@pytest.mark.parametrize(
    "attn_implementation", ["dilated_flash_attention", "sdpa", "eager", "flash_attention_2", "flash_attention_4"]
)
def test_every_implementation_trains(published, attn_implementation):
    model = copy.deepcopy(published).bfloat16().train()
    try:
        model.set_attn_implementation(attn_implementation)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    model.vision_encoder(torch.randn(1, 3, 1024, 1024, device="cuda")).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.vision_encoder.parameters())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_model_compiles_in_one_graph(published, mode):
    model = copy.deepcopy(published).bfloat16()
    model.set_attn_implementation("dilated_flash_attention")
    pixel_values = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = model.get_image_embeddings(pixel_values)
    compiled = torch.compile(model.vision_encoder, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            output = compiled(pixel_values).last_hidden_state
    assert relative_error(output, expected.double()) < 2e-2
