"""The scripts in benchmarks/ that measure a checkpoint on a data set, on a tiny one."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.data.files import annotation, box_mask, jpeg, sa1b_json, write_tar
from tests.inference.conftest import random_model


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with arguments in this process; return its exit status, and what it printed."""

    def call(script: str, *arguments) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}", *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, "".join(capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "model"
    random_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    members = {}
    for number in range(2):
        masks = box_mask(), box_mask(1, 2, 20, 20)
        members[f"sa_{number}.jpg"] = jpeg(seed=number)
        members[f"sa_{number}.json"] = sa1b_json(*(annotation(k, mask) for k, mask in enumerate(masks)))
    return write_tar(tmp_path_factory.mktemp("data") / "tiny.tar", members)


def test_the_stages_of_everything_mode_are_those_that_it_has(checkpoint):
    script = runpy.run_path(str(BENCHMARKS / "everything.py"))
    rows = list(script["_stages"](str(checkpoint), Image.new("RGB", (40, 30), "red")))
    times = {row["stage"]: row["ms"] for row in rows}
    assert all(times[stage] > 0 for stage in ("image to tensor", "preprocess", "encode", "decode"))
    assert {"masks", "measure", "filter", "outlines and run lengths", "NMS"} < set(times)


def test_small_objects(run, checkpoint, tar, tmp_path):
    path = tmp_path / "small.json"
    options = ["--model", checkpoint, "--dataset", tar, tar, "--limit", 1, "--device", "cpu", "--json", path]
    status, printed = run("small_objects.py", *options, "--settings", "1", "1,crops=1", "2,tile=20,overlap=8")
    assert status == 0
    result = json.loads(path.read_text())
    assert "small_objects.py --model" in result["command"]
    assert [row["setting"] for row in result["rows"]] == ["1", "1,crops=1", "2,tile=20,overlap=8"] * 2
    for row in result["rows"]:
        assert (row["num_images"], row["num_objects"]) == (1, 2)
        assert 0 <= row["AR@1000 small"] <= 1
        assert "AR@1000 large" not in row  # no object is
        assert row["seconds_per_image"] > 0
    assert result["rows"][1]["masks per image"] > result["rows"][0]["masks per image"]
    assert len([line for line in printed.splitlines() if line.startswith("tiny.tar")]) == 6


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("x", "'x' is not POINTS"), ("0", "points_per_crop=0"), ("8,crop=1", "crop is not possible"),
        ("8,crops=-1", "crops_n_layers=-1"), ("8,overlap=4", "overlap is not possible"),
        ("8,tile=20,overlap=20", "overlap=20 of tiles must be smaller"), ("8,tile", "'8,tile' is not POINTS"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(run, tar, setting, said):
    status, printed = run("small_objects.py", "--dataset", tar, "--settings", setting)
    assert status == 2
    assert said in printed


def test_sizes_of_two_runs_in_one_table(run, checkpoint, tar, tmp_path):
    """Scores of one run and times of another make the rows, and each run alone makes a plot."""
    common = ["--model", checkpoint, "--sizes", 32, 48, "--bands", "image", "--out", tmp_path / "out"]
    scores, times, both = (tmp_path / f"{name}.json" for name in ("scores", "times", "both"))
    options = ["--dataset", tar, "--limit", 1, "--device", "cpu", "--time-on", "none"]
    assert run("sizes.py", *common, *options, "--json", scores)[0] == 0
    assert run("sizes.py", *common, "--time-on", "cpu", "--json", times)[0] == 0
    status, printed = run("sizes.py", "--from", scores, times, "--json", both)
    assert status == 0
    rows = {path: json.loads(path.read_text())["rows"] for path in (scores, times, both)}
    assert [(row["size"], row["bands"]) for row in rows[both]] == [(32, "as trained"), (48, "image")]
    for score, timed, row in zip(rows[scores], rows[times], rows[both], strict=True):
        assert row == timed | score
        assert row.keys() >= {"box/single", "encoder_ms", "num_instances"}
        assert f"{row['box/single'][0]:.3f}" in printed
    assert all(path.with_suffix(".png").stat().st_size for path in (scores, times, both))
    sources = json.loads(both.read_text())["from"]
    assert [source["time_on"] for source in sources] == ["none", "cpu"]


def test_checkpoints_in_folders_of_one_name_have_rows_of_their_own(run, tmp_path):
    """As the students of several distillations are."""
    students = [tmp_path / name / "student" for name in "abc"]
    for student in students:
        random_model().save_pretrained(student)
    a, b, c = students
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    common = ["--sizes", 48, "--bands", "image", "--time-on", "cpu", "--out", tmp_path / "out"]
    assert run("sizes.py", *common, "--model", a, "--also", b, "--json", files[0])[0] == 0
    assert run("sizes.py", *common, "--model", c, "--also", b, "--json", files[1])[0] == 0
    status, printed = run("sizes.py", "--from", *files, "--json", tmp_path / "both.json")
    assert status == 0
    rows = json.loads((tmp_path / "both.json").read_text())["rows"]
    expected = [(32, "as trained", a), (32, "as trained", c), (32, "trained at this size", b)]
    expected += [(48, "image", a), (48, "image", c)]
    assert [(row["size"], row["bands"], Path(row["model"])) for row in rows] == expected
    assert [printed.count(f" {student.as_posix()} ") for student in students] == [2, 1, 2]


def test_padding(run, checkpoint, tar, tmp_path):
    status, printed = run(
        "padding.py", "--model", checkpoint, "--dataset", tar, "--device", "cpu", "--json", tmp_path / "padding.json"
    )
    assert status == 0
    result = json.loads((tmp_path / "padding.json").read_text())
    assert (result["num_images"], result["num_objects"]) == (2, 4)
    assert set(result["miou"]) == {"all rows", "skip_padding"}
    assert f"IoU of the two masks: mean {result['iou_of_both']['mean']:.4f}" in printed
    portrait = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(20, 30), "a.json": sa1b_json(width=20, height=30)})
    assert "no landscape image" in str(run("padding.py", "--model", checkpoint, "--dataset", portrait)[0])
