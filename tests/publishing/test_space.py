"""Spaces: their folders, that they run by themselves, and their upload to a fake Hub."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, metadata_load

from samlight_hf.commands import cli
from samlight_hf.publishing.space import (
    REQUIREMENTS,
    SpaceSettings,
    build_space,
    publish_space,
    space_files,
    thresholds_of,
)
from samlight_hf.publishing.upload import PublishError

from .client import ROOT


EXAMPLE = SpaceSettings("org/sam-lightening", "org/sam-lightening")


def test_the_example_is_what_is_written():
    """`samlight publish --space` writes examples/space, and the package's code beside it."""
    texts = space_files(EXAMPLE)
    folder = ROOT / "examples" / "space"
    assert {path.name for path in folder.iterdir()} == set(texts)
    for name, text in texts.items():
        assert (folder / name).read_text(encoding="utf-8") == text


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    expected = {*project["dependencies"], *extras["polygons"]}
    assert set(REQUIREMENTS.split()) == expected
    assert {name for name in extras["app"] if not name.startswith("samlight-hf[")} == {"gradio>=6.31"}


def test_the_metadata_name_model_and_sdk(tmp_path):
    build_space(tmp_path / "space", SpaceSettings("org/student", "me/try-it", "0" * 40, (0.5, 0.65)))
    data = metadata_load(tmp_path / "space" / "README.md")
    assert data["sdk"] == "gradio" and data["models"] == ["org/student"] and data["app_file"] == "app.py"
    assert re.fullmatch(r"6\.\d+\.\d+", data["sdk_version"]) and data["title"] == "try-it"
    app = (tmp_path / "space" / "app.py").read_text()
    assert f"REVISION = '{'0' * 40}'" in app and "THRESHOLDS = (0.5, 0.65)" in app
    compile(app, "app.py", "exec")
    build_space(tmp_path / "space", SpaceSettings("org/student", "me/2024"))
    assert metadata_load(tmp_path / "space" / "README.md")["title"] == "2024"  # no number


