import io
import pickle

import numpy as np
import pytest
from PIL import Image

from samlight_hf.data import (
    Cutouts,
    ImageFolderDataset,
    PromptSampling,
    Sa1bDataset,
    SkipReason,
    SyntheticScenes,
    TrainingExamples,
)
from samlight_hf.data.samples import CutoutError

from .files import annotation, png, sa1b_json, write_tar


S = M = 64
STILL = {"flip": False, "max_rotation_degrees": 0, "brightness": 0, "contrast": 0, "saturation": 0}


def disc(colour=(250, 0, 0), side=24, suffix="PNG") -> bytes:
    """Encode a disc of one colour with a soft edge on a transparent background."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    alpha = np.clip(side / 2 - 0.5 - np.hypot(rows, columns), 0, 1)
    pixels = np.concatenate(
        [np.broadcast_to(np.uint8(colour), (side, side, 3)), (255 * alpha[..., None]).astype(np.uint8)], 2
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **({"lossless": True} if suffix == "WEBP" else {}))
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """Return a folder of blue images without masks."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(np.full((48, 64, 3), (0, 0, 200), np.uint8)))
    return ImageFolderDataset(folder)


@pytest.fixture
def cutouts(tmp_path):
    return write_tar(tmp_path / "discs.tar", {"a.webp": disc(suffix="WEBP"), "b.png": disc(), "README.md": b"discs"})


def pasted_pixels(example) -> np.ndarray:
    return example["pixel_values"][0].numpy() > 125


