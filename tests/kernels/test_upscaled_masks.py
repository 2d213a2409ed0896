"""Tests that the Triton kernels measure the same as upscaled masks, in Triton's interpreter and on a GPU."""

import pytest
import torch

from samlight_hf.inference.candidates import Candidates
from samlight_hf.inference.packed_logits import Place, columns_of
from samlight_hf.kernels import upscaled_masks
from samlight_hf.kernels.support import triton
from samlight_hf.kernels.upscaled_masks import (
    Frame,
    changes,
    changes_reference,
    launch_changes,
    launch_masks,
    launch_measure,
    masks_reference,
    measure,
    measure_reference,
    why_not_triton,
)
from samlight_hf.masks.boxes import mask_boxes
from samlight_hf.masks.rle import RunLengthMasks

from .interpreter import run_in_tritons_interpreter


THRESHOLDS = (0.0, 1.0, -1.0)
CASES = {  # logits' size, frame
    "one resize": ((16, 16), Frame((64, 64), (40, 64), (40, 64), (0, 0), (40, 64))),
    "two resizes": ((16, 16), Frame((64, 64), (43, 64), (67, 100), (0, 0), (67, 100))),
    "made smaller": ((16, 16), Frame((64, 64), (64, 33), (41, 21), (0, 0), (41, 21))),
    "a crop": ((8, 8), Frame((32, 32), (20, 32), (25, 40), (5, 11), (50, 60))),
    "wider than a block": ((16, 16), Frame((64, 64), (11, 64), (23, 133), (0, 0), (23, 133))),
    "no multiple": ((6, 6), Frame((20, 20), (15, 20), (15, 20), (0, 0), (15, 20))),
    "wider than two blocks": ((40, 40), Frame((160, 160), (40, 160), (40, 160), (0, 0), (40, 160))),
    "wider than a block of logits": ((4, 300), Frame((16, 1200), (11, 1200), (11, 1200), (0, 0), (11, 1200))),
    "more strips than are joined at once": ((8, 4), Frame((32, 16), (32, 1), (1100, 9), (0, 0), (1100, 9))),
    "one pixel": ((8, 8), Frame((32, 32), (32, 32), (1, 1), (0, 0), (1, 1))),
}


def logits_of(size, count=1, device="cpu", dtype=torch.float32):
    """Make logits of blobs, of narrow masks, and of empty and full ones."""
    generator = torch.Generator().manual_seed(size[0])
    blobs = 3 * torch.randn(count, *size, generator=generator)
    empty, narrow = torch.full((2, 1, *size), -7.0)
    narrow[:, 1:-1, size[1] // 3] = 90.0  # blocks of columns far from it are skipped
    return torch.cat([blobs, narrow, empty, torch.full((1, *size), 7.0)]).to(device, dtype)


def check(name: str, device="cpu", dtype=torch.float32):
    """Check the kernels against the reference; a pixel at the threshold may differ by rounding."""
    size, frame = CASES[name]
    logits = logits_of(size, count=1 if device == "cpu" else 9, device=device, dtype=dtype)
    found, expected = launch_measure(logits, frame, THRESHOLDS), measure_reference(logits, frame, THRESHOLDS)
    assert (found.dtype, found.shape) == (torch.int32, expected.shape), name
    assert (found - expected).abs().max() <= 1, (name, found, expected)
    written, expected = launch_masks(logits, frame, 0.0), masks_reference(logits, frame, 0.0)
    assert (written.dtype, written.shape) == (torch.bool, expected.shape), name
    assert (written != expected).flatten(1).sum(dim=1).max() <= 1, name
    (top, left), boxes = frame.corner, measure_reference(logits, frame, THRESHOLDS)[:, 2:]
    columns = columns_of(boxes + boxes.new_tensor([left, top, left, top]), frame, size[1])
    assert all(map(torch.equal, launch_changes(logits, frame, 0.0, columns), launch_changes(logits, frame, 0.0))), name
    masks = [
        RunLengthMasks.from_changes(*frame.image, *(tensor.cpu().numpy() for tensor in result)).to_masks()
        for result in (launch_changes(logits, frame, 0.0), changes_reference(logits, frame, 0.0))
    ]
    for mask, other in zip(*masks, strict=True):
        assert (mask != other).sum() <= 1, name
    # All kernels compute the same pixels, to the bit.
    rows, columns = slice(top, top + frame.crop[0]), slice(left, left + frame.crop[1])
    assert torch.equal(torch.from_numpy(masks[0])[:, rows, columns], written.cpu()), name
    measured = launch_measure(logits, frame, (0.0, 0.0, -1.0))
    assert torch.equal(measured[:, 0], written.flatten(1).sum(dim=1, dtype=torch.int32)), name
    assert torch.equal(measured[:, 2:], mask_boxes(written).int()), name
    assert not launch_measure(logits[:0], frame, THRESHOLDS).numel()
    assert launch_masks(logits[:0], frame, 0.0).shape == (0, *frame.crop)
    assert [len(tensor) for tensor in launch_changes(logits[:0], frame, 0.0)] == [0, 0]
    assert [len(tensor) for tensor in launch_changes(logits[-2:-1], frame, 0.0)] == [0, 1]


def test_some_cases_are_larger_than_a_block():
    rows, columns, _, near_columns = upscaled_masks._MEASURE_BLOCK
    assert (rows, columns) == upscaled_masks._MASK_BLOCK
    sizes, frames = zip(*CASES.values())
    heights, widths = zip(*(frame.crop for frame in frames))
    assert max(heights) > rows
    assert max(widths) > columns
    assert max(width for _, width in sizes) > near_columns
    assert {width % 4 == 0 for width in widths} == {False, True}, "both kinds of stores"


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["masks_kernel", "measure_kernel", "join_kernel", "bits_kernel", "changes_kernel"])
def test_the_kernels_are_compiled_for_none_of_their_integers(name):
    """`launch_again` requires it. In the other places are tensors and floats."""
    others = "logits masks partial measures spans bits counts starts positions threshold middle high low lowest"
    scales = {f"{low}scale_{axis}" for low in ("", "low_") for axis in "yx"}
    parameters = [parameter for parameter in getattr(upscaled_masks, name).params if not parameter.is_constexpr]
    integers = {parameter.name for parameter in parameters if parameter.do_not_specialize}
    assert integers and {parameter.name for parameter in parameters} - integers <= {*others.split(), *scales}


