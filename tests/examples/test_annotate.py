"""examples/annotate.py, run on photographs and tars."""

import json
import tarfile

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.data import Sa1bDataset, load_dataset, sa1b
from samlight_hf.masks.files import save_label_map
from tests.data.files import rle
from tests.launcher import ROOT, backends, launch, output_of, torchrun

from .in_process import run_example


COFFEE = EXAMPLE_IMAGES / "coffee.jpg"


OPTIONS = ["--points-per-side", "4", "--pred-iou-thresh", "0.4", "--stability-score-thresh", "0.65"]


def annotate(images, out):
    options = ("--device", "cpu", *OPTIONS)
    run = run_example("annotate.py", images, "--out", out, "--model", BUNDLED_CHECKPOINT, *options)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """The tar for a folder with a JPEG, a BMP, a damaged and a too thin image; and the printed output."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "a.jpg").write_bytes(COFFEE.read_bytes())
    Image.open(COFFEE).resize((300, 200)).save(folder / "b.bmp")
    (folder / "c.jpg").write_bytes(COFFEE.read_bytes()[:3000])
    Image.new("RGB", (3000, 1)).save(folder / "d.png")
    return folder / "out.tar", annotate(folder, folder / "out.tar")


def test_a_folder_becomes_a_tar_to_train_on(annotated):
    tar, printed = annotated
    assert "2 images" in printed and "damaged" in printed and "too thin" in printed, printed
    with tarfile.open(tar) as opened:
        assert opened.getnames() == ["out_1.jpg", "out_1.json", "out_2.png", "out_2.json"]
        assert opened.extractfile("out_1.jpg").read() == COFFEE.read_bytes()
    dataset = Sa1bDataset(tar)
    assert [(sample.width, sample.height) for sample in dataset] == [(600, 400), (300, 200)]
    masks = dataset[0].instances
    assert len(masks) > 3
    assert len({instance.id for instance in masks}) == len(masks)
    assert min(instance.area for instance in masks) >= 64
    rles = [instance.rle for instance in masks]
    overlaps = coco_mask.iou(rles, rles, [0] * len(rles))
    assert (overlaps - np.eye(len(masks))).max() < 0.8


def test_a_tar_is_not_overwritten(annotated, tmp_path):
    tar, _ = annotated
    before = tar.read_bytes()
    run = run_example("annotate.py", tar, "--out", tar, "--model", BUNDLED_CHECKPOINT, "--device", "cpu")
    assert run.returncode == 1 and f"{tar} exists already. Move it away" in run.stderr
    assert tar.read_bytes() == before


def test_an_image_that_exif_data_turn_is_written_in_the_frame_of_its_masks(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/masks").mkdir()
    Image.open(COFFEE).resize((300, 200)).save(tmp_path / "mine/images/a.jpg", exif=exif)
    labels = np.zeros((200, 300), np.uint16)
    labels[20:60, 30:90] = 1
    save_label_map(tmp_path / "mine/masks/a.png", labels)  # of the image as its EXIF data turn it
    annotate(tmp_path / "mine", tmp_path / "out.tar")
    (expected,), (sample,) = load_dataset(tmp_path / "mine"), Sa1bDataset(tmp_path / "out.tar")
    assert np.array_equal(np.asarray(sample.image), np.asarray(expected.image))
    assert np.array_equal(sample.masks()[0], labels == 1)


@pytest.mark.parametrize("backend", backends(pytest.mark.slow))
def test_two_processes_write_the_tar_that_one_does(tmp_path, backend):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(5):
        Image.open(COFFEE).resize((300 - number, 200)).save(folder / f"{number}.{'bmp' if number == 3 else 'jpg'}")
    (folder / "1.jpg").write_bytes(COFFEE.read_bytes()[:3000])
    printed = []
    for count in (1, 2):
        (tmp_path / str(count) / ".out.tar.parts").mkdir(parents=True)
        for left in (".0.tar.123.part", "9.tar"):  # of a run that was killed
            (tmp_path / str(count) / ".out.tar.parts" / left).write_bytes(b"left")
        options = ("--out", tmp_path / str(count) / "out.tar", "--model", BUNDLED_CHECKPOINT, *OPTIONS)
        device = "auto" if backend == "nccl" else "cpu"
        arguments = (folder, *options, "--device", device)
        printed.append(torchrun(ROOT / "examples/annotate.py", count, *arguments, cuda=backend == "nccl"))
        assert [path.name for path in (tmp_path / str(count)).iterdir()] == ["out.tar"]
    assert printed[0].replace("/1/out", "/2/out") == printed[1] and "1 image: " in printed[1]
    one, two = (tmp_path / count / "out.tar" for count in "12")
    with tarfile.open(one) as first, tarfile.open(two) as second:
        assert first.getnames() == second.getnames() and len(first.getnames()) == 8
    if backend == "gloo":
        assert one.read_bytes() == two.read_bytes()
    for mine, theirs in zip(Sa1bDataset(one), Sa1bDataset(two), strict=True):
        overlaps = coco_mask.iou(
            *([i.rle for i in sample.instances] for sample in (mine, theirs)), [0] * len(theirs.instances)
        )
        assert len(mine.instances) == len(theirs.instances) > 0 and overlaps.max(axis=1).min() > 0.95


def test_masks_that_are_there_already_stay_and_are_not_found_again(annotated, tmp_path):
    first = Sa1bDataset(annotated[0])[0]
    existing = coco_mask.decode(first.instances[0].rle).astype(bool)
    existing[:2, :5] = True  # nearly one of the model's masks
    with tarfile.open(tmp_path / "existing.tar", "w") as tar:
        (tmp_path / "x.jpg").write_bytes(COFFEE.read_bytes())
        content = {"annotations": [{"id": 7, "segmentation": rle(existing)}]}
        (tmp_path / "x.json").write_text(json.dumps(content))
        for name in ("x.jpg", "x.json"):
            tar.add(tmp_path / name, name)
    annotate(tmp_path / "existing.tar", tmp_path / "out.tar")
    sample = Sa1bDataset(tmp_path / "out.tar")[0]
    assert len(sample.instances) == len(first.instances)
    np.testing.assert_array_equal(coco_mask.decode(sample.instances[0].rle), existing)


def test_a_finished_tar_that_cannot_be_moved_is_kept(tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    Image.open(COFFEE).resize((300, 200)).save(tmp_path / "photographs/a.jpg")
    out = tmp_path / "there" / "out.tar"
    out.parent.mkdir()
    add_sample = sa1b.add_sample

    def adding(*arguments):
        out.mkdir()  # meanwhile somebody makes a folder of that name
        add_sample(*arguments)

    monkeypatch.setattr(sa1b, "add_sample", adding)
    arguments = ("--out", out, "--model", BUNDLED_CHECKPOINT, "--device", "cpu", *OPTIONS)
    run = run_example("annotate.py", tmp_path / "photographs", *arguments)
    part = out.parent / ".out.tar.parts/0.tar"
    assert run.returncode == 1
    assert f"{out} was not written." in run.stderr and run.stderr.endswith(f" are kept until it is: {part}.\n")
    assert len(Sa1bDataset(part)) == 1


_FAILING = """
import os, runpy, sys, time
from pathlib import Path
from samlight_hf.data import sa1b

