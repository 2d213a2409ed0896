"""Test that readers of COCO's format return every usable image, and count all others."""

import json
import pickle

import numpy as np
import pytest

from samlight_hf.data import CocoDataset, Sa1bDataset, SkipReason, SkipReport, load_dataset

from .files import HEIGHT, WIDTH, annotation, box_mask, counts, jpeg, sa1b_json, uncompressed_rle, write_coco, write_tar


def image(identifier, **fields) -> dict:
    return {"id": identifier, "file_name": f"{identifier}.jpg", "width": WIDTH, "height": HEIGHT, **fields}


def read(dataset):
    report = SkipReport()
    return list(dataset.samples(report)), report


@pytest.fixture
def coco(tmp_path):
    square = [[5, 4, 15, 4, 15, 12, 5, 12]]
    annotations = [
        {"id": 10, "image_id": 2, "segmentation": square, "category_id": 1, "bbox": [5, 4, 10, 8], "iscrowd": 0},
        annotation(11, image_id=1, category_id=2),
        {"id": 12, "image_id": 2, "segmentation": uncompressed_rle(box_mask()), "iscrowd": 1, "category_id": 3},
    ]
    return write_coco(
        tmp_path, [image(2), image(1), image(3)], annotations, {f"{i}.jpg": jpeg(seed=i) for i in (1, 2, 3)}
    )


def test_samples_are_what_was_written(coco):
    samples, report = read(CocoDataset(*coco))
    assert [sample.id for sample in samples] == ["2", "1", "3"] and not report
    assert [[instance.id for instance in sample.instances] for sample in samples] == [[10, 12], [11], []]
    assert [instance.is_crowd for instance in samples[0].instances] == [False, True]
    assert [instance.category_id for instance in samples[0].instances] == [1, 3]
    for sample in samples[:2]:
        for mask in sample.masks():
            np.testing.assert_array_equal(mask, box_mask())


def test_limit_takes_the_first_images_without_orphans(coco):
    dataset = CocoDataset(*coco, limit=1)
    assert [sample.id for sample in read(dataset)[0]] == ["2"]
    assert not dataset.index_report and dataset.num_images == 1


def test_a_pickled_dataset_reads_the_same(coco):
    copy = pickle.loads(pickle.dumps(CocoDataset(*coco)))
    assert [sample.id for sample in read(copy)[0]] == ["2", "1", "3"]


@pytest.mark.parametrize("place", ["val2017/000000000139.jpg", "000000000139.jpg", "images/val2017/000000000139.jpg"])
def test_lvis_names_its_images_by_url(tmp_path, place):
    entry = {"id": 139, "coco_url": "http://images.cocodataset.org/images/val2017/000000000139.jpg"}
    json_file, folder = write_coco(tmp_path, [entry], [annotation(1, image_id=139)], {place: jpeg()})
    sample = CocoDataset(json_file, folder)[0]
    assert sample.id == "139" and len(sample.instances) == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("pics\\a.jpg", "pics/a.jpg"),
        ("pics\\a.jpg", "a.jpg"),
        ("C:\\data\\pics\\a.jpg", "pics/a.jpg"),
        ("C:\\data\\pics\\a.jpg", "data/pics/a.jpg"),
        ("C:\\data\\pics\\a.jpg", "a.jpg"),
        ("C:\\data/pics\\a.jpg", "a.jpg"),
        ("\\\\server\\share\\pics\\a.jpg", "pics/a.jpg"),
        ("..\\pics\\a.jpg", "pics/a.jpg"),
        ("/home/me/pics/a.jpg", "pics/a.jpg"),
        ("pics\\a.jpg", "pics\\a.jpg"),  # on Linux, a file name with a backslash
    ],
)
def test_names_as_windows_writes_them_and_absolute_ones(tmp_path, name, place):
    json_file, folder = write_coco(tmp_path, [image(1, file_name=name)], [annotation(1, image_id=1)], {place: jpeg()})
    dataset = CocoDataset(json_file, folder)
    assert not dataset.index_report
    np.testing.assert_array_equal(dataset[0].instances[0].mask(), box_mask())


