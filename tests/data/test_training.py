"""Test that training examples are a pure function of their index, and that masks, boxes and points match the pixels."""

import pickle
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import SamImageProcessor

from samlight_hf.data import (
    Augmentation,
    PromptSampling,
    Sa1bDataset,
    SkipReason,
    SkipReport,
    SyntheticScenes,
    TrainingExamples,
)
from samlight_hf.data import augmentation as augmentation_module
from samlight_hf.data.augmentation import Colours, View, resize, resize_box, to_cells
from samlight_hf.data.lazy import LazySample, decode_columns, planes
from samlight_hf.data.order import ExampleOrder
from samlight_hf.data.skip_counter import SkipCounter

from .files import annotation, box_mask, coloured_objects, coloured_tar, jpeg, png, rle, sa1b_json, write_tar


S, M = 128, 32
VARIED = Augmentation(scale=(0.5, 2.0), flip=True, brightness=0.3, contrast=0.3, saturation=0.3)


def examples(sources=None, num_examples=40, image_size=64, **settings) -> TrainingExamples:
    settings = {"prompts": PromptSampling(4), "augmentation": VARIED, **settings}
    return TrainingExamples(sources or SyntheticScenes(10, 64), num_examples, image_size, **settings)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def id_of(example) -> int:
    return int(example["example_id"])


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
    again = examples(num_examples=400)
    backwards = [again[n] for n in reversed(range(40))][::-1]
    copy = pickle.loads(pickle.dumps(again))
    # Workers make whole batches, so that batches of 3 from 2 workers come from both.
    loaded = [
        {key: value[i] for key, value in batch.items()}
        for batch in DataLoader(examples(), batch_size=3, num_workers=2)
        for i in range(len(batch["points"]))
    ]
    for n, example in enumerate(forwards):
        assert same(example, backwards[n]) and same(example, copy[n]) and same(example, loaded[n]), n
    assert same(again[-1], again[399])
    with pytest.raises(IndexError):
        again[400]
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


def test_prompts_differ_where_an_image_comes_again():
    made = examples(SyntheticScenes(1, 64), 2, num_views=1)
    assert id_of(made[0]) == id_of(made[1])
    assert not torch.equal(made[0]["boxes"], made[1]["boxes"])


def test_plain_examples_have_the_size_and_place_that_sam_gives(tmp_path):
    processor = SamImageProcessor(size={"longest_edge": S}, pad_size={"height": S, "width": S}, do_normalize=False)
    sizes = [(97, 61), (61, 97), (300, 200), (128, 128), (201, 3)]
    made = examples(Sa1bDataset(coloured_tar(tmp_path / "a.tar", sizes)), 5, S, augmentation=None, prompts=None)
    for example in made:
        width, height = sizes[id_of(example) % 5]
        image = Image.fromarray(coloured_objects(id_of(example) % 5, width, height)[0])
        expected = processor(image, return_tensors="pt", do_rescale=False)["pixel_values"][0].float()
        difference = (example["pixel_values"].float() - expected).abs()
        assert difference.mean() < 0.5 and difference.max() <= 6, (width, height)
        shown = tuple((example["pixel_values"].sum(0) > 0).nonzero().max(0).values + 1)
        assert shown == tuple((expected.sum(0) > 0).nonzero().max(0).values + 1)


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation(scale=(0.4, 2.5), flip=True), Augmentation(stretch=1.6, scale=(0.6, 1.6))],
    ids=str,
)
def test_masks_boxes_and_points_lie_where_the_object_is_seen(tmp_path, augmentation):
    """Each object has its own colour channel, so the pixels are its share of each cell."""
    sizes = [(97, 61), (150, 211), (333, 222), (64, 64)]
    tar = Sa1bDataset(coloured_tar(tmp_path / "a.tar", sizes))
    prompts = PromptSampling(3, box_noise=0.0, min_mask_cells=6)
    cell, ious = S // M, []
    for example in examples(tar, 40, S, mask_size=M, augmentation=augmentation, prompts=prompts):
        covered = example["pixel_values"].numpy() / 255
        for mask, box, point in zip(example["masks"].numpy(), example["boxes"].numpy(), example["points"].numpy()):
            column, row = (point / cell).astype(int)
            assert mask[row, column]
            own = covered[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].mean((1, 2)).argmax()
            expected = covered[own].reshape(M, cell, M, cell).mean((1, 3)) >= 0.5
            ious.append((mask & expected).sum() / (mask | expected).sum())
            columns, rows = np.flatnonzero((covered[own] > 0.5).any(0)), np.flatnonzero((covered[own] > 0.5).any(1))
            tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(box - tight).max() <= 2.5, (box, tight)
    assert len(ious) == 120 and np.mean(ious) > 0.96 and min(ious) > 0.75


