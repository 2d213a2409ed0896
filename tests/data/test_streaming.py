"""Test that streamed tars give each sample once over all ranks and workers, and that both ways to resume are exact."""

import gzip
import itertools
import os
import pickle
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from samlight_hf.data import Augmentation, Cutouts, PromptSampling, Sa1bDataset, SkipReason, StreamedExamples

from .files import annotation, box_mask, jpeg, sa1b_json, write_tar


SIZES = (7, 5, 9, 6, 8)


def samples(prefix, number) -> dict[str, bytes]:
    content = sa1b_json(annotation(mask=box_mask(width=30, height=20)))
    return {
        f"{prefix}_{i}.{end}": jpeg(seed=i) if end == "jpg" else content
        for i in range(number)
        for end in ("jpg", "json")
    }


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for tar, size in enumerate(SIZES):
        write_tar(folder / f"sa_{tar}.tar", samples(f"sa_{tar}", size))
    return folder


def streamed(tars, image_size=32, **settings) -> StreamedExamples:
    return StreamedExamples(tars, image_size, **{"num_epochs": 1, "block_size": 4, **settings})


def ids(examples) -> list[int]:
    return [int(example["example_id"]) for example in examples]


def batches(examples, num_workers) -> list[list[int]]:
    return [batch["example_id"].tolist() for batch in DataLoader(examples, 3, num_workers=num_workers)]


def test_an_example_is_what_the_indexed_dataset_gives(tars):
    prompts = PromptSampling(2, num_uniforms=5)
    examples = {bytes(e["pixel_values"].numpy()): e for e in streamed(tars, prompts=prompts)}
    assert len(examples) == max(SIZES)  # images of the same number have the same pixels
    image = torch.from_numpy(np.array(Sa1bDataset(tars)[0].image.resize((32, 24), Image.Resampling.BILINEAR)))
    expected = torch.zeros(3, 32, 32, dtype=torch.int16)
    expected[:, :24] = image.permute(2, 0, 1)
    # PIL and torch round differently, twice.
    (example,) = (e for e in examples.values() if (e["pixel_values"] - expected).abs().max() <= 2)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in example.items()} == {
        "pixel_values": (torch.uint8, (3, 32, 32)),
        "reshaped_input_sizes": (torch.int64, (2,)),
        "example_id": (torch.int64, ()),
        "masks": (torch.bool, (2, 8, 8)),
        "boxes": (torch.float32, (2, 4)),
        "points": (torch.float32, (2, 2)),
        "uniforms": (torch.float32, (2, 5)),
    }


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (2, 2), (3, 2), (1, 3), (4, 3)])
def test_ranks_and_workers_read_everything_once(tars, world_size, num_workers):
    """Also with more workers than tars."""
    everything = ids(streamed(tars))
    assert len(set(everything)) == sum(SIZES)
    parts = [
        [i for batch in batches(streamed(tars, rank=rank, world_size=world_size), num_workers) for i in batch]
        for rank in range(world_size)
    ]
    assert sorted(i for part in parts for i in part) == sorted(everything)
    assert all(parts)


def test_the_order_is_shuffled_and_depends_on_seed_and_epoch(tars):
    two_epochs = ids(streamed(tars, num_epochs=2, num_views=1))
    first, second = two_epochs[:35], two_epochs[35:]
    assert sorted(first) == sorted(second) and first != second
    assert ids(streamed(tars, num_views=1)) == first
    assert ids(streamed(tars, num_views=1, seed=1)) != first
    in_order = ids(streamed(tars, num_views=1, block_size=1))
    assert sum(a == b for a, b in zip(first, in_order)) < 20


