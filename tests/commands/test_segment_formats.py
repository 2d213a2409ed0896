"""Formats of `samlight segment` for other tools, each read back as its tool does, and by the tool where it is here."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from samlight_hf.commands import options as options_module
from samlight_hf.commands import segment as segment_command
from samlight_hf.data import load_dataset
from samlight_hf.inference.mask_generation import MaskGenerator
from samlight_hf.masks.boxes import mask_edges
from samlight_hf.masks.regions import clean_mask
from samlight_hf.masks.results import GeneratedMasks
from samlight_hf.masks.rle import RunLengthMasks
from tests.masks.test_formats import fill_as_labelme, fill_as_ultralytics

from .test_segment import QUICK, names, one_line
from .test_segment_results import is_b, write_images


def blobs(seed: int, shape: tuple[int, int] = (30, 40), number: int = 4) -> np.ndarray:
    """Make masks with large parts, islands and holes: bool (n, H, W)."""
    small = np.random.default_rng(seed).integers(0, 255, (number, 8, 9), dtype=np.uint8)
    resize = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(each).resize(shape[::-1], resize)) > 127 for each in small])


@pytest.fixture
def generated(monkeypatch):
    """Have the model find `blobs`: an untrained one finds noise or nothing, in which no reader would tell a fault."""

    def generate(self, image, settings, progress=None, encoded=None):
        masks = blobs(image.shape[-1], tuple(image.shape[-2:]))
        scores = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
        nowhere = np.zeros((4, 2), dtype=np.float32)
        boxes = mask_edges(masks)
        return GeneratedMasks(RunLengthMasks.from_masks(masks), scores, boxes, scores, nowhere, boxes)

    monkeypatch.setattr(MaskGenerator, "generate", generate)


@pytest.fixture
def segment(samlight, checkpoint, tmp_path, monkeypatch, generated):
    """Return a function that runs `samlight segment` in `tmp_path`, and expects that it succeeds, with no complaint."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> str:
        status, stdout, stderr = samlight("segment", *arguments, "--model", checkpoint, *QUICK)
        complaints = [line for line in stderr.splitlines() if not line.endswith("of the same images replaced.")]
        assert (status, complaints) == (0, [])
        return stdout

    return run


def test_training_reads_label_maps_and_folders_of_masks(segment, tmp_path):
    write_images(tmp_path, "mine/images/a.jpg", "mine/images/deep/b.png")
    segment("mine/images", "--out", "mine/masks", "--format", "labels")
    assert names(tmp_path / "mine/masks") == {"a.png", "deep/b.png"}
    for sample, width in zip(load_dataset("mine"), (40, 41)):
        masks = blobs(width, (30, width))
        seen: np.ndarray = np.zeros((30, width), dtype=bool)
        expected = {}
        for number, mask in enumerate(masks, start=1):  # in the order of their scores
            expected[number], seen = mask & ~seen, mask | seen
        assert {instance.id: instance.mask().tolist() for instance in sample.instances} == {
            number: mask.tolist() for number, mask in expected.items() if mask.any()
        }
    for path in (tmp_path / "mine/masks").rglob("*.png"):
        assert Image.open(path).mode.startswith("I;16")
        path.unlink()
    segment("mine/images", "--out", "mine/masks", "--format", "png")
    dataset = load_dataset("mine")
    assert not dataset.index_report and len(dataset) == 2
    for sample, width in zip(dataset, (40, 41)):
        assert [instance.id for instance in sample.instances] == ["0000", "0001", "0002", "0003"]
        assert np.array_equal(sample.masks(), blobs(width, (30, width)))


def test_masks_that_others_cover_are_counted(samlight, checkpoint, tmp_path, monkeypatch, generated):
    write_images(tmp_path, "a.jpg", "b.jpg")
    generate = MaskGenerator.generate

    def with_copies(self, image, settings, progress=None, encoded=None):
        return generate(self, image, settings, progress, encoded)[np.array([0, 1, 1, 0])]

    monkeypatch.setattr(MaskGenerator, "generate", with_copies)
    arguments = ["segment", tmp_path / "a.jpg", tmp_path / "b.jpg", "--out", tmp_path / "out", "--model", checkpoint]
    status, _, stderr = samlight(*arguments, "--format", "labels", *QUICK)
    assert status == 0
    one_line(stderr, "4 masks of 8 left out of the results", "--format png keeps all")
    assert samlight(*arguments, "--format", "png", *QUICK)[::2] == (0, "")


