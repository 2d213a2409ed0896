"""Data that cannot be used are named in one line before anything is trained."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from samlight_hf.data import CocoDataset, Sa1bDataset
from samlight_hf.distillation.open_data import check_usable
from tests.data.files import HEIGHT, WIDTH, annotation, box_mask, jpeg, sa1b_json, write_coco, write_tar

from .test_run import run


def good_samples(num_images: int = 4) -> dict[str, bytes]:
    files = [(f"{n}.jpg", jpeg(seed=n)) for n in range(num_images)]
    return dict(files) | {f"{n}.json": sa1b_json(annotation(1, box_mask(width=20))) for n in range(num_images)}


BAD_SETS = {
    "missing": (None, "no such file or folder. Check the name."),
    "cut short": (slice(3000), "the tar is damaged or cut short. Copy or download it again"),
    "cut between members": (slice(2048), "the tar is damaged or cut short"),
    "no tar": (b"<html>not found</html>", "no tar, or "),
    "another format": ({"jpg": "bmp"}, "annotation JSON without a .jpg, .jpeg, .png or .webp file of its name"),
    "an unknown format": (b"\0\0\0\x18ftypheic", "4 images: no image, or one of a format that cannot be opened"),
    "masks of zero area": (annotation(1, np.zeros((HEIGHT, WIDTH), bool)), "4 instances: mask of zero area"),
    "masks of another size": (annotation(1, box_mask(image=(90, 90))), "4 instances: RLE size disagrees"),
    "crowds alone": (annotation(1, iscrowd=1), "none of the 4 images that were tried has a mask that can be used"),
}


def write_bad_set(path: Path, fault) -> Path:
    """Write a tar of four images with this fault: see BAD_SETS."""
    members = good_samples()
    if isinstance(fault, dict) and "id" in fault:
        members |= {f"{n}.json": sa1b_json(fault) for n in range(4)}
    elif isinstance(fault, dict):
        members = {name.replace("jpg", fault["jpg"]): content for name, content in members.items()}
    elif isinstance(fault, bytes) and b"ftyp" in fault:
        members |= {f"{n}.jpg": fault + bytes(2000) for n in range(4)}
    if fault is None:
        return path
    write_tar(path, members)
    if isinstance(fault, slice):
        path.write_bytes(path.read_bytes()[fault])
    elif isinstance(fault, bytes) and b"html" in fault:
        path.write_bytes(fault)
    return path


@pytest.mark.parametrize("role", ["train", "eval"])
@pytest.mark.parametrize("fault", BAD_SETS)
def test_a_bad_tar_of_the_list_is_named_before_anything_is_trained(folder, tmp_path, fault, role):
    content, message = BAD_SETS[fault]
    good, bad = write_tar(tmp_path / "good.tar", good_samples()), write_bad_set(tmp_path / "bad.tar", content)
    data = ("--train_data", str(good), *([str(bad)] if role == "train" else []))
    options = ("--eval_limit", "4", *(["--eval_data", str(bad)] if role == "eval" else []))
    with pytest.raises(ValueError, match=rf"bad\.tar.*\n?(.|\n)*{re.escape(message)}"):
        run(folder, tmp_path / "out", *options, stages=("end_to_end",), data=data)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("fault", ["missing", "cut short", "cut between members", "no tar"])
def test_a_bad_tar_of_a_stream_is_named_before_anything_is_trained(folder, tmp_path, fault):
    good, bad = (
        write_tar(tmp_path / "good.tar", good_samples()),
        write_bad_set(tmp_path / "bad.tar", BAD_SETS[fault][0]),
    )
    with pytest.raises(ValueError, match=rf"bad\.tar: .*{re.escape(BAD_SETS[fault][1])}"):
        run(folder, tmp_path / "out", stages=("end_to_end",), data=("--stream_data", str(good), str(bad)))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_set_with_few_usable_images_is_found_wherever_they_are(folder, tmp_path):
    """Some of the images that are tried must be usable, and they are spread over the set."""
    members = {f"{n:03}.jpg": jpeg(seed=n) for n in range(100)}
    members |= {f"{n:03}.json": sa1b_json(*[annotation(1)] * (n >= 70)) for n in range(100)}
    options = ("--eval_data", str(write_tar(tmp_path / "late.tar", members)), "--eval_limit", "100")
    run(folder, tmp_path / "out", *options, "--max_steps", "1", stages=("end_to_end",))
    metrics = json.loads((tmp_path / "out/end_to_end/result.json").read_text())["metrics"]
    assert 0 <= metrics["eval_box_miou"] <= 1  # and no sheet of the first images, which have no masks, is drawn
    assert not (tmp_path / "out/end_to_end/pictures").exists()


def test_usable_images_at_a_period_are_found(tmp_path):
    """Of 640 images, 192 have masks; every tenth, as 64 images at even distances would be, has none."""
    image, masked, bare = jpeg(), sa1b_json(annotation(1)), sa1b_json()
    members = {f"{n:03}.jpg": image for n in range(640)}
    members |= {f"{n:03}.json": masked if n % 10 in (1, 2, 3) else bare for n in range(640)}
    check_usable("train_data", Sa1bDataset(write_tar(tmp_path / "a.tar", members)), needs_masks=True)


@pytest.mark.parametrize("number", [0, 333, 639])
def test_the_only_annotated_image_of_a_coco_file_is_found(tmp_path, number):
    entries = [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(640)]
    images = dict.fromkeys((f"{n}.jpg" for n in range(640)), jpeg())
    usable = CocoDataset(*write_coco(tmp_path, entries, [annotation(1, image_id=number)], images))
    check_usable("train_data", usable, needs_masks=True)
    bare = CocoDataset(*write_coco(tmp_path / "bare", entries[:3], [], {f"{n}.jpg": jpeg() for n in range(3)}))
    check_usable("train_data", bare, needs_masks=False)
    with pytest.raises(ValueError, match="none of the 3 images that were tried has a mask"):
        check_usable("train_data", bare, needs_masks=True)
