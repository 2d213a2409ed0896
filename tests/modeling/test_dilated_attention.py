import pytest
import torch
from samlight_hf.modeling import dilated_attention as module
from samlight_hf.modeling.dilated_attention import (
    dense_attention,
    dilated_attention,
    dilated_attention_mask,
    dilated_attention_reference,
    merge_groups,
    split_groups,
    why_not,
)


# tokens, segment length, dilation rate, offsets
PATTERNS = [
    (24, 24, 1, "all"),
    (24, 24, 2, "all"),
    (24, 24, 24, "all"),
    (24, 12, 3, "all"),
    (24, 8, 4, "all"),
    (24, 1, 1, "all"),
    (24, 12, 1, "per_head"),
    (24, 24, 2, "per_head"),
    (24, 12, 6, "per_head"),
]
HEADS, HEAD_DIM = 6, 8


def random_tokens(num_tokens, batch_size=2, dtype=torch.float64, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_tokens, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(**kwargs) for _ in range(3)]


def visible_tokens(n, num_tokens, segment_length, dilation_rate):
    """Compute the mask from the definition, with loops: m is in the segment and residue class of n."""
    return {
        m
        for m in range(num_tokens)
        if m // segment_length == n // segment_length
        and (m % segment_length) % dilation_rate == (n % segment_length) % dilation_rate
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_mask_is_the_definition(pattern):
    num_tokens, segment_length, dilation_rate, offsets = pattern
    mask = dilated_attention_mask(num_tokens, HEADS, segment_length, dilation_rate, offsets)
    for head in range(HEADS):
        for n in range(num_tokens):
            expected = visible_tokens(n, num_tokens, segment_length, dilation_rate)
            if offsets == "per_head" and (n % segment_length) % dilation_rate != head % dilation_rate:
                expected = set()
            assert set(mask[head, n].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_reference(pattern):
    query, key, value = random_tokens(pattern[0])
    output = dilated_attention(query, key, value, *pattern[1:])
    expected, _ = dilated_attention_reference(query, key, value, *pattern[1:])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_equal_the_reference_and_finite_differences(pattern):
    inputs = random_tokens(pattern[0], batch_size=1, requires_grad=True)
    weights = torch.randn(1, pattern[0], HEADS, HEAD_DIM, dtype=torch.float64)
    gradients = torch.autograd.grad((dilated_attention(*inputs, *pattern[1:]) * weights).sum(), inputs)
    expected = torch.autograd.grad((dilated_attention_reference(*inputs, *pattern[1:])[0] * weights).sum(), inputs)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", [(8, 4, 2, "all"), (8, 8, 2, "per_head")])
def test_gradcheck(pattern):
    inputs = [tokens[:, :, :2, :3].detach().requires_grad_() for tokens in random_tokens(pattern[0], batch_size=1)]
    assert torch.autograd.gradcheck(lambda q, k, v: dilated_attention(q, k, v, *pattern[1:]), inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_key_set_of_every_query_by_perturbation(pattern):
    """Changing one token's key and value changes exactly the outputs of its group."""
    num_tokens, segment_length, dilation_rate, offsets = pattern
    query, key, value = random_tokens(num_tokens, batch_size=1)
    output = dilated_attention(query, key, value, *pattern[1:])
    for m in range(num_tokens):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, m] += 1.0
        other_value[:, m] += 1.0
        changed = dilated_attention(query, other_key, other_value, *pattern[1:])
        moved = (changed - output).abs().amax(-1)[0] > 1e-9  # (N, H)
        for n in range(num_tokens):
            sees = m in visible_tokens(n, num_tokens, segment_length, dilation_rate)
            for head in range(HEADS):
                own_class = offsets == "all" or (n % segment_length) % dilation_rate == head % dilation_rate
                assert bool(moved[n, head]) == (sees and own_class), (n, m, head)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_token_is_left_out(pattern):
    """Every token's value reaches the output, and every token has an output (per_head: in the heads of its class)."""
    num_tokens, _, dilation_rate, offsets = pattern
    query, key, value = random_tokens(num_tokens, requires_grad=True)
    output = dilated_attention(query, key, value, *pattern[1:])
    output.square().sum().backward()
    assert (value.grad.abs().sum((-2, -1)) > 0).all()
    answered = (output.abs().amax(-1) > 0).sum(-1)  # (B, N): heads that answer
    assert (answered == (HEADS if offsets == "all" else HEADS // dilation_rate)).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_image_never_changes_another(pattern):
    query, key, value = random_tokens(pattern[0], batch_size=3)
    together = dilated_attention(query, key, value, *pattern[1:])
    for image in range(3):
        alone = dilated_attention(*(tokens[image : image + 1] for tokens in (query, key, value)), *pattern[1:])
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-12, atol=1e-12)


def test_undilated_whole_image_is_full_attention():
    query, key, value = random_tokens(24)
    heads_first = [tokens.transpose(1, 2) for tokens in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    torch.testing.assert_close(dilated_attention(query, key, value), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_groups_are_an_inverse_pair(pattern):
    num_tokens, *pattern = pattern
    tokens = random_tokens(num_tokens)[0]
    groups = split_groups(tokens, *pattern)
    merged = merge_groups(groups, num_tokens, HEADS, *pattern)
    if pattern[-1] == "all":
        assert groups.data_ptr() == tokens.data_ptr()  # dilation is a view
        assert merged.data_ptr() == tokens.data_ptr()
        assert torch.equal(merged, tokens)
    else:  # each head keeps the rows of its own residue class, and the other rows are zero
        own = dilated_attention_mask(num_tokens, HEADS, *pattern).any(-1).T[None, :, :, None]
        assert torch.equal(merged, tokens * own)
        assert torch.equal(split_groups(merged, *pattern), groups)


def test_impossible_patterns_are_refused():
    query, key, value = random_tokens(24)
    for number in (0, -4, True):
        with pytest.raises(ValueError, match=f"segment_length={number} must be a positive integer"):
            dilated_attention(query, key, value, number)
        with pytest.raises(ValueError, match=f"dilation_rate={number} must be a positive integer"):
            dilated_attention(query, key, value, 12, number)
    with pytest.raises(ValueError, match="must have one shape"):
        dilated_attention(query, key[:, :12], value[:, :12], 12)
    with pytest.raises(ValueError, match="segment_length=10 must divide the 24 tokens"):
        dilated_attention(query, key, value, 10)
    with pytest.raises(ValueError, match="dilation_rate=5 must divide segment_length=12"):
        dilated_attention(query, key, value, 12, 5)
    with pytest.raises(ValueError, match="dilation_rate=4 to divide num_attention_heads=6"):
        dilated_attention(query, key, value, 12, 4, "per_head")
    with pytest.raises(ValueError, match="dilation_offsets='some'"):
        dilated_attention(query, key, value, 12, 4, "some")


@pytest.mark.parametrize("backend", ["flash_attention_4", "cudnn", "flash"])
def test_named_backend_that_cannot_run_raises_with_the_reason(backend):
    query, key, value = random_tokens(24, dtype=torch.float32)
    assert "CUDA" in why_not(backend, query, key, value)
    with pytest.raises(ValueError, match=f"'{backend}' cannot run here: it needs CUDA tensors, and these are on cpu"):
        dilated_attention(query, key, value, backend=backend)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no such backend. Use one of auto"):
        dense_attention(*random_tokens(24), backend="flash3")


def test_default_falls_back_to_sdpa_on_cpu(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or sdpa(*a, **k)
    )
    dilated_attention(*random_tokens(24), segment_length=12, dilation_rate=3)
    assert calls == [(2 * 24 // 12, 3 * HEADS, 12 // 3, HEAD_DIM)]


@pytest.mark.parametrize("length", [5, 512, 700])
@torch.no_grad()
def test_blocks_are_attention(length):
    query, key, value = random_tokens(length)
    expected, _ = dilated_attention_reference(query, key, value, length, scaling=0.3)
    found = dense_attention(query, key, value, scaling=0.3, backend="blocks")
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for pattern in ((length, 1, "all"), (length // 5 * 5 if length % 5 else length, 5, "all")):
        if length % pattern[0] == 0:
            expected, _ = dilated_attention_reference(query, key, value, *pattern)
            found = dilated_attention(query, key, value, *pattern, backend="blocks")
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_blocks_in_bfloat16_are_nearly_as_exact_as_sdpa():
    tokens = random_tokens(1024, dtype=torch.float32)
    expected = dense_attention(*tokens, backend="sdpa")
    half = [token.bfloat16() for token in tokens]

    def error(backend):
        return ((dense_attention(*half, backend=backend).float() - expected).norm() / expected.norm()).item()

    assert error("blocks") < 3 * error("sdpa") < 0.03


def test_reasons_against_blocks():
    tokens = [token.detach() for token in random_tokens(8)]
    assert why_not("blocks", *tokens) is None
    assert "dropout=0.5" in why_not("blocks", *tokens, 0.5)
    assert "on meta" in why_not("blocks", *(token.to("meta") for token in tokens))
    with pytest.raises(ValueError, match="'blocks' cannot run here: it computes no gradients"):
        dense_attention(*random_tokens(8, requires_grad=True), backend="blocks")


@pytest.mark.parametrize(
    "dtype, length, avx512, amx, expected",
    [
        (torch.bfloat16, 256, True, False, 1),
        (torch.bfloat16, 256, True, True, 0),
        (torch.bfloat16, 256, False, False, 0),
        (torch.bfloat16, 255, True, False, 0),
        (torch.float32, 256, True, False, 0),
    ],
)
def test_which_processors_and_tensors_take_blocks(monkeypatch, dtype, length, avx512, amx, expected):
    taken, attend = [], module._attend_in_blocks
    monkeypatch.setattr(module, "_attend_in_blocks", lambda *tokens: (taken.append(1), attend(*tokens))[1])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    tokens = random_tokens(length, dtype=dtype)
    with torch.no_grad():
        found = dilated_attention(*tokens)
        assert len(taken) == expected
        assert torch.allclose(found, dense_attention(*tokens, backend="sdpa"), atol=0.05)
    dilated_attention(*tokens).sum().backward()
    assert len(taken) == expected  # training does not
