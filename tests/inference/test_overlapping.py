"""Images whose ends and beginnings overlap get the masks that each gets alone, in order, and errors in their place."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from samlight_hf import ImageError, MaskGenerator
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.images.preprocessing import image_tensor
from samlight_hf.inference import overlapping
from samlight_hf.inference.candidates import Candidates
from samlight_hf.inference.crops import MaskGenerationSettings
from samlight_hf.inference.overlapping import Running
from samlight_hf.loading import load_model


SETTINGS = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_crop": 4}
MANY = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.65, "points_per_crop": 32}


@pytest.fixture
def generator(folder):
    """On a CPU one image is decoded after another, unless it is told otherwise, as here."""
    generator = MaskGenerator(*load_model(folder, "cpu"))
    assert not generator._overlaps
    generator._overlaps = True
    return generator


def image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)


def steps_of(generator, monkeypatch) -> list[str]:
    """Return a list that gets a letter for each step: s for the start of an image, e for its end."""
    steps: list[str] = []
    for letter, name in (("s", "_start"), ("e", "_select")):
        method = getattr(generator, name)
        monkeypatch.setattr(generator, name, lambda *a, m=method, c=letter, **k: (steps.append(c), m(*a, **k))[1])
    return steps


@pytest.mark.parametrize("kind", ["array", "tensor", "animation"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_frames_that_come_in_one_memory(generator, kind, overlaps, tmp_path):
    """Images are taken before they are read, and the next one may overwrite them."""
    frames = [image(seed).quantize(8).convert("RGB") for seed in range(4)]
    frames[0].save(tmp_path / "frames.png", save_all=True, append_images=frames[1:])

    def taken():
        if kind == "animation":
            yield from ImageSequence.Iterator(Image.open(tmp_path / "frames.png"))
            return
        arrays = [np.asarray(frame) for frame in frames]
        memory = np.empty_like(arrays[0])
        for array in arrays:
            memory[:] = array
            yield torch.from_numpy(memory).permute(2, 0, 1) if kind == "tensor" else memory

    generator._overlaps = overlaps
    expected = [generator(frame, **SETTINGS).masks.to_coco() for frame in frames]
    assert len({str(masks) for masks in expected}) == 4
    assert [result.masks.to_coco() for result in generator.generate_many(taken(), **SETTINGS)] == expected


def test_images_with_several_frames_are_read_as_alone(generator, tmp_path):
    """Their levels and their damage, too, are those of the file; what is taken has no more bits than a screen."""
    levels = np.random.default_rng(0).integers(0, 4096, (2, 30, 40), dtype=np.uint16)
    first, second = (Image.fromarray(each) for each in levels)
    first.save(tmp_path / "deep.tif", save_all=True, append_images=[second])
    frames = [image(seed) for seed in range(2)]
    frames[0].save(tmp_path / "whole.png", save_all=True, append_images=frames[1:])
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 4])

    def opened():
        return (Image.open(tmp_path / name) for name in ("deep.tif", "half.png", "whole.png"))

    with pytest.warns(UserWarning, match="image 1: "):
        deep, half, whole = generator.generate_many(opened(), **SETTINGS)
    assert isinstance(half, ImageError)
    alone = [generator(tmp_path / name, **SETTINGS) for name in ("deep.tif", "whole.png")]
    assert [each.masks.to_coco() for each in (deep, whole)] == [each.masks.to_coco() for each in alone]


def test_the_next_image_begins_before_one_ends(generator, monkeypatch):
    images = [image(seed) for seed in range(4)]
    alone = [generator(each, **SETTINGS) for each in images]
    assert len({str(result.masks.to_coco()) for result in alone}) == 4
    steps = steps_of(generator, monkeypatch)
    for result, expected in zip(generator.generate_many(images, **SETTINGS), alone, strict=True):
        assert result.masks.to_coco() == expected.masks.to_coco()
        assert np.array_equal(result.scores, expected.scores)
    assert "".join(steps) == "ssesesee"
    steps.clear()
    settings, tensors = MaskGenerationSettings(**SETTINGS), [image_tensor(each) for each in images]
    encoded = zip(tensors, generator.encoder(tensors))
    for result, expected in zip(generator.generate_each(encoded, settings), alone, strict=True):
        assert result.masks.to_coco() == expected.masks.to_coco()
    assert "".join(steps) == "ssesesee"
    steps.clear()
    generator._overlaps = False
    assert len(list(generator.generate_many(images, **SETTINGS))) == 4
    assert "".join(steps) == "sesesese"


def test_a_result_is_used_before_the_end_of_the_next_image_begins(generator, monkeypatch):
    """That runs in another thread, and both would share Python's lock, while the device has points to decode."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *work):
            future = super().submit(*work)
            future.result()
            return future

    monkeypatch.setattr(overlapping, "ThreadPoolExecutor", AtOnce)
    steps, seen = steps_of(generator, monkeypatch), []
    for _ in generator.generate_many([image(seed) for seed in range(4)], **SETTINGS):
        seen.append(steps.count("e"))
    assert seen == [1, 2, 3, 4]


def test_masks_of_no_more_than_one_image_wait(generator, monkeypatch):
    made, alive, begin = [], [], Candidates.__init__

    def init(self, *arguments):
        begin(self, *arguments)
        made.append(1)
        gc.collect()
        alive.append(sum(isinstance(each, Candidates) for each in gc.get_objects()))

    monkeypatch.setattr(Candidates, "__init__", init)
    results = generator.generate_many((image(seed) for seed in range(5)), **SETTINGS)
    assert sum(len(result) > 0 for result in results) == len(made) == 5
    assert max(alive) == 2


