"""Tests that fused linear layers compute what LayerNorm, linear layer, GELU and residual compute in sequence."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from samlight_hf.kernels import linear as fused_linear
from samlight_hf.kernels import records
from samlight_hf.kernels import support as triton_support
from samlight_hf.kernels.linear import (
    FusedLinear,
    RowsWithStatistics,
    embed_patches,
    fused_linear_reference,
    launch_patches,
    launch_triton,
    triton,
    triton_tile,
    why_not_patches,
    why_not_triton,
    with_statistics,
)

from .interpreter import run_in_tritons_interpreter


# norm, gelu, residual rows (0: none), statistics, order
CASES = [
    (False, False, 0, False, False),
    (True, True, 0, False, False),
    (True, False, 0, False, True),
    (False, False, 256, True, False),
    (False, False, 128, True, False),
    (True, True, 256, True, False),
]
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


def make(case, dtype, device, num_rows=256, in_features=192, out_features=128):
    """Make a layer, its input with statistics in three parts, its residual, and the float64 result of plain modules."""
    norm, gelu, num_residual_rows, _, reorder = case
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, device=device, dtype=dtype)
    layer_norm = nn.LayerNorm(in_features, eps=1e-6, device=device) if norm else None
    if norm:
        nn.init.normal_(layer_norm.weight, 1, 0.3)
        nn.init.normal_(layer_norm.bias)
        layer_norm = layer_norm.to(dtype)
    order = torch.randperm(out_features, device=device) if reorder else None
    layer = FusedLinear(linear.weight, linear.bias, layer_norm, gelu, order)
    # Rows with a large mean and very different sizes: E[x^2] - E[x]^2 would be inaccurate.
    sizes = torch.logspace(-1, 1, num_rows, device=device)[:, None]
    values = (torch.randn(num_rows, in_features, device=device) * sizes + 8).to(dtype)
    parts = [with_statistics(part).statistics for part in values.chunk(3, dim=1)]
    residual = torch.randn(num_residual_rows, out_features, device=device).to(dtype) if num_residual_rows else None
    with torch.no_grad():
        expected = values.double()
        if norm:
            expected = layer_norm.double()(expected)
        expected = linear.double()(expected)
        if order is not None:
            expected = expected[:, order]
        if gelu:
            expected = nn.functional.gelu(expected)
        if residual is not None:
            expected = expected + residual.double().repeat(num_rows // num_residual_rows, 1)
    return layer, RowsWithStatistics(values, torch.cat(parts)), residual, expected


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def kernel_errors(case, dtype, device, tile=None, **sizes) -> tuple[float, float]:
    """Return the errors of the kernel's values and of its statistics."""
    layer, rows, residual, expected = make(case, dtype, device, **sizes)
    with torch.no_grad():
        result = launch_triton(layer, rows, residual, case[3], tile)
    return error(result.values, expected), statistics_error(result)


def statistics_error(rows: RowsWithStatistics) -> float:
    """Return the error of mean and variance according to the statistics; 0 without statistics."""
    if rows.statistics is None:
        return 0.0
    width = rows.values.shape[1] // len(rows.statistics)
    mean = rows.statistics[:, 0].mean(dim=0)
    squares = rows.statistics[:, 1] + width * (rows.statistics[:, 0] - mean) ** 2
    whole = with_statistics(rows.values).statistics[0]
    return max(error(mean, whole[0].double()), error(squares.sum(dim=0), whole[1].double()))


def check_memory(device="cpu", tile=SMALL):
    """Check that a result is written to the beginning of `memory`, whatever was there, and not beyond."""
    layer, rows, residual, expected = make(CASES[0], torch.float16, device)
    memory = torch.full((expected.numel() + 7,), 5, dtype=torch.float16, device=device)
    with torch.no_grad():
        result = launch_triton(layer, rows, residual, tile=tile, memory=memory).values
    assert result.data_ptr() == memory.data_ptr() and memory[-7:].eq(5).all()
    assert error(result, expected) < TOLERANCES[torch.float16]


def patches_error(dtype, device, tile=None) -> float:
    torch.manual_seed(0)
    layer = FusedLinear(torch.randn(128, 768, device=device).to(dtype) / 28, torch.randn(128, device=device))
    pixel_values, positions = torch.randn(2, 3, 128, 256, device=device), torch.randn(128, 128, device=device).to(dtype)
    with torch.no_grad():
        found = launch_patches(layer, pixel_values.to(dtype), positions, tile)
        weight = layer.weight.double().view(128, 3, 16, 16)
        expected = nn.functional.conv2d(pixel_values.to(dtype).double(), weight, layer.bias.double(), stride=16)
        expected = (expected.flatten(2).transpose(1, 2) + positions.double()).flatten(0, 1)
    return error(found.values, expected)