def test_an_example_does_not_depend_on_who_reads_it(tars):
    settings = {"prompts": PromptSampling(2), "augmentation": Augmentation(scale=(0.7, 1.5), flip=True)}
    alone = {int(e["example_id"]): e for e in streamed(tars, **settings)}
    for example in streamed(tars, rank=1, world_size=2, block_size=3, **settings):
        other = alone[int(example["example_id"])]
        assert all(torch.equal(example[key], other[key]) for key in example)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_state_dict_goes_on_exactly(tars, world_size):
    settings = {"num_epochs": 2, "world_size": world_size, "rank": world_size - 1}
    expected = ids(streamed(tars, **settings))
    running = streamed(tars, **settings)
    states = [running.state_dict()] + [pickle.loads(pickle.dumps(running.state_dict())) for _ in running]
    for stop in range(0, len(expected) + 1, 3 if world_size == 1 else 2):
        resumed = pickle.loads(pickle.dumps(streamed(tars, **settings)))
        resumed.load_state_dict(states[stop])
        assert ids(resumed) == expected[stop:], stop
    assert ids(running) == expected  # a new iteration starts at the beginning


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_skipping_batches_goes_on_exactly(tars, num_workers):
    expected = batches(streamed(tars, num_epochs=3), num_workers)
    for stop in (1, 4, 13):  # 13 of about 12 an epoch
        resumed = streamed(tars, num_epochs=3)
        resumed.skip_batches(stop, 3)
        assert batches(resumed, num_workers) == expected[stop:], stop


def test_without_a_number_of_epochs_there_is_no_end(tars):
    endless = iter(streamed(tars, num_epochs=None))
    assert len({int(next(endless)["example_id"]) for _ in range(200)}) == 200  # another view in each epoch


@pytest.mark.parametrize("world_size", [2, 4])
def test_images_of_small_parts_are_not_read_more_often(tmp_path, world_size):
    """Three tars for two ranks are parts of two tars and of one; for four ranks, two of them share a tar."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(number, 6))
    read = Counter()
    for rank in range(world_size):
        endless = streamed(tmp_path, num_epochs=None, num_views=1, rank=rank, world_size=world_size)
        read.update(int(example["example_id"]) for example in itertools.islice(endless, 360 // world_size))
    assert len(read) == 18 and max(read.values()) - min(read.values()) <= 2  # 20 times each


def test_a_bad_sample_is_not_replaced_by_its_neighbour(tmp_path):
    """Otherwise the same example would come twice in a row."""
    members = samples("good", 60) | {f"bad_{i}.{end}": b"" for i in range(30) for end in ("jpg", "json")}
    settings = {"prompts": PromptSampling(2), "max_skipped": 1.0, "block_size": 90}
    examples = list(streamed(write_tar(tmp_path / "a.tar", members), **settings))
    numbers = ids(examples)
    assert len(numbers) == 90 and len(set(numbers)) == 60
    assert sum(first == second for first, second in itertools.pairwise(numbers)) < 5  # of 20 to 30 by the neighbours
    assert len({example["uniforms"].numpy().tobytes() for example in examples}) == 90


def test_a_bad_cutout_is_named_and_not_the_tar_of_the_image(tars, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "opaque.png")
    with pytest.raises(ValueError, match="(?s)max_skipped=5%.*without transparency .*opaque.png"):
        list(streamed(tars, num_epochs=9, block_size=200, cutouts=Cutouts(tmp_path, (0, 1))))


@pytest.fixture
def bad_tar(tmp_path):
    members = samples("good", 20)
    members |= {"no_json.jpg": jpeg(), "no_image.json": sa1b_json(), "bad_json.jpg": jpeg(), "bad_json.json": b"{"}
    members |= {"broken.jpg": jpeg()[:300], "broken.json": sa1b_json(annotation()), "LICENSE": b"text"}
    return write_tar(tmp_path / "bad.tar", members)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_counted_and_replaced(bad_tar, num_workers):
    made = streamed(bad_tar, max_skipped=1.0, block_size=12, num_views=1)
    example_ids = [i for batch in batches(made, num_workers) for i in batch]
    assert len(example_ids) == 24 and len(set(example_ids)) == 20
    report = made.skip_report()
    assert set(report.images) == {
        SkipReason.MISSING_JSON, SkipReason.JSON_ALONE, SkipReason.MALFORMED_JSON, SkipReason.BROKEN_IMAGE
    }  # fmt: skip
    assert made.num_read == 24 + report.num_images
    assert report.images[SkipReason.MALFORMED_JSON].examples == ["bad.tar"]


def test_too_many_bad_samples_is_an_error(bad_tar):
    with pytest.raises(ValueError, match="(?s)max_skipped=5%.*bad.tar"):
        list(streamed(bad_tar, num_epochs=None, block_size=24))
    with pytest.raises(ValueError, match="None of 1 samples"):
        list(streamed(bad_tar, block_size=1))


def test_damaged_tars_are_named_before_they_are_read(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples("sa", 3))
    content, cut = whole.read_bytes(), tmp_path / "cut.tar"
    with tarfile.open(whole) as tar:
        between_members = tar.getmembers()[2].offset
    for size in (3000, between_members, len(content) // 1024 * 512 + 100):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.tar: the tar is damaged or cut short"):
            streamed([whole, cut])
    zipped = gzip.compress(content)
    for text in (b"<html>not found</html>", b"", zipped[:100], zipped[:10] + bytes([255]) * 500):
        cut.write_bytes(text)
        with pytest.raises(ValueError, match=r"cut\.tar: no tar, or one that is damaged"):
            streamed([whole, cut])


def test_a_tar_cut_within_zeros_is_named(tmp_path):
    """At a block's boundary when it is read, as its end looks like that of a whole tar; elsewhere before that."""
    files = samples("sa", 3)
    files["sa_2.jpg"] = files["sa_2.jpg"][:-2] + bytes(4096)
    content, cut = write_tar(tmp_path / "whole.tar", files).read_bytes(), tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member = tar.getmember("sa_2.jpg")
    end = (member.offset_data + member.size) // 512 * 512 - 512
    assert not any(content[end - 1024 : end + 100])
    cut.write_bytes(content[: end + 100])
    with pytest.raises(ValueError, match=r"cut\.tar: the tar is damaged or cut short"):
        streamed(cut)
    cut.write_bytes(content[:end])
    stream = streamed(cut)
    with pytest.raises(ValueError, match="damaged or cut short"):
        list(stream)


