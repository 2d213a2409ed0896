"""Test that readers of SA-1B tars return every usable image, and count all others."""

import io
import multiprocessing
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from samlight_hf.data import PromptSampling, Sa1bDataset, SampleError, SkipReason, SkipReport, TrainingExamples

from .files import HEIGHT, WIDTH, annotation, box_mask, counts, jpeg, sa1b_json, write_tar


def pair(name, *annotations, seed=0) -> dict[str, bytes]:
    return {f"{name}.jpg": jpeg(seed=seed), f"{name}.json": sa1b_json(*(annotations or (annotation(),)))}


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", {k: v for i in range(6) for k, v in pair(f"sa_{i}", seed=i).items()})


def read(dataset):
    report = SkipReport()
    return list(dataset.samples(report)), report


def test_samples_are_what_was_written(tmp_path):
    masks = [box_mask(), box_mask(x=20, width=4)]
    annotations = [annotation(i, mask, point_coords=[[6, 5]]) for i, mask in enumerate(masks)]
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", pair("sa_7", *annotations)))
    assert len(dataset) == dataset.num_images == 1
    sample = dataset[0]
    assert sample.id == "sa_7" and (sample.width, sample.height) == (WIDTH, HEIGHT)
    assert sample.image.mode == "RGB" and sample.image.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(sample.masks(), np.stack(masks))
    assert [instance.point_xy for instance in sample.instances] == [(6, 5)] * 2
    np.testing.assert_array_equal(dataset[-1].image, sample.image)
    with pytest.raises(IndexError):
        dataset[1]


def test_members_may_lie_in_any_order_and_in_folders(tmp_path):
    members = list(pair("x/sa_1").items()) + list(pair("sa_2").items()) + [("LICENSE", b"text"), ("._sa_1.jpg", b"mac")]
    order = [members[i] for i in (3, 4, 0, 5, 2, 1)]
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", order))
    samples, report = read(dataset)
    assert [sample.id for sample in samples] == ["sa_2", "x/sa_1"]
    assert not report and not dataset.index_report


def test_folders_patterns_and_lists_name_the_same_tars(tmp_path):
    paths = [write_tar(tmp_path / f"{name}.tar", pair(f"sa_{name}")) for name in "bac"]
    for paths_or_glob in (
        tmp_path,
        str(tmp_path / "*.tar"),
        paths,
        [tmp_path, paths[0]],
        [str(tmp_path / "[ab].tar"), paths[2]],
    ):
        assert sorted(sample.id for sample in read(Sa1bDataset(paths_or_glob))[0]) == ["sa_a", "sa_b", "sa_c"]
    assert [sample.id for sample in read(Sa1bDataset(tmp_path))[0]] == ["sa_a", "sa_b", "sa_c"]


def test_limit_takes_the_first_and_counts_nothing_behind_them(tmp_path):
    members = {"sa_0.jpg": jpeg(), **pair("sa_1"), **pair("sa_2"), "sa_3.jpg": jpeg(), **pair("sa_4")}
    dataset = Sa1bDataset([write_tar(tmp_path / "a.tar", members)], limit=2)
    assert [sample.id for sample in read(dataset)[0]] == ["sa_1", "sa_2"]
    assert dataset.num_images == 3


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_limit_that_is_none(tar, limit):
    with pytest.raises(ValueError, match=f"limit={limit}"):
        Sa1bDataset(tar, limit=limit)


def test_a_pickled_dataset_reads_the_same(tar):
    dataset = Sa1bDataset(tar)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [sample.id for sample in read(copy)[0]] == [f"sa_{i}" for i in range(6)]


def checksum(dataset, index) -> int:
    return int(np.asarray(dataset[index].image, dtype=np.int64).sum())


def test_threads_and_processes_read_the_same(tar):
    dataset = Sa1bDataset(tar)
    indices = [i % 6 for i in range(48)]
    expected = [checksum(dataset, i) for i in indices]
    assert len(set(expected)) == 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(checksum, [dataset] * 48, indices)) == expected
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(checksum, [dataset] * 48, indices)) == expected