def test_a_convolution_that_loads_cudnn_is_none_of_few_images(monkeypatch):
    images = []
    monkeypatch.setattr(fused_linear.F, "conv2d", lambda x, weight, padding: images.append((x.shape, weight.shape)))
    fused_linear.load_convolution(torch.device("cpu"), torch.float32, 8, 64)
    ((shape, _),) = images
    assert shape[0] * shape[2] * shape[3] > fused_linear.hopper_linear.FEW_ROWS
    fused_linear.load_convolution(torch.device("cuda", 100), torch.float32, 8, 64)  # fails, and says nothing
    assert len(images) == 1


def check_attempts():
    """Check that attempts accept each variant, and reject one whose statistics are wrong."""
    cpu, half = torch.device("cpu"), torch.float16
    plain, patches = (
        fused_linear._Variant(half, 64, 192),
        fused_linear._Variant(half, 64, 768, adds=True, statistics=True),
    )
    variants = [
        plain,
        dataclasses.replace(plain, normalizes=True, gelu=True, parts=3),
        dataclasses.replace(plain, adds=True, statistics=True),
    ]
    assert [fused_linear._why_not_variant(cpu, variant, SMALL) for variant in variants] == [None] * 3
    assert fused_linear._why_not_patches_variant(cpu, patches, torch.float32, 3, 128, 128) is None
    assert fused_linear.why_not_at_all(cpu, half) is None

    def off(*arguments, **options):
        values, statistics = dataclasses.astuple(launch_triton(*arguments, **options))
        return RowsWithStatistics(values, None if statistics is None else statistics * 1.1)

    fused_linear.launch_triton = off
    other = {**SMALL, "num_warps": 2}  # not tried yet
    with pytest.warns(UserWarning, match="its result is wrong"):
        assert "its result is wrong" in fused_linear._why_not_variant(cpu, variants[2], other)
    assert fused_linear._why_not_variant(cpu, plain, other) is None
    fused_linear.launch_triton = launch_triton


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_equals_the_modules_in_sequence(case, dtype):
    layer, rows, residual, expected = make(case, dtype, "cpu")
    with torch.no_grad():
        result = fused_linear_reference(layer, rows, residual, case[3])
        assert torch.equal(layer(rows, residual).values, result.values)  # the only path on a CPU
    assert error(result.values, expected) < (1e-5 if dtype == torch.float32 else 1e-3)
    assert (result.statistics is not None) == case[3]


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [10, 384])
def test_rounded_weights_of_a_norm_have_zero_sums(features, dtype):
    """The Hopper kernels leave out a row's mean, which may be large, times these sums."""
    torch.manual_seed(0)
    weight = torch.randn(256, features) / features**0.5 + 0.1
    rounded = fused_linear._with_zero_sums(weight, dtype)
    exact = weight.double() - weight.double().mean(dim=1, keepdim=True)
    assert rounded.dtype == dtype and rounded.double().sum(dim=1).abs().max() < 1e-5
    plain = error(exact.to(dtype), exact)
    assert error(rounded, exact) < (1.1 if features > 16 else 3) * plain
    norm = nn.LayerNorm(features)
    layer, values = FusedLinear(weight.to(dtype), None, norm), torch.randn(64, features) + 50
    products = values.double() @ layer.weight.double().T  # without the mean
    expected = norm.double()(values.double()) @ weight.to(dtype).double().T
    assert error(products / values.double().std(dim=1, correction=0, keepdim=True), expected) < TOLERANCES[dtype]


@torch.no_grad()
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(64)], ids=["plain", "norm"])
def test_factors_and_another_order_are_folded_into_the_weights(norm):
    torch.manual_seed(0)
    linear, order, factors = nn.Linear(64, 96), torch.randperm(96), torch.rand(96)
    rows = torch.randn(128, 64)
    found = FusedLinear(linear.weight, linear.bias, norm, order=order, factors=factors)(RowsWithStatistics(rows))
    expected = linear(rows if norm is None else norm(rows)) * factors
    assert torch.allclose(found.values, expected[:, order], atol=1e-5)