@pytest.mark.parametrize("tool", ["python", "gnu", "one zero block"])
def test_tars_of_other_tools_are_whole(tmp_path, tool):
    path = write_tar(tmp_path / "a.tar", samples("sa", 3))
    if tool == "gnu":
        if not shutil.which("tar"):
            pytest.skip("needs the program tar")
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "files", filter="data")
        subprocess.run(
            ["tar", "-cf", path, "-C", tmp_path / "files", *sorted(os.listdir(tmp_path / "files"))], check=True
        )
    elif tool == "one zero block":
        with tarfile.open(path) as tar:
            end = tar.getmembers()[-1]
        path.write_bytes(path.read_bytes()[: end.offset_data + (end.size + 511) // 512 * 512 + 512])
    assert len(list(streamed(path))) == 3


def test_a_compressed_tar_is_read_and_its_end_is_checked(tmp_path):
    content = write_tar(tmp_path / "whole.tar", samples("sa", 3)).read_bytes()
    compressed = tmp_path / "compressed.tar"
    compressed.write_bytes(gzip.compress(content))
    assert len(list(streamed(compressed))) == 3
    compressed.write_bytes(gzip.compress(content)[:-2000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        list(streamed(compressed))


def test_what_cannot_be_opened(tmp_path):
    for paths, message in ((tmp_path / "no.tar", "no such file"), ([], "No tar"), (tmp_path, "no tar file")):
        with pytest.raises(ValueError, match=message):
            streamed(paths)
    empty = write_tar(tmp_path / "empty.tar", {})
    assert list(streamed(empty)) == []
    with pytest.raises(ValueError, match="fewer samples than workers"):
        list(streamed(empty, num_epochs=None))


@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"block_size": 0}, {"num_epochs": 0}, {"seed": -1}, {"mask_size": 5}]
)
def test_settings_that_do_not_fit(tars, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        streamed(tars, world_size=2, **settings) if "rank" in settings else streamed(tars, **settings)
