"""`samlight` as a user sees it: files, exit status, and one line on stderr for each error."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import samlight_hf
from samlight_hf.commands import cli
from samlight_hf.commands import options as options_module
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.inference.crops import MaskGenerationSettings
from samlight_hf.masks import files as mask_files


QUICK = ["--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path):
    """A folder of two images, one in a subfolder."""
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("one.jpg", "deep/two.PNG"):
        image = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        image.save(tmp_path / "photos" / name)
    return tmp_path / "photos"


NOTE = ".samlight.json"


def names(folder: Path) -> set[str]:
    """Return the paths of results at any depth, without the hidden note; a folder of PNGs is one path."""
    found = set()
    for path in sorted(folder.rglob("*")):
        in_result = any(parent.name.endswith("_masks") for parent in path.relative_to(folder).parents)
        if not in_result and (path.is_file() or path.name.endswith("_masks")):
            found.add(path.relative_to(folder).as_posix())
    return found - {NOTE}


def one_line(stderr: str, *words: str):
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("samlight: ")
    for word in words:
        assert str(word) in stderr, stderr


def test_a_folder_gives_overlays_a_contact_sheet_and_a_table(samlight, photos, checkpoint, tmp_path):
    out = tmp_path / "new" / "masks"
    status, stdout, stderr = samlight("segment", photos, "--out", out, "--model", checkpoint, *QUICK)
    assert (status, stderr) == (0, "")
    assert names(out) == {"one_masks.png", "deep/two_masks.png", "contact_sheet.png"}
    assert Image.open(out / "one_masks.png").size == (40, 30)
    header, *rows, sheet, last = stdout.splitlines()
    assert header.split() == ["image", "size", "prompt", "masks", "seconds", "output"]
    assert len(rows) == 2
    assert rows[1].split()[:3] == [str(photos / "one.jpg"), "40x30", "everything"]
    assert str(out / "contact_sheet.png") in sheet
    num_masks = sum(int(row.split()[3]) for row in rows)
    assert last.startswith(f"2 images, {num_masks} masks, ")
    assert last.endswith(f" images/s, in {out}")


def test_prompts(samlight, photos, checkpoint, tmp_path):
    prompts = ["--box", "1,2,30,20", "--box", "0,0,40,30", "--point", "39.5,29"]
    status, stdout, stderr = samlight("segment", photos / "one.jpg", *prompts, "--out", tmp_path, "--model", checkpoint)
    assert (status, stderr) == (0, "")
    assert "2 boxes, 1 point      3" in stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("prompts", [QUICK, ["--point", "3,3", "--device", "cpu"]], ids=["everything", "point"])
def test_half_precision(samlight, photos, checkpoint, tmp_path, dtype, prompts):
    arguments = [photos / "one.jpg", "--out", tmp_path, "--model", checkpoint, "--dtype", dtype, *prompts]
    assert samlight("segment", *arguments)[::2] == (0, "")


def test_bad_files_are_skipped_and_named(samlight, photos, checkpoint, tmp_path):
    (photos / "diary.jpg").write_text("Dear diary")
    (photos / "half.jpg").write_bytes((photos / "one.jpg").read_bytes()[:400])
    Image.new("RGB", (500, 2)).save(photos / "thin.png")
    Image.new("I;16", (9, 9)).save(photos / "sixteen.png")
    arguments = [photos, tmp_path / "gone.jpg", "--out", tmp_path / "out", "--model", checkpoint, *QUICK]
    status, stdout, stderr = samlight("segment", *arguments)
    assert status == 0
    assert len(stdout.splitlines()) == 1 + 3 + 2
    lines = stderr.splitlines()
    assert len(lines) == 5
    for name, what in (("gone", "no such"), ("diary", "not an image"), ("half", "truncated"), ("thin", "too thin")):
        assert any(name in line and what in line for line in lines[:4]), stderr
    assert lines[-1] == "samlight: 4 skipped, 3 done."


def test_prompts_that_fit_one_image_only(samlight, photos, checkpoint, tmp_path):
    Image.new("RGB", (100, 100)).save(photos / "large.png")
    arguments = ["--box", "50,50,90,90", "--out", tmp_path / "out", "--model", checkpoint]
    status, stdout, stderr = samlight("segment", photos, *arguments)
    assert status == 0
    assert "large.png" in stdout
    assert stderr.count("box 50,50,90,90 lies outside the image of 40x30 pixels") == 2
    status, stdout, stderr = samlight("segment", photos / "one.jpg", *arguments)
    assert (status, stdout) == (1, "")
    assert "no image could be segmented (1 skipped)" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "prompt", ["--box=10,10,10,20", "--box=20,10,10,20", "--box=-5,0,-1,10", "--point=41,0", "--point=-1,-1"]
)
def test_prompts_that_no_image_can_have(samlight, photos, checkpoint, tmp_path, prompt):
    status, _, stderr = samlight("segment", photos / "one.jpg", prompt, "--out", tmp_path, "--model", checkpoint)
    assert status == 1
    assert "one.jpg: " in stderr.splitlines()[0]
    assert prompt.split("=")[1] in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment"],
        ["unknown"],
        ["segment", "x.jpg", "--box", "1,2,3"],
        ["segment", "x.jpg", "--box", "a,b,c,d"],
        ["segment", "x.jpg", "--point", "1,2,3"],
        ["segment", "x.jpg", "--point", ""],
        ["segment", "x.jpg", "--points-per-side", "0"],
        ["segment", "x.jpg", "--points-per-batch", "1.5"],
        ["segment", "x.jpg", "--pred-iou-thresh", "1.5"],
        ["segment", "x.jpg", "--stability-score-thresh", "nan"],
        ["segment", "x.jpg", "--format", "tiff"],
        ["segment", "x.jpg", "--min-area", "-1"],
        ["segment", "x.jpg", "--max-masks", "0"],
        ["segment", "x.jpg", "--batch-size", "0"],
        ["demo", "--surprise"],
    ],
    ids=" ".join,
)
def test_wrong_usage(samlight, arguments):
    status, stdout, stderr = samlight(*arguments)
    assert (status, stdout) == (2, "")
    assert "error: " in stderr.splitlines()[-1]


@pytest.mark.parametrize("option", [("--device", "nonsense"), ("--device", "cuda:77"), ("--dtype", "int8")])
def test_devices_and_dtypes_that_cannot_be(samlight, photos, checkpoint, tmp_path, option):
    status, _, stderr = samlight("segment", photos, "--out", tmp_path / "out", "--model", checkpoint, *option)
    assert status == 2
    one_line(stderr, option[1])


def test_broken_checkpoints(samlight, photos, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model, words in ((broken, "truncated"), (tmp_path / "none", "no such folder"), (photos, "config.json")):
        status, stdout, stderr = samlight("segment", photos, "--out", tmp_path / "out", "--model", model)
        assert (status, stdout) == (1, "")
        one_line(stderr, model, words)


def test_without_a_clone_a_model_is_asked_for(samlight, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "BUNDLED_CHECKPOINT", tmp_path / "none")
    status, _, stderr = samlight("segment", photos, "--out", tmp_path / "out")
    assert status == 2
    one_line(stderr, "--model")
    monkeypatch.setattr("samlight_hf.commands.demo.EXAMPLE_IMAGES", tmp_path / "none")
    status, _, stderr = samlight("demo", "--out", tmp_path / "out")
    assert status == 2
    one_line(stderr, "clone")


def test_places_that_results_cannot_go_to(samlight, photos, checkpoint, tmp_path):
    shutil.copy(photos / "deep/two.PNG", photos / "deep/one_masks.png")
    before = (photos / "deep/one_masks.png").read_bytes()
    for out, paths in (
        (photos / "one.jpg", [photos]),
        (photos, [photos]),
        (photos / "deep", [photos / "one.jpg", photos / "deep/one_masks.png"]),
    ):
        status, _, stderr = samlight("segment", *paths, "--out", out, "--model", checkpoint, *QUICK)
        assert status == 2
        one_line(stderr, f"--out {out}")
    assert (photos / "deep/one_masks.png").read_bytes() == before


def test_results_of_an_earlier_run_are_not_segmented(samlight, photos, checkpoint):
    for _ in range(2):
        status, stdout, _ = samlight("segment", photos, "--out", photos / "out", "--model", checkpoint, *QUICK)
        assert status == 0
        assert len(stdout.splitlines()) == 1 + 2 + 2


def read_result(path: Path) -> list[np.ndarray]:
    """Read the masks of one image, of any format but overlay."""
    from pycocotools import mask as coco_mask

    if path.is_dir():
        return [np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))]
    if path.suffix == ".npz":
        return list(np.load(path)["masks"])
    annotations = json.loads(path.read_text())["annotations"]
    return [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in annotations]


@pytest.mark.parametrize("prompts", [QUICK, ["--box", "1,2,30,20", "--point", "3,3"]], ids=["everything", "prompts"])
def test_formats_hold_the_same_masks(samlight, photos, checkpoint, tmp_path, prompts):
    results = {}
    for file_format in ("overlay", "png", "coco", "npz"):  # the others: test_segment_formats.py
        out, ending = tmp_path / file_format, mask_files.ENDINGS[file_format]
        arguments = [photos / "one.jpg", "--format", file_format, "--out", out, "--model", checkpoint, *prompts]
        assert samlight("segment", *arguments)[::2] == (0, "")
        expected = {f"one{ending}"} | ({"contact_sheet.png"} if file_format == "overlay" else set())
        assert names(out) == expected
        if file_format != "overlay":
            results[file_format] = read_result(out / f"one{ending}")
    assert len(results["coco"]) > 0
    for masks in results.values():
        assert np.array_equal(masks, results["coco"])
        assert masks[0].shape == (30, 40)
    table = (tmp_path / "png/one_masks/masks.csv").read_text().splitlines()
    assert table[0] == "file,predicted_iou,x1,y1,x2,y2"
    assert len(table) == 1 + len(results["png"])


def test_coco_is_read_by_pycocotools(samlight, photos, checkpoint, tmp_path):
    from pycocotools.coco import COCO

    arguments = [photos / "one.jpg", "--format", "coco", "--out", tmp_path / "out", "--model", checkpoint]
    assert samlight("segment", *arguments, *QUICK)[0] == 0
    coco = COCO(tmp_path / "out/one.json")
    assert coco.loadImgs(1)[0] == {"id": 1, "file_name": "one.jpg", "width": 40, "height": 30}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1, catIds=1))
    assert len(annotations) > 0
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        x, y, width, height = annotation["bbox"]
        assert mask.sum() == annotation["area"] == mask[int(y) : int(y + height), int(x) : int(x + width)].sum()
        assert {"predicted_iou", "stability_score", "point_coords", "crop_box"} < set(annotation)


def test_small_masks_and_many_masks_are_left_out(samlight, photos, checkpoint, tmp_path):
    def masks_of(*options):
        arguments = [photos / "one.jpg", "--format", "npz", "--out", tmp_path / "out", "--model", checkpoint]
        assert samlight("segment", *arguments, *QUICK, "--points-per-side", "4", *options)[0] == 0
        result = np.load(tmp_path / "out/one.npz")
        return result["masks"].sum(axis=(1, 2)), result["scores"]

    areas, scores = masks_of()
    limit = int(np.median(areas)) + 1
    assert masks_of("--min-area", limit)[0].tolist() == areas[areas >= limit].tolist()
    assert masks_of("--max-masks", 1)[1].tolist() == scores[:1].tolist()


def test_resuming_leaves_finished_images_alone(samlight, photos, checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = ["segment", photos, "--format", "coco", "--out", out, "--model", checkpoint, *QUICK]
    assert samlight(*arguments)[0] == 0
    (out / "one.json").write_text("finished")
    (out / "deep/two.json").unlink()
    status, stdout, stderr = samlight(*arguments, "--resume")
    assert (status, stderr) == (0, "")
    assert "1 image done before" in stdout
    assert (out / "one.json").read_text() == "finished"
    assert json.loads((out / "deep/two.json").read_text())["annotations"]
    status, stdout, _ = samlight(*arguments, "--resume")
    assert (status, stdout) == (0, "2 images done before.\n")
    assert samlight(*arguments)[0] == 0
    assert (out / "one.json").read_text() != "finished"


def test_resuming_takes_no_results_of_an_earlier_run_for_its_own(samlight, photos, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["segment", photos, "--format", "coco", "--out", out, "--model", checkpoint]
    assert samlight(*arguments, *QUICK)[0] == 0
    others = [*arguments, *QUICK, "--points-per-side", "3"]
    with monkeypatch.context() as patch:
        patch.setattr("samlight_hf.commands.segment._run_jobs", Mock(side_effect=KeyboardInterrupt))
        assert samlight(*others)[0] == 130
    status, stdout, _ = samlight(*others, "--resume")
    assert status == 0 and "done before" not in stdout
    status, stdout, _ = samlight(*others, "--resume")
    assert (status, stdout) == (0, "2 images done before.\n")


def test_resuming_knows_images_from_others_of_their_names(samlight, photos, checkpoint, tmp_path):
    def image_of(path: Path) -> tuple[int, int]:
        image = json.loads(path.read_text())["images"][0]
        return image["width"], image["height"]

    for folder, size in (("p/in", (40, 30)), ("q/in", (30, 40))):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", size, "teal").save(tmp_path / folder / "0001.png")
    out = tmp_path / "out"
    arguments = ["--format", "coco", "--out", out, "--model", checkpoint, *QUICK, "--resume"]
    assert samlight("segment", tmp_path / "p", *arguments)[0] == 0
    status, stdout, _ = samlight("segment", tmp_path / "q", *arguments)
    assert status == 0 and "done before" not in stdout
    assert [image_of(out / name) for name in ("in/0001.json", "q/in/0001.json")] == [(40, 30), (30, 40)]
    Image.new("RGB", (50, 30), "navy").save(tmp_path / "q/in/0001.png")  # another one in its place
    status, stdout, stderr = samlight("segment", tmp_path / "q", *arguments)
    assert "done before" not in stdout and "1 earlier result of the same images replaced" in stderr
    assert [image_of(out / name) for name in ("in/0001.json", "q/in/0001.json")] == [(40, 30), (50, 30)]


@pytest.mark.parametrize("pattern", ["*.safetensors", "config.json"])
def test_resuming_with_other_files_of_the_model_is_refused(samlight, photos, checkpoint, tmp_path, pattern):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    arguments = ["segment", photos, "--out", tmp_path / "out", *QUICK, "--model"]
    assert samlight(*arguments, model)[0] == 0
    assert samlight(*arguments, f"{model}/", "--resume")[:2] == (0, "2 images done before.\n")
    os.utime(next(model.glob(pattern)))
    status, _, stderr = samlight(*arguments, model, "--resume")
    assert status == 2
    one_line(stderr, "another run: the model's files was")


def test_results_are_no_images_to_another_run(samlight, photos, checkpoint):
    for name in ("first", "second"):
        assert samlight("segment", photos, "--out", photos / name, "--model", checkpoint, *QUICK)[0] == 0
    assert names(photos / "second") == {"one_masks.png", "deep/two_masks.png", "contact_sheet.png"}


def test_resuming_with_other_settings_is_refused(samlight, photos, checkpoint, tmp_path):
    arguments = ["segment", photos, "--out", tmp_path / "out", "--model", checkpoint, *QUICK]
    assert samlight(*arguments)[0] == 0
    status, _, stderr = samlight(*arguments, "--resume", "--points-per-side", "3", "--max-masks", "5")
    assert status == 2
    one_line(stderr, "another run", "--points-per-side was 2 and is 3", "--max-masks was not given and is 5")
    (tmp_path / "out" / NOTE).write_text("{")
    status, _, stderr = samlight(*arguments, "--resume")
    assert status == 2
    one_line(stderr, NOTE, "cannot be read")


def test_an_interrupted_write_leaves_what_was_there(samlight, photos, checkpoint, tmp_path, monkeypatch):
    for file_format, method in (("overlay", "Image.save"), ("png", "Image.save"), ("npz", "savez_compressed")):
        out = tmp_path / file_format
        arguments = [photos / "one.jpg", "--format", file_format, "--out", out, "--model", checkpoint, *QUICK]
        assert samlight("segment", *arguments)[0] == 0
        path = out / f"one{mask_files.ENDINGS[file_format]}"
        before = [file.read_bytes() for file in (sorted(path.glob("*")) if path.is_dir() else [path])]

        def half(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Image.Image if method == "Image.save" else np, method.split(".")[-1], half)
            status, _, stderr = samlight("segment", *arguments)
        assert status == 130
        one_line(stderr, "interrupted: 0 of 1 images are done", "--resume")
        assert [file.read_bytes() for file in (sorted(path.glob("*")) if path.is_dir() else [path])] == before
        assert not [name for name in names(out) if name.endswith((".part", ".old"))]


def test_sigterm_ends_as_ctrl_c_does(samlight, photos, checkpoint, tmp_path, monkeypatch):
    """What has begun to be written is finished and counted, and no hidden folder is left."""
    save, sent = Image.Image.save, []

    def stop(image, *arguments, **options):
        save(image, *arguments, **options)
        if not sent:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "it would end this process"
            sent.append(True)
            time.sleep(0.5)  # by then the main thread has started this one, and waits for it
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    monkeypatch.setattr(Image.Image, "save", stop)
    arguments = [photos / "one.jpg", "--format", "png", "--out", tmp_path / "out", "--model", checkpoint, *QUICK]
    status, _, stderr = samlight("segment", *arguments)
    assert sent and status == 143
    one_line(stderr, "interrupted: 1 of 1 images are done", "--resume")
    assert not [name for name in names(tmp_path / "out") if name.endswith((".part", ".old"))]
    assert samlight("segment", *arguments, "--resume")[:2] == (0, "1 image done before.\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_stops_a_folder_cleanly_and_resume_goes_on(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(80):
        Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number:03}.png")
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "samlight_hf.commands.cli",
        "segment",
        tmp_path / "photos",
        "--format",
        "coco",
        "--out",
        out,
    ]
    command = [*map(str, command), "--model", checkpoint, *QUICK, "--points-per-side", "8"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job ignores SIGINT, and what it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(out.glob("[0-9]*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    done = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.json")}
    assert 5 <= len(done) < 80
    one_line(stderr, f"interrupted: {len(done)} of 80 images are done", "--resume")
    assert all(json.loads(path.read_text())["images"] for path in done)
    assert not list(out.glob(".*.part"))
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{len(done)} images done before" in result.stdout
    assert len(list(out.glob("[0-9]*.json"))) == 80
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())


def test_a_full_disk_ends_the_run_with_one_line(samlight, photos, checkpoint, tmp_path, monkeypatch):
    counter = itertools.count()
    write = Path.write_text

    def write_text(path, text, **options):
        if path.name.startswith(".") and ".json." in path.name and NOTE not in path.name and next(counter) > 0:
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    out = tmp_path / "out"
    arguments = ["segment", photos, "--format", "coco", "--out", out, "--model", checkpoint, *QUICK]
    status, stdout, stderr = samlight(*arguments)
    assert (status, stdout) == (1, "")
    one_line(stderr, "cannot be written: No space left on device", "--resume goes on")
    assert len(names(out)) == 1  # what was finished before
    monkeypatch.undo()
    assert samlight(*arguments, "--resume")[0] == 0
    assert names(out) == {"one.json", "deep/two.json"}


@pytest.mark.parametrize(
    "error, status, message",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_reaches_the_user_as_a_traceback(
    samlight, photos, checkpoint, tmp_path, monkeypatch, error, status, message
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(mask_files, "write_masks", fail)
    result = samlight("segment", photos / "one.jpg", "--out", tmp_path, "--model", checkpoint, *QUICK)
    assert result[0] == status
    one_line(result[2], message)


def test_an_image_that_does_not_fit_is_skipped_and_its_batch_is_not(
    samlight, photos, checkpoint, tmp_path, monkeypatch
):
    from samlight_hf.inference.mask_generation import MaskGenerator

    generate = MaskGenerator.generate

    def limited(self, image, *arguments):
        if image.shape[1] > 100:
            raise MemoryError
        return generate(self, image, *arguments)

    monkeypatch.setattr(MaskGenerator, "generate", limited)
    Image.new("RGB", (200, 200)).save(photos / "large.png")
    status, stdout, stderr = samlight("segment", photos, "--out", tmp_path / "out", "--model", checkpoint, *QUICK)
    assert status == 0
    assert len(stdout.splitlines()) == 1 + 2 + 2
    assert "large.png" in stderr.splitlines()[0]
    assert stderr.splitlines()[-1] == "samlight: 1 skipped, 2 done."


def test_nothing_found_says_how_to_find_more(samlight, photos, checkpoint, tmp_path):
    arguments = ["--points-per-side", "2", "--pred-iou-thresh", "1", "--out", tmp_path, "--model", checkpoint]
    status, stdout, _ = samlight("segment", photos / "one.jpg", *arguments)
    assert status == 0
    assert "No masks found: lower --pred-iou-thresh" in stdout


def test_default_thresholds_are_those_of_the_pipeline():
    args = cli.build_parser().parse_args(["segment", "x.jpg"])
    settings = MaskGenerationSettings()
    assert args.pred_iou_thresh == settings.pred_iou_thresh
    assert args.stability_score_thresh == settings.stability_score_thresh


def test_demo(samlight, checkpoint, tmp_path):
    status, stdout, stderr = samlight("demo", "--out", tmp_path, "--model", checkpoint, "--device", "cpu")
    assert (status, stderr) == (0, "")
    photographs = {path.stem for path in EXAMPLE_IMAGES.glob("*.jpg")}
    assert len(photographs) == 4
    kinds = ("boxes", "points", "everything")
    assert names(tmp_path) == {f"{name}_{kind}.png" for name in photographs for kind in kinds} | {"contact_sheet.png"}
    assert len(stdout.splitlines()) == 1 + 3 * len(photographs) + 1
    credits = (EXAMPLE_IMAGES.parent / "CREDITS.md").read_text()
    assert all(f"`{name}.jpg`" in credits for name in photographs)


def test_help_and_version(samlight):
    assert samlight("--help")[0] == samlight("segment", "--help")[0] == 0
    assert samlight("segment")[0] == 2
    assert samlight("--version")[1] == f"samlight {samlight_hf.__version__}\n"


@pytest.mark.parametrize("arguments", [["", "--out", "x"], ["x.jpg", "--model", ""]])
def test_an_empty_name_is_not_the_current_directory(samlight, arguments):
    status, _, stderr = samlight("segment", *arguments)
    assert status == 2
    assert "is empty" in stderr


@pytest.mark.parametrize(("box", "is_inside"), [("-5,-5,20,20", True), ("-5,0,20,20", True), ("-5,0,-1,20", False)])
def test_a_box_that_begins_with_a_minus(samlight, checkpoint, photos, tmp_path, box, is_inside):
    status, _, stderr = samlight(
        "segment", photos / "one.jpg", "--box", box, "--model", checkpoint, "--out", tmp_path / "out"
    )
    assert status == (0 if is_inside else 1)
    assert ("lies outside the image" in stderr) is not is_inside


def test_the_bundled_checkpoint_in_a_process_of_its_own(tmp_path):
    arguments = [EXAMPLE_IMAGES / "cat.jpg", "--box", "215,215,288,265", "--out", tmp_path]
    command = [sys.executable, "-m", "samlight_hf.commands.cli", "segment", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert BUNDLED_CHECKPOINT.is_dir()
    assert names(tmp_path) == {"cat_masks.png", "contact_sheet.png"}


def test_a_reader_who_leaves_early(tmp_path):
    command = f"{sys.executable} -m samlight_hf.commands.cli segment --help"
    result = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True)
    assert result.stderr == ""