@pytest.mark.parametrize("name", ["C:\\", "\\", "pics\\", "/"])
def test_names_of_no_file(tmp_path, name):
    images = [image(1, file_name=name), image(2)]
    dataset = CocoDataset(*write_coco(tmp_path, images, [], {"2.jpg": jpeg(), "pics/x.jpg": jpeg()}))
    assert len(dataset) == 1 and dataset.index_report.num_images == 1


@pytest.mark.parametrize(("of_image", "of_annotation"), [(1, "1"), ("1", 1), (1, 1.0), (1.0, 1)])
def test_ids_that_differ_in_spelling_alone(tmp_path, of_image, of_annotation):
    entry = image(of_image, file_name="1.jpg")
    dataset = CocoDataset(*write_coco(tmp_path, [entry], [annotation(1, image_id=of_annotation)], {"1.jpg": jpeg()}))
    assert not dataset.index_report and dataset[0].id == "1"
    np.testing.assert_array_equal(dataset[0].instances[0].mask(), box_mask())


def test_two_spellings_are_two_images(tmp_path):
    images = [image(1), image("1")]
    annotations = [annotation(1, image_id=1), annotation(2, image_id="1"), annotation(3, image_id="1")]
    dataset = CocoDataset(*write_coco(tmp_path, images, annotations, {"1.jpg": jpeg()}))
    assert [[i.id for i in dataset[index].instances] for index in (0, 1)] == [[1], [2, 3]]


def test_what_is_bad_beside_a_good_mask_costs_no_instance_and_is_counted(tmp_path):
    square, triangle = [5, 4, 15, 4, 15, 12, 5, 12], [20, 10, 30, 10, 30, 20]
    annotations = [
        {"id": 1, "segmentation": [square, [1, 1, 9, 9]], "bbox": [], "category_id": "3"},
        {"segmentation": square, "category_id": "cat"},
        {"segmentation": [square, [7, 7]]},
        {"id": 4, "segmentation": [triangle]},
    ]
    annotations = [{**annotation, "image_id": 1} for annotation in annotations]
    dataset = CocoDataset(*write_coco(tmp_path, [image(1)], annotations, {"1.jpg": jpeg()}))
    (sample,), report = read(dataset)
    for instance in sample.instances[:3]:
        np.testing.assert_array_equal(instance.mask(), box_mask())
        assert instance.bbox_xywh == (5, 4, 10, 8)
    assert [i.id for i in sample.instances] == [1, "number 1", "number 2", 4]
    assert [i.category_id for i in sample.instances] == [3, None, None, None]
    assert {reason: skipped.count for reason, skipped in report.parts.items()} == {
        SkipReason.STRAY_RING: 2, SkipReason.BAD_BOX: 1, SkipReason.MISSING_ID: 2, SkipReason.BAD_CATEGORY: 1,
        SkipReason.FLAT_POLYGON: 1,
    }  # fmt: skip
    assert counts(report) == ({}, {}) and "parts of 7:" in report.summary()


