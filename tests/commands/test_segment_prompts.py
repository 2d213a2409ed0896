"""Clicks for one object and prompts for a folder: what `samlight segment` makes of options and files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlight_hf import Predictor
from samlight_hf.commands.options import EXAMPLE_IMAGES
from samlight_hf.commands.prompt_files import parse_points, prompts_of_images, read_prompts
from samlight_hf.inference.prompts import ObjectPrompt
from samlight_hf.loading import load_model

from .test_segment import names, one_line
from .test_segment_results import write_images


@pytest.fixture
def segment(samlight, checkpoint, tmp_path, monkeypatch):
    """Return a function that runs `samlight segment` in `tmp_path` on images of noise; status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("photos/a.jpg", "photos/deep/b.jpg", "photos/deep/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / name)

    def run(*arguments) -> tuple[int, str, str]:
        return samlight("segment", *arguments, "--out", "out", "--format", "npz", "--model", checkpoint)

    return run


@pytest.fixture
def predict(checkpoint, tmp_path):
    """Return a function that predicts the mask of one object on an image of `photos`, by `Predictor.predict`."""
    predictor = Predictor(*load_model(checkpoint, "cpu"))

    def mask(image: str, points=None, labels=None, box=None) -> list:
        one = [None if part is None else [part] for part in (points, labels, box)]
        is_ambiguous = box is None and len(points) == 1
        prediction = predictor.predict(
            *one, multimask_output=is_ambiguous, image=predictor.encode(str(tmp_path / "photos" / image))
        )
        return prediction.masks[0, prediction.scores[0].argmax()].tolist()

    return mask


def masks(name: str) -> list:
    return np.load(f"out/{name}.npz")["masks"].tolist()


def test_several_clicks_are_one_object(segment, predict):
    clicks = ["--points", "9,9 30,20,0", "--points", "5.5,6,1 7,8"]
    status, stdout, stderr = segment("photos/a.jpg", "--point", "20,5", *clicks, "--box", "1,2,30,20")
    assert (status, stderr) == (0, "") and "1 box, 5 points      4" in stdout
    assert masks("a") == [
        predict("a.jpg", box=(1, 2, 30, 20)),
        predict("a.jpg", [(20, 5)], [1]),
        predict("a.jpg", [(9, 9), (30, 20)], [1, 0]),
        predict("a.jpg", [(5.5, 6), (7, 8)], [1, 1]),
    ]


def test_a_click_beside_the_object_changes_its_mask(segment):
    results = []
    for clicks in ("9,9", "9,9 30,20", "9,9 30,20,0"):
        assert segment("photos/a.jpg", "--points", clicks)[0] == 0
        results.append(masks("a"))
    assert results[0] != results[1] != results[2] != results[0]


def test_clicks_are_drawn_and_those_beside_the_object_differently(samlight, checkpoint, tmp_path):
    write_images(tmp_path, "a.png")
    overlays = []
    for clicks in ("9,9 30,20", "9,9 30,20,0"):
        arguments = ["--points", clicks, "--out", tmp_path / "out", "--model", checkpoint]
        assert samlight("segment", tmp_path / "a.png", *arguments)[0] == 0
        overlays.append(np.asarray(Image.open(tmp_path / "out/a_masks.png")))
    assert overlays[0][20, 30].tolist() == [255, 255, 255] and overlays[1][20, 30].tolist() == [0, 0, 0]
    assert overlays[0][9, 9].tolist() == overlays[1][9, 9].tolist() == [255, 255, 255]


def test_clicks_may_begin_with_a_minus_and_those_outside_are_one_images_error(segment):
    assert segment("photos/a.jpg", "--points", "-0.5,3 9,9,0")[0] == 0
    status, _, stderr = segment("photos/a.jpg", "--points", "9,9 -7,3,0")
    assert status == 1 and "photos/a.jpg: point -7,3 lies outside the image of 40x30 pixels" in stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs a box or a point on it"),
        ("1", "'1' is not a click, X,Y or X,Y,0"),
        ("1,2 3", "'3' is not a click"),
        ("1,2,0", "all of its points are beside it"),
        ("1,2 3,4,2", "label '2' of the click '3,4,2' must be 1, on the object, or 0"),
        ("1,2,3,4", "'1,2,3,4' is not a click"),
        ("1,nan", "'1,nan' is not a click"),
        ("a,b", "'a,b' is not a click"),
    ],
)
def test_clicks_that_are_none(samlight, text, words):
    status, stdout, stderr = samlight("segment", "x.jpg", "--points", text)
    assert (status, stdout) == (2, "") and words in stderr.splitlines()[-1]


