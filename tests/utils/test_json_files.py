"""Check that JSON files are read, and that errors name the file."""

import os

import pytest

from samlight_hf.utils.json_files import read_json


def test_what_a_file_holds_is_read(tmp_path):
    path = tmp_path / "a.json"
    for text, kind, expected in (
        ('{"é": [1, null]}', dict, {"é": [1, None]}),
        ("[1.5]", list, [1.5]),
        ("3", None, 3),
        ("\ufeff{}", dict, {}),
    ):
        path.write_text(text, encoding="utf-8")
        assert read_json(path, kind) == read_json(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON, or cut short"),
        (b'{"a": 1', "not JSON, or cut short"),
        (b'{"a": "\xff"}', "not JSON, or cut short"),
        (b"[" * 200_000, "not JSON, or cut short"),
    ],
    ids=["empty", "cut short", "not UTF-8", "too deep"],
)
def test_a_file_that_is_not_json_is_named(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: cannot be read") and "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ValueError) as error:
            read_json(path)
        assert str(error.value).startswith(f"{path}: cannot be read (") and os.strerror(0) not in str(error.value)


def test_another_kind_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json: holds no JSON object\."):
        read_json(path, dict)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json: holds no JSON list\."):
        read_json(path, list)
