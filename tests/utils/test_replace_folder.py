"""Check that an interruption at any step leaves the earlier folder or the new one, whole."""

import os
import shutil

import pytest

from samlight_hf.utils import atomic_files
from samlight_hf.utils.atomic_files import move_folder, replace_folder


class Interrupted(BaseException):
    """An error that, like KeyboardInterrupt, is not an Exception."""


def write_files(content):
    def write(folder):
        (folder / "sub").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt"):
            (folder / name).write_text(content)

    return write


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.txt")}


OLD, NEW = ({"a.txt": text, "sub/b.txt": text} for text in ("old", "new"))


@pytest.mark.parametrize("fsync", [False, True])
def test_a_folder_is_made_and_replaced(tmp_path, fsync):
    path = tmp_path / "folder"
    for text, expected in (("old", OLD), ("new", NEW)):
        replace_folder(path, write_files(text), fsync=fsync)
        assert content_of(path) == expected
        assert list(tmp_path.iterdir()) == [path]


def test_what_only_the_earlier_folder_had_is_gone(tmp_path):
    replace_folder(tmp_path / "folder", write_files("old"))
    (tmp_path / "folder/more.txt").touch()
    replace_folder(tmp_path / "folder", write_files("new"))
    assert content_of(tmp_path / "folder") == NEW


@pytest.mark.parametrize(("is_there", "step"), [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
def test_an_interruption_leaves_the_earlier_folder(tmp_path, monkeypatch, is_there, step):
    """Interrupt the writing (0) or a move: there is one, or two where an earlier folder makes room."""
    path = tmp_path / "folder"
    if is_there:
        replace_folder(path, write_files("old"))
    moves = []

    def replace(source, destination):
        moves.append(source)
        if len(moves) == step:
            raise Interrupted
        os.rename(source, destination)

    def write(folder):
        write_files("new")(folder)
        if step == 0:
            raise Interrupted

    monkeypatch.setattr(atomic_files.os, "replace", replace)
    with pytest.raises(Interrupted):
        replace_folder(path, write)
    assert list(tmp_path.iterdir()) == ([path] if is_there else [])
    assert content_of(path) == (OLD if is_there else {})


def test_an_earlier_folder_that_cannot_be_put_back_is_not_lost(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    replace_folder(path, write_files("old"))
    moves = []

    def replace(source, destination):
        moves.append(source)
        if len(moves) > 1:
            raise OSError("the disk is gone")
        os.rename(source, destination)

    monkeypatch.setattr(atomic_files.os, "replace", replace)
    with pytest.raises(OSError, match="the disk is gone"):
        replace_folder(path, write_files("new"))
    (earlier,) = tmp_path.iterdir()
    assert content_of(earlier) == OLD


def test_the_earlier_folder_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder"
    replace_folder(path, write_files("old"))

    def write(folder):
        write_files("new")(folder)
        assert content_of(path) == OLD

    replace_folder(path, write)
    assert content_of(path) == NEW


def test_a_file_and_a_link_are_replaced_and_what_the_link_names_stays(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "target").mkdir()
    write_files("old")(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        replace_folder(tmp_path / name, write_files("new"))
        assert content_of(tmp_path / name) == NEW and not (tmp_path / name).is_symlink()
    assert content_of(tmp_path / "target") == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link", "target"]


def test_what_an_earlier_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    for ending in ("part", "old"):
        write_files("left")(tmp_path / f".folder.{os.getpid()}.{ending}")
    write_files("old")(tmp_path / "folder")
    replace_folder(tmp_path / "folder", write_files("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and content_of(tmp_path / "folder") == NEW


def test_a_finished_folder_is_moved(tmp_path):
    for text, expected in (("old", OLD), ("new", NEW)):
        write_files(text)(tmp_path / "staged" / "folder")
        move_folder(tmp_path / "staged" / "folder", tmp_path / "folder", fsync=True)
        assert content_of(tmp_path / "folder") == expected
    shutil.rmtree(tmp_path / "staged")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_everything_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    flushed, replaced = [], []
    replace = os.replace
    monkeypatch.setattr(atomic_files, "_flush", lambda path: flushed.append(path.name))
    monkeypatch.setattr(atomic_files.os, "replace", lambda *paths: (replaced.append(list(flushed)), replace(*paths)))
    write_files("new")(tmp_path / "staged")
    move_folder(tmp_path / "staged", tmp_path / "folder", fsync=True)
    assert sorted(replaced[0]) == ["a.txt", "b.txt", "staged", "sub"]
    assert flushed[-1] == tmp_path.name