def test_a_stretched_image_fits_the_frame_in_other_proportions():
    augmentation, generator = Augmentation(stretch=2.0), np.random.default_rng(0)
    sizes = [augmentation.view(generator, 200, 100, S).size for _ in range(200)]
    ratios = np.array([width / height / 2 for width, height in sizes])
    assert all(max(size) == S for size in sizes)
    assert 0.5 <= ratios.min() < 0.55 and 1.85 < ratios.max() <= 2.0
    assert 0.4 < np.mean(ratios > 1) < 0.6


def test_flipping_twice_and_cropping_nothing_is_nothing():
    _, masks = coloured_objects(3, 90, 70)
    encoded = rle(masks[0])
    plain = View(90, 70, (0, 0, 90, 70), (S, 100), False, S)
    flipped = View(90, 70, (0, 0, 90, 70), (S, 100), True, S)
    mask, box, share = plain.mask(encoded, M)
    other, other_box, _ = flipped.mask(rle(masks[0][:, ::-1]), M)
    np.testing.assert_array_equal(mask, other)
    np.testing.assert_allclose(box, other_box)
    assert share == 1.0


def test_a_mask_that_the_crop_cuts():
    mask = box_mask(x=10, y=10, width=40, height=20, image=(80, 100))
    view = View(100, 80, (30, 0, 80, 40), (100, 80), False, 128)
    cells, box, share = view.mask(rle(mask), 128)
    np.testing.assert_array_equal(box, [0, 20, 40, 60])
    assert share == 0.5
    np.testing.assert_array_equal(cells, box_mask(x=0, y=20, width=40, height=40, image=(128, 128)))
    assert View(100, 80, (60, 0, 80, 40), (100, 80), False, 128).mask(rle(mask), 128) is None
    hole = mask & ~box_mask(x=12, y=10, width=20, height=20, image=(80, 100))
    assert (
        View(100, 80, (14, 0, 30, 40), (100, 80), False, 128).mask(rle(hole), 128) is None
    )  # inside the box, outside the mask
    two = box_mask(x=10, y=10, width=10, height=20, image=(80, 100)) | box_mask(
        x=40, y=25, width=10, height=5, image=(80, 100)
    )
    cells, box, share = view.mask(rle(two), 128)  # the second object only, which starts after the edge of the crop
    np.testing.assert_array_equal(box, [20, 50, 40, 60])
    np.testing.assert_array_equal(cells, box_mask(x=20, y=50, width=20, height=10, image=(128, 128)))
    assert share == 0.2


@pytest.mark.parametrize("seed", range(8))
def test_cells_are_half_full(seed):
    generator = np.random.default_rng(seed)
    pixels = (generator.random((5, 7)) < 0.5).astype(np.uint8)
    left, top, cell = *generator.integers(0, 20, 2), 4
    grid = to_cells(pixels, left, top, cell, cell, 16)
    whole = np.zeros((64, 64))
    whole[top : top + 5, left : left + 7] = pixels
    np.testing.assert_array_equal(grid, whole.reshape(16, 4, 16, 4).mean((1, 3)) >= 0.5)


def test_columns_of_a_mask_are_those_of_pycocotools():
    mask = np.random.default_rng(0).random((23, 31)) < 0.4
    for start, stop in ((0, 31), (5, 6), (7, 30), (30, 31)):
        np.testing.assert_array_equal(decode_columns(rle(mask), start, stop), mask.T[start:stop])


def test_box_noise_is_as_large_as_said_and_keeps_every_box_whole():
    exact = np.tile([[100.0, 100.0, 300.0, 200.0]], (4000, 1))
    sampling = PromptSampling(4000)
    noisy = sampling.boxes(exact, (1024, 1024), 1024, np.random.default_rng(0))
    error = noisy - exact
    assert np.abs(error).max() <= 20 + 1e-3 and np.isclose(np.abs(error).max(), 20, atol=1e-3)
    np.testing.assert_allclose(error[:, 1].std(), 10, rtol=0.1)  # 10 % of the height, rarely limited
    assert 14 < error[:, 0].std() < 17  # 10 % of the width is 20: limited at one standard deviation
    tiny = np.tile([[0.0, 0.0, 1.0, 1.0]], (500, 1))
    boxes = PromptSampling(500, box_noise=5.0).boxes(tiny, (1024, 700), 1024, np.random.default_rng(1))
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0