def test_labelme_reads_its_documents(segment, tmp_path):
    write_images(tmp_path, "photos/a.jpg", "photos/deep/b.png")
    segment("photos", "--out", "out/labelme", "--format", "labelme")
    for name, image, width in (("a", "photos/a.jpg", 40), ("deep/b", "photos/deep/b.png", 41)):
        path = tmp_path / f"out/labelme/{name}.json"
        document = json.loads(path.read_text())
        assert (path.parent / document["imagePath"]).resolve() == tmp_path / image  # where labelme opens it
        assert Image.open(tmp_path / image).size == (document["imageWidth"], document["imageHeight"]) == (width, 30)
        objects: dict = {}
        for number, shape in enumerate(document["shapes"]):
            group = shape["group_id"] if shape["group_id"] is not None else f"alone {number}"
            objects.setdefault(group, []).append(shape["points"])
        assert any(len(rings) > 1 for rings in objects.values()), "a mask of several parts tells more"
        masks = [fill_as_labelme(rings, (width, 30)) for rings in objects.values()]
        assert np.array_equal(masks, blobs(width, (30, width)))


# In processes of their own: importing these packages changes functions and limits of Pillow.
LABELME = """
import sys
import numpy as np
from labelme import LabelFile
from labelme.utils import shape_to_mask

masks = {}
for number, shape in enumerate(LabelFile(sys.argv[1]).shapes):
    group = shape["group_id"] if shape["group_id"] is not None else f"alone {number}"
    mask = shape_to_mask((30, 40), shape["points"], shape["shape_type"])
    masks[group] = masks.get(group, False) | mask
np.save(sys.argv[2], list(masks.values()))
"""
ULTRALYTICS = """
import sys
import numpy as np
from ultralytics.data.utils import img2label_paths, polygon2mask, verify_image_label

image = sys.argv[1]
(label,) = img2label_paths([image])
_, boxes, shape, segments, _, *counts, message = verify_image_label((image, label, "", False, 1, 0, 0, False))
assert counts == [0, 1, 0, 0] and message == "", (counts, message)
assert len(boxes) == len(segments) and shape == (30, 40), (boxes, shape)
pixels = [(segment * np.float32([40, 30])).ravel() for segment in segments]
np.save(sys.argv[2], [polygon2mask(shape, [polygon]) > 0 for polygon in pixels])
"""


def read_by(script: str, path: Path) -> list:
    """Return the masks that a script reads."""
    command = [sys.executable, "-c", script, str(path), str(path.with_name("read.npy"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return np.load(path.with_name("read.npy")).tolist()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("labelme") is None, reason="needs labelme")
def test_labelme_itself_reads_its_documents(segment, tmp_path):
    write_images(tmp_path, "photos/a.jpg")
    segment("photos", "--out", "out", "--format", "labelme")
    assert read_by(LABELME, tmp_path / "out/a.json") == blobs(40).tolist()


def test_yolo_lines_are_read_as_documented(segment, tmp_path):
    write_images(tmp_path, "mine/images/a.jpg", "mine/images/deep/b.png")
    segment("mine/images", "--out", "mine/labels", "--format", "yolo")
    for name, width in (("a", 40), ("deep/b", 41)):
        lines = (tmp_path / f"mine/labels/{name}.txt").read_text().splitlines()
        assert len(lines) == 4 and all(line.startswith("0 ") for line in lines)
        for line, mask in zip(lines, blobs(width, (30, width))):
            filled = fill_as_ultralytics(line, (width, 30))
            assert filled[mask].all()  # all of the mask, and the lines that join its parts
            assert (filled & ~mask).sum() <= 0.1 * mask.size


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs ultralytics")
def test_ultralytics_itself_reads_its_lines(segment, tmp_path):
    write_images(tmp_path, "mine/images/a.jpg")
    segment("mine/images", "--out", "mine/labels", "--format", "yolo", "--min-region-area", "1000")
    parts = [clean_mask(mask, 0, 1000).tolist() for mask in blobs(40)]  # the largest part of each, with its holes
    read = read_by(ULTRALYTICS, tmp_path / "mine/images/a.jpg")
    assert len(read) == len((tmp_path / "mine/labels/a.txt").read_text().splitlines()) >= 1
    assert all(mask in parts for mask in read)


def test_one_coco_document_of_a_folder(segment, tmp_path):
    from pycocotools.coco import COCO

    write_images(tmp_path, "photos/b.jpg", "photos/deep/a.png", "photos/instances.jpg")
    arguments = ["photos", "--out", "out", "--format", "coco", "--one-json"]
    assert "COCO of 3 images: out/instances-2.json" in segment(*arguments)  # another image's result has the name
    assert names(tmp_path / "out") == {"b.json", "deep/a.json", "instances.json", "instances-2.json"}
    coco = COCO(tmp_path / "out/instances-2.json")
    assert [image["id"] for image in coco.dataset["images"]] == [1, 2, 3]
    assert [annotation["id"] for annotation in coco.dataset["annotations"]] == list(range(1, 13))
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "object"}]
    for image in coco.loadImgs(coco.getImgIds()):
        assert Image.open(tmp_path / "photos" / image["file_name"]).size == (image["width"], image["height"])
        masks = [coco.annToMask(annotation) for annotation in coco.loadAnns(coco.getAnnIds(image["id"]))]
        assert np.array_equal(masks, blobs(image["width"], (30, image["width"])))
    dataset = load_dataset("out/instances-2.json", images="photos")
    assert [len(sample.instances) for sample in dataset] == [4, 4, 4]
    before = (tmp_path / "out/instances-2.json").read_bytes()
    (tmp_path / "out/instances-2.json").unlink()
    assert "3 images done before" in segment(*arguments, "--resume")  # and the document is of all of them
    assert (tmp_path / "out/instances-2.json").read_bytes() == before
    segment(*arguments)
    assert not (tmp_path / "out/instances-3.json").exists()