def test_every_bad_image_is_counted_by_reason(tmp_path):
    rotten = jpeg()
    wrong = np.zeros((HEIGHT + 1, WIDTH), bool)
    wrong[0, 0] = True
    members = {
        **pair("good", annotation(1), annotation(1), annotation(2, wrong), annotation(3, iscrowd=1)),
        **pair("truncated", annotation(1), annotation(2)),
        **pair("no-jpeg"),
        **pair("empty"),
        **pair("bad-json"),
        **pair("list-json"),
        **pair("no-annotations"),
        "alone.jpg": jpeg(),
        "lost.json": sa1b_json(),
        "other-size.jpg": jpeg(),
        "other-size.json": sa1b_json(annotation(), width=WIDTH + 1),
        "truncated.jpg": rotten[: len(rotten) // 2],
        "no-jpeg.jpg": b"<html>not found</html>",
        "empty.jpg": b"",
        "bad-json.json": sa1b_json(annotation())[:-5],
        "list-json.json": b"[]",
        "no-annotations.json": b'{"annotations": null}',
    }
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    assert counts(dataset.index_report) == (
        {SkipReason.MISSING_JSON: 1, SkipReason.JSON_ALONE: 1},
        {},
    )
    assert dataset.index_report.images[SkipReason.MISSING_JSON].examples == ["a.tar/alone"]
    samples, report = read(dataset)
    assert [sample.id for sample in samples] == ["good"]
    assert [(instance.id, instance.is_crowd) for instance in samples[0].instances] == [(1, False), (3, True)]
    assert counts(report) == (
        {
            SkipReason.BROKEN_IMAGE: 1,
            SkipReason.UNKNOWN_FORMAT: 2,
            SkipReason.MALFORMED_JSON: 3,
            SkipReason.IMAGE_SIZE: 1,
        },
        {SkipReason.DUPLICATE_ANNOTATION: 1, SkipReason.RLE_SIZE: 1, SkipReason.IMAGE_SKIPPED: 5},
    )
    total = report.merge(dataset.index_report)
    assert len(samples) + total.num_images == dataset.num_images
    assert total.too_many(dataset.num_images) and "WARNING" in total.summary(dataset.num_images)


def test_bad_fields_beside_a_good_mask_cost_no_instance(tmp_path):
    """Both `load` and training examples keep instances whose box, point, category or id cannot be used."""
    bad = {**annotation(), "bbox": [], "category_id": "cat", "point_coords": [[999, 1]]}
    del bad["id"]
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", pair("sa_1", bad, annotation(5))))
    (sample,), report = read(dataset)
    assert [instance.id for instance in sample.instances] == ["number 0", 5]
    for instance in sample.instances:
        np.testing.assert_array_equal(instance.mask(), box_mask())
    expected = dict.fromkeys(
        (SkipReason.BAD_BOX, SkipReason.BAD_CATEGORY, SkipReason.BAD_POINT, SkipReason.MISSING_ID), 1
    )
    assert {reason: skipped.count for reason, skipped in report.parts.items()} == expected
    assert counts(report) == ({}, {})
    made = TrainingExamples(dataset, 1, 40, mask_size=40, prompts=PromptSampling(2))
    for mask in made[0]["masks"]:
        np.testing.assert_array_equal(mask, np.pad(box_mask(), ((0, 10), (0, 0))))
    assert {reason: skipped.count for reason, skipped in made.skip_report().parts.items()} == expected


def test_images_of_another_format_are_no_missing_ones(tmp_path):
    bmp = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(bmp, "BMP")
    members = {"a.bmp": bmp.getvalue(), "a.json": sa1b_json(annotation()), **pair("b", annotation())}
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    assert dataset.index_report.images[SkipReason.JSON_ALONE].examples == ["a.tar/a"]
    assert len(dataset) == 1 and dataset.where(0) == "a.tar/b"
    del members["b.jpg"]
    with pytest.raises(ValueError, match=r"2 x annotation JSON without a \.jpg, \.jpeg, \.png or \.webp file of its"):
        Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    renamed = write_tar(tmp_path / "b.tar", {"a.jpg": bmp.getvalue(), "a.json": sa1b_json(annotation())})
    assert Sa1bDataset(renamed)[0].image.size == (WIDTH, HEIGHT)  # the content counts, not the name


def test_a_bad_image_raises_when_it_is_asked_for(tmp_path):
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", {**pair("bad"), "bad.jpg": jpeg()[:500]}))
    with pytest.raises(SampleError, match="bad: image damaged or truncated"):
        dataset[0]
    assert dataset.load(0)[0] is None


def test_parts_read_by_several_processes_add_up_to_the_whole(tmp_path):
    members = {k: v for i in range(5) for k, v in pair(f"sa_{i}").items()}
    members["sa_1.jpg"] = members["sa_4.jpg"] = b"rotten"
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", members))
    parts = [SkipReport(), SkipReport()]
    ids = [sample.id for rank in (0, 1) for sample in dataset.samples(parts[rank], range(rank, 5, 2))]
    assert ids == ["sa_0", "sa_2", "sa_3"]
    assert parts[0].merge(parts[1]) == read(dataset)[1]


def test_duplicates_are_counted_once_each_within_a_tar_and_between_tars(tmp_path):
    first, second = pair("sa_1", annotation(1)), pair("sa_1", annotation(2))
    a = write_tar(tmp_path / "a.tar", [*first.items(), *second.items()])
    b = write_tar(tmp_path / "b.tar", {**second, **pair("sa_2")})
    dataset = Sa1bDataset([a, b])
    samples, report = read(dataset)
    assert [(sample.id, sample.instances[0].id) for sample in samples] == [("sa_1", 1), ("sa_2", 1)]
    assert counts(dataset.index_report) == ({SkipReason.DUPLICATE_IMAGE: 2}, {}) and not report


def test_an_image_turned_by_exif_is_taken_in_the_frame_of_its_annotations(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    turned = jpeg(width=HEIGHT, height=WIDTH, exif=exif)
    members = {"stored.jpg": turned, "upright.jpg": turned}
    members["upright.json"] = sa1b_json(annotation())
    members["stored.json"] = sa1b_json(annotation(mask=box_mask(image=(WIDTH, HEIGHT))), width=HEIGHT, height=WIDTH)
    samples = {sample.id: sample for sample in read(Sa1bDataset(write_tar(tmp_path / "a.tar", members)))[0]}
    assert samples["stored"].image.size == (HEIGHT, WIDTH)
    assert samples["upright"].image.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(
        samples["upright"].image, samples["stored"].image.transpose(Image.Transpose.ROTATE_270)
    )


def test_an_image_without_masks_is_a_sample(tmp_path):
    dataset = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.png": jpeg(), "a.json": sa1b_json()}))
    assert dataset[0].instances == ()


def refused(paths, *words):
    with pytest.raises(ValueError) as raised:
        Sa1bDataset(paths)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, tar):
    refused(tmp_path / "nothing.tar", "nothing.tar", "no such file")
    refused([], "No tar file")
    refused([tar, tmp_path / "*.tgz"], "tgz")
    refused(write_tar(tmp_path / "empty.tar", {}), "empty.tar", "there are none")
    refused(write_tar(tmp_path / "alone.tar", {"a.jpg": jpeg()}), "1 x annotation JSON missing")
    (tmp_path / "text.tar").write_text("no tar")
    refused(tmp_path / "text.tar", "text.tar", "unpack")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as packed:
        packed.add(tar, "a.jpg")
    refused(tmp_path / "packed.tar", "packed.tar", "compressed")
    (tmp_path / "zero.tar").write_bytes(b"")
    refused(tmp_path / "zero.tar", "zero.tar")


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members", "header overwritten"])
def test_a_damaged_tar_is_refused_and_not_read_in_part(tmp_path, tar, cut):
    with tarfile.open(tar) as opened:
        middle = opened.getmembers()[6]
    content = bytearray(tar.read_bytes())
    if cut == "header overwritten":
        content[middle.offset : middle.offset + 512] = b"x" * 512
    else:
        end = {"in a member": middle.offset_data + 100, "in a header": middle.offset + 100}.get(cut, middle.offset)
        content = content[:end]
    (tmp_path / "cut.tar").write_bytes(content)
    refused(tmp_path / "cut.tar", "cut.tar", "damaged or cut short")