@pytest.mark.parametrize("name", ['org/a"; import os #', "a", "org/a b", "../x", "org/{x}"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="repo_id"):
        space_files(SpaceSettings(name, "org/a"))
    with pytest.raises(ValueError, match="repo_id"):
        space_files(SpaceSettings("org/a", name))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no Space"):
        build_space(tmp_path, EXAMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    build_space(tmp_path / "space", EXAMPLE)
    (tmp_path / "space" / "images" / "old.jpg").parent.mkdir(exist_ok=True)
    (tmp_path / "space" / "images" / "old.jpg").touch()
    assert tmp_path / "space" / "images" / "old.jpg" not in build_space(tmp_path / "space", EXAMPLE), "it is replaced"
    (tmp_path / "space" / ".git").mkdir()
    with pytest.raises(ValueError, match="is no Space as it was written"):
        build_space(tmp_path / "space", EXAMPLE)
    assert (tmp_path / "space" / ".git").is_dir()


@pytest.mark.parametrize("space", ["try it", "a/b/c", "try"])
def test_a_wrong_name_is_told_before_anything_is_done(hub, space, capsys):
    assert cli.main(["publish", "nowhere", "org/student", "--license", "mit", "--space", space]) == 2
    assert space in capsys.readouterr().err and not hub.requests


@pytest.mark.slow
def test_a_dry_run_writes_the_space_and_sends_nothing(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "card.yaml").write_text("thresholds: {pred_iou_thresh: 0.3}")
    status = cli.main([
        "publish", str(tmp_path / "student"), "org/student", "--license", "mit", "--dry-run", "--space", "org/try",
        "--space-out", str(tmp_path / "space"), "--image", str(ROOT / "examples" / "images" / "cat.jpg"),
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "the Space org/try was not sent" in captured.out and not hub.requests
    assert f"SAMLIGHT_MODEL={tmp_path / 'student'} python {tmp_path / 'space' / 'app.py'} runs it" in captured.out
    app = (tmp_path / "space" / "app.py").read_text()
    assert '"org/student"' in app and "REVISION = None" in app and "THRESHOLDS = (0.3, 0.95)" in app


@pytest.mark.slow
def test_a_space_is_published_with_the_commit_of_the_model(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "student")
    arguments = [
        "publish", str(tmp_path / "student"), "org/student", "--license", "mit", "--image",
        str(ROOT / "examples" / "images" / "cat.jpg"), "--space",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert f"{hub.url}/spaces/org/student" in capsys.readouterr().out
    commit = HfApi().model_info("org/student").sha
    app = Path(hf_hub_download("org/student", "app.py", repo_type="space")).read_text()
    assert f"REVISION = '{commit}'" in app
    names = HfApi().list_repo_files("org/student", repo_type="space")
    assert {
        "README.md",
        "requirements.txt",
        "LICENSE",
        "samlight_hf/app/stage.js",
        "samlight_hf/modeling/__init__.py",
    } < set(names)
    assert not [name for name in names if name.endswith((".pyc", ".safetensors"))]


@pytest.mark.slow
def test_a_token_that_may_not_write_is_told(hub, tmp_path, monkeypatch):
    build_space(tmp_path / "space", EXAMPLE)
    with pytest.raises(PublishError, match="answered 403"):
        publish_space(tmp_path / "space", "org/space", token="hf_reader")


@pytest.mark.parametrize("private", [False, True])
def test_a_space_that_must_not_be_written_to_is_told_before_anything_is_published(
    hub, model, tmp_path, capsys, private
):
    """A Space of others keeps its app, and what shall be private goes to no public one."""
    model.save_pretrained(tmp_path / "student")
    api = HfApi()
    api.create_repo("org/try", repo_type="space", space_sdk="gradio")
    if not private:
        api.upload_file(path_or_fileobj=b"print('mine')", path_in_repo="app.py", repo_id="org/try", repo_type="space")
    before = api.space_info("org/try").sha
    arguments = ["publish", str(tmp_path / "student"), "org/student", "--license", "mit", "--space", "org/try"]
    assert cli.main([*arguments, *["--private"] * private]) == 1
    error = capsys.readouterr().err
    assert ("is public, and private was asked for" if private else "holds app.py, and no app that") in error
    assert "--space org/name" in error and error.count("\n") == 1
    assert api.space_info("org/try").sha == before and not api.repo_exists("org/student")


def test_a_new_space_and_one_of_an_earlier_publication_are_written(hub, tmp_path):
    build_space(tmp_path / "space", EXAMPLE)
    HfApi().create_repo("org/space", repo_type="space", space_sdk="gradio")  # as on the Hub's page
    for _ in range(2):
        assert publish_space(tmp_path / "space", "org/space") == f"{hub.url}/spaces/org/space"
    assert "app.py" in HfApi().list_repo_files("org/space", repo_type="space")


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "/api/spaces/org/space$", {"status": 503}), ("POST", "/repos/create", {"status": 502}),
        ("POST", "/commit/", {"status": 503}), ("POST", "/commit/", {"cut": "response"}),
    ],
)  # fmt: skip
def test_failures_that_pass_are_retried_as_those_of_a_model(hub, tmp_path, fault):
    build_space(tmp_path / "space", EXAMPLE)
    method, pattern, kind = fault
    hub.fail(method, pattern, **kind, times=1)
    publish_space(tmp_path / "space", "org/space", retries=1, retry_wait=0.001)
    assert hub.count("GET", "/api/spaces/org/space$") == 2, "it began again"
    assert "app.py" in HfApi().list_repo_files("org/space", repo_type="space")
    assert len(HfApi().list_repo_commits("org/space", repo_type="space")) <= 2, "one commit, on what was there"
    hub.fail(method, pattern, 503)
    tried = hub.count(method, pattern)
    build_space(tmp_path / "space", SpaceSettings("org/another", "org/space"))  # so that there is something to commit
    with pytest.raises(PublishError, match="answered 503.*not published"):
        publish_space(tmp_path / "space", "org/space", retries=1, retry_wait=0.001)
    assert hub.count(method, pattern) >= tried + 2


def test_thresholds_are_those_of_the_card():
    assert thresholds_of({}) == (0.88, 0.95)
    assert thresholds_of({"pred_iou_thresh": 0.3, "points_per_batch": 8}) == (0.3, 0.95)
    assert thresholds_of({"pred_iou_thresh": -1, "stability_score_thresh": 1}) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"card\.yaml: pred_iou_thresh='0\.3' of thresholds is no number"):
        thresholds_of({"pred_iou_thresh": "0.3"})


@pytest.mark.slow
def test_a_space_runs_by_itself(model, tmp_path):
    """Its folder has all that it needs beside the requirements: this package's code is imported from it."""
    pytest.importorskip("gradio", reason="a Space needs gradio")
    from tests.app.conftest import processor_of

    model.save_pretrained(tmp_path / "model")
    processor_of(model).save_pretrained(tmp_path / "model")
    images = [ROOT / "examples" / "images" / "cat.jpg"]
    build_space(tmp_path / "space", EXAMPLE, images)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    code = (
        "import runpy, samlight_hf, sys; print(samlight_hf.__file__, samlight_hf.modeling.__file__, flush=True); "
        "runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {**os.environ, "SAMLIGHT_MODEL": str(tmp_path / "model"), "GRADIO_SERVER_PORT": str(port)}
    environment.pop("SPACE_ID", None)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path / "space", env=environment, stdout=file, stderr=file
        )
    try:
        end = time.monotonic() + 120
        while "Open http" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=30) as answer:
            assert b"data:image/jpeg" in answer.read(), "the examples are there"
    finally:
        process.terminate()
        process.wait(30)
    assert log.read_text().split()[:2] == [
        str(tmp_path / "space" / "samlight_hf" / "__init__.py"),
        str(tmp_path / "space" / "samlight_hf" / "modeling" / "__init__.py"),
    ]
