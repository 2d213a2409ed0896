"""The fake Hub, used through huggingface_hub's own client."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "org/model"
LARGE = bytes(range(256)) * 4096  # 1 MiB


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi()
    api.create_repo(REPO)
    return api


def commit(api, *operations, message="a commit", **options):
    return api.create_commit(REPO, operations, commit_message=message, **options)


def test_a_commit_is_read_back(api, hub, tmp_path):
    first = commit(
        api, add("config.json", b"{}"), add("model.safetensors", LARGE), add("a/b/c.txt", b"text"), message="first"
    )
    assert hub.repository(REPO).find("main").files["model.safetensors"].is_large
    assert not hub.repository(REPO).find("main").files["config.json"].is_large
    folder = snapshot_download(REPO, local_dir=tmp_path / "copy")
    for path, content in {"config.json": b"{}", "model.safetensors": LARGE, "a/b/c.txt": b"text"}.items():
        assert (tmp_path / "copy" / path).read_bytes() == content, folder
    second = commit(api, add("config.json", b"[]"), CommitOperationDelete("a/"), message="second")
    assert [c.title for c in api.list_repo_commits(REPO)] == ["second", "first", "initial commit"]
    assert set(api.list_repo_files(REPO)) == {".gitattributes", "config.json", "model.safetensors"}
    assert set(api.list_repo_files(REPO, revision=first.oid)) >= {"a/b/c.txt"}
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == second.oid
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert {s.rfilename: s.lfs and s.lfs.sha256 for s in info.siblings}["model.safetensors"] == sha256
    infos = api.get_paths_info(REPO, ["model.safetensors", "config.json"])
    assert {info.path: info.lfs and info.lfs.size for info in infos} == {
        "model.safetensors": len(LARGE),
        "config.json": None,
    }
    tops = {entry.path for entry in api.list_repo_tree(REPO, revision=first.oid)}
    assert tops == {".gitattributes", "a", "config.json", "model.safetensors"}


def test_it_hashes_files_as_git_does(api, hub, tmp_path):
    (tmp_path / "file").write_bytes(b"some text\n")
    commit(api, add("file", b"some text\n"))
    process = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert api.get_paths_info(REPO, ["file"])[0].blob_id == process.stdout.strip()


def test_what_is_there_is_neither_uploaded_nor_committed_again(api, hub):
    files = (add("config.json", b"{}"), add("model.safetensors", LARGE))
    first = commit(api, *files)
    again = commit(api, add("config.json", b"{}"), add("model.safetensors", LARGE))
    assert again.oid == first.oid
    commit(api, add("other.safetensors", LARGE))  # the same content under another name
    assert hub.count("PUT", "/storage/upload/") == 1


def test_a_commit_on_what_has_changed_since_is_refused(api):
    first = commit(api, add("a", b"1"))
    second = commit(api, add("b", b"1"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit(api, add("a", b"2"), parent_commit=first.oid)
    commit(api, add("a", b"2"), parent_commit=second.oid)


def test_a_commit_that_is_refused_changes_nothing(api, hub):
    before = hub.repository(REPO).files()
    with pytest.raises(EntryNotFoundError):
        commit(api, add("new", b"1"), CommitOperationDelete("missing"))
    hub.fail("PUT", "/storage/upload/", 403)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        commit(api, add("new", b"1"), add("model.safetensors", LARGE))
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64, "size": 5}},
    ]
    with pytest.raises(Exception, match="does not exist"):
        hub.repository(REPO).commit("main", lines)
    assert hub.repository(REPO).files() == before


def test_branches_tags_and_pull_requests(api, hub):
    first = commit(api, add("a", b"1"))
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="next")
    api.create_branch(REPO, branch="next", exist_ok=True)
    commit(api, add("a", b"2"), revision="next")
    request = commit(api, add("a", b"3"), create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    commit(api, add("b", b"4"), revision="refs/pr/1")
    expected = {"main": {"a": b"1"}, "v1": {"a": b"1"}, "next": {"a": b"2"}, "refs/pr/1": {"a": b"3", "b": b"4"}}
    for revision, files in expected.items():
        for path, content in files.items():
            assert Path(hf_hub_download(REPO, path, revision=revision)).read_bytes() == content
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "next"}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first.oid)]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        commit(api, add("a", b"2"), revision="nowhere")
    with pytest.raises(BadRequestError):
        commit(api, add("a", b"2"), revision="v1")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")


def test_strangers_see_no_private_repository_and_write_nowhere(api, hub):
    api.create_repo("org/secret", private=True)
    assert api.model_info("org/secret").private
    for token, status in ((False, "401"), ("hf_reader", "403")):
        stranger = HfApi(token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            stranger.create_commit(REPO, [add("a", b"1")], commit_message="m")
        stranger.model_info(REPO)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("org/secret")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("others/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.whoami()["name"] == "user"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "not YAML"),
        ("license: Apache License 2", "license"),
        ("license: other", "license_name"),
        ("base_model: /home/me/teacher", "base_model"),
        ("datasets: [A data set]", "datasets"),
        ("model-index: [{name: x, results: [{task: {}}]}]", "model-index"),
    ],
)
def test_metadata_that_the_hub_refuses(api, hub, metadata, message):
    with pytest.raises(ValueError, match=message):
        commit(api, add("README.md", f"---\n{metadata}\n---\ntext".encode()))
    assert "README.md" not in hub.repository(REPO).files()
    commit(api, add("README.md", b"---\nlicense: apache-2.0\nbase_model: facebook/sam-vit-base\n---\ntext"))


def test_faults(api, hub):
    hub.fail("PUT", "/storage/upload/", 500, times=2)  # the client itself retries
    commit(api, add("model.safetensors", LARGE))
    assert hub.count("PUT", "/storage/upload/") == 3
    hub.fail("PUT", "/storage/upload/", cut="request", times=1)
    commit(api, add("model.safetensors", LARGE[1:]))
    hub.fail("GET", "/storage/download/", cut="response", times=1)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == LARGE[1:]
    for status in (401, 409, 413, 500):
        hub.fail("POST", "/commit/", status, times=1)
        with pytest.raises(HfHubHTTPError, match=str(status)):
            commit(api, add("a", b"1"))
    hub.fail("POST", "/commit/", cut="request", times=1)
    with pytest.raises(Exception, match="(?i)disconnect|closed|reset|peer"):
        commit(api, add("a", b"1"))
    assert "a" not in hub.repository(REPO).files()
    hub.fail("POST", "/commit/", cut="response", times=1)  # done, but the client does not know
    with pytest.raises(Exception, match="(?i)disconnect|closed|reset|peer|incomplete"):
        commit(api, add("a", b"1"))
    assert hub.repository(REPO).files()["a"] == b"1"
    assert commit(api, add("a", b"1")).oid == hub.repository(REPO).find("main").sha
