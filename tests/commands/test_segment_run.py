"""The pipeline of `samlight segment`: one stream of images, in which no image is lost, whatever one of them raises."""

import numpy as np
import pytest
import torch
from PIL import Image

from samlight_hf import MaskGenerator, Predictor
from samlight_hf.commands.segment_run import EverythingSegmenter, Job, PromptSegmenter, Run
from samlight_hf.inference.crops import MaskGenerationSettings
from samlight_hf.inference.prompts import ObjectPrompt
from samlight_hf.loading import load_model


SETTINGS = MaskGenerationSettings(4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
NUM_IMAGES = 7


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(checkpoint, "cpu")


@pytest.fixture
def jobs(tmp_path):
    """Images whose widths are 40, 41 and so on."""
    jobs = []
    for number in range(NUM_IMAGES):
        levels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(levels).resize((40 + number, 30)).save(path)
        jobs.append(Job(path, path.with_suffix(".json"), prompts=(ObjectPrompt(points_xy=((9.0, 9.0),), labels=(1,)),)))
    return jobs


@pytest.fixture(params=["everything", "everything, overlapping", "prompts"])
def segmenter(request, loaded):
    if request.param == "prompts":
        return PromptSegmenter(Predictor(*loaded, output="torch"))
    generator = MaskGenerator(*loaded)
    generator._overlaps = request.param.endswith("overlapping")  # as on a CUDA device
    return EverythingSegmenter(generator, SETTINGS)


def run(segmenter, jobs, batch_size: int) -> tuple[dict[str, list], list[str]]:
    """Return the masks of each image by its name, in order, and the names of those that were skipped."""
    skipped: list[str] = []

    def write(segmented) -> tuple[str, list[bytes], float]:
        masks = [np.packbits(mask).tobytes() for mask in segmented.result.masks]
        return segmented.job.path.name, masks, segmented.seconds

    written = list(Run(segmenter, write, lambda error, path: skipped.append(path.name), batch_size)(jobs))
    assert all(seconds > 0 for *_, seconds in written)
    return {name: masks for name, masks, _ in written}, sorted(skipped)


def test_images_follow_each_other_over_the_ends_of_batches(loaded, jobs, monkeypatch):
    steps, generator = [], MaskGenerator(*loaded)
    generator._overlaps = True
    for letter, name in (("s", "_start"), ("e", "_select")):
        method = getattr(generator, name)
        monkeypatch.setattr(generator, name, lambda *a, m=method, c=letter, **k: (steps.append(c), m(*a, **k))[1])
    run(EverythingSegmenter(generator, SETTINGS), jobs, 2)
    assert "".join(steps) == "s" + (NUM_IMAGES - 1) * "se" + "e"


@pytest.mark.parametrize("bad", [(0,), (2, 3, 6), range(NUM_IMAGES)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_only_the_image_with_an_error_is_skipped(segmenter, jobs, monkeypatch, batch_size, bad):
    expected, none = run(segmenter, jobs, 4)
    assert list(expected) == [job.path.name for job in jobs] and none == []
    # An error of the encoder concerns a whole batch, one of the decoder a single image.
    encoder = (getattr(segmenter, "generator", None) or segmenter.predictor).encoder
    encode, widths = type(encoder).__call__, {40 + number for number in bad}

    def full(self, images):
        if any(image.shape[-1] in widths for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, images)

    monkeypatch.setattr(type(encoder), "__call__", full)
    masks, skipped = run(segmenter, jobs, batch_size)
    assert skipped == [f"{number}.png" for number in bad]
    assert masks == {name: own for name, own in expected.items() if name not in skipped}
    assert list(masks) == [name for name in expected if name not in skipped]


def test_what_the_jobs_raise_comes_behind_the_images_before(segmenter, jobs):
    def broken():
        yield from jobs
        raise KeyError("no more")

    written = []
    pipeline = Run(segmenter, lambda segmented: written.append(segmented.job.path.name), pytest.fail, 2)
    with pytest.raises(KeyError, match="no more"):
        list(pipeline(broken()))
    assert sorted(written) == [job.path.name for job in jobs]