@torch.no_grad()
def test_a_norm_after_the_layer_is_the_modules():
    torch.manual_seed(0)
    linear, norm = nn.Linear(192, 128), nn.LayerNorm(128, eps=1e-6)
    norm.weight.normal_(1, 0.3), norm.bias.normal_()
    rows, layer = torch.randn(256, 192), FusedLinear(linear.weight, linear.bias, norm_after=norm)
    assert error(layer(RowsWithStatistics(rows)).values, norm(linear(rows)).double()) < 1e-6
    image, kernel = torch.randn(1, 64, 128), torch.randn(128, 9 * 128) / 34
    found = fused_linear.convolve(FusedLinear(kernel, None, norm_after=norm), image, (8, 8))
    weight = kernel.view(128, 3, 3, 128).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(image.mT.unflatten(2, (8, 8)), weight, padding=1).flatten(2).mT
    assert error(found, norm(expected).double()) < 1e-6
    for others in ({"norm": nn.LayerNorm(192)}, {"gelu": True}):
        with pytest.raises(ValueError, match="norm_after is for layers without norm and gelu"):
            FusedLinear(linear.weight, None, norm_after=norm, **others)


def test_patches_equal_those_of_the_convolution():
    torch.manual_seed(0)
    convolution, pixel_values = nn.Conv2d(3, 64, 16, 16), torch.randn(2, 3, 64, 96)
    layer, positions = FusedLinear(convolution.weight.flatten(1), convolution.bias), torch.randn(24, 64)
    with torch.no_grad():
        expected = convolution(pixel_values).flatten(2).transpose(1, 2) + positions
        found = embed_patches(layer, pixel_values, positions)
    assert torch.allclose(found.values.view_as(expected), expected, atol=1e-5)


def test_every_reason_not_to_run_the_kernel(monkeypatch):
    layer = FusedLinear(torch.zeros(64, 64), None)
    rows, patches = RowsWithStatistics(torch.zeros(128, 64)), torch.zeros(1, 1, 64, 128)
    assert "cpu" in why_not_triton(layer, rows) and "cpu" in why_not_patches(layer, patches, None)
    monkeypatch.setattr(fused_linear, "triton", None)
    assert "not installed" in why_not_triton(layer, rows) and "not installed" in why_not_patches(layer, patches, None)


@pytest.mark.gpu
def test_every_reason_not_to_run_the_kernel_on_a_gpu():
    layer = FusedLinear(torch.zeros(64, 64, device="cuda", dtype=torch.float16), None)
    values = torch.zeros(384, 64, device="cuda", dtype=torch.float16)
    assert why_not_triton(layer, RowsWithStatistics(values), values[:128]) is None
    assert "100 rows" in why_not_triton(layer, RowsWithStatistics(values[:100]))
    assert "torch.float32" in why_not_triton(layer, RowsWithStatistics(values.float()))
    assert "torch.float32" in why_not_triton(layer, RowsWithStatistics(values), values.float())
    assert "odd addresses" in why_not_triton(layer, RowsWithStatistics(values.view(-1)[1 : 1 + 128 * 64].view(128, 64)))
    for count in (0, 64, 192, 256):  # a block of 128 rows would reach beyond the residual
        assert f"a residual of {count} rows" in why_not_triton(layer, RowsWithStatistics(values), values[:count])
    pixels = values.view(3, 1, 64, 128)
    assert why_not_patches(layer, pixels, values[:128]) is None
    assert "60 x 128 pixels" in why_not_patches(layer, torch.zeros_like(pixels[:1, :, :60]).repeat(8, 1, 1, 1), None)
    assert "64 positions" in why_not_patches(layer, pixels, values[:64])
    with torch.no_grad():  # the fallback, for images of less than a block
        small, positions = torch.randn(4, 1, 32, 64, device="cuda").half(), torch.randn(32, 64, device="cuda").half()
        layer = FusedLinear(torch.randn(64, 64, device="cuda").half() / 8, None)
        assert "32 positions" in why_not_patches(layer, small, positions)
        found = embed_patches(layer, small, positions).values.double()
        expected = nn.functional.conv2d(small.double(), layer.weight.double().view(64, 1, 8, 8), stride=8)
        expected = (expected.flatten(2).mT + positions.double()).flatten(0, 1)
        assert error(found, expected) < TOLERANCES[torch.float16]


def test_tiles_fit():
    """Tiles divide all sizes that `why_not_triton` accepts."""
    for num_rows in (128, 4096, 4096 * 3, 4096 * 5, 4096 * 8, 128 * 257):
        for out_features in (64, 192, 256, 384, 1152, 1536):
            for in_features in (64, 384, 1024, 1536, 3072):
                tile = triton_tile(num_rows, out_features, in_features)
                assert (
                    num_rows % tile["BLOCK_M"] == out_features % tile["BLOCK_N"] == in_features % tile["BLOCK_K"] == 0
                )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu(case, dtype):
    assert fused_linear.why_not_at_all(torch.device("cuda"), dtype) is None
    for tile in (None, SMALL):
        assert max(kernel_errors(case, dtype, "cuda", tile)) < TOLERANCES[dtype]
    sizes = {"num_rows": 16384 + 256, "in_features": 1536, "out_features": 384}  # the largest tile
    if case[2] != 128:
        case = (*case[:2], sizes["num_rows"] if case[2] else 0, *case[3:])
        assert max(kernel_errors(case, dtype, "cuda", **sizes)) < TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_patch_kernel_on_a_gpu(dtype):
    assert patches_error(dtype, "cuda") < TOLERANCES[dtype]


