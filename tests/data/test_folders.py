import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps

from samlight_hf.data import (
    ImageFolderDataset,
    MaskFolderDataset,
    PromptSampling,
    SkipReason,
    SkipReport,
    TrainingExamples,
    load_dataset,
)
from samlight_hf.data.image_cache import ImageCache
from samlight_hf.images.reading import open_image
from samlight_hf.masks.files import ENDINGS, write_masks
from samlight_hf.masks.results import MaskResult

from .files import HEIGHT, WIDTH, box_mask, counts, jpeg, png


def write(folder, files: dict[str, bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def labels(*values, dtype=np.uint8) -> np.ndarray:
    """Make a label map with a box for each value, side by side."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype)
    for i, value in enumerate(values):
        pixels[5:20, 3 + 8 * i : 9 + 8 * i] = value
    return pixels


def test_all_images_of_a_folder_in_order(tmp_path, caplog):
    write(tmp_path, {"b.jpg": jpeg(seed=1), "a/c.PNG": png(labels()), ".d.jpg": jpeg(), "a/notes.txt": b"x"})
    dataset = ImageFolderDataset(tmp_path)
    assert [dataset[i].id for i in range(len(dataset))] == ["a/c.PNG", "b.jpg"]
    assert all(sample.instances == () and sample.image.mode == "RGB" for sample in dataset.samples(SkipReport()))
    assert "left out 1 file of other formats: 1 .txt." in caplog.text
    assert len(ImageFolderDataset(tmp_path, limit=1)) == 1


def test_images_of_16_bits_and_transparent_ones_are_those_of_inference(tmp_path):
    levels = np.linspace(8000, 34000, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    clear = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    write(tmp_path, {"deep.png": png(levels), "clear.png": png(clear)})
    dataset = ImageFolderDataset(tmp_path)
    for index, name in enumerate(("clear.png", "deep.png")):
        expected = np.asarray(open_image(tmp_path / name))
        assert np.array_equal(np.asarray(dataset[index].image), expected), name
        assert np.array_equal(np.asarray(dataset.open(index).decode()[0]), expected), name


def test_what_macos_leaves_beside_masks_is_none(tmp_path):
    files = {"images/a.jpg": jpeg(), "masks/a/1.png": png(labels(255)), "masks/a/._1.png": b"x", "masks/._a.png": b"x"}
    dataset = MaskFolderDataset(write(tmp_path, files))
    assert len(dataset[0].instances) == 1
    assert not dataset.index_report


def test_broken_images_of_a_folder_are_counted(tmp_path):
    heic = b"\0\0\0\x18ftypheic" + bytes(2000)  # as phones and messengers name it
    write(tmp_path, {"a.jpg": jpeg()[:600], "b.jpg": jpeg(), "c.jpg": b"", "d.jpg": heic})
    dataset, report = ImageFolderDataset(tmp_path), SkipReport()
    assert [sample.id for sample in dataset.samples(report)] == ["b.jpg"]
    assert counts(report)[0] == {SkipReason.BROKEN_IMAGE: 1, SkipReason.UNKNOWN_FORMAT: 2}


@pytest.mark.parametrize("make", [ImageFolderDataset, MaskFolderDataset])
def test_folders_that_are_not_there(tmp_path, make):
    with pytest.raises(ValueError, match="missing"):
        make(tmp_path / "missing")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty"):
        make(tmp_path / "empty")


def test_label_maps_of_8_and_16_bits_and_palettes(tmp_path):
    palette = Image.frombytes("P", (WIDTH, HEIGHT), labels(4, 2).tobytes())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.save(tmp_path / "palette.png")
    files = {
        "8": png(labels(4, 2)),
        "16": png(labels(40_000, 300, dtype=np.uint16)),
        "palette": (tmp_path / "palette.png").read_bytes(),
        "bits": png(labels(1).astype(bool)),
    }
    (tmp_path / "palette.png").unlink()
    for name, content in files.items():
        write(tmp_path, {f"images/{name}.jpg": jpeg(), f"masks/{name}.png": content})
    dataset = MaskFolderDataset(tmp_path)
    masks_of_images = {}
    for sample in dataset.samples(report := SkipReport()):
        masks_of_images[sample.id] = {i.id: i.mask() for i in sample.instances}
    assert not report and not dataset.index_report
    assert {name: sorted(masks) for name, masks in masks_of_images.items()} == {
        "8.jpg": [2, 4], "16.jpg": [300, 40_000], "palette.jpg": [2, 4], "bits.jpg": [1]
    }  # fmt: skip
    for name, first, second in (("8.jpg", 4, 2), ("16.jpg", 40_000, 300), ("palette.jpg", 4, 2)):
        np.testing.assert_array_equal(masks_of_images[name][first], labels(1, 0) == 1)
        np.testing.assert_array_equal(masks_of_images[name][second], labels(0, 1) == 1)


@pytest.mark.parametrize("seed", range(5))
def test_label_maps_without_any_order(tmp_path, seed):
    pixels = np.random.default_rng(seed).integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
    write(tmp_path, {"images/a.jpg": jpeg(), "masks/a.png": png(pixels)})
    (sample,) = MaskFolderDataset(tmp_path).samples(SkipReport())
    assert [i.id for i in sample.instances] == [1, 2, 3]
    for instance in sample.instances:
        np.testing.assert_array_equal(instance.mask(), pixels == instance.id)


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("a.PNG", "PNG"),
        ("a.tif", "TIFF"),
        ("a.TIFF", "TIFF"),
        ("a.bmp", "BMP"),
        ("a.jpg", "PNG"),  # the format is read from the content, not the suffix
        ("a.jpg.png", "PNG"),
        ("a_mask.png", "PNG"),
        ("a_mask.PNG", "PNG"),
        ("a.jpg_mask.tif", "TIFF"),
        ("a/0.tif", "TIFF"),
        ("a.jpg/0.PNG", "PNG"),
        ("a_mask/0.bmp", "BMP"),
        ("a_masks/0.png", "PNG"),
    ],
)
def test_masks_are_found_as_images_are(tmp_path, name, file_format):
    file = io.BytesIO()
    Image.fromarray(labels(0, 255)).save(file, file_format)
    files = {"images/x/a.jpg": jpeg(), f"masks/x/{name}": file.getvalue(), "masks/x/notes.txt": b"x"}
    dataset = MaskFolderDataset(write(tmp_path, files))
    assert not dataset.index_report and dataset.mask_files() == [tmp_path / "masks/x" / name]
    (instance,) = dataset[0].instances
    assert instance.id == ("0" if "/" in name else 255)
    np.testing.assert_array_equal(instance.mask(), labels(0, 255) > 0)
    (tmp_path / "masks/x" / name).unlink()
    assert SkipReason.MISSING_MASK in dataset.load(0)[1].images


def test_each_mask_has_one_image(tmp_path):
    names = ("a", "a_mask", "b.jpg", "c", "d")
    files = {f"images/{name}.jpg": jpeg() for name in names} | {
        "images/c.png": png(labels()),
        "images/d.png": png(labels()),
    }
    files |= {"images/e/0.jpg": jpeg(), "images/e.jpg": jpeg()}
    masks = ("a.png", "a_mask.png", "b.jpg.png", "c.jpg.png", "c.png.png", "d.png", "e.png", "e/0.png", "lost_mask.png")
    files |= {f"masks/{name}": png(labels(number)) for number, name in enumerate(masks, start=1)}
    dataset = MaskFolderDataset(write(tmp_path, files))
    ids_of_images = {sample.id: [i.id for i in sample.instances] for sample in dataset.samples(SkipReport())}
    assert ids_of_images == {
        "a.jpg": [1], "a_mask.jpg": [2], "b.jpg.jpg": [3], "c.jpg": [4], "c.png": [5], "d.jpg": [6],
        "e.jpg": [7], "e/0.jpg": [8],
    }  # fmt: skip
    assert {reason: s.examples for reason, s in dataset.index_report.images.items()} == {
        SkipReason.DUPLICATE_IMAGE: ["d.png"], SkipReason.MISSING_IMAGE: ["lost_mask.png"]
    }  # fmt: skip


def test_an_image_of_several_mask_files_is_left_out_by_name(tmp_path):
    files = {f"images/{name}.jpg": jpeg() for name in "abcd"}
    files |= {
        f"masks/{name}": png(labels(1))
        for name in ("a.png", "a.tif", "b.png", "b/0.png", "c.png", "c_mask.png", "d.png")
    }
    dataset = MaskFolderDataset(write(tmp_path, files))
    assert [sample.id for sample in dataset.samples(SkipReport())] == ["d.jpg"]
    assert {reason: s.examples for reason, s in dataset.index_report.images.items()} == {
        SkipReason.SEVERAL_MASKS: ["a.jpg (a.png, a.tif)", "b.jpg (b, b.png)", "c.jpg (c.png, c_mask.png)"]
    }


def test_objects_whose_files_differ_in_suffix_alone_are_two(tmp_path):
    files = {"images/a.jpg": jpeg(), "masks/a/1.png": png(labels(1)), "masks/a/1.bmp": png(labels(0, 1))}
    sample = MaskFolderDataset(write(tmp_path, files))[0]
    assert {i.id: i.mask().tobytes() for i in sample.instances} == {
        "1.bmp": (labels(0, 1) > 0).tobytes(), "1.png": (labels(1) > 0).tobytes()
    }  # fmt: skip


def test_masks_that_are_links_to_one_file_are_those_of_several_images(tmp_path):
    write(
        tmp_path, {"images/a.jpg": jpeg(), "images/b.jpg": jpeg(seed=1), "blob": png(labels(1)), "masks/.x/c.png": b""}
    )
    for name in "ab":
        (tmp_path / f"masks/{name}.png").symlink_to(tmp_path / "blob")
    assert [sample.id for sample in MaskFolderDataset(tmp_path).samples(SkipReport())] == ["a.jpg", "b.jpg"]


def anti_aliased() -> np.ndarray:
    """Make two blobs with grey edges."""
    image = Image.new("L", (4 * WIDTH, 4 * HEIGHT))
    for left in (12, 82):
        ImageDraw.Draw(image).ellipse([left, 20, left + 63, 95], fill=255)
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def test_grey_levels_are_no_objects_in_evaluation_and_in_training(tmp_path):
    grey = anti_aliased()
    assert len(np.unique(grey)) > 40
    write(
        tmp_path, {"images/a.jpg": jpeg(), "images/b.jpg": jpeg(), "masks/a.png": png(grey), "masks/b/0.png": png(grey)}
    )
    dataset, report = MaskFolderDataset(tmp_path), SkipReport()
    (sample,) = dataset.samples(report)
    assert sample.id == "b.jpg"
    np.testing.assert_array_equal(sample.masks(), [grey >= 128])
    assert report.images[SkipReason.GREY_MASK].examples == ["a.jpg (masks/a.png)"]
    made = TrainingExamples(dataset, 8, 40, mask_size=40, prompts=PromptSampling(2), max_skipped=1.0)
    expected = np.pad(grey >= 128, ((0, 10), (0, 0)))
    assert all(np.array_equal(mask, expected) for example in made for mask in example["masks"].numpy())
    assert set(made.skip_report().images) == {SkipReason.GREY_MASK}

    binary, report = MaskFolderDataset(tmp_path, binary_masks=True), SkipReport()
    assert [sample.id for sample in binary.samples(report)] == ["a.jpg", "b.jpg"]
    assert not report
    np.testing.assert_array_equal(binary[0].masks(), [grey >= 128])


def test_void_is_no_object_in_evaluation_and_in_training_and_is_counted(tmp_path):
    write(tmp_path, {"images/a.jpg": jpeg(), "masks/a.png": png(labels(1, 20, 255))})
    dataset = MaskFolderDataset(tmp_path)
    (sample,) = dataset.samples(report := SkipReport())
    assert [i.id for i in sample.instances] == [1, 20]
    assert counts(report) == ({}, {SkipReason.VOID_LABEL: 1})
    made = TrainingExamples(dataset, 1, 40, mask_size=40, prompts=PromptSampling(3))
    masks = {mask.tobytes() for mask in made[0]["masks"].numpy()}
    assert masks == {np.pad(labels(1, 20) == label, ((0, 10), (0, 0))).tobytes() for label in (1, 20)}
    assert made.skip_report().instances[SkipReason.VOID_LABEL].count == 1
    for ignore_label, ids, count in ((None, [1, 20, 255], {}), (255, [1, 20], {}), (20, [1, 255], {})):
        (sample,) = MaskFolderDataset(tmp_path, ignore_label=ignore_label).samples(report := SkipReport())
        assert [i.id for i in sample.instances] == ids and counts(report) == ({}, count)


def test_another_reading_of_the_masks_is_another_run(tmp_path):
    write(tmp_path, {"images/a.jpg": jpeg(), "masks/a.png": png(labels(1, 2))})
    orders = [
        TrainingExamples(load_dataset(tmp_path, **reading), 1, 40, prompts=PromptSampling(2)).order()
        for reading in ({}, {"ignore_label": "auto"}, {"ignore_label": 2}, {"binary_masks": True})
    ]
    assert orders[0] == orders[1] and "masks" not in orders[0]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_folders_of_binary_masks_may_overlap(tmp_path):
    first, second = box_mask(), box_mask(x=8)
    write(
        tmp_path,
        {
            "images/x/a.png": png(labels()),
            "masks/x/a/0.png": png(first.astype(np.uint8) * 255),
            "masks/x/a/1.png": png(second),
            "masks/x/a/none.png": png(np.zeros((HEIGHT, WIDTH), np.uint8)),
        },
    )
    (sample,) = MaskFolderDataset(tmp_path).samples(SkipReport())
    assert [i.id for i in sample.instances] == ["0", "1"]
    np.testing.assert_array_equal(sample.masks(), [first, second])


def test_what_does_not_fit_is_counted(tmp_path):
    files = {f"images/{name}.jpg": jpeg() for name in ("good", "lonely", "small", "damaged", "colours")}
    files |= {
        "masks/good.png": png(labels(1)),
        "masks/small.png": png(labels(1)[:-3]),
        "masks/damaged.png": png(labels(1))[:60],
        "masks/colours.png": png(np.stack([labels(1), labels(2), labels(3)], -1)),
        "masks/orphan.png": png(labels(1)),
        "images/good.png": png(labels()),
    }
    dataset = MaskFolderDataset(write(tmp_path, files))
    assert counts(dataset.index_report)[0] == {
        SkipReason.MISSING_MASK: 1, SkipReason.MISSING_IMAGE: 1, SkipReason.DUPLICATE_IMAGE: 1
    }  # fmt: skip
    report = SkipReport()
    assert [sample.id for sample in dataset.samples(report)] == ["good.jpg"]
    assert counts(report)[0] == {SkipReason.IMAGE_SIZE: 1, SkipReason.MALFORMED_MASK: 1, SkipReason.COLOURED_MASK: 1}
    assert report.images[SkipReason.COLOURED_MASK].examples == ["colours.jpg (masks/colours.png)"]
    (tmp_path / "masks" / "good.png").unlink()
    assert SkipReason.MISSING_MASK in dataset.load(2)[1].images


def test_load_dataset_tells_the_folders_apart(tmp_path):
    write(tmp_path, {"photos/a.jpg": jpeg(), "mine/images/a.jpg": jpeg(), "mine/masks/a.png": png(labels(1))})
    assert isinstance(load_dataset(tmp_path / "mine"), MaskFolderDataset)
    assert isinstance(load_dataset(tmp_path / "photos", require_masks=False), ImageFolderDataset)
    with pytest.raises(ValueError, match="require_masks"):
        load_dataset(tmp_path / "photos")


def test_training_on_ones_own_masks(tmp_path):
    for i in range(3):
        write(tmp_path, {f"images/{i}.jpg": jpeg(seed=i), f"masks/{i}.png": png(labels(1, 2))})
    made = TrainingExamples(load_dataset(tmp_path), 6, 40, mask_size=40, prompts=PromptSampling(2))
    for example in made:
        masks = example["masks"].numpy()
        assert {mask.tobytes() for mask in masks} == {
            np.pad(labels(*values) == 1, ((0, 10), (0, 0))).tobytes() for values in ((1, 0), (0, 1))
        }


def test_prompts_need_masks_or_cutouts(tmp_path):
    photos = ImageFolderDataset(write(tmp_path, {"a.jpg": jpeg()}))
    assert len(list(TrainingExamples(photos, 3, 40))) == 3
    with pytest.raises(ValueError, match="images without masks, which prompts need"):
        TrainingExamples(photos, 3, 40, prompts=PromptSampling(2))


def test_pixels_stay_as_they_are_stored_whoever_turns_images_upright_later(tmp_path):
    """Masks are in the frame of the stored pixels, so the predictor must not turn the image of a sample."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=exif))
    image = ImageFolderDataset(tmp_path)[0].image
    assert ImageOps.exif_transpose(image).size == image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("file_format", ["labels", "png"])
@pytest.mark.parametrize(("orientation", "stored"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)])
def test_masks_of_our_own_belong_to_the_upright_image(tmp_path, file_format, orientation, stored):
    """By their size they could belong to the stored pixels too: of a square, and after half a turn."""
    mask = box_mask(x=2, y=3, width=10, height=5, image=(32, 32))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(np.repeat(mask[..., None], 3, axis=2) * np.uint8(255))
    (tmp_path / "images").mkdir()
    image.transpose(stored).save(tmp_path / "images/a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "images/a.png")), np.asarray(image))
    result = MaskResult(mask[None], np.ones(1, np.float32), np.array([[2, 3, 12, 8]], np.float32))
    (tmp_path / "masks").mkdir()
    write_masks(tmp_path / f"masks/a{ENDINGS[file_format]}", file_format, image, "a.png", result)
    dataset = MaskFolderDataset(tmp_path)
    assert np.array_equal(dataset[0].masks()[0], mask) and np.array_equal(np.asarray(dataset[0].image), image)
    assert np.array_equal(dataset.open(0).pixels()[0], np.asarray(image).transpose(2, 0, 1))
    dataset.image_cache = ImageCache(tmp_path / "cache")
    assert np.array_equal(dataset.open(0).pixels()[0], np.asarray(image).transpose(2, 0, 1))
