"""Results of `samlight segment`: where they lie, that no run replaces another's, and that one bad image ends no run."""
# ruff: noqa: F401  (fixtures of test_cli)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from samlight_hf.commands import options as options_module
from samlight_hf.commands import segment as segment_command
from samlight_hf.commands import segment_run
from samlight_hf.commands.result_folder import RULE, ResultFolder
from samlight_hf.images.reading import common_folder, find_images
from samlight_hf.inference.mask_generation import MaskGenerator
from samlight_hf.masks import files as mask_files
from tests.images.test_levels import gradient

from .test_segment import NOTE, QUICK, names, one_line


SLOW = {"labels", "labelme", "yolo"}  # which have no code of their own in choosing names
FORMATS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in mask_files.ENDINGS]
COLOURS = ("teal", "navy", "olive", "maroon")


def write_images(root: Path, *paths: str):
    """Write images whose sizes differ by their place in `paths`."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number, 30), COLOURS[number % 4]).save(root / path)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != NOTE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def file_names(out: Path) -> dict[str, str]:
    """Return the `file_name` in each COCO document, by the document's path."""
    documents = {path: json.loads(path.read_text()) for path in sorted(out.rglob("[!.]*.json"))}
    return {path.relative_to(out).as_posix(): value["images"][0]["file_name"] for path, value in documents.items()}


