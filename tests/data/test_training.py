"""Test that training examples are a pure function of their index, and that unusable images are counted and replaced."""

import pickle
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samlight_hf.data import (
    Augmentation,
    PromptSampling,
    Sa1bDataset,
    SkipReason,
    SkipReport,
    SyntheticScenes,
    TrainingExamples,
)
from samlight_hf.data.order import ExampleOrder
from samlight_hf.data.skip_counter import SkipCounter

from .examples import examples, id_of
from .files import annotation, box_mask, jpeg, sa1b_json, write_tar


S = 128


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_in_an_example():
    example = examples(image_size=64)[3]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in example.items()} == {
        "pixel_values": (torch.uint8, (3, 64, 64)),
        "reshaped_input_sizes": (torch.int64, (2,)),
        "example_id": (torch.int64, ()),
        "masks": (torch.bool, (4, 16, 16)),
        "boxes": (torch.float32, (4, 4)),
        "points": (torch.float32, (4, 2)),
        "uniforms": (torch.float32, (4, 16)),
    }
    assert example["uniforms"].min() >= 0 and example["uniforms"].max() < 1
    assert example["uniforms"].unique().numel() == 64
    assert set(examples(prompts=None)[3]) == {"pixel_values", "reshaped_input_sizes", "example_id"}


def test_the_same_number_gives_the_same_bytes_in_any_order_and_process():
    forwards = list(examples())
    others = examples(num_examples=400)
    backwards = [others[n] for n in reversed(range(40))][::-1]
    copy = pickle.loads(pickle.dumps(others))
    # Workers make whole batches, so that batches of 3 from 2 workers come from both.
    loaded = [
        {key: value[i] for key, value in batch.items()}
        for batch in DataLoader(examples(), batch_size=3, num_workers=2)
        for i in range(len(batch["points"]))
    ]
    for n, example in enumerate(forwards):
        assert same(example, backwards[n]) and same(example, copy[n]) and same(example, loaded[n]), n
    assert same(others[-1], others[399])
    with pytest.raises(IndexError):
        others[400]
    assert not same(forwards[0], examples(seed=1)[0])


def test_examples_do_not_touch_global_random_state():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.random(), torch.rand(())
    np.random.seed(0)
    torch.manual_seed(0)
    examples()[5]
    assert (np.random.random(), torch.rand(())) == expected