FILES = {
    "document.json": json.dumps({
        "a.jpg": {"boxes_xyxy": [[1, 2, 30, 20]], "points_xy": [[20, 5], [[9, 9], [30, 20]]], "labels": [1, [1, 0]]},
        "deep/c.jpg": {"points_xy": [[8, 8]]},
    }),
    "list.json": json.dumps([
        {"image": "a.jpg", "boxes_xyxy": [[1, 2, 30, 20]], "points_xy": [[20, 5]]},
        {"image": "a.jpg", "objects": [{"points_xy": [[9, 9], [30, 20]], "labels": [1, 0]}]},
        {"image": "photos/deep/c.jpg", "objects": [{"points_xy": [8, 8]}]},
    ]),
    "lines.jsonl": '{"image": "a.jpg", "boxes_xyxy": [[1, 2, 30, 20]], "points_xy": [[[20, 5]], [[9, 9], [30, 20]]], '
    '"labels": [[1], [1, 0]]}\n\n{"image": "c.jpg", "points_xy": [[8, 8]]}\n',
    "table.csv": '\ufeffimage,boxes_xyxy,points_xy\r\na.jpg,"1,2,30,20","20,5; 9,9 30,20,0"\r\n,,\r\nc.jpg,,"8,8"\r\n',
    "columns.csv": 'points_xy,image\n"8,8",deep/c.jpg\n"20,5",a.jpg\n"9,9,1 30,20,0",a.jpg\n',
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "s." in name else name for name in FILES]
)
def test_each_image_of_a_folder_has_its_prompts(segment, predict, tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    status, stdout, stderr = segment("photos", "--prompts", name)
    assert (status, stderr) == (0, f"samlight: left out 1 image without prompts in {name}.\n")
    assert names(tmp_path / "out") == {"a.npz", "deep/c.npz"}
    expected = [
        predict("a.jpg", box=(1, 2, 30, 20)),
        predict("a.jpg", [(20, 5)], [1]),
        predict("a.jpg", [(9, 9), (30, 20)], [1, 0]),
    ]
    assert masks("a") == expected[name == "columns.csv" :]
    assert masks("deep/c") == [predict("deep/c.jpg", [(8, 8)], [1])]
    assert ("1 point, " not in stdout) and ("2 points" in stdout or "3 points" in stdout)


def test_a_box_with_clicks_is_one_object(segment, predict, tmp_path):
    value = {"box_xyxy": [1, 2, 30, 20], "points_xy": [[4, 4]], "labels": [0]}
    (tmp_path / "p.json").write_text(json.dumps({"a.jpg": {"objects": [value]}}))
    status, stdout, _ = segment("photos/a.jpg", "--prompts", "p.json")
    assert status == 0 and "1 box, 1 point      1" in stdout
    assert masks("a") == [predict("a.jpg", [(4, 4)], [0], (1, 2, 30, 20))]


def test_the_prompts_of_the_demo_are_such_a_file():
    entries, num_malformed = read_prompts(EXAMPLE_IMAGES.parent / "prompts.json")
    assert num_malformed == 0 and {name for _, name, _ in entries} == {f.name for f in EXAMPLE_IMAGES.glob("*.jpg")}


def test_malformed_lines_and_unknown_images_are_left_out_counted_and_named(segment, tmp_path):
    lines = [
        "image,boxes_xyxy,points_xy",
        'a.jpg,"1,2,30,20",',
        'a.jpg,"1,2,30",',
        "deep/b.jpg,1,2,30,20",
        'x.jpg,,"8,8"',
        'c.jpg,,"8,8"',
        'c.jpg,"',
        "b.jpg,,",
        'a.jpg,"10,10,5,5",',
    ]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    status, stdout, stderr = segment("photos", "--prompts", "p.csv")
    assert status == 0 and "2 images, 2 masks" in stdout
    assert stderr.splitlines() == [
        "samlight: p.csv, line 3 is left out: '1,2,30' is not a box, X1,Y1,X2,Y2, in pixels of the image.",
        "samlight: p.csv, line 4 is left out: it has 5 columns, and the first line 3: quote what has commas.",
        "samlight: p.csv, line 7 is left out: it is no CSV (unexpected end of data).",
        "samlight: p.csv, line 8 is left out: it has no prompt.",
        "samlight: p.csv, line 9 is left out: box 10,10,5,5 is reversed: it must be X1,Y1,X2,Y2 with X1 < X2 and Y1 < "
        "Y2.",
        "samlight: p.csv, line 5 is left out: x.jpg is no image here.",
        "samlight: left out 1 image without prompts in p.csv.",
        "samlight: 6 skipped, 2 done.",
    ]


def test_many_malformed_lines_are_reported_in_bulk(segment, tmp_path):
    lines = [
        '{"image": "a.jpg", "points_xy": [[3, 3]]}',
        *["{"] * 30,
        *['{"image": "x.jpg", "points_xy": [[1, 1]]}'] * 25,
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    status, _, stderr = segment("photos/a.jpg", "--prompts", "p.jsonl")
    assert status == 0 and stderr.count("\n") == 20 + 20 + 3
    assert "samlight: 55 skipped, 1 done." in stderr
    assert "samlight: 10 further lines like these." in stderr and "samlight: 5 further lines like these." in stderr


def test_prompts_outside_an_image_are_that_images_error(segment, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({
        "a.jpg": {"points_xy": [[3, 3], [99, 3]]}, "b.jpg": {"boxes_xyxy": [[9, 9, 3, 3]]},
        "c.jpg": {"points_xy": [[3, 3]]},
    }))  # fmt: skip
    status, stdout, stderr = segment("photos", "--prompts", "p.json")
    assert status == 0 and "1 image, 1 mask" in stdout
    assert "photos/a.jpg: point 99,3 lies outside the image of 40x30 pixels" in stderr
    assert "photos/deep/b.jpg: box 9,9,3,3 is reversed" in stderr
    assert stderr.splitlines()[-1] == "samlight: 2 skipped, 1 done."


def test_a_name_of_two_images_needs_its_folder(caplog):
    images = [Path("in/a.jpg"), Path("in/x/b.jpg"), Path("in/y/b.jpg")]
    point = (ObjectPrompt(((1, 2),), (1,)),)
    found, num_unknown = prompts_of_images(
        [("p, 1", name, point) for name in ("b.jpg", "y/b.jpg", "in/a.jpg", str(Path("in/x/b.jpg").resolve()))],
        images,
        Path("in").resolve(),
    )
    assert list(found) == images and num_unknown == 1
    assert caplog.messages == ["p, 1 is left out: b.jpg is the name of 2 images: give its folder."]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", None, "--prompts p.json cannot be read: No such file"),
        ("p.json", b"", "--prompts p.json is empty: it must be JSON"),
        ("p.json", b'{\n  "a.jpg": {\n', "is no JSON"),
        ("p.json", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("p.json", b"7", "has no prompts for any image (entry 1: it is a JSON int, not an object"),
        ("p.json", b"{}", "has no prompts for any image: it must be JSON"),
        ("p.json", b'{"a.jpg": {"box": [1, 2, 3, 4]}}', "(entry a.jpg: it has 'box', and may have image, boxes_xyxy"),
        ("p.json", b'{"a.jpg": {}}', "(entry a.jpg: it has no prompt.)"),
        ("p.json", b'{"a.jpg": {"boxes_xyxy": [[1, 2, 3]]}}', "'1,2,3' is not a box"),
        ("p.json", b'{"a.jpg": {"boxes_xyxy": [[1, 2, 3, NaN]]}}', "'1,2,3,nan' is not a box"),
        ("p.json", b'{"a.jpg": {"boxes_xyxy": ["1234"]}}', "'1234' is not a box"),
        ("p.json", b'{"a.jpg": {"boxes_xyxy": [[1, 2, 3, 1' + b"0" * 400 + b"]]}}", "is not a box"),
        ("p.json", b"[" * 100_000, "is no JSON"),
        ("p.csv", b'image,points_xy\na.jpg,"' + b"1" * 200_000 + b'"\n', "it is no CSV (field larger than"),
        ("p.json", b'{"a.jpg": {"boxes_xyxy": 4}}', "boxes_xyxy is no list"),
        ("p.json", b'{"a.jpg": {"points_xy": [[1, 2]], "labels": [1, 0]}}', "labels has 2 entries and points_xy 1"),
        ("p.json", b'{"a.jpg": {"points_xy": [[[1, 2], [3, 4]]], "labels": [[1]]}}', "there are 1 labels and 2 points"),
        ("p.json", b'{"a.jpg": {"points_xy": [[1, 2]], "labels": [-1]}}', "label -1 must be 1"),
        ("p.json", b'{"a.jpg": {"objects": [[1, 2]]}}', "an entry of objects is a JSON list"),
        ("p.json", b'{"a.jpg": {"objects": [{"labels": [1]}]}}', "there are 1 labels and 0 points"),
        ("p.json", b'[{"points_xy": [[1, 2]]}]', 'it has no "image"'),
        ("p.json", b'{"a.jpg": {"points_xy": [[1, 2]]}, "a.jpg": {"points_xy": [[3, 4]]}}', "'a.jpg' is in it twice"),
        ("p.json", b'{"x.jpg": {"points_xy": [[1, 2]]}}', "--prompts p.json names none of the 3 images"),
        ("p.csv", b"", "--prompts p.csv is empty: it must be JSON"),
        ("p.csv", b",,\n", "must have image, and boxes_xyxy or points_xy"),
        ("p.csv", b"name,x,y\na.jpg,1,2\n", "has the columns name, x, y: it must have image"),
        ("p.csv", b"image,points_xy\n", "has no prompts for any image"),
        ("p.csv", b'image,points_xy\n,"1,2"\n', "(line 2: it names no image.)"),
    ],
)  # fmt: skip
def test_files_that_hold_no_prompts(segment, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, stdout, stderr = segment("photos", "--prompts", name)
    assert (status, stdout) == (2, "")
    assert words in stderr.splitlines()[-1] and stderr.count("\n") <= 2
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


@pytest.mark.parametrize("option", [("--points", "1,2"), ("--point", "1,2"), ("--box", "1,2,3,4")])
def test_prompts_of_options_and_of_a_file_are_not_both_given(segment, tmp_path, option):
    (tmp_path / "p.json").write_text('{"a.jpg": {"points_xy": [[1, 2]]}}')
    status, _, stderr = segment("photos", "--prompts", "p.json", *option)
    assert status == 2
    one_line(stderr, "leave out either it, or --box, --point and --points")


def test_resuming_knows_the_prompts(segment, tmp_path):
    (tmp_path / "p.json").write_text('{"a.jpg": {"points_xy": [[1, 2]]}}')
    assert segment("photos/a.jpg", "--prompts", "p.json")[0] == 0
    assert "1 image done before" in segment("photos/a.jpg", "--prompts", "p.json", "--resume")[1]
    (tmp_path / "p.json").write_text('{"a.jpg": {"points_xy": [[1, 3]]}}')
    status, _, stderr = segment("photos/a.jpg", "--prompts", "p.json", "--resume")
    assert status == 2
    one_line(stderr, "--prompts was")
    status, _, stderr = segment("photos/a.jpg", "--points", "1,2 3,4", "--resume")
    assert status == 2
    one_line(stderr, "--points was not given and is")


def test_clicks_are_resumed(segment):
    assert segment("photos/a.jpg", "--points", "1,2 3,4,0")[0] == 0
    assert "1 image done before" in segment("photos/a.jpg", "--points", "1,2 3,4,0", "--resume")[1]


def test_parsed_clicks():
    assert parse_points(" 1,2  3.5,-4,0 ") == ObjectPrompt(((1, 2), (3.5, -4)), (1, 0))


def test_the_examples_of_the_documentation_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs/segment.md").read_text(encoding="utf-8")
    found = {}
    for suffix in ("csv", "json"):
        example = tmp_path / f"example.{suffix}"
        example.write_text(text.split(f"```{suffix}\n")[1].split("```")[0], encoding="utf-8")
        entries, num_malformed = read_prompts(example)
        assert num_malformed == 0
        found[suffix] = [(name, len(prompts)) for _, name, prompts in entries]
    assert found == {"csv": [("a.jpg", 2), ("day1/b.jpg", 2)], "json": [("a.jpg", 3), ("b.jpg", 1)]}
