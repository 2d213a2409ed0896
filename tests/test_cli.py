"""`samlight` as a user sees it: files, exit status, and one line on stderr for whatever goes wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samlight_hf
from samlight_hf import SamLighteningModel, cli, segment_command
from samlight_hf.segment_command import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES, output_paths, save_picture

from .conftest import tiny_config


QUICK = ["--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """Two pictures; whatever a test adds lies beside them."""
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("one.jpg", "deep/two.PNG"):
        picture = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        picture.save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def samlight(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # what loading and saving in fixtures has said
        status = cli.main([str(argument) for argument in arguments])
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stdout + stderr
        return status, stdout, stderr

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def one_line(stderr: str, *words: str):
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("samlight: ")
    for word in words:
        assert str(word) in stderr, stderr


def test_a_folder_gives_overlays_a_contact_sheet_and_a_table(samlight, photos, checkpoint, tmp_path):
    out = tmp_path / "new" / "masks"
    status, stdout, stderr = samlight("segment", photos, "--out", out, "--model", checkpoint, *QUICK)
    assert (status, stderr) == (0, "")
    assert names(out) == {"one_masks.png", "two_masks.png", "contact_sheet.png"}
    assert Image.open(out / "one_masks.png").size == (40, 30)
    header, *rows, last = stdout.splitlines()
    assert header.split() == ["picture", "size", "prompt", "masks", "seconds", "overlay"]
    assert len(rows) == 2
    assert rows[1].split()[:3] == [str(photos / "one.jpg"), "40x30", "everything"]
    assert str(out / "contact_sheet.png") in last


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
    assert len(stdout.splitlines()) == 1 + 3 + 1
    lines = stderr.splitlines()
    assert len(lines) == 5
    for name, what in (("gone", "no such"), ("diary", "not a picture"), ("half", "truncated"), ("thin", "too thin")):
        assert any(name in line and what in line for line in lines[:4]), stderr
    assert lines[-1] == "samlight: 4 skipped, 3 done."


def test_prompts_that_fit_one_picture_only(samlight, photos, checkpoint, tmp_path):
    Image.new("RGB", (100, 100)).save(photos / "large.png")
    arguments = ["--box", "50,50,90,90", "--out", tmp_path / "out", "--model", checkpoint]
    status, stdout, stderr = samlight("segment", photos, *arguments)
    assert status == 0
    assert "large.png" in stdout
    assert stderr.count("box 50,50,90,90 reaches outside the picture of 40x30 pixels") == 2
    status, stdout, stderr = samlight("segment", photos / "one.jpg", *arguments)
    assert (status, stdout) == (1, "")
    assert "no picture could be segmented (1 skipped)" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "prompt", ["--box=10,10,10,20", "--box=20,10,10,20", "--box=-5,0,10,10", "--point=40,0", "--point=-1,-1"]
)
def test_prompts_that_no_picture_can_have(samlight, photos, checkpoint, tmp_path, prompt):
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
    monkeypatch.setattr(segment_command, "BUNDLED_CHECKPOINT", tmp_path / "none")
    status, _, stderr = samlight("segment", photos, "--out", tmp_path / "out")
    assert status == 2
    one_line(stderr, "--model")
    monkeypatch.setattr(segment_command, "EXAMPLE_IMAGES", tmp_path / "none")
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
        assert len(stdout.splitlines()) == 1 + 2 + 1


def test_output_names_never_clash():
    pictures = [
        Path(path) for path in ("a/x.jpg", "b/x.jpg", "b/X.png", "c/b/x.jpg", "y.jpg", "y/b_x_jpg.png", "d/Ü.jpg")
    ]
    outputs = output_paths(pictures, Path("out"))
    assert len({str(path).casefold() for path in outputs}) == len(pictures)
    assert [path.name for path in outputs[:3]] == ["a_x_jpg_masks.png", "b_x_jpg_masks.png", "b_X_png_masks.png"]
    assert outputs[4].name == "y_masks.png"


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_picture(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()

    def half(picture, file, **options):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_picture(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == {"x.png"}


@pytest.mark.parametrize(
    "error, status, message",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "MemoryError"),
        (ZeroDivisionError("two\nlines"), 1, "internal error: ZeroDivisionError: two lines"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_reaches_the_user_as_a_traceback(
    samlight, photos, checkpoint, tmp_path, monkeypatch, error, status, message
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(segment_command, "save_picture", fail)
    result = samlight("segment", photos / "one.jpg", "--out", tmp_path, "--model", checkpoint, *QUICK)
    if isinstance(error, MemoryError):  # one picture may be too large, and the next one not
        assert result[0] == 1
        assert "skipped" in result[2]
    else:
        assert result[0] == status
        one_line(result[2], message)


def test_nothing_found_says_how_to_find_more(samlight, photos, checkpoint, tmp_path):
    arguments = ["--points-per-side", "2", "--pred-iou-thresh", "1", "--out", tmp_path, "--model", checkpoint]
    status, stdout, _ = samlight("segment", photos / "one.jpg", *arguments)
    assert status == 0
    assert "No masks found: lower --pred-iou-thresh" in stdout


def test_thresholds_suit_the_model_unless_they_are_given(tmp_path):
    parse = cli.build_parser().parse_args
    for options, model, expected in (
        ([], BUNDLED_CHECKPOINT, segment_command.BUNDLED_THRESHOLDS),
        ([], tmp_path, segment_command.DEFAULT_THRESHOLDS),
        (["--pred-iou-thresh", "0"], BUNDLED_CHECKPOINT, (0, segment_command.BUNDLED_THRESHOLDS[1])),
    ):
        assert segment_command._thresholds(parse(["segment", "x.jpg", *options]), str(model)) == expected


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


@pytest.mark.parametrize("box", ["-5,-5,20,20", "-5,0,20,20"])
def test_a_box_that_begins_with_a_minus(samlight, checkpoint, photos, tmp_path, box):
    status, _, stderr = samlight(
        "segment", photos / "one.jpg", "--box", box, "--model", checkpoint, "--out", tmp_path / "out"
    )
    assert status == 1
    assert "reaches outside the picture" in stderr


def test_the_bundled_checkpoint_in_a_process_of_its_own(tmp_path):
    arguments = [EXAMPLE_IMAGES / "cat.jpg", "--box", "215,215,288,265", "--out", tmp_path]
    command = [sys.executable, "-m", "samlight_hf.cli", "segment", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert BUNDLED_CHECKPOINT.is_dir()
    assert names(tmp_path) == {"cat_masks.png", "contact_sheet.png"}


def test_a_reader_who_leaves_early(tmp_path):
    command = f"{sys.executable} -m samlight_hf.cli segment --help"
    result = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True)
    assert result.stderr == ""