def test_one_coco_document_has_no_image_that_failed(samlight, segment, checkpoint, tmp_path, monkeypatch):
    write_images(tmp_path, "photos/a.jpg", "photos/b.jpg", "photos/c.jpg")
    arguments = ["segment", "photos", "--out", "out", "--format", "coco", "--one-json", "--model", checkpoint, *QUICK]
    assert samlight(*arguments)[0] == 0
    generate = MaskGenerator.generate

    def fail(self, image, *rest):
        if is_b(image):
            raise ValueError("no")
        return generate(self, image, *rest)

    monkeypatch.setattr(MaskGenerator, "generate", fail)
    status, stdout, stderr = samlight(*arguments, "--max-masks", "2")  # b.json of the first run is still there
    assert status == 0 and "COCO of 2 images" in stdout and "1 skipped, 2 done" in stderr
    document = json.loads((tmp_path / "out/instances.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["a.jpg", "c.jpg"]
    assert [annotation["image_id"] for annotation in document["annotations"]] == [1, 1, 2, 2]
    monkeypatch.setattr(MaskGenerator, "generate", Mock(side_effect=ValueError("no")))
    assert samlight(*arguments)[0] == 1  # none at all: the earlier document stays
    assert json.loads((tmp_path / "out/instances.json").read_text()) == document


def test_a_document_that_was_changed_is_named(segment, samlight, checkpoint, tmp_path):
    write_images(tmp_path, "photos/a.jpg", "photos/b.jpg")
    arguments = ["photos", "--out", "out", "--format", "coco", "--one-json"]
    segment(*arguments)
    before = (tmp_path / "out/instances.json").read_bytes()
    for content in ("{", '{"images": []}', '{"images": [], "annotations": []}'):
        (tmp_path / "out/b.json").write_text(content)
        status, _, stderr = samlight("segment", *arguments, "--resume", "--model", checkpoint, *QUICK)
        assert status == 1
        one_line(stderr, "out/b.json: ")
        assert (tmp_path / "out/instances.json").read_bytes() == before


@pytest.mark.parametrize("mode", [[], ["--box", "0,0,40,30"]], ids=["everything", "box"])
def test_small_holes_and_parts_of_masks(samlight, checkpoint, tmp_path, generated, mode):
    write_images(tmp_path, "a.jpg")

    def masks(*options) -> np.ndarray:
        arguments = [tmp_path / "a.jpg", "--out", tmp_path / "out", "--format", "npz", "--model", checkpoint]
        assert samlight("segment", *arguments, *QUICK, *mode, *options)[0] == 0
        result = np.load(tmp_path / "out/a.npz")
        columns = [mask.any(axis=0).nonzero()[0] for mask in result["masks"]]
        assert [box[0] for box in result["boxes_xyxy"]] == [inside[0] for inside in columns]
        assert [box[2] for box in result["boxes_xyxy"]] == [inside[-1] + 1 for inside in columns]
        return result["masks"]

    before, after = masks(), masks("--min-hole-area", "30", "--min-region-area", "40")
    expected = [clean_mask(mask, 30, 40) for mask in before]
    assert any(not np.array_equal(one, other) for one, other in zip(before, expected))
    assert len(after) and all(any(np.array_equal(mask, other) for other in expected) for mask in after)
    assert len(after) == len(before) or not mode  # of everything, those that became duplicates are left out


def test_masks_that_become_duplicates_are_left_out(samlight, checkpoint, tmp_path, monkeypatch):
    masks = np.zeros((3, 30, 40), dtype=bool)
    masks[:2, 5:20, 5:20] = masks[1, 28, 38] = masks[2, 5:20, 8:24] = True  # the second has an island
    boxes, scores = mask_edges(masks), np.array([0.9, 0.8, 0.7], dtype=np.float32)
    found = GeneratedMasks(RunLengthMasks.from_masks(masks), scores, boxes, scores, boxes[:, :2], boxes)
    monkeypatch.setattr(MaskGenerator, "generate", lambda *arguments: found)
    write_images(tmp_path, "a.jpg")
    arguments = ["segment", tmp_path / "a.jpg", "--out", tmp_path / "out", "--format", "npz", "--model", checkpoint]
    for options, expected in (([], scores), (["--min-region-area", "2"], scores[[0, 2]])):
        assert samlight(*arguments, *QUICK, *options)[0] == 0
        assert np.load(tmp_path / "out/a.npz")["scores"].tolist() == expected.tolist()


def test_crops_are_segmented_too_and_their_points_are_counted(samlight, checkpoint, tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    decode, crops, bar = MaskGenerator._decode_crop, [], Mock()

    def decode_crop(self, embedding, crop, *arguments):
        crops.append(crop.box_xyxy)
        return decode(self, embedding, crop, *arguments)

    monkeypatch.setattr(MaskGenerator, "_decode_crop", decode_crop)
    monkeypatch.setattr(segment_command, "point_progress", progress := Mock(return_value=bar))
    arguments = ["segment", tmp_path / "a.png", "--out", tmp_path / "out", "--model", checkpoint, *QUICK]
    for options, num_crops in (([], 1), (["--crops-n-layers", "2"], 1 + 4 + 16)):
        crops.clear()
        bar.reset_mock()
        assert samlight(*arguments, *options)[0] == 0
        assert len(set(crops)) == num_crops and crops[0] == (0, 0, 120, 90)
        assert progress.call_args.args[0] == sum(call.args[0] for call in bar.update.call_args_list) == 4 * num_crops


def test_what_needs_opencv_says_so_before_the_model_is_loaded(samlight, checkpoint, tmp_path, monkeypatch):
    write_images(tmp_path, "a.jpg")
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(options_module, "load_from_options", None)
    for options in (
        ["--format", "yolo"],
        ["--format", "labelme"],
        ["--min-hole-area", "9"],
        ["--min-region-area", "9"],
    ):
        status, _, stderr = samlight("segment", tmp_path / "a.jpg", "--out", tmp_path / "out", *options)
        assert status == 2
        one_line(stderr, 'pip install "samlight-hf[polygons]"')
    arguments = [tmp_path / "a.jpg", "--out", tmp_path / "out", "--format", "labels", "--model", checkpoint]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert samlight("segment", *arguments, *QUICK)[0] == 0  # the others need none


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--one-json"], "--one-json is for --format coco, not overlay"),
        (["--crops-n-layers", "-1"], "must be a whole number of at least 0"),
        (["--min-hole-area", "none"], "'none' is not a positive integer"),
        (["--min-region-area", "0"], "'0' is not a positive integer"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_fit(samlight, tmp_path, options, words):
    write_images(tmp_path, "a.jpg")
    status, _, stderr = samlight("segment", tmp_path / "a.jpg", "--out", tmp_path / "out", *options)
    assert status == 2 and words in stderr.splitlines()[-1]


def test_resuming_knows_the_later_settings_and_notes_that_lack_them(segment, samlight, tmp_path):
    write_images(tmp_path, "a.jpg")
    segment("a.jpg", "--out", "out", "--format", "coco")
    assert "--min-hole-area" not in (tmp_path / "out/.samlight.json").read_text()  # as earlier versions wrote it
    status, _, stderr = samlight(
        "segment", "a.jpg", "--out", "out", "--format", "coco", "--resume", "--min-hole-area", 9
    )
    assert status == 2
    assert "--min-hole-area was not given and is 9" in stderr
    segment("a.jpg", "--out", "out", "--format", "coco", "--crops-n-layers", "1")
    status, _, stderr = samlight("segment", "a.jpg", "--out", "out", "--format", "coco", "--resume")
    assert status == 2 and "--crops-n-layers was 1 and is not given" in stderr
