"""examples/split.py, run on tars."""

import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from samlight_hf.data import Sa1bDataset
from tests.data.files import annotation, jpeg, sa1b_json, write_tar

from .in_process import run_example


def run(*arguments) -> subprocess.CompletedProcess:
    return run_example("split.py", *arguments)


@pytest.fixture
def tar(tmp_path):
    members = {}
    for number in range(40):
        members[f"{'ab'[number % 2]}_{number}.jpg"] = jpeg(seed=number)
        members[f"{'ab'[number % 2]}_{number}.json"] = sa1b_json(annotation(number))
    return write_tar(tmp_path / "set.tar", members)


def names(path: Path) -> set[str]:
    dataset = Sa1bDataset(path)
    return {dataset.sample_id(index) for index in range(len(dataset))}


def test_every_image_is_in_one_part_and_nothing_is_changed(tar, tmp_path):
    result = run(tar, "--out", tmp_path, "--share", 0.3)
    assert result.returncode == 0, result.stderr
    train, held_out = (tmp_path / f"set-{part}.tar" for part in ("train", "held-out"))
    assert names(train) | names(held_out) == names(tar) and not names(train) & names(held_out)
    assert 4 <= len(names(held_out)) <= 20
    with tarfile.open(tar) as source, tarfile.open(held_out) as part:
        for name in part.getnames():
            assert part.extractfile(name).read() == source.extractfile(name).read()


def test_the_rule_depends_on_the_name_alone(tar, tmp_path):
    run(tar, "--out", tmp_path / "all", "--share", 0.3)
    with tarfile.open(tar) as source:
        few = {name: source.extractfile(name).read() for name in source.getnames()[:20]}
    run(write_tar(tmp_path / "few.tar", few), "--out", tmp_path / "few", "--share", 0.3)
    assert names(tmp_path / "few/few-held-out.tar") < names(tmp_path / "all/set-held-out.tar")


def test_images_of_a_group_stay_together(tar, tmp_path):
    assert run(tar, "--out", tmp_path, "--share", 0.5, "--group", "^[ab]").returncode == 0
    assert {name[0] for name in names(tmp_path / "set-held-out.tar")} in ({"a"}, {"b"})


@pytest.mark.parametrize(
    "options, message",
    [
        (["--share", "0"], "--share 0.0 must be above 0"),
        (["--share", "0.3", "--group", "_"], "would be empty"),
    ],
)
def test_what_cannot_be_is_one_line(tar, tmp_path, options, message):
    result = run(tar, "--out", tmp_path, *options)
    assert result.returncode != 0
    assert re.match(f"error: .*{message}", result.stderr) and "Traceback" not in result.stderr


def test_a_damaged_tar_leaves_nothing_and_nothing_is_overwritten(tar, tmp_path):
    broken = tmp_path / "broken.tar"
    broken.write_bytes(tar.read_bytes()[:20_000])
    assert "damaged or cut short" in run(broken, "--out", tmp_path / "out", "--share", 0.3).stderr
    assert not list((tmp_path / "out").iterdir())
    assert run(tar, "--out", tmp_path / "out", "--share", 0.3).returncode == 0
    again = run(tar, "--out", tmp_path / "out", "--share", 0.3)
    assert again.returncode != 0 and "exists already" in again.stderr
