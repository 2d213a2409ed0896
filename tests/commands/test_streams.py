"""`samlight segment -` and `--out -`: an image from standard input, and its result to standard output."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlight_hf.commands import cli

from .test_segment import QUICK, names
from .test_segment_results import write_images


class Pipe:
    """Standard input that holds these bytes."""

    def __init__(self, data: bytes, is_terminal: bool = False):
        self.buffer, self.is_terminal = io.BytesIO(data), is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def segment(checkpoint, tmp_path, monkeypatch, capfdbinary):
    """Return a function that runs `samlight segment` in `tmp_path` with bytes as its input; status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, "a.png", "b.png")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(*arguments, data: bytes | None = b"") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "stdin", data if data is None else Pipe(data))
        capfdbinary.readouterr()
        status = cli.main(["segment", *arguments, "--model", checkpoint, *QUICK])
        stdout, stderr = capfdbinary.readouterr()
        assert not list((tmp_path / "temporary").iterdir())  # nothing is left behind
        assert b"Traceback" not in stderr
        return status, stdout, stderr.decode()

    return run


@pytest.mark.parametrize(
    "file_format",
    ["overlay", "coco", *(pytest.param(name, marks=pytest.mark.slow) for name in ("labels", "npz", "yolo"))],
)
def test_a_result_is_the_same_through_pipes_and_by_files(segment, tmp_path, file_format):
    options = ["--format", file_format, "--point", "3,3"]
    assert segment("a.png", "--out", "out", *options)[0] == 0
    (path,) = [path for path in (tmp_path / "out").iterdir() if path.stem in ("a", "a_masks")]
    data = (tmp_path / "a.png").read_bytes()
    assert segment("a.png", "--out", "-", *options) == (0, path.read_bytes(), "")
    status, stdout, stderr = segment("-", "--out", "-", *options, data=data)
    assert (status, stderr) == (0, "")
    if file_format == "coco":
        assert json.loads(stdout)["images"][0]["file_name"] == "stdin"
        stdout = stdout.replace(b'"stdin"', b'"a.png"')
    assert stdout == path.read_bytes()


def test_images_from_standard_input_are_never_replaced_by_others(segment, tmp_path):
    data = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert segment("a.png", "--out", "out", "--format", "coco")[0] == 0
    for image in data:
        status, stdout, stderr = segment("-", "--out", "out", "--format", "coco", data=image)
        assert (status, stderr) == (0, "") and stdout.decode().splitlines()[1].startswith("standard input  ")
    assert names(tmp_path / "out") == {"a.json", "stdin.json", "stdin-2.json"}
    widths = [
        json.loads((tmp_path / f"out/{name}.json").read_text())["images"][0]["width"] for name in ("stdin", "stdin-2")
    ]
    assert widths == [40, 41]
    assert "temporary" not in (tmp_path / "out/.samlight.json").read_text().splitlines()[1]


def test_one_document_of_a_folder_goes_to_standard_output(segment):
    status, stdout, stderr = segment("a.png", "b.png", "--out", "-", "--format", "coco", "--one-json")
    assert (status, stderr) == (0, "")
    assert [image["file_name"] for image in json.loads(stdout)["images"]] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("arguments", "data", "status", "words"),
    [
        (["-"], b"", 1, "skipped standard input: the file is empty"),
        (["-"], b"Dear diary", 1, "skipped standard input: not an image"),
        (["-", "--point", "99,3"], "a.png", 1, "skipped standard input: point 99,3 lies outside the image"),
        (["-", "a.png"], b"", 2, "- is one image, from standard input: give no path beside it"),
        (["-"], None, 2, "- is an image from standard input: give one, as by < photo.jpg"),
        (["-", "--resume"], b"", 2, "--resume needs files"),
        (["a.png", "--out", "-", "--format", "png"], b"", 2, "--format png a folder: choose another format"),
        (["a.png", "b.png", "--out", "-"], b"", 2, "--out - is the result of one image, and there are 2"),
        (["a.png", "gone.png", "--out", "-", "--format", "coco"], b"", 0, "skipped gone.png: no such file"),
        (["gone.png", "--out", "-"], b"", 1, "skipped gone.png: no such file"),
    ],
)
def test_streams_that_cannot_be(segment, tmp_path, arguments, data, status, words):
    data = (tmp_path / data).read_bytes() if isinstance(data, str) else data
    found, stdout, stderr = segment(*arguments, data=data)
    assert found == status and words in stderr
    assert bool(stdout) == (status == 0)
    assert stderr.count("\n") <= 2


def test_terminals_are_refused(segment, monkeypatch):
    monkeypatch.setattr(Pipe, "isatty", lambda self: True)
    status, _, stderr = segment("-", "--out", "out")
    assert status == 2 and "< photo.jpg" in stderr
    master, slave = os.openpty()
    with open(slave, "w") as terminal, open(master, "rb"), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        status, _, stderr = segment("a.png", "--out", "-")
        assert status == 2 and "--out - would write to the terminal" in stderr
        assert segment("a.png", "--out", "-", "--format", "yolo", "--point", "3,3")[0] == 0  # text can be read there


@pytest.mark.slow
def test_pipes_between_processes(checkpoint, tmp_path):
    write_images(tmp_path, "a.png")
    options = f"--model {checkpoint} --point 3,3 --format labels --device cpu"
    command = f"cat a.png | {sys.executable} -m samlight_hf.commands.cli segment - --out - {options} | cat > labels.png"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert np.asarray(Image.open(tmp_path / "labels.png")).shape == (30, 40)