@pytest.mark.parametrize("turned", [False, True])
def test_masks_match_the_pasted_pixels(images, cutouts, turned):
    settings = {} if turned else STILL
    made = TrainingExamples(
        images, 60, S, mask_size=M, cutouts=Cutouts(cutouts, (1, 1), (0.3, 0.8), **settings),
        prompts=PromptSampling(2, box_noise=0.0), max_skipped=1.0,
    )  # fmt: skip
    for example in made:
        seen = pasted_pixels(example)
        assert (example["masks"][0] == example["masks"][1]).all()
        difference = (example["masks"][0].numpy() != seen).sum()
        assert difference <= 0.06 * seen.sum() + 2
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        np.testing.assert_allclose(example["boxes"][0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.01)
        x, y = example["points"][0].int().tolist()
        assert example["masks"][0, y, x]
        assert example["pixel_values"][:, 48:].sum() == 0  # nothing is pasted outside of the image


def test_later_objects_cover_earlier_ones_and_the_image(tmp_path):
    """Two objects are pasted onto an image that is one object: the masks are disjoint, and their union is the image."""
    content = sa1b_json(annotation(mask=np.ones((64, 64), bool)), width=64, height=64)
    tar = write_tar(tmp_path / "a.tar", {"a.png": png(np.full((64, 64, 3), (0, 0, 200), np.uint8)), "a.json": content})
    red, green = tmp_path / "cutouts" / "red.png", tmp_path / "cutouts" / "green.png"
    red.parent.mkdir()
    red.write_bytes(disc())
    green.write_bytes(disc((0, 250, 0)))
    made = TrainingExamples(
        Sa1bDataset(tar), 60, S, mask_size=M, cutouts=Cutouts([red.parent], (2, 2), (0.4, 0.7), **STILL),
        prompts=PromptSampling(3, box_noise=0.0, min_visible=0.0, min_mask_cells=1),
    )  # fmt: skip
    overlaps = 0
    for example in made:
        masks = {mask.numpy().tobytes(): mask.numpy() for mask in example["masks"]}
        assert sum(masks.values()).max() == 1
        assert sum(mask.sum() for mask in masks.values()) == S * S
        pixels = example["pixel_values"].numpy().astype(int)
        for mask in masks.values():
            colour = pixels[:, mask].argmax(0)
            assert (colour == np.bincount(colour).argmax()).mean() > 0.93  # each object has one colour
        areas = sorted(mask.sum() for mask in masks.values())
        overlaps += areas[0] < 0.6 * areas[1]
        for box, mask in zip(example["boxes"].numpy(), example["masks"].numpy()):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 1
    assert overlaps > 3


def test_objects_that_are_hardly_seen_are_no_targets(images, cutouts):
    made = TrainingExamples(
        images, 100, S, mask_size=M, cutouts=Cutouts(cutouts, (4, 4), (0.4, 0.6), **STILL),
        prompts=PromptSampling(4, min_visible=0.5), max_skipped=1.0,
    )  # fmt: skip
    whole = np.pi / 4 * (0.39 * S) ** 2  # the smallest disc
    assert min(int(mask.sum()) for example in made for mask in example["masks"]) >= 0.45 * whole


def test_pasting_is_a_function_of_the_view(images, cutouts):
    settings = {"cutouts": Cutouts(cutouts), "num_views": 1, "max_skipped": 1.0}
    plain = TrainingExamples(images, 8, S, **settings)
    copy = pickle.loads(pickle.dumps(plain))
    prompted = TrainingExamples(images, 8, S, **settings, prompts=PromptSampling(1, min_visible=0.0, min_mask_cells=1))
    by_id = {int(example["example_id"]): example["pixel_values"] for example in plain}
    assert len(by_id) == 4
    for example in [*copy, *prompted]:
        assert (by_id[int(example["example_id"])] == example["pixel_values"]).all()
    assert repr(plain.maker.cutouts) == repr(copy.maker.cutouts) != repr(Cutouts(cutouts, number=(1, 6)))


def test_damaged_cutouts_are_counted(tmp_path):
    opaque = png(np.full((8, 8, 3), 90, np.uint8))
    tar = write_tar(tmp_path / "a.tar", {"a.png": disc(), "b.png": disc()[:60], "c.png": opaque, "d.webp": b"no"})
    settings = {"cutouts": Cutouts(tar, (1, 1)), "max_skipped": 1.0}
    made = TrainingExamples(SyntheticScenes(30, S), 40, S, **settings)
    assert len(list(made)) == 40
    assert set(made.skip_report().images) == {SkipReason.BROKEN_CUTOUT}
    assert 50 < made.skip_report().num_images < 250  # three of four
    (named,) = made.skip_report().images[SkipReason.BROKEN_CUTOUT].examples  # the cut-out, not the image under it
    assert named in [f"{tar}, cut-out {number}" for number in (2, 3, 4)]
    with pytest.raises(CutoutError) as raised:
        made.maker.cutouts.load(2)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.index, copy.reason) == (str(raised.value), 2, SkipReason.BROKEN_CUTOUT)
    with pytest.raises(ValueError, match="cut-out damaged.*a.tar, cut-out [234]"):
        list(TrainingExamples(SyntheticScenes(30, S), 1000, S, cutouts=Cutouts(tar, (1, 1))))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"number": (3, 1)}, "number"),
        ({"scale": (0, 1)}, "scale"),
        ({"max_rotation_degrees": -1}, "max_rotation_degrees=-1"),
        ({"saturation": 7}, "saturation=7"),
        ({"paths": "missing"}, "missing: no such file"),
        ({"paths": []}, "No path"),
    ],
)
def test_settings_that_do_not_fit(cutouts, settings, message):
    with pytest.raises(ValueError, match=message):
        Cutouts(**{"paths": cutouts, **settings})


def test_paths_without_cutouts(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.webp"):
        Cutouts(write_tar(tmp_path / "a.tar", {"a.txt": b"x"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        Cutouts(tmp_path / "empty")


def test_objects_are_decoded_once_as_far_as_there_is_room(cutouts, monkeypatch):
    monkeypatch.setattr("samlight_hf.data.cutouts.CACHE_BYTES", 4 * 24 * 24)
    objects = Cutouts(cutouts)
    first, second = objects.load(0), objects.load(1)
    assert objects.load(0) is first
    assert objects.load(1) is not second and objects.load(1).tobytes() == second.tobytes()
    before = first.tobytes()
    objects.paste(np.zeros((3, 24, 24), np.uint8), np.random.default_rng(0))
    assert first.tobytes() == before
    copy = pickle.loads(pickle.dumps(objects))  # as worker processes receive it, without decoded objects
    assert copy.load(0) is not first and copy.load(0).tobytes() == before and repr(copy) == repr(objects)