def test_points_are_deepest_or_anywhere_inside():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 2:9, 3:14] = True
    deepest = PromptSampling(1, deepest_share=1.0).points(mask, (64, 64), 64, np.random.default_rng(0))
    assert deepest[0, 1] == (2 + 3) * 4 + 1.5
    many = np.repeat(mask, 2000, 0)
    points = PromptSampling(2000, deepest_share=0.0).points(many, (64, 64), 64, np.random.default_rng(0))
    columns, rows = points.T.astype(int)
    assert mask[0, rows // 4, columns // 4].all()
    assert np.array_equal(np.unique(columns), np.arange(12, 56)) and np.array_equal(np.unique(rows), np.arange(8, 36))


def test_targets_repeat_only_where_there_are_too_few(tmp_path):
    tar = Sa1bDataset(coloured_tar(tmp_path / "a.tar", [(97, 61)]))
    for num_prompts, expected in ((2, {1: 2}), (3, {1: 3}), (7, {3: 1, 2: 2})):
        example = examples(tar, 1, S, augmentation=None, prompts=PromptSampling(num_prompts))[0]
        times = Counter(mask.numpy().tobytes() for mask in example["masks"])
        assert Counter(times.values()) == expected
        assert len(np.unique(example["boxes"], axis=0)) == num_prompts


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


BAD_IMAGES = {SkipReason.BROKEN_IMAGE: 2, SkipReason.MALFORMED_JSON: 1, SkipReason.NO_INSTANCE: 2}
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
    assert set(report.images[SkipReason.BROKEN_IMAGE].examples) <= {"broken", "text"}
    ids = {int(i) for batch in batches for i in batch["example_id"]}
    assert ids == set(range(15))  # the usable ones, which also replace the others
    again = examples(tar, 20, 32, max_skipped=1.0, augmentation=None)
    assert all(same(again[4 * i + j], {k: v[j] for k, v in batches[i].items()}) for i in range(5) for j in range(4))


def test_without_prompts_images_without_masks_are_used(tmp_path):
    tar = Sa1bDataset(bad_tar(tmp_path / "a.tar", 15))
    made = examples(tar, 20, 32, max_skipped=1.0, prompts=None, augmentation=None)
    assert {15 + 3, 15 + 4} <= {id_of(example) for example in made}
    assert set(made.skip_report().images) == {SkipReason.BROKEN_IMAGE, SkipReason.MALFORMED_JSON}


def test_more_bad_images_than_allowed_is_an_error_that_names_them(tmp_path):
    tar = Sa1bDataset(bad_tar(tmp_path / "a.tar", 25))
    made = examples(tar, 1000, 32, augmentation=None)
    with pytest.raises(ValueError, match="(?s)max_skipped=5%.*image damaged.*(broken|text)"):
        for n in range(1000):
            made[n]
    assert 100 <= made.num_read < 130
    with pytest.raises(ValueError, match="max_skipped=5%"):
        list(DataLoader(examples(tar, 1000, 32, augmentation=None), batch_size=4, num_workers=2))


def test_images_that_the_index_left_out_count_too(tmp_path):
    members = {f"sa_{i}.jpg": jpeg(seed=i) for i in range(10)}
    members |= {f"sa_{i}.json": sa1b_json(annotation()) for i in range(9)}
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match="(?s)1 of 10 .*annotation JSON missing"):
        examples(tar)
    report = examples(tar, max_skipped=0.1).skip_report()
    assert report.images[SkipReason.MISSING_JSON].count == 1


def test_nothing_usable_at_all(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"sa_1.jpg": jpeg(), "sa_1.json": sa1b_json()})
    with pytest.raises(ValueError, match="(?s)No usable image in 100 tries.*no instance that can be used"):
        examples(Sa1bDataset(tar), max_skipped=1.0)[0]


def test_objects_too_small_to_see_are_left_out_and_not_held_against_the_data(tmp_path):
    dot = annotation(1, box_mask(width=2, height=2))
    members = {"sa_1.jpg": jpeg(), "sa_1.json": sa1b_json(dot, annotation(2, box_mask(x=18, width=12)))}
    members |= {f"dot_{i}.jpg": jpeg(seed=i) for i in range(3)} | {f"dot_{i}.json": sa1b_json(dot) for i in range(3)}
    made = examples(Sa1bDataset(write_tar(tmp_path / "a.tar", members)), 200, 32, mask_size=16, augmentation=None)
    assert all(example["masks"].flatten(1).sum(1).min() > 4 for example in made)
    assert set(made.skip_report().images) == {SkipReason.NOTHING_IN_VIEW}


