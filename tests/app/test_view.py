"""What the page is sent: images and masks as data URIs."""

import base64
import io
import json

import numpy as np
from PIL import Image

from samlight_hf.app.session import Session
from samlight_hf.app.view import TABLE_COLUMNS, fit, summary, table, view
from samlight_hf.masks.rle import RunLengthMasks

from .conftest import noise


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_masks_are_white_inside_and_transparent_outside(session):
    session.add_points([(20, 30, 1)])
    shown = view(session)
    for candidate, mask in zip(shown["candidates"], session.state.candidates.masks, strict=True):
        levels = np.asarray(opened(candidate["mask"]).convert("RGBA"))
        assert np.array_equal(levels[..., 3] > 0, mask) and (levels[mask] == 255).all()


def test_the_image_and_known_masks_are_sent_once(session):
    session.set_box((10, 20, 60, 50))
    session.keep("cat")
    first = view(session, with_image=True)
    assert opened(first["image"]["uri"]).size == session.image.size and first["objects"][0]["mask"]
    again = view(session, frozenset([1]))
    assert again["image"]["uri"] is None and again["objects"][0]["mask"] is None
    json.dumps(again, allow_nan=False)


def test_large_images_are_sent_small(segmenter, limits):
    session = Session(segmenter, noise(size=(2800, 700)), "wide.jpg", limits)
    session.add_points([(2799, 699, 1)])
    shown = view(session, with_image=True)
    assert opened(shown["image"]["uri"]).size == (1400, 350) == fit((2800, 700))
    assert opened(shown["candidates"][0]["mask"]).size == (1400, 350)
    assert shown["image"]["width"] == 2800, "clicks are in pixels of the image"
    assert fit((1, 90_000)) == (1, 1400)


def test_everything_is_a_drawing_and_a_table(session):
    result = session.run_everything(3, 0.0, 0.0)
    shown = view(session)
    levels = np.asarray(opened(shown["everything"]["picture"]))
    covered = np.logical_or.reduce(list(result.masks))
    assert np.array_equal(levels[..., 3] > 0, covered) and shown["everything"]["count"] == len(result)
    rows = table(result)
    assert len(rows) == len(result) and all(len(row) == len(TABLE_COLUMNS) for row in rows)
    for row, mask in zip(rows, result.masks):
        ys, xs = np.nonzero(mask)
        assert row[3] == mask.sum() and row[5:] == [
            xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min(),
        ]  # fmt: skip


def test_the_summary_for_programs_has_run_lengths(session):
    session.add_points([(20, 30, 1)])
    found = summary(session)
    json.dumps(found, allow_nan=False)
    expected = RunLengthMasks.from_masks(session.state.candidates.masks.to_masks()).to_coco()
    assert [candidate["segmentation"] for candidate in found["candidates"]] == expected
    assert found["chosen"] == session.state.chosen