def test_errors_are_in_their_place(generator):
    thin, good = Image.new("RGB", (20_000, 100)), [image(seed) for seed in range(3)]
    images = [thin, good[0], "gone.jpg", good[1], good[2], thin]
    alone = [generator(each, **SETTINGS) for each in good]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(generator.generate_many(images, **SETTINGS))
    assert [place for place, result in enumerate(results) if isinstance(result, ImageError)] == [0, 2, 5]
    assert [str(results[place]) for place in (0, 2, 5)] == [str(warning.message) for warning in caught]
    for place, expected in zip((1, 3, 4), alone):
        assert results[place].masks.to_coco() == expected.masks.to_coco()
    before = generator.generate_many(images[1:], errors="raise", **SETTINGS)
    assert next(before).masks.to_coco() == alone[0].masks.to_coco()
    with pytest.raises(ImageError, match="image 1: gone.jpg"):
        next(before)


def test_an_image_without_memory_begins_again_when_the_one_before_is_gone(generator, monkeypatch):
    start, calls = generator._start, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) in (2, 4, 5):  # the second image at first, and the third twice
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return start(*arguments, **options)

    images = [image(seed) for seed in range(4)]
    alone = [generator(each, **SETTINGS) for each in images]
    monkeypatch.setattr(generator, "_start", full)
    with pytest.warns(UserWarning, match="image 2: OutOfMemoryError: CUDA out of memory"):
        results = list(generator.generate_many(images, **SETTINGS))
    assert [isinstance(result, ImageError) for result in results] == [False, False, True, False]
    for place in (0, 1, 3):
        assert results[place].masks.to_coco() == alone[place].masks.to_coco()


@pytest.mark.parametrize("step", ["finish", "_outlined", "outlines"])
def test_what_runs_out_of_memory_beside_another_image_is_done_again_without_it(generator, monkeypatch, step):
    """The points of the second image, or the conversion of the last masks, or the choice in the other thread."""
    images, calls = [image(seed) for seed in range(4)], []
    generator.budget.waiting_bytes = 0
    monkeypatch.setitem(vars(generator.decoder), "is_lean", True)  # else no masks wait for the end of their image
    settings = {**SETTINGS, "crops_nms_thresh": 1.0}  # the last masks of an image are among the result
    alone = [generator(each, **settings) for each in images]
    holder = Running if step == "finish" else Candidates
    method = getattr(holder, step)

    def full(*arguments):
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 2 if step == "finish" else not calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return method(*arguments)

    monkeypatch.setattr(holder, step, full)
    for result, expected in zip(generator.generate_many(images, **settings), alone, strict=True):
        assert result.masks.to_coco() == expected.masks.to_coco()
        assert np.array_equal(result.scores, expected.scores)
    assert (len(calls) if step == "finish" else calls.count(False)) == (5 if step == "finish" else 3)


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_an_iterable_raises_comes_behind_the_images_before(generator, overlaps):
    def broken():
        yield from images
        raise KeyError("no more")

    generator._overlaps = overlaps
    images = [image(seed) for seed in range(5)]
    results, received = generator.generate_many(broken(), **SETTINGS), []
    with pytest.raises(KeyError, match="no more"):
        for result in results:
            received.append(result.masks.to_coco())
    assert received == [generator(each, **SETTINGS).masks.to_coco() for each in images]


def test_an_interrupt_ends_it_at_once(generator, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    results = generator.generate_many((image(seed) for seed in range(9)), **SETTINGS)
    next(results)
    monkeypatch.setattr(generator, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert list(results) == []


@pytest.fixture(scope="module")
def on_gpu():
    return MaskGenerator(*load_model(BUNDLED_CHECKPOINT, "cuda", torch.bfloat16))


@pytest.mark.gpu
def test_on_a_gpu_overlapping_images_have_their_own_masks(on_gpu):
    """Of all sizes and in several batches, so that memory is used again while another stream may still read it."""
    images = [Image.open(path) for path in sorted(EXAMPLE_IMAGES.glob("*.jpg"))]
    images = [each.resize(size) for size in ((1024, 683), (500, 700), (1300, 900)) for each in images]
    assert on_gpu._overlaps and on_gpu.decoder.is_lean
    alone = [on_gpu(each, **MANY) for each in images]
    for _ in range(2):
        results = on_gpu.generate_many(images, **MANY)
        for number, expected in enumerate(alone):
            with torch.cuda.stream(torch.cuda.Stream() if number % 2 else None):
                result = next(results)
            assert result.masks.to_coco() == expected.masks.to_coco()
            for name in ("scores", "boxes_xyxy", "stability_scores", "points_xy", "crop_boxes_xyxy"):
                assert np.array_equal(getattr(result, name), getattr(expected, name))
    assert all(result.masks.compressed is not None and len(result) > 20 for result in alone)


@pytest.mark.gpu
def test_on_a_gpu_a_batch_waits_once_and_launches_little(on_gpu):
    """Waiting for an event leaves the device its work: what waits for all of it happens only at an image's end."""
    photograph = image_tensor(Image.open(EXAMPLE_IMAGES / "coffee.jpg").resize((1024, 683)))
    settings = MaskGenerationSettings(**MANY)
    on_gpu.generate(photograph, settings)
    running = on_gpu._start(photograph, settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        running.finish()
        encoded = on_gpu.encoder([photograph])[0]
        again = on_gpu._start(photograph, settings, encoded=encoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(on_gpu._select(running)) > 20
    with torch.profiler.profile() as profile:
        again.finish()
    launches = [event for event in profile.events() if "Launch" in event.name and event.name.startswith("cu")]
    num_batches = -(-32 * 32 // on_gpu.budget.points_per_batch)
    print(f"{len(launches) / num_batches:.0f} launches a batch")
    assert len(launches) < 60 * num_batches