@pytest.mark.parametrize("size", [(2250, 1500), (2251, 1499), (1023, 700)])
def test_large_images_decoded_at_a_fraction_look_like_the_whole_ones(tmp_path, size):
    """Decoding a JPEG at a reduced size does not shift the crop."""
    photograph = Image.open("examples/images/coffee.jpg").convert("RGB").resize(size)
    file = tmp_path / "a.jpg"
    photograph.save(file, quality=95)
    content = sa1b_json(annotation(mask=box_mask(image=size[::-1])), width=size[0], height=size[1])
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": file.read_bytes(), "a.json": content}))
    whole = tar[0].image
    for crop in ((0, 0, *size), (101, 37, size[0] - 3, size[1] - 11)):
        shown = (S, round(S * (crop[3] - crop[1]) / (crop[2] - crop[0])))
        view = View(*size, crop, shown, False, S)
        lazy = tar.open(0)
        image = view.pixels(lazy).transpose(1, 2, 0)
        assert lazy.image.size[0] < size[0]
        expected = whole.resize(shown, Image.Resampling.BILINEAR, crop)
        difference = np.abs(np.asarray(image, np.float32) - np.asarray(expected, np.float32))
        shifted = np.abs(np.asarray(expected, np.float32)[:, 1:] - np.asarray(expected, np.float32)[:, :-1])
        assert difference.mean() < 0.25 * shifted.mean()  # far less than for a shift by one pixel


@pytest.mark.parametrize("size", [(96, 72), (40, 31), (200, 40), (64, 48)])
def test_whole_pixels_are_resized_as_fractions_of_them_are(size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 64), dtype=np.uint8)
    expected = resize_box(pixels, size, (0, 0, 64, 48))
    found = resize(pixels[:, :, ::-1][:, :, ::-1], size)
    assert found.shape == expected.shape == (3, size[1], size[0])
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_which_way_of_resizing_runs(tmp_path, monkeypatch):
    ran = []
    for name in ("resize", "resize_box"):
        function = getattr(augmentation_module, name)
        monkeypatch.setattr(augmentation_module, name, lambda *a, n=name, f=function: ran.append(n) or f(*a))
    for side, expected in ((100, "resize"), (300, "resize_box")):  # the larger JPEG is decoded at a half
        content = sa1b_json(width=side, height=side)
        tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(side, side), "a.json": content}))
        examples(tar, 1, S, augmentation=None, prompts=None)[0]
        assert ran.pop() == expected and not ran


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_colours_are_the_same_whether_changed_before_or_after_resizing(tmp_path, scale):
    photograph = Image.open("examples/images/coffee.jpg").convert("RGB").resize((150, 100))
    sample = LazySample("a", photograph, [])
    view = View(150, 100, (20, 10, 120, 90), (round(100 * scale), round(80 * scale)), True, 256)
    colours = Colours(0.7, 0.1, 20.0)  # nothing is clipped at black or white
    expected = colours(resize_box(planes(photograph)[:, 10:90, 20:120], view.size, (0, 0, 100, 80)))[:, :, ::-1]
    assert np.abs(view.pixels(sample, colours).astype(int) - expected).max() <= 2


def test_large_objects_come_more_often_with_area_power(tmp_path):
    masks = [box_mask(x=1, width=2, height=2), box_mask(x=10, width=4, height=4), box_mask(x=20, width=16, height=16)]
    content = sa1b_json(*(annotation(i, mask, **({"area": 16} if i == 1 else {})) for i, mask in enumerate(masks)))
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), "a.json": content}))
    for power, expected in ((0.0, [1 / 3] * 3), (0.5, [2 / 22, 4 / 22, 16 / 22])):
        prompts = PromptSampling(1, min_mask_cells=1, area_power=power)
        made = examples(tar, 600, 64, mask_size=64, augmentation=None, prompts=prompts)
        areas = [int(example["masks"].sum()) for example in made]
        shares = [np.mean([area < 30 for area in areas]), np.mean([30 <= area < 100 for area in areas])]
        np.testing.assert_allclose(shares, expected[:2], atol=0.06)


def test_colours_vary_and_by_default_do_not(tmp_path):
    grey = write_tar(
        tmp_path / "a.tar",
        {"a.png": png(np.full((32, 32, 3), 100, np.uint8)), "a.json": sa1b_json(width=32, height=32)},
    )
    plain = examples(Sa1bDataset(grey), 20, 32, augmentation=None, prompts=None)
    assert all((example["pixel_values"] == 100).all() for example in plain)
    bright = examples(Sa1bDataset(grey), 200, 32, augmentation=Augmentation(brightness=0.3), prompts=None)
    levels = [int(example["pixel_values"][0, 0, 0]) for example in bright]
    assert 70 <= min(levels) < 75 and 125 < max(levels) <= 130
    assert all((e["pixel_values"] == e["pixel_values"][0, 0, 0]).all() for e in bright)  # grey stays grey


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