def test_each_epoch_goes_through_all_images_once_in_another_order():
    made = examples(augmentation=None, prompts=None, num_views=1)
    epochs = [[id_of(made[n]) for n in range(start, start + 10)] for start in (0, 10, 20, 30)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_sources_take_turns_by_weight():
    order = ExampleOrder([1000, 10], weights=[0.3, 0.7], seed=2)
    taken = [order(n) for n in range(20_000)]
    sources = np.array([source for source, _, _ in taken])
    for window in sources.reshape(-1, 50):  # in every batch, not only on average
        assert abs(window.mean() - 0.7) <= 1 / 50
    for source, size in ((0, 1000), (1, 10)):
        own = [(epoch, image) for s, epoch, image in taken if s == source]
        assert len(set(own)) == len(own)
        assert [epoch for epoch, _ in own] == [i // size for i in range(len(own))]
    by_size = Counter(ExampleOrder([30, 10])(n)[0] for n in range(400))
    assert by_size == {0: 300, 1: 100}


def test_ids_tell_sources_images_and_views_apart():
    sources = [SyntheticScenes(4, 32), SyntheticScenes(6, 32, seed=1)]
    ids = [id_of(example) for example in examples(sources, 50, 32, prompts=None)]
    assert len(set(ids)) == 50  # another view of the image in each epoch
    twice = examples(sources, 50, 32, prompts=None, num_views=2)
    seen = {}
    for example in twice:
        pixels = seen.setdefault(id_of(example), example["pixel_values"])
        assert torch.equal(pixels, example["pixel_values"])
    assert sorted(seen) == list(range(20))
    assert len({pixels.numpy().tobytes() for pixels in seen.values()}) == 20


def test_pixels_do_not_depend_on_the_prompts():
    # Without crops: an image whose crop has no object would be replaced by another one.
    settings = {"augmentation": Augmentation(scale=(0.6, 1.0), flip=True, contrast=0.3), "mask_size": 64}
    for plain, prompted in zip(examples(prompts=None, **settings), examples(prompts=PromptSampling(2), **settings)):
        assert id_of(plain) == id_of(prompted)
        assert torch.equal(plain["pixel_values"], prompted["pixel_values"])


def test_views_are_the_pixels_of_all_examples_by_id(tmp_path):
    sources = [SyntheticScenes(4, 32), Sa1bDataset(bad_tar(tmp_path / "a.tar", 3))]
    made = examples(sources, 60, 32, prompts=None, num_views=2, max_skipped=1.0)
    views = made.views()
    assert len(views) == made.num_ids == 2 * (4 + 8)
    for example in made:
        view = views[id_of(example)]
        assert torch.equal(view["pixel_values"], example["pixel_values"])
        assert torch.equal(view["reshaped_input_sizes"], example["reshaped_input_sizes"])
    assert views[4 + 3]["pixel_values"].sum() == 0  # broken
    with pytest.raises(ValueError, match="num_views"):
        len(examples().views())


@pytest.mark.parametrize(
    "settings", [{"seed": 1}, {"image_size": 32}, {"augmentation": None}, {"sources": SyntheticScenes(10, 64, seed=1)}]
)
def test_preprocessing_differs_where_the_pixels_do(settings):
    assert examples(num_views=1).preprocessing() == examples(num_views=1, prompts=None, num_examples=2).preprocessing()
    assert examples(num_views=1).preprocessing() != examples(num_views=1, **settings).preprocessing()


def bad_tar(path, num_good):
    """Write a tar of `num_good` usable images and five unusable ones: damaged, malformed or without usable masks."""
    members = {}
    for i in range(num_good):
        members |= {f"good_{i}.jpg": jpeg(seed=i), f"good_{i}.json": sa1b_json(annotation(mask=box_mask(width=30)))}
    wrong_size = annotation(mask=box_mask(image=(9, 9), x=1, y=1, width=5, height=5))
    outside = {"id": 2, "segmentation": [[900, 900, 905, 900, 905, 905]]}
    members |= {
        "broken.jpg": jpeg()[:300],
        "broken.json": sa1b_json(annotation()),
        "text.jpg": b"no image",
        "text.json": sa1b_json(annotation()),
        "json.jpg": jpeg(),
        "json.json": b"{",
        "wrong.jpg": jpeg(),
        "wrong.json": sa1b_json(wrong_size, outside, annotation(iscrowd=1)),
        "empty.jpg": jpeg(),
        "empty.json": sa1b_json(),
    }
    return write_tar(path, members)


BAD_IMAGES = {
    SkipReason.BROKEN_IMAGE: 1,
    SkipReason.UNKNOWN_FORMAT: 1,
    SkipReason.MALFORMED_JSON: 1,
    SkipReason.NO_INSTANCE: 2,
}
BAD_INSTANCES = {SkipReason.RLE_SIZE: 1, SkipReason.OUTSIDE: 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_counted_in_all_workers_and_replaced(tmp_path, num_workers):
    tar = Sa1bDataset(bad_tar(tmp_path / "a.tar", 15))
    made = examples(tar, 20, 32, max_skipped=1.0, augmentation=None)
    batches = list(DataLoader(made, batch_size=4, num_workers=num_workers))
    assert sum(len(batch["masks"]) for batch in batches) == 20
    report = made.skip_report()
    num_skipped = report.num_images
    assert made.num_read == 20 + num_skipped
    for reasons, expected in ((report.images, BAD_IMAGES), (report.instances, BAD_INSTANCES)):
        assert reasons.keys() == expected.keys()
        assert all(
            reasons[reason].count >= count for reason, count in expected.items()
        )  # replacements may be unusable too
    assert set(report.images[SkipReason.BROKEN_IMAGE].examples) == {"a.tar/broken"}
    ids = {int(i) for batch in batches for i in batch["example_id"]}
    assert ids == set(range(15))  # the usable ones, which also replace the others
    repeated = examples(tar, 20, 32, max_skipped=1.0, augmentation=None)
    assert all(same(repeated[4 * i + j], {k: v[j] for k, v in batches[i].items()}) for i in range(5) for j in range(4))


def test_without_prompts_images_without_masks_are_used(tmp_path):
    tar = Sa1bDataset(bad_tar(tmp_path / "a.tar", 15))
    made = examples(tar, 20, 32, max_skipped=1.0, prompts=None, augmentation=None)
    assert {15 + 3, 15 + 4} <= {id_of(example) for example in made}
    unreadable = {SkipReason.BROKEN_IMAGE, SkipReason.UNKNOWN_FORMAT, SkipReason.MALFORMED_JSON}
    assert set(made.skip_report().images) == unreadable


def test_more_bad_images_than_allowed_is_an_error_that_names_them(tmp_path):
    tar = Sa1bDataset(bad_tar(tmp_path / "a.tar", 25))
    made = examples(tar, 1000, 32, augmentation=None)
    with pytest.raises(ValueError, match="(?s)max_skipped=5%.*image damaged.*(broken|text)"):
        for n in range(1000):
            made[n]
    assert len(tar) <= made.num_read < 2 * len(tar)
    with pytest.raises(ValueError, match="max_skipped=5%"):
        list(DataLoader(examples(tar, 1000, 32, augmentation=None), batch_size=4, num_workers=2))


def test_a_small_set_is_judged_when_all_of_it_has_been_read():
    counter = SkipCounter(0.05, num_images=10)
    for image in range(10):
        report = SkipReport()
        if image < 2:
            report.add_image(SkipReason.BROKEN_IMAGE, "x")
        counter.check(lambda *_: "x")
        counter.add(report, 0, image)
    with pytest.raises(ValueError, match="2 of the 10 images"):
        counter.check(lambda *_: "x")


def test_images_that_the_index_left_out_count_too(tmp_path):
    members = {f"sa_{i}.jpg": jpeg(seed=i) for i in range(10)}
    members |= {f"sa_{i}.json": sa1b_json(annotation()) for i in range(9)}
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match="(?s)1 of 10 .*annotation JSON missing"):
        examples(tar)
    made = examples(tar, max_skipped=0.1)
    assert made.skip_report().images[SkipReason.MISSING_JSON].count == 1
    assert not made.skip_report(with_index=False)


def test_nothing_usable_at_all(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"sa_1.jpg": jpeg(), "sa_1.json": sa1b_json()})
    with pytest.raises(ValueError, match="(?s)No usable image in 100 tries.*no instance that can be used"):
        examples(Sa1bDataset(tar), max_skipped=1.0)[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask_size": 30}, "mask_size=30"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_views": 0}, "num_views=0"),
        ({"seed": -1}, "seed=-1"),
        ({"source_weights": [1, 2]}, "source_weights"),
        ({"source_weights": [0]}, "source_weights"),
        ({"max_skipped": 5}, "max_skipped=5"),
        ({"sources": []}, "at least one source"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingExamples(**{"sources": SyntheticScenes(3, 32), "num_examples": 3, "image_size": 64, **settings})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Augmentation(scale=(2, 1)),
        lambda: Augmentation(contrast=2),
        lambda: Augmentation(stretch=0.5),
        lambda: PromptSampling(0),
    ],
)
def test_augmentations_and_prompts_that_do_not_fit(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_what_a_spawned_worker_gets_counts_in_the_same_memory(tmp_path):
    made = examples(Sa1bDataset(bad_tar(tmp_path / "a.tar", 5)), 10, 32, max_skipped=1.0, augmentation=None)
    received = ForkingPickler.loads(ForkingPickler.dumps(made))  # as DataLoader passes it to workers
    assert all(same(received[n], made[n]) for n in range(10))
    assert made.num_read == received.num_read > 20


def test_chance_stops_nobody_before_all_has_been_read():
    def counter(num_bad: int, num_images: int, seed: int) -> SkipCounter:
        counter, bad = SkipCounter(0.05, num_images), SkipReport()
        bad.add_image(SkipReason.BROKEN_IMAGE, "x")
        for number in np.random.default_rng(seed).permutation(num_images):
            counter.add(bad if number < num_bad else SkipReport(), 0, int(number))
            counter.check(lambda source, image: str(image))
        return counter

    for seed in range(10):
        counter(40, 1000, seed)
        with pytest.raises(ValueError, match="of the 1000 images read so far cannot be used, more than max_skipped=5%"):
            counter(51, 1000, seed)
    with pytest.raises(ValueError, match="of the 1.. images read so far"):
        counter(500, 1000, 0)