@pytest.mark.gpu
@torch.no_grad()
def test_embedded_patches_lie_in_the_given_memory():
    layer = FusedLinear(torch.randn(384, 768, device="cuda").to(torch.bfloat16) / 28, None)
    pixel_values = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = embed_patches(layer, pixel_values, None)
    for embed in (embed_patches, fused_linear.launch_patches):
        memory = torch.full((384 * 4096 + 8,), 5, device="cuda", dtype=torch.bfloat16)
        found = embed(layer, pixel_values, None, memory=memory)
        assert found.values.data_ptr() == memory.data_ptr() and memory[-8:].eq(5).all()
        assert error(found.values, expected.values.double()) < TOLERANCES[torch.bfloat16]


@pytest.mark.gpu
@torch.no_grad()
def test_patches_wait_for_positions_that_the_previous_kernel_writes():
    """A layer allows the next kernel to start before it has written anything."""
    writer, rows, _, _ = make((False, False, 0, False, False), torch.bfloat16, "cuda", 4096, 1536, 384)
    patches = FusedLinear(torch.randn(384, 768, device="cuda").to(torch.bfloat16) / 28, None)
    pixel_values = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    positions = launch_triton(writer, rows).values
    expected = launch_patches(patches, pixel_values, positions.clone()).values
    for _ in range(20):
        memory = torch.zeros(4096 * 384, device="cuda", dtype=torch.bfloat16)
        written = launch_triton(writer, rows, memory=memory).values
        assert torch.equal(launch_patches(patches, pixel_values, written).values, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_a_variant_that_cannot_run_falls_back_and_the_others_run(monkeypatch):
    """Only the layer that cannot run falls back; the other one still runs in Triton."""
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(records, "machine_of", lambda device: None)  # nor are there records of other processes
    monkeypatch.setattr(triton_support, "_warned", set())
    launched = []

    def breaks(layer, rows, *arguments, **options):
        if layer.weight.shape == (192, 64):
            raise RuntimeError("out of resource: shared memory")
        launched.append(layer.weight.shape)
        return launch_triton(layer, rows, *arguments, **options)

    monkeypatch.setattr(fused_linear, "launch_triton", breaks)
    monkeypatch.setattr(fused_linear, "why_not_hopper", lambda *arguments: "not asked for")
    rows = RowsWithStatistics(torch.randn(128, 64, device="cuda").half())
    good, bad = (FusedLinear(torch.randn(size, 64, device="cuda").half() / 8, None) for size in (128, 192))
    with pytest.warns(UserWarning, match="Triton kernel for linear layers does not run here: out of resource"):
        assert torch.equal(bad(rows).values, fused_linear_reference(bad, rows).values)
    assert not launched
    assert error(good(rows).values, fused_linear_reference(good, rows).values.double()) < 1e-3
    assert launched == [good.weight.shape] * 2  # tried, and run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(bad(rows).values, fused_linear_reference(bad, rows).values)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_run_on_their_own_gpu():
    for device in ("cuda:1", "cuda:0"):
        layer, rows, residual, expected = make(CASES[3], torch.bfloat16, device)
        assert error(layer(rows, residual, True).values, expected) < TOLERANCES[torch.bfloat16]


@pytest.mark.gpu
def test_kernels_that_overlap_read_what_the_one_before_wrote():
    """Run a chain of layers many times: a kernel that does not wait for the previous one gives wrong numbers."""
    layer, rows, _, _ = make((False, False, 0, True, False), torch.bfloat16, "cuda", 4096, 384, 384)
    chain = FusedLinear(layer.weight / layer.weight.float().norm(dim=1, keepdim=True).to(torch.bfloat16), None)
    with torch.no_grad():
        expected = rows
        for _ in range(20):
            expected = fused_linear_reference(chain, expected)
        for _ in range(20):
            found = rows
            for _ in range(20):
                found = chain(found, statistics=True)
            assert error(found.values, expected.values.double()) < 3e-2


if __name__ == "__main__":
    for case in CASES:
        values, statistics = kernel_errors(case, torch.float16, "cpu", SMALL)
        assert values < TOLERANCES[torch.float16] and statistics < 1e-3, (case, values, statistics)
    assert patches_error(torch.float16, "cpu", SMALL) < TOLERANCES[torch.float16]
    check_memory()
    check_attempts()
    print(f"{len(CASES)} cases")