@pytest.mark.gpu
def test_logits_of_another_alignment_have_a_kernel_of_their_own():
    """A kernel that was compiled for aligned ones would read wrong addresses."""
    frame = Frame((32, 32), (32, 24), (62, 48), (0, 0), (62, 48))
    memory = torch.randn(3 * 8 * 8 + 1, generator=torch.Generator().manual_seed(0)).cuda()
    for start in (0, 1, 0, 1):
        logits = memory[start : start + 3 * 8 * 8].view(3, 8, 8)
        differences = launch_masks(logits, frame, 0.0) != masks_reference(logits, frame, 0.0)
        assert differences.flatten(1).sum(dim=1).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_on_a_gpu(name, dtype):
    assert why_not_triton(torch.empty(0, device="cuda")) is None
    check(name, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "frame",
    [
        Frame((1024, 1024), (683, 1024), (683, 1024), (0, 0), (683, 1024)),
        Frame((1024, 1024), (684, 1024), (427, 640), (0, 0), (427, 640)),
        Frame((1024, 1024), (1024, 768), (1200, 900), (300, 200), (2000, 1500)),
    ],
    ids=str,
)
def test_masks_of_the_published_size_on_a_gpu(frame):
    generator = torch.Generator().manual_seed(0)
    coarse = 10 * torch.randn(40, 1, 20, 20, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")[:, 0].cuda()
    found, expected = launch_measure(logits, frame, THRESHOLDS), measure_reference(logits, frame, THRESHOLDS)
    assert (found[:, :2] - expected[:, :2]).abs().max() <= 1e-3 * expected[:, 0].min()
    assert (found[:, 2:] - expected[:, 2:]).abs().max() <= 1
    masks, others = (
        torch.from_numpy(
            RunLengthMasks.from_changes(*frame.image, *(tensor.cpu().numpy() for tensor in result)).to_masks()
        )
        for result in (launch_changes(logits, frame, 0.0), changes_reference(logits, frame, 0.0))
    )
    union, intersection = ((part).flatten(1).sum(1) for part in (masks | others, masks & others))
    assert (intersection / union).min() >= 0.999
    different = launch_masks(logits, frame, 0.0) != masks_reference(logits, frame, 0.0)
    assert different.float().mean() < 1e-5


@pytest.mark.gpu
def test_masks_of_more_pixels_than_32_bits_count():
    frame = Frame((1024, 1024), (683, 1024), (2000, 3000), (0, 0), (2000, 3000))
    logits = torch.linspace(-9, 9, 64 * 64, device="cuda").sin().view(1, 64, 64).repeat(360, 1, 1)
    logits[-1] *= -1
    masks = launch_masks(logits, frame, 0.0)
    assert torch.equal(masks[-2:], launch_masks(logits[-2:], frame, 0.0))
    assert not torch.equal(masks[-1], masks[-2])


def test_why_the_kernels_do_not_run_on_a_cpu_and_what_runs_there():
    size, frame = CASES["a crop"]
    logits = logits_of(size)
    assert triton is None or "the tensors are on cpu" in why_not_triton(logits)
    whole = changes_reference(logits, frame, 0.0)
    for step in (1, 3, 100):
        assert torch.equal(
            measure(logits, frame, THRESHOLDS, step, False), measure_reference(logits, frame, THRESHOLDS)
        )
        assert all(map(torch.equal, changes(logits, frame, 0.0, step, False), whole))
    assert measure(logits[:0], frame, THRESHOLDS, 2, False).shape == (0, 6)


@pytest.mark.parametrize("pixels, at_once", [((683, 1024), 161), ((4000, 6000), 20), ((60_000, 60_000), 1)])
def test_outlines_of_large_images_are_made_of_fewer_masks_at_once(monkeypatch, pixels, at_once):
    parts = []

    def launch(part, frame, threshold, columns):
        parts.append(len(part))
        return torch.zeros(0, dtype=torch.int32), torch.zeros(len(part), dtype=torch.int32)

    monkeypatch.setattr(upscaled_masks, "launch_changes", launch)
    monkeypatch.setattr(upscaled_masks, "why_not_triton", lambda logits, frame: None)
    frame = Frame((1024, 1024), (1024, 1024), pixels, (0, 0), pixels)
    _, counts = changes(torch.zeros(1, 1, 1).expand(400, 256, 256), frame, 0.0, 1, use_triton=True)
    assert (len(counts), max(parts)) == (400, at_once)


@pytest.mark.gpu
def test_more_masks_than_the_second_axis_of_a_grid_has_programs():
    """More than 65,535 masks, and more than 65,535 blocks of one mask for outlines."""
    frame = Frame((16, 16), (16, 12), (20, 15), (1, 2), (24, 20))
    logits = logits_of((4, 4), count=70_000, device="cuda")
    some = torch.tensor([0, 1, 65_534, 65_535, 65_536, len(logits) - 3, len(logits) - 1], device="cuda")
    assert torch.equal(launch_measure(logits, frame, THRESHOLDS)[some], launch_measure(logits[some], frame, THRESHOLDS))
    assert torch.equal(launch_masks(logits, frame, 0.0)[some], launch_masks(logits[some], frame, 0.0))
    (positions, counts), (few, few_counts) = (launch_changes(part, frame, 0.0) for part in (logits, logits[some]))
    assert torch.equal(counts[some], few_counts)
    parts = positions.split(counts.tolist())
    assert torch.equal(torch.cat([parts[number] for number in some.tolist()]), few)
    frame, logits = Frame((16, 16), (16, 16), (16, 16), (8191, 8191), (8208, 8208)), logits[-4:]  # 65,793 blocks
    found, expected = launch_changes(logits, frame, 0.0), changes_reference(logits, frame, 0.0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("max_bytes", [0, 3000, 1e9])
def test_outlines_do_not_depend_on_when_they_are_computed(max_bytes):
    """Masks of an image and of a crop of it are kept in another order than they were added."""
    crop = CASES["a crop"][1]
    image = Frame((32, 32), (27, 32), crop.image, (0, 0), crop.image)
    found = Candidates(crop.image, 0.0, max_bytes, use_triton=False, device=torch.device("cpu"))
    masks = []
    for seed, frame in enumerate((image, image, crop, image, crop)):
        logits = logits_of((8, 8), count=seed)
        count = len(logits)
        top, left = frame.corner
        boxes = measure_reference(logits, frame, THRESHOLDS)[:, 2:] + torch.tensor([left, top, left, top])
        columns, place = torch.cat([torch.rand(count, 4), boxes], dim=1), Place.make(frame, *logits.shape[1:])
        found.add(columns, torch.ones(count, dtype=torch.bool), place, logits, step=2)
        masks.append(
            RunLengthMasks.from_changes(*crop.image, *map(torch.Tensor.numpy, changes_reference(logits, frame, 0.0)))
        )
    expected = [mask for part in masks for mask in part]
    found.settle()
    assert len(found.columns()[0]) == len(expected) == 25
    kept = torch.randperm(25, generator=torch.Generator().manual_seed(0))[:13]

    def outlines(kept):
        return RunLengthMasks.from_changes(*crop.image, *(part.numpy() for part in found.outlines(kept, 3, 3)))

    for mask, number in zip(outlines(kept), kept.tolist(), strict=True):
        assert (mask == expected[number]).all()
    assert len(outlines(kept[:0])) == 0


if __name__ == "__main__":
    for case in CASES:
        check(case)
    for twice in (False, True):
        assert upscaled_masks._why_not_tried(torch.device("cpu"), torch.float32, twice) is None
    print(f"{len(CASES)} cases")
