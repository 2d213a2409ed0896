"""Test that cached images equal decoded ones, and that a folder that cannot be written only costs time."""

import numpy as np
import pytest
import torch

import samlight_hf.data.image_cache as image_cache
from samlight_hf.data import Augmentation, PromptSampling, Sa1bDataset, SampleError, SkipReason, TrainingExamples
from samlight_hf.data.image_cache import ImageCache

from .files import annotation, box_mask, jpeg, sa1b_json, write_tar


@pytest.fixture
def tar(tmp_path):
    members = {f"sa_{i}.jpg": jpeg(seed=i) for i in range(4)} | {"sa_4.jpg": jpeg()[:300]}
    members |= {f"sa_{i}.json": sa1b_json(annotation(mask=box_mask(width=20))) for i in range(5)}
    return Sa1bDataset(write_tar(tmp_path / "a.tar", members))


def examples(source) -> TrainingExamples:
    augmentation = Augmentation(scale=(0.5, 2.0), flip=True, brightness=0.3)
    return TrainingExamples(
        source, 20, 64, augmentation=augmentation, prompts=PromptSampling(2), max_skipped=1.0, seed=3
    )


def test_examples_are_the_same_and_nothing_is_decoded_twice(tar, tmp_path, monkeypatch):
    plain = list(made := examples(tar))
    tar.image_cache = ImageCache(tmp_path / "cache")
    first = list(filling := examples(tar))
    files = list((tmp_path / "cache").rglob("*"))
    assert sum(file.suffix == ".npy" for file in files) == 4 and not any(".part" in file.name for file in files)

    decoded = []
    decode = image_cache.decode_image
    monkeypatch.setattr(image_cache, "decode_image", lambda *data: decoded.append(data) or decode(*data))
    second = list(examples(tar))
    assert {len(data) for data, *_ in decoded} == {300}  # only the damaged file is decoded again
    for expected, *others in zip(plain, first, second, strict=True):
        assert all(torch.equal(value, other[name]) for other in others for name, value in expected.items())
    assert filling.skip_report() == made.skip_report()
    assert set(made.skip_report().images) == {SkipReason.BROKEN_IMAGE}


def test_a_file_cut_short_is_made_again(tar, tmp_path):
    cache = ImageCache(tmp_path)
    data, size = tar.image_bytes(0), (40, 30)
    expected = np.array(cache.pixels(data, size))
    (file,) = tmp_path.rglob("*.npy")
    for content in (file.read_bytes()[:200], b""):
        file.write_bytes(content)
        assert np.array_equal(cache.pixels(data, size), expected)
        assert np.array_equal(np.load(file), expected)


def test_the_size_that_the_annotations_say_counts(tar, tmp_path):
    cache = ImageCache(tmp_path)
    cache.pixels(tar.image_bytes(0), (40, 30))
    with pytest.raises(SampleError, match="another size"):
        cache.pixels(tar.image_bytes(0), (30, 40))


def test_a_full_disk_costs_time_alone(tar, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    cache = ImageCache(tmp_path / "cache")
    monkeypatch.setattr(image_cache.np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        pixels = cache.pixels(tar.image_bytes(0), (40, 30))
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(tar[0].image))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
