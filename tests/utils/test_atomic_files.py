"""Check that files with the longest possible names can be written."""

import os
from pathlib import Path

import pytest

from samlight_hf import SamLighteningModel
from samlight_hf.evaluation.evaluator import Journal
from samlight_hf.publishing.build import build_folder
from samlight_hf.utils import atomic_files
from samlight_hf.utils.atomic_files import atomic_write, beside, fit_name
from tests.conftest import tiny_config


LONG = ["x" * 255, "长" * 85, "🦊" * 63, "é" * 127]


@pytest.mark.parametrize("name", LONG, ids=lambda name: name[0])
def test_a_file_of_the_longest_name_is_written_aside(tmp_path, name):
    path = tmp_path / name
    for text in ("one", "two"):
        atomic_write(path, lambda aside, text=text: aside.write_text(text))
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_short_names_are_what_they_were(tmp_path):
    assert beside(tmp_path / "a.json").name == f".a.json.{os.getpid()}.part"
    assert beside(tmp_path / "a", ".old").name == ".a.old"
    assert fit_name("a", ".png", tmp_path) == "a.png"
    assert fit_name("x" * 251, ".png", tmp_path) == "x" * 251 + ".png"


@pytest.mark.parametrize("name", LONG, ids=lambda name: name[0])
def test_names_that_are_cut_stay_apart(tmp_path, name):
    cut = [fit_name(name + end, "_masks.png", tmp_path) for end in ("1", "2")]
    assert cut[0] != cut[1]
    for each in cut:
        assert each.endswith("_masks.png") and each[:20] == name[:20] and len(os.fsencode(each)) <= 255
        (tmp_path / each).touch()


def test_journals_and_published_folders_of_long_names(tmp_path):
    Journal(tmp_path / "journal", f"{'x' * 250}.box", {}).flush()
    (journal,) = (tmp_path / "journal").iterdir()
    assert len(journal.name) <= 255 and journal.name.endswith(".0.jsonl")
    SamLighteningModel(tiny_config()).save_pretrained(tmp_path / "model")
    build_folder(tmp_path / "model", Path(tmp_path / ("y" * 250)), card="# Card\n")
    assert (tmp_path / ("y" * 250) / "config.json").is_file()
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["j", "m", "y"]


def test_a_published_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    SamLighteningModel(tiny_config()).save_pretrained(tmp_path / "model")
    build_folder(tmp_path / "model", tmp_path / "built", card="# First\n")
    replace = os.replace

    def fail(source, destination):
        if source.name.endswith(".part"):
            raise OSError("the disk is full")
        replace(source, destination)

    monkeypatch.setattr(atomic_files.os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        build_folder(tmp_path / "model", tmp_path / "built", card="# Second\n")
    assert (tmp_path / "built/README.md").read_text() == "# First\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "model"]
