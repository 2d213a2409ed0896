"""Files to download, read back."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from samlight_hf.app.exports import WRITERS, export
from samlight_hf.app.session import SessionError


@pytest.fixture
def filled(session):
    """A session with a kept object, a hidden one, and a current mask."""
    session.set_box((10, 20, 60, 50))
    session.keep("cat")
    session.set_box((5, 5, 90, 60))
    session.keep("hidden")
    session.change_object(2, is_visible=False)
    session.add_points([(70, 30, 1)])
    return session


def masks_of(session) -> list[np.ndarray]:
    return [kept.mask for kept in session.shown_objects()]


def test_masks(filled, session):
    with zipfile.ZipFile(io.BytesIO(export(filled, "png").content)) as archive:
        assert archive.namelist() == ["001_cat.png", "002_object_3.png"]
        for name, mask in zip(archive.namelist(), masks_of(filled), strict=True):
            assert np.array_equal(np.asarray(Image.open(archive.open(name))), mask)
    session.change_object(1, remove=True)
    file = export(session, "png")
    assert file.name == "photo of me_mask.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.content))), masks_of(session)[0])


def test_label_map(filled):
    labels = np.asarray(Image.open(io.BytesIO(export(filled, "labels").content)))
    first, second = masks_of(filled)
    assert set(np.unique(labels)) <= {0, 1, 2} and np.array_equal(labels > 0, first | second)
    assert (labels[first & ~second] == 1).all() and (labels[second & ~first] == 2).all()


def test_coco(filled):
    coco_mask = pytest.importorskip("pycocotools.mask")
    document = json.loads(export(filled, "coco").content)
    assert [category["name"] for category in document["categories"]] == ["cat", "object 3"]
    assert document["images"][0] == {"id": 1, "file_name": "photo of me.jpg", "width": 96, "height": 64}
    for annotation, mask in zip(document["annotations"], masks_of(filled), strict=True):
        assert np.array_equal(coco_mask.decode(annotation["segmentation"]).astype(bool), mask)
        assert annotation["area"] == mask.sum()


def test_polygons(filled):
    """The lines and documents are those of `masks.formats`, which has tests of its own; here: names and classes."""
    pytest.importorskip("cv2")
    document = json.loads(export(filled, "labelme").content)
    assert {shape["label"] for shape in document["shapes"]} <= {"cat", "object 3"}
    assert document["imagePath"] == "photo of me.jpg" and document["imageWidth"] == 96
    with zipfile.ZipFile(io.BytesIO(export(filled, "yolo").content)) as archive:
        assert archive.namelist() == ["labels/photo of me.txt", "data.yaml"]
        lines = archive.read("labels/photo of me.txt").decode().splitlines()
        assert [line.split()[0] for line in lines] == [str(i) for i, mask in enumerate(masks_of(filled)) if mask.any()]
        assert json.loads(archive.read("data.yaml"))["names"] == {"0": "cat", "1": "object 3"}


def test_cutout(filled):
    cut = Image.open(io.BytesIO(export(filled, "cutout").content))
    mask = np.logical_or.reduce(masks_of(filled))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels = np.asarray(cut)
    assert cut.mode == "RGBA" and np.array_equal(pixels[..., 3] > 0, mask[part])
    assert np.array_equal(pixels[..., :3], np.asarray(filled.image)[part])


@pytest.mark.parametrize("file_format", WRITERS)
def test_nothing_to_download(session, file_format):
    with pytest.raises(SessionError, match="nothing to download"):
        export(session, file_format)


def test_unknown_format(filled):
    with pytest.raises(SessionError, match="'exe' is no format. Use one of png, labels"):
        export(filled, "exe")