def failing(*arguments):
    if os.environ["RANK"] == "1":
        while not Path(sys.argv[3]).parent.joinpath(".out.tar.parts/0.tar").exists():
            time.sleep(0.1)
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return add(*arguments)

add, sa1b.add_sample = sa1b.add_sample, failing
runpy.run_path("examples/annotate.py", run_name="__main__")
"""


@pytest.mark.slow
def test_one_of_two_processes_fails_and_leaves_nothing_for_good(tmp_path):
    """The finished part of the other one is kept and named; the next run, on one process, removes what is left."""
    (tmp_path / "failing.py").write_text(_FAILING)
    (tmp_path / "photographs").mkdir()
    for number in range(2):
        Image.open(COFFEE).resize((300 - number, 200)).save(tmp_path / f"photographs/{number}.jpg")
    out = tmp_path / "there" / "out.tar"
    out.parent.mkdir()
    options = ("--out", out, "--model", BUNDLED_CHECKPOINT, *OPTIONS, "--device", "cpu")
    process = launch(tmp_path / "failing.py", 2, tmp_path / "photographs", *options)
    _, complaints = output_of(process)
    part = out.parent / ".out.tar.parts/0.tar"
    assert process.returncode != 0 and "process 1: error: CUDA error: uncorrectable ECC" in complaints
    assert "another process" in complaints and f" are kept until it is: {part}." in complaints
    assert len(Sa1bDataset(part)) == 1
    annotate(tmp_path / "photographs", out)
    assert [path.name for path in out.parent.iterdir()] == ["out.tar"]
    assert len(Sa1bDataset(out)) == 2