@pytest.fixture
def segment(samlight, checkpoint, tmp_path, monkeypatch):
    """Return a function that runs `samlight segment` in `tmp_path`, and returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: samlight("segment", *arguments, "--model", checkpoint, *QUICK)


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resume"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_another_folder_never_replaces_earlier_results(segment, tmp_path, file_format, resume):
    write_images(tmp_path, "day1/IMG_0001.jpg", "day2/IMG_0001.jpg", "day2/IMG_0002.jpg")
    options = ["--out", "out", "--format", file_format, *resume]
    ending = mask_files.ENDINGS[file_format]
    assert segment("day1", *options)[0] == 0
    before = content(tmp_path / "out")
    assert before and f"IMG_0001{ending}" in names(tmp_path / "out")
    assert segment("day2", *options)[0] == 0
    after = content(tmp_path / "out")
    assert before.items() <= after.items()
    assert {f"day2/IMG_0001{ending}", f"day2/IMG_0002{ending}"} <= names(tmp_path / "out")
    if file_format == "coco":
        assert list(file_names(tmp_path / "out").values()) == ["IMG_0001.jpg", "day2/IMG_0001.jpg", "day2/IMG_0002.jpg"]
    for day, number in (("day1", 1), ("day2", 2)):  # and each run finds its own results again
        status, stdout, _ = segment(day, "--out", "out", "--format", file_format, "--resume")
        assert status == 0 and f"{number} image" in stdout and "done before" in stdout
    assert content(tmp_path / "out") == after


@pytest.mark.parametrize(
    "paths, file_format",
    [
        (["."], "overlay"),
        (["."], "coco"),
        (["day2", "day1"], "png"),
        (["day1/img.jpg", "day2/img.jpg"], "coco"),
        (["*/img.jpg"], "npz"),
    ],
    ids=str,
)
def test_results_keep_the_subfolders_of_what_was_asked_for(segment, tmp_path, paths, file_format):
    write_images(tmp_path, "day1/img.jpg", "day2/img.jpg")
    status, stdout, stderr = segment(*paths, "--out", "out", "--format", file_format)
    assert (status, stderr) == (0, "")
    ending = mask_files.ENDINGS[file_format]
    sheet = {"contact_sheet.png"} if file_format == "overlay" else set()
    assert names(tmp_path / "out") == {f"day1/img{ending}", f"day2/img{ending}"} | sheet
    assert str(Path("out/day1") / f"img{ending}") in stdout
    if file_format == "coco":
        assert file_names(tmp_path / "out") == {f"{day}/img.json": f"{day}/img.jpg" for day in ("day1", "day2")}


def places(out: Path, *paths, ending=".json"):
    """Write empty results; return their paths and the names of their images. The note of `out` has them."""
    results = ResultFolder(out)
    found, _ = find_images(paths)
    root = common_folder(paths)
    planned = results.places(found, root, ending)
    results.begin({}, root, planned)
    for place in planned:
        place.output.parent.mkdir(parents=True, exist_ok=True)
        place.output.touch()
        results.finish(place)
    return [place.output.relative_to(out).as_posix() for place in planned], [place.name for place in planned]


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_names_of_one_flat_folder_are_what_they_were(out, tmp_path):
    write_images(tmp_path, "b/x.jpg", "b/X.png", "b/y.jpg", "b/y-2.jpg", "b/Ü.jpg")
    assert places(out, "b")[0] == ["b_X_png.json", "b_x_jpg.json", "y-2.json", "y.json", "Ü.json"]


def test_roots_of_later_runs(out, tmp_path):
    write_images(tmp_path, "p/in/1.png", "q/in/1.png", "r/in/1.png", "p/in/deep/2.png", "p/3.png")
    assert places(out, "p/in") == (["1.json", "deep/2.json"], ["1.png", "deep/2.png"])
    assert places(out, "q/in") == (["in/1.json"], ["in/1.png"])
    assert places(out, "r/in") == (["r/in/1.json"], ["r/in/1.png"])
    assert places(out, "p/in/deep") == (["deep/2.json"], ["deep/2.png"])  # the same image, the same place
    assert places(out, "p/in/1.png") == (["1.json"], ["1.png"])
    assert places(out, "p")[0] == ["p/3.json", "p/in/1.json", "p/in/deep/2.json"]
    assert places(out, "q/in") == (["in/1.json"], ["in/1.png"])
    assert places(out, "p/in", "q/in")[0][0] == f"{tmp_path.name}/p/in/1.json"


def test_a_subfolder_that_is_there_is_not_taken_for_another_folders(out, tmp_path):
    write_images(tmp_path, "p/in/1.png", "q/in/1.png")
    places(out, "p")
    assert places(out, "q/in")[0] == ["q/in/1.json"]


def test_files_of_unknown_origin_are_left_alone(out, tmp_path):
    write_images(tmp_path, "b/x.jpg")
    (out / "x.json").write_text("mine")
    (out / "x-2.json").write_text("mine too")
    for _ in range(2):
        assert places(out, "b")[0] == ["x-3.json"]
    assert (out / "x.json").read_text() == "mine"


def test_the_note_is_no_result(out, tmp_path):
    write_images(tmp_path, "b/.samlight.jpg")
    assert places(out, "b/.samlight.jpg")[0] == [".samlight-2.json"]


def test_a_result_that_is_a_folder_and_images_in_one_of_its_name(segment, tmp_path):
    write_images(tmp_path, "b/x.jpg", "b/x_masks/0000.jpg")
    for _ in range(2):
        assert segment("b", "--out", "out", "--format", "png")[0] == 0
        assert (tmp_path / "out/x-2_masks/masks.csv").is_file()
        assert (tmp_path / "out/x_masks/0000_masks/masks.csv").is_file()


def test_notes_of_earlier_versions_are_read(segment, tmp_path):
    """Read a note whose lines have names alone, without folders."""
    write_images(tmp_path, "day1/a.jpg", "day2/a.jpg")
    assert segment("day1", "--out", "out", "--format", "coco")[0] == 0
    note = tmp_path / "out" / NOTE
    note.write_text("".join(line for line in note.read_text().splitlines(keepends=True) if "folders" not in line))
    before = content(tmp_path / "out")
    assert segment("day1", "--out", "out", "--format", "coco", "--resume")[1] == "1 image done before.\n"
    assert segment("day2", "--out", "out", "--format", "coco")[0] == 0
    assert before.items() < content(tmp_path / "out").items()


def test_other_settings_keep_the_names_of_earlier_results(segment, tmp_path):
    write_images(tmp_path, "day1/a.jpg", "day2/a.jpg")
    assert segment("day1", "--out", "out", "--format", "coco")[0] == 0
    assert segment("day2", "--out", "out", "--format", "coco", "--max-masks", "1")[0] == 0
    assert segment("day1", "--out", "out", "--format", "npz")[0] == 0
    before = content(tmp_path / "out")
    assert before.keys() == {"a.json", "day2/a.json", "a.npz"}
    status, _, stderr = segment("day1", "--out", "out", "--format", "coco", "--max-masks", "1")
    assert status == 0 and "samlight: 1 earlier result of the same images replaced.\n" in stderr
    assert content(tmp_path / "out")["day2/a.json"] == before["day2/a.json"]


def test_runs_that_begin_at_the_same_time(segment, tmp_path, monkeypatch):
    """Have another run begin after this one has planned its results, while its model is loaded."""
    write_images(tmp_path, "day1/a.jpg", "day2/a.jpg")
    load = options_module.load_from_options

    def load_late(*arguments):
        monkeypatch.setattr("samlight_hf.commands.segment.load_from_options", load)
        assert segment("day1", "--out", "out", "--format", "coco")[0] == 0
        return load(*arguments)

    monkeypatch.setattr("samlight_hf.commands.segment.load_from_options", load_late)
    assert segment("day2", "--out", "out", "--format", "coco")[0] == 0
    assert file_names(tmp_path / "out") == {"a.json": "a.jpg", "day2/a.json": "day2/a.jpg"}


def test_contact_sheets_of_other_images_are_kept(segment, tmp_path):
    write_images(tmp_path, "day1/a.jpg", "day2/a.jpg")
    for day in ("day1", "day2", "day1"):
        assert segment(day, "--out", "out")[0] == 0
    assert {"contact_sheet.png", "contact_sheet-2.png"} <= names(tmp_path / "out")
    assert not (tmp_path / "out/contact_sheet-3.png").exists()


def test_the_rule_is_told(samlight):
    assert " ".join(RULE.split()) in " ".join(samlight("segment", "--help")[1].split())


LONG = {
    "letters": "x" * 239,
    "the limit": "y" * 251,
    "Chinese": "长" * 80,
    "emoji": "🦊" * 62,
}


@pytest.mark.parametrize("file_format", FORMATS)
def test_names_as_long_as_file_systems_take(segment, tmp_path, file_format):
    write_images(tmp_path, *(f"photos/{name}.jpg" for name in LONG.values()), "photos/short.jpg")
    ending = mask_files.ENDINGS[file_format]
    arguments = ["photos", "--out", "out", "--format", file_format]
    status, stdout, stderr = segment(*arguments)
    assert (status, stderr) == (0, "") and "5 images, " in stdout
    found = names(tmp_path / "out") - {"contact_sheet.png"}
    assert len(found) == 5 and all(name.endswith(ending) for name in found)
    assert {f"{LONG['letters']}{ending}", f"short{ending}"} <= found
    assert all(len(os.fsencode(part)) <= 255 for name in found for part in name.split("/"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith((".part", ".old"))]
    if file_format == "coco":
        assert sorted(file_names(tmp_path / "out").values()) == sorted(
            [f"{n}.jpg" for n in LONG.values()] + ["short.jpg"]
        )
    status, stdout, _ = segment(*arguments, "--resume")
    assert (status, stdout) == (0, "5 images done before.\n")
    assert segment(*arguments)[0] == 0  # and again over the earlier ones
    assert names(tmp_path / "out") - {"contact_sheet.png"} == found


STEPS = {
    "reading": (segment_run, "open_image"),
    "preparing": (segment_run, "image_tensor"),
    "segmenting": (MaskGenerator, "generate"),
    "writing": (mask_files, "write_masks"),
}


def is_b(value) -> bool:
    """Tell b.jpg by its name or its size."""
    if isinstance(value, Path):
        return value.stem == "b"
    return value.size == (41, 30) if isinstance(value, Image.Image) else getattr(value, "shape", ())[-2:] == (30, 41)


@pytest.mark.parametrize(
    "step, error",
    [(step, ZeroDivisionError("two\nlines")) for step in STEPS]
    + [("writing", OSError(36, "File name too long")), ("preparing", MemoryError())],
)
def test_one_images_error_never_ends_a_folder(segment, tmp_path, monkeypatch, step, error):
    write_images(tmp_path, "photos/a.jpg", "photos/b.jpg", "photos/c.jpg")
    holder, name = STEPS[step]
    run = getattr(holder, name)

    def fail(*arguments, **options):
        if any(map(is_b, arguments)):
            raise error
        return run(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, fail)
        status, stdout, stderr = segment("photos", "--out", "out", "--format", "coco")
    assert status == 0 and "2 images, " in stdout
    first, last = stderr.splitlines()
    assert first.startswith("samlight: skipped photos/b.jpg: ") and last == "samlight: 1 skipped, 2 done."
    if isinstance(error, ZeroDivisionError):
        assert "internal error: ZeroDivisionError: two lines" in first
    assert names(tmp_path / "out") == {"a.json", "c.json"}
    assert "2 images done before" in segment("photos", "--out", "out", "--format", "coco", "--resume")[1]
    assert names(tmp_path / "out") == {"a.json", "b.json", "c.json"}


def test_a_place_that_cannot_be_written_to_is_one_images_error(segment, tmp_path):
    write_images(tmp_path, "photos/a/x.jpg", "photos/b.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("a file where a folder is needed")
    status, _, stderr = segment("photos", "--out", "out", "--format", "coco")
    assert status == 0 and "skipped photos/a/x.jpg: " in stderr and "1 skipped, 1 done" in stderr
    assert names(tmp_path / "out") == {"a", "b.json"}


def test_levels_and_files_that_are_left_out_are_told(segment, tmp_path):
    write_images(tmp_path, "photos/a.jpg", "photos/b.jfif")
    Image.fromarray(gradient(300, 900)).save(tmp_path / "photos/c.tif")
    (tmp_path / "photos/notes.txt").touch()
    status, stdout, stderr = segment("photos", "--out", "out", "--format", "coco")
    assert status == 0 and "3 images, " in stdout
    left_out, levels = stderr.splitlines()
    assert left_out == "samlight: left out 1 file of other formats: 1 .txt."
    assert levels == "samlight: photos/c.tif: levels 303 to 896 became 0 to 255."


def test_many_lines_of_one_kind_are_counted(segment, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(23):
        Image.fromarray(gradient(300, 900, size=(8, 9))).save(tmp_path / f"photos/{number:02}.tif")
    stderr = segment("photos", "--out", "out", "--format", "coco")[2].splitlines()
    assert len(stderr) == 21 and stderr[-1] == "samlight: 3 further lines like these."


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("utf-8", marks=pytest.mark.slow)])
def test_no_encoding_of_the_console_ends_a_command(checkpoint, tmp_path, encoding):
    name = "Łódź 长城 🦊"
    surrogate = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8
    write_images(tmp_path, f"{name}/{name}.png", f"{name}/{surrogate}.png")
    (tmp_path / name / "Жук.jpg").write_text("no image")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(mask_files.__file__).parents[1])}
    command = [sys.executable, "-m", "samlight_hf.commands.cli", "segment", name, "--model", checkpoint, *QUICK]
    result = subprocess.run([*command, "--out", "nö/长"], cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"2 images, " in result.stdout and b"1 skipped, 2 done" in result.stderr
    assert (f"{name}_masks.png".encode() in result.stdout) == (encoding == "utf-8")
    assert names(tmp_path / "nö/长") >= {f"{name}_masks.png", f"{surrogate}_masks.png"}


def test_examples_are_safe_on_any_console(checkpoint, tmp_path):
    examples = Path(__file__).parents[2] / "examples"
    command = [sys.executable, examples / "average.py", checkpoint, checkpoint, "--out", "长城"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 0 and result.stdout.startswith(rb"\u957f\u57ce: the average of 2 models"), result.stderr
    for example in examples.glob("*.py"):
        text = example.read_text(encoding="utf-8")
        assert "def main" not in text or "    make_console_safe()\n" in text, example