def test_every_bad_entry_is_counted_by_reason(tmp_path):
    entries = [
        image(1), image(1), image(2), image(3), image(4, width=WIDTH + 1), {"id": 5}, {"file_name": "1.jpg"}, "6.jpg",
        image(7),
    ]  # fmt: skip
    annotations = [
        annotation(1, image_id=1),
        annotation(1, image_id=7),  # the id of an annotation of another image
        annotation(2, image_id=2),  # no such file
        annotation(3, image_id=2),
        annotation(4, image_id=3),  # truncated
        annotation(5, image_id=5),
        annotation(6, image_id=99),
        {**annotation(7), "image_id": [1]},
        {**annotation(7, image_id=1), "id": None},
        "annotation",
        {"id": 8, "image_id": 1, "segmentation": [[1, 1, 9, 9]]},
        annotation(9, np.zeros((HEIGHT, WIDTH)), image_id=7),
    ]
    images = {"1.jpg": jpeg(), "3.jpg": jpeg()[:400], "4.jpg": jpeg(), "7.jpg": jpeg()}
    dataset = CocoDataset(*write_coco(tmp_path, entries, annotations, images))
    assert counts(dataset.index_report) == (
        {SkipReason.DUPLICATE_IMAGE: 1, SkipReason.MISSING_IMAGE: 1, SkipReason.MALFORMED_IMAGE: 3},
        {
            SkipReason.DUPLICATE_ANNOTATION: 1,
            SkipReason.IMAGE_SKIPPED: 3,
            SkipReason.UNKNOWN_IMAGE: 1,
            SkipReason.MALFORMED_ANNOTATION: 2,
        },
    )
    samples, report = read(dataset)
    assert [(sample.id, [i.id for i in sample.instances]) for sample in samples] == [("1", [1, "number 1"]), ("7", [])]
    assert counts(report) == (
        {SkipReason.BROKEN_IMAGE: 1, SkipReason.IMAGE_SIZE: 1},
        {SkipReason.IMAGE_SKIPPED: 1, SkipReason.TOO_FEW_POINTS: 1, SkipReason.ZERO_AREA: 1},
    )
    assert {reason: skipped.count for reason, skipped in report.parts.items()} == {SkipReason.MISSING_ID: 1}
    report.merge(dataset.index_report)
    assert dataset.num_images == len(entries) == len(samples) + report.num_images
    assert sum(len(sample.instances) for sample in samples) + report.num_instances == len(annotations)


def test_an_image_that_disappears_later_is_counted(coco):
    dataset = CocoDataset(*coco)
    (coco[1] / "2.jpg").unlink()
    samples, report = read(dataset)
    assert [sample.id for sample in samples] == ["1", "3"]
    assert counts(report) == ({SkipReason.MISSING_IMAGE: 1}, {SkipReason.IMAGE_SKIPPED: 2})


def refused(call, *words):
    with pytest.raises(ValueError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not JSON"),
        ("[]", "results"),
        ('{"images": []}', "'annotations'"),
        ('{"images": {}, "annotations": []}', "'images'"),
        ("3", "COCO"),
        ('{"images": [], "annotations": []}', "no image"),
        ("\x00\xff", "not JSON"),
        (json.dumps({"images": [image(1)], "annotations": []}), "1 x image file missing"),
    ],
)
def test_a_json_that_is_no_dataset_is_refused_in_one_line(tmp_path, content, word):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    refused(lambda: CocoDataset(path, tmp_path), "x.json", word)


def test_files_that_are_not_there(tmp_path):
    refused(lambda: CocoDataset(tmp_path / "x.json", tmp_path), "x.json", "No such file")
    refused(lambda: CocoDataset(tmp_path / "x.json", tmp_path / "pictures"), "pictures", "no such folder")


def test_load_dataset_chooses_the_reader_by_its_arguments(coco, tmp_path):
    json_file, folder = coco
    for dataset in (
        load_dataset(json_file, images=folder),
        load_dataset(str(folder), annotations=str(json_file)),
        load_dataset("coco", annotations=json_file, images=folder),
        load_dataset("lvis", json_file, folder, limit=3),
    ):
        assert isinstance(dataset, CocoDataset) and len(dataset) == 3
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), "a.json": sa1b_json(annotation())})
    for dataset in (
        load_dataset(tar),
        load_dataset(tmp_path),
        load_dataset([tar]),
        load_dataset(str(tmp_path / "*.tar"), limit=1),
        load_dataset("sa1b", images=tar),
    ):
        assert isinstance(dataset, Sa1bDataset) and len(dataset) == 1


def test_load_dataset_says_what_is_missing(coco, tmp_path):
    json_file, folder = coco
    refused(lambda: load_dataset(json_file), "images=")
    refused(lambda: load_dataset("coco"), "annotations=", "images=")
    refused(lambda: load_dataset("sa1b"), "images=")
    refused(lambda: load_dataset(folder), "pictures", "annotations=")
    refused(lambda: load_dataset(folder, images=folder), "images=")
    refused(lambda: load_dataset(folder, json_file, folder), "once")
    refused(lambda: load_dataset([folder], images=folder), "neither")
    refused(lambda: load_dataset("coco2017"), "coco2017")
