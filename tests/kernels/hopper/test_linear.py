"""Tests of the linear kernel for Hopper GPUs: it compiles without spilling registers and equals the reference."""

import re

import pytest
import torch
from torch import nn

from samlight_hf.kernels import records
from samlight_hf.kernels import support as triton_support
from samlight_hf.kernels.hopper import linear as hopper_linear
from samlight_hf.kernels.hopper import runtime as hopper
from samlight_hf.kernels.hopper.linear import (
    CLUSTER_TILE,
    NARROW_TILES,
    PATCH_TILE,
    TILES,
    hopper_tile,
    neighbours_of,
    patches_of,
    rows_of,
    source_of,
)
from samlight_hf.kernels.linear import (
    FusedLinear,
    RowsWithStatistics,
    convolve,
    embed_patches,
    fused_linear_reference,
    launch_hopper,
    launch_triton,
    why_not_hopper,
    why_not_hopper_patches,
)
from tests.kernels.test_linear import CASES, TOLERANCES, error, make, statistics_error


ALL_TILES = (*TILES, *NARROW_TILES, PATCH_TILE, CLUSTER_TILE)
# Layers of the encoder: projections to and from attention, first and second layer of the MLP, neck, patches.
KERNELS = [
    {"NORM": 1, "PARTS": 4},
    {"RESIDUAL": 1, "STATISTICS": 1},
    {"NORM": 1, "PARTS": 2, "GELU": 1},
    {"RESIDUAL": 1, "STATISTICS": 1, "K": 1536},
    {"KIND": "NEIGHBOURS", "HEIGHT": 64, "WIDTH": 64, "K": 2304},
    {"KIND": "PATCHES", "HEIGHT": 64, "WIDTH": 64, "K": 768, "RESIDUAL": 1, "STATISTICS": 1},
]
PLAIN = {
    "KIND": "ROWS", "HEIGHT": 1, "WIDTH": 1, "K": 384, "N": 1152, "NORM": 0, "PARTS": 1, "GELU": 0,
    "RESIDUAL": 0, "STATISTICS": 0, "NORM_AFTER": 0,
}  # fmt: skip
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")


def has_compiler() -> bool:
    if not hopper.has_bindings():
        return False
    from cuda.bindings import nvrtc

    try:
        return int(nvrtc.nvrtcVersion()[0]) == 0
    except RuntimeError:  # the library is missing
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs cuda.bindings and NVRTC")


def spilled_bytes(log: str) -> int:
    """Return the number of spilled bytes from the compiler's log, which must have no warning."""
    assert "warning" not in log and "Performance Loss" not in log, log
    (count,) = re.findall(r"(\d+) bytes spill stores", log)
    return int(count)


@needs_compiler
@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
@pytest.mark.parametrize("constants", KERNELS, ids=str)
@pytest.mark.parametrize("bfloat16", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_kernel_compiles_without_spilling(tile, constants, bfloat16):
    code, log = hopper.compile_source(source_of(tile, **PLAIN | constants | {"BFLOAT16": bfloat16}))
    assert spilled_bytes(log) == 0, log
    assert code[:4] == b"\x7fELF"


@needs_compiler
@pytest.mark.parametrize("constants", [KERNELS[4], {}], ids=str)
@pytest.mark.parametrize("out_features", [128, 256])
@pytest.mark.parametrize("bfloat16", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_kernels_with_a_norm_after_them_compile_without_spilling(constants, out_features, bfloat16):
    after = {"N": out_features, "NORM_AFTER": 1, "BFLOAT16": bfloat16}
    _, log = hopper.compile_source(source_of(CLUSTER_TILE, **PLAIN | constants | after))
    assert spilled_bytes(log) == 0, log


def test_tiles_fit():
    """Tiles divide all sizes that `why_not` accepts, and fit into shared memory; small weights stay there, alone."""
    for num_rows in (128, 4096, 4096 * 32):
        for out_features in range(64, 3072 + 1, 64):
            for normalizes, gelu in ((False, False), (True, False), (True, True)):
                for kind in ("ROWS", "PATCHES"):
                    tile = hopper_tile(num_rows, out_features, normalizes, gelu, kind)
                    assert tile in ALL_TILES and out_features % tile.columns == 0
    for tile in ALL_TILES:
        for in_features in range(64, 3072 + 1, 64):
            for adds in (False, True):
                stays, stages, shared_bytes = tile.layout(in_features, adds)
                assert shared_bytes <= 227 * 1024 and stages >= 4
                assert stays or adds or in_features > 384
            stays, stages, shared_bytes = CLUSTER_TILE.layout(in_features, norm_of=256)
            assert shared_bytes <= 227 * 1024 and stages >= 4


def test_every_reason_not_to_run_it(monkeypatch):
    layer, rows = FusedLinear(torch.zeros(64, 64), None), torch.zeros(128, 64)
    assert "cpu" in why_not_hopper(layer, rows_of(rows))
    monkeypatch.setattr(hopper, "why_not_hopper", lambda device, dtype: None)
    monkeypatch.setattr("samlight_hf.kernels.linear.why_not_tried", lambda *arguments: None)
    assert why_not_hopper(layer, rows_of(rows), rows) is None
    assert "torch.float64" in why_not_hopper(layer, rows_of(rows.double()))
    assert "torch.float64" in why_not_hopper(layer, rows_of(rows), rows.double())
    assert "on meta" in why_not_hopper(layer, rows_of(rows), rows.to("meta"))
    assert "100 rows" in why_not_hopper(layer, rows_of(rows[:100]))
    assert "0 rows" in why_not_hopper(layer, rows_of(rows[:0]))
    assert "not have 64 features" in why_not_hopper(layer, rows_of(rows.view(-1).repeat(2).view(128, 128)))
    assert "the residual not 64" in why_not_hopper(layer, rows_of(rows), torch.zeros(128, 128))
    assert "not contiguous" in why_not_hopper(layer, rows_of(rows.T.contiguous().T))
    assert "odd addresses" in why_not_hopper(layer, rows_of(torch.zeros(128 * 64 + 1)[1:].view(128, 64)))
    for count in (0, 64, 100):
        assert f"the residual's {count} rows" in why_not_hopper(layer, rows_of(rows), rows[:count])
    layer.gelu = True
    assert "GELU" in why_not_hopper(layer, rows_of(rows))
    layer.row_sums = torch.zeros(64)
    assert why_not_hopper(layer, rows_of(rows)) is None
    assert "no residual" in why_not_hopper(layer, rows_of(rows), rows)
    normalized = FusedLinear(torch.zeros(64, 64), None, norm_after=nn.LayerNorm(64))
    assert "no residual" in why_not_hopper(normalized, rows_of(rows), rows)
    convolution = FusedLinear(torch.zeros(64, 9 * 64), None)
    assert why_not_hopper(convolution, neighbours_of(torch.zeros(2, 2, 64, 64))) is None
    for grid in ((8, 48), (8, 8), (6, 32), (1, 1)):  # a block of 128 places would reach into the next image
        assert f"{grid[0]} x {grid[1]}" in why_not_hopper(convolution, neighbours_of(torch.zeros(128, *grid, 64)))
    patches = FusedLinear(torch.zeros(64, 3 * 16**2), None)
    images, positions = torch.zeros(1, 3, 128, 256), torch.zeros(8 * 16, 64)
    assert why_not_hopper_patches(patches, images, positions) is None
    assert "64 positions must match" in why_not_hopper_patches(patches, images, positions[:64])
    assert "100 x 256 pixels" in why_not_hopper_patches(patches, images[:, :, :100], None)
    assert "8 x 8 places" in why_not_hopper_patches(patches, torch.zeros(2, 3, 128, 128), None)
    assert "torch.float64" in why_not_hopper_patches(patches, images.double(), positions)
    assert "patches of 8 x 8" in why_not_hopper_patches(FusedLinear(torch.zeros(64, 3 * 64), None), images, None)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not (case[2] and (case[0] or case[1]))], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
# Fewer blocks than stages, and more; weights that stay in shared memory, and weights that do not.
@pytest.mark.parametrize("in_features", [192, 768, 1536])
def test_the_kernel_computes_what_the_modules_do(in_features, case, dtype, tile):
    """There are more tiles than thread blocks, so that each processes several."""
    sizes = {"num_rows": 256 * 129, "in_features": in_features, "out_features": 768}
    layer, rows, residual, expected = make(case, dtype, "cuda", **sizes)
    memory = torch.full((expected.numel() + 8,), 5, dtype=dtype, device="cuda")
    with torch.no_grad():
        found = launch_hopper(layer, rows_of(rows.values), rows.statistics, residual, case[3], tile, memory)
    assert error(found.values, expected) < TOLERANCES[dtype]
    assert (found.statistics is not None) == case[3] and statistics_error(found) < 1e-4
    assert found.values.data_ptr() == memory.data_ptr() and memory[-8:].eq(5).all()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", [*ALL_TILES, "Triton"], ids=str)
@pytest.mark.parametrize("in_features", [384, 1536])
@torch.no_grad()
def test_a_layer_may_overwrite_its_residual(in_features, tile):
    num_rows = 256 * 129
    case, sizes = (False, False, num_rows, True, False), {"num_rows": num_rows, "in_features": in_features}
    layer, rows, residual, _ = make(case, torch.bfloat16, "cuda", **sizes, out_features=384)

    def run(residual, memory):
        if tile == "Triton":
            return launch_triton(layer, rows, residual, True, memory=memory)
        return launch_hopper(layer, rows_of(rows.values), None, residual, True, tile, memory)

    expected = run(residual, None)
    for _ in range(5):
        own = residual.clone()
        found = run(own, own.view(-1))
        assert found.values.data_ptr() == own.data_ptr() and torch.equal(own, expected.values)
        assert torch.equal(found.statistics, expected.statistics)


@pytest.mark.gpu
@needs_hopper
def test_it_runs_by_itself_and_again_to_the_bit(monkeypatch):
    """Layers in sequence, each of which starts before the previous one has ended."""
    layers = [
        make(case, torch.bfloat16, "cuda", in_features=384, out_features=384)[0]
        for case in (CASES[3], CASES[1], CASES[3])
    ]
    _, rows, _, _ = make(CASES[0], torch.bfloat16, "cuda", num_rows=4096, in_features=384, out_features=384)
    assert why_not_hopper(layers[0], rows_of(rows.values)) is None

    @torch.no_grad()
    def run(call) -> torch.Tensor:
        first = call(layers[0], RowsWithStatistics(rows.values), rows.values, True)
        return call(layers[2], call(layers[1], first, None, False), first.values, True).values

    expected = run(fused_linear_reference)
    run(FusedLinear.__call__)  # tries the kernels against the reference
    for name in ("launch_triton", "fused_linear_reference"):
        monkeypatch.delattr(f"samlight_hf.kernels.linear.{name}")
    found = run(FusedLinear.__call__)
    assert error(found, expected.double()) < TOLERANCES[torch.bfloat16]
    for _ in range(20):
        assert torch.equal(run(FusedLinear.__call__), found)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("grid", [(8, 16), (32, 32), (4, 128), (64, 64), (2, 256)], ids=str)
def test_the_neck_is_its_convolution(grid, monkeypatch):
    torch.manual_seed(0)
    convolution = nn.Conv2d(128, 64, 3, padding=1, bias=False).to("cuda", torch.bfloat16)
    tokens = torch.randn(2, grid[0] * grid[1], 128, device="cuda", dtype=torch.bfloat16)
    layer = FusedLinear(convolution.weight.permute(0, 2, 3, 1).flatten(1), None)
    with torch.no_grad():
        image = tokens.double().transpose(1, 2).unflatten(2, grid)
        expected = convolution.double()(image).flatten(2).transpose(1, 2)
        convolve(layer, tokens, grid)  # tries the kernel against torch's
        monkeypatch.delattr("samlight_hf.kernels.linear.F.conv2d")
        found = convolve(layer, tokens, grid)
    assert error(found, expected) < TOLERANCES[torch.bfloat16]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("out_features", [64, 128, 256])  # the kernel applies norms of 128 and 256 features
@pytest.mark.parametrize("batch_size", [1, 2, 3])  # a tile for each thread block, several, and more than few rows
@torch.no_grad()
def test_norms_after_layers_are_those_of_the_modules(batch_size, out_features, dtype, monkeypatch):
    torch.manual_seed(0)
    norms = [nn.LayerNorm(out_features, eps=1e-6).cuda() for _ in range(2)]
    for norm in norms:
        norm.weight.normal_(1, 0.3), norm.bias.normal_()
    projection = nn.Linear(384, out_features).to("cuda", dtype)
    convolution = nn.Conv2d(out_features, out_features, 3, padding=1, bias=False).to("cuda", dtype)
    kernel = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    layers = (
        FusedLinear(projection.weight, projection.bias, norm_after=norms[0]),
        FusedLinear(kernel, None, norm_after=norms[1]),
    )
    rows = torch.randn(batch_size * 4096, 384, device="cuda", dtype=dtype)

    def run() -> list[torch.Tensor]:
        tokens = layers[0](RowsWithStatistics(rows)).values
        return [tokens, convolve(layers[1], tokens.view(batch_size, 4096, out_features), (64, 64)).flatten(0, 1)]

    found = run()
    is_fused = batch_size < 3 and out_features > 64
    assert [hopper_linear.fuses_norm_after(layer, len(rows)) for layer in layers] == [is_fused, is_fused]
    if is_fused:
        for name in ("add_layer_norm", "launch_triton", "fused_linear_reference"):
            monkeypatch.delattr(f"samlight_hf.kernels.linear.{name}")
    for _ in range(20):
        assert all(torch.equal(again, first) for again, first in zip(run(), found))
    norms, projection, convolution = (module.double() for module in (nn.ModuleList(norms), projection, convolution))
    expected = norms[0](projection(rows.double()))
    images = found[0].double().unflatten(0, (batch_size, 64, 64)).permute(0, 3, 1, 2)
    convolved = norms[1](convolution(images).permute(0, 2, 3, 1).flatten(0, 2))
    for result, exact in zip(found, (expected, convolved)):
        assert error(result, exact) < TOLERANCES[dtype]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "grid, tile", [((8, 16), None), ((4, 128), None), ((2, 256), None), *(((64, 64), tile) for tile in ALL_TILES)]
)
@torch.no_grad()
def test_patches_are_those_of_the_convolution(grid, tile, dtype):
    torch.manual_seed(0)
    pixel_values = torch.randn(9, 3, 16 * grid[0], 16 * grid[1], device="cuda").to(dtype)
    weight, bias = torch.randn(384, 3, 16, 16, device="cuda").to(dtype) / 28, torch.randn(384, device="cuda")
    positions = torch.randn(grid[0] * grid[1], 384, device="cuda").to(dtype)
    found = launch_hopper(FusedLinear(weight.flatten(1), bias), patches_of(pixel_values), None, positions, True, tile)
    expected = nn.functional.conv2d(pixel_values.double(), weight.double(), bias.double(), stride=16)
    expected = (expected.flatten(2).mT + positions.double()).flatten(0, 1)
    assert error(found.values, expected) < TOLERANCES[dtype] and statistics_error(found) < 1e-4


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_patches_run_by_themselves_and_after_what_writes_the_positions(monkeypatch):
    layer = FusedLinear(torch.randn(384, 768, device="cuda").bfloat16() / 28, torch.randn(384, device="cuda"))
    writer, rows, _, _ = make(CASES[0], torch.bfloat16, "cuda", 4096, 1536, 384)
    for batch_size in (1, 3):
        pixel_values = torch.randn(batch_size, 3, 1024, 1024, device="cuda").bfloat16()
        positions = launch_hopper(writer, rows_of(rows.values)).values
        expected = embed_patches(layer, pixel_values, positions).values  # tries the kernel
        with monkeypatch.context() as without:
            for name in ("launch_patches", "launch_triton", "fused_linear_reference"):
                without.delattr(f"samlight_hf.kernels.linear.{name}")
            for _ in range(20):
                memory = torch.zeros_like(positions).view(-1)
                written = launch_hopper(writer, rows_of(rows.values), memory=memory).values
                assert torch.equal(embed_patches(layer, pixel_values, written).values, expected)


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_each_variant_is_tried_by_itself(monkeypatch):
    """The variant with a residual cannot be compiled and falls back to Triton; the others run in CUDA."""
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(records, "machine_of", lambda device: None)  # nor are there records of other processes
    monkeypatch.setattr(triton_support, "_warned", set())
    compiled = hopper.compiled

    def breaks(source: str) -> bytes:
        if "#define RESIDUAL 1" in source:
            raise RuntimeError("too many registers")
        return compiled(source)

    monkeypatch.setattr(hopper, "compiled", breaks)
    hopper_linear._kernel.cache_clear()
    sizes = {"num_rows": 256, "in_features": 384, "out_features": 384}
    layer, rows, residual, expected = make(CASES[3], torch.bfloat16, "cuda", **sizes)
    x = rows_of(rows.values)
    with pytest.warns(UserWarning, match="CUDA kernel for linear layers does not run here: too many registers"):
        assert "too many registers" in why_not_hopper(layer, x, residual)
    assert error(layer(rows, residual).values, expected) < TOLERANCES[torch.bfloat16]
    assert why_not_hopper(layer, x) is None and why_not_hopper(layer, x, statistics=True) is None
    normalized, rows, _, _ = make(CASES[1], torch.bfloat16, "cuda", **sizes)
    for parts in (1, 3):
        assert why_not_hopper(normalized, rows_of(rows.values), parts=parts) is None
    convolution = FusedLinear(torch.randn(64, 9 * 64, device="cuda").bfloat16() / 24, None)
    images = torch.zeros(1, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert why_not_hopper(convolution, neighbours_of(images)) is None
