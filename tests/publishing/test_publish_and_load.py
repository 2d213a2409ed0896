"""Publishing to the fake Hub, and loading from it in another process without the package."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

from samlight_hf import SamLighteningModel
from samlight_hf.publishing.build import build_folder
from samlight_hf.publishing.checks import CODE
from samlight_hf.publishing.upload import PublishedRevision, PublishError, publish
from tests.conftest import tiny_config

from .client import ROOT, environment, run_without_package


REPO = "org/sam-lightening"
FILES = {*CODE, "model.safetensors", "config.json", "processor_config.json", "README.md", "LICENSE"}
COMMIT, UPLOAD, PREUPLOAD = ("POST", "/commit/"), ("PUT", "/storage/upload/"), ("POST", "/preupload/")
BATCH, CREATE, TAG = ("POST", "/objects/batch"), ("POST", "/repos/create"), ("POST", "/tag/")


def make_folder(parent: Path, seed: int, **options) -> Path:
    torch.manual_seed(seed)
    SamLighteningModel(tiny_config()).save_pretrained(parent / f"model-{seed}")
    build_folder(parent / f"model-{seed}", parent / f"published-{seed}", **options)
    return parent / f"published-{seed}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two folders with different weights, ready to be published."""
    parent = tmp_path_factory.mktemp("folders")
    return [make_folder(parent, seed) for seed in (0, 1)]


def upload(folder, **options) -> PublishedRevision:
    """Publish without the slow verification, which test_publish_command.py and test_trainer_push.py include."""
    return publish(folder, REPO, **{"verify": False, "retries": 0, "retry_wait": 0.001, **options})


def state(hub) -> dict:
    """Return the files and refs of the repository."""
    if REPO not in hub.repositories:
        return {}
    repo = hub.repository(REPO)
    return {"files": repo.files(), "refs": repo.refs(True)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub, revision="main") -> dict[str, bytes]:
    return {name: data for name, data in hub.repository(REPO).files(revision).items() if name != ".gitattributes"}


def titles(hub, revision="main") -> list[str]:
    return [commit.title for commit in hub.repository(REPO).history(revision)]


LOAD = """
import json
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline

repo_id, revisions, photo = {arguments!r}
image = Image.open(photo)
results = {{}}
for revision in revisions:
    options = {{"revision": revision, "trust_remote_code": True}}
    model = AutoModel.from_pretrained(repo_id, **options)
    again = AutoModelForMaskGeneration.from_pretrained(repo_id, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    processor = AutoProcessor.from_pretrained(repo_id, **options)
    inputs = processor(image, input_boxes=[[[10, 10, 200, 150]]], return_tensors="pt")
    with torch.inference_mode():
        masks = model(**inputs, multimask_output=False).pred_masks
    generator = pipeline("mask-generation", model=repo_id, device="cpu", **options)
    settings = {{"pred_iou_thresh": -1.0, "stability_score_thresh": -1.0, "crops_nms_thresh": 1.0}}
    everything = generator(image, points_per_crop=2, **settings)
    token = model.mask_decoder.iou_token.weight[0, 0].item()
    results[revision] = [token, masks.double().sum().item(), len(everything["masks"])]
assert type(model).__module__.startswith("transformers_modules.")
print(json.dumps(results))
"""


def test_what_is_published_loads_elsewhere_by_tag_by_commit_and_offline(hub, folders, tmp_path):
    """Only the cache is used here; test_trainer_push.py loads from the server."""
    first = upload(folders[0], tag="v1.0")
    second = upload(folders[1])
    assert second.commit == hub.repository(REPO).find("main").sha
    home = tmp_path / "elsewhere"
    for revision in ("main", "v1.0", first.commit):
        snapshot_download(REPO, revision=revision, cache_dir=home / "hub")
    num_requests = len(hub.requests)
    script = LOAD.format(arguments=[REPO, ["main", "v1.0", first.commit], str(ROOT / "examples/images/coffee.jpg")])
    offline = environment(hub, home, token=None, HF_HUB_OFFLINE="1")
    results = json.loads(run_without_package(script, tmp_path, offline).splitlines()[-1])
    assert len(hub.requests) == num_requests
    tokens = [
        load_file(folder / "model.safetensors")["mask_decoder.iou_token.weight"][0, 0].item() for folder in folders
    ]
    assert results["v1.0"] == results[first.commit] != results["main"]
    assert [results["v1.0"][0], results["main"][0]] == tokens
    assert all(num_masks == 12 for _, _, num_masks in results.values())


def test_a_publication_is_one_commit_and_repeating_it_makes_none(hub, folders):
    first = upload(folders[0], private=True, tag="v1.0", commit_message="A student")
    head = hub.repository(REPO).find("main").sha
    assert first == PublishedRevision(REPO, head, f"{hub.url}/{REPO}/tree/{head}", "main", "v1.0")
    assert published(hub) == content(folders[0])
    assert set(published(hub)) == FILES
    assert titles(hub) == ["A student", "initial commit"]
    assert hub.repository(REPO).tags == {"v1.0": first.commit}
    assert hub.repository(REPO).private
    before = state(hub)
    again = upload(folders[0], tag="v1.0")
    assert again.commit == first.commit
    assert state(hub) == before
    assert upload(folders[1], tag="v2.0").commit != first.commit
    assert published(hub, "v1.0") == content(folders[0])
    assert published(hub, "v2.0") == published(hub) == content(folders[1])


@pytest.mark.parametrize("is_head", [True, False])
def test_a_tag_that_names_something_else_is_refused_before_anything_is_published(hub, folders, is_head):
    first = upload(folders[0], tag="v1.0")
    if not is_head:
        upload(folders[1])
    before = state(hub)
    with pytest.raises(PublishError, match=f"the tag v1.0 is there, on {first.commit}"):
        upload(folders[1 if is_head else 0], tag="v1.0")
    assert state(hub) == before


def test_a_pull_request_leaves_main_as_it_is(hub, folders, tmp_path):
    with pytest.raises(PublishError, match="a pull request needs one"):
        upload(folders[0], create_pr=True)
    upload(folders[0])
    request = upload(folders[1], create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert request.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert published(hub) == content(folders[0])
    copy = snapshot_download(REPO, revision=request.pr_revision, cache_dir=tmp_path)
    assert {name: Path(copy, name).read_bytes() for name in FILES} == content(folders[1])


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, folders):
    HfApi().create_repo(REPO)
    hub.fail(*COMMIT, cut="response", times=1)
    with pytest.raises(PublishError, match="A pull request may have been opened"):
        upload(folders[0], create_pr=True, retries=2)
    assert hub.count(*COMMIT) == 1


def test_a_pull_request_that_is_refused_was_not_opened(hub, folders):
    HfApi().create_repo(REPO)
    hub.fail(*COMMIT, 403)
    with pytest.raises(PublishError, match=r"may not write there.*Nothing was published\."):
        upload(folders[0], create_pr=True, retries=2)
    hub.heal()
    hub.fail(*COMMIT, 409, times=1)
    assert upload(folders[0], create_pr=True, retries=2).pr_revision == "refs/pr/1"


def test_a_branch_is_made_and_a_private_repository_hidden(hub, folders, tmp_path):
    upload(folders[0], revision="experiment", private=True)
    assert published(hub, "experiment") == content(folders[0])
    assert published(hub) == {}
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download(REPO, revision="experiment", token=False, cache_dir=tmp_path)
    snapshot_download(REPO, revision="experiment", token="hf_reader", cache_dir=tmp_path)


def test_private_is_never_public_by_mistake(hub, folders):
    HfApi().create_repo(REPO)
    with pytest.raises(PublishError, match="is public, and private was asked for"):
        upload(folders[0], private=True)
    assert published(hub) == {}


def test_what_the_new_folder_has_not_is_gone_and_the_rest_stays(hub, folders, tmp_path):
    sharded = make_folder(tmp_path, 2, max_shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    upload(sharded)
    assert published(hub) == content(sharded)
    theirs = {"images/a.png": b"x", "notes.md": b"y"}
    loaded = {"old_code.py": b"z", "adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}
    for name, data in {**theirs, **loaded}.items():
        HfApi().upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=REPO)
    upload(folders[0])
    assert published(hub) == content(folders[0]) | theirs
    upload(sharded)
    assert published(hub) == content(sharded) | theirs


@pytest.mark.parametrize(
    ("request_", "fault", "message", "num_tries"),
    [
        (COMMIT, {"status": 500}, "answered 500", 2),
        (COMMIT, {"status": 401}, "hf auth login", 1),
        (COMMIT, {"status": 403}, "write access", 1),
        (COMMIT, {"status": 409}, "Another commit was made at the same time", 2),
        (COMMIT, {"status": 413}, "--max-shard-size", 1),
        (COMMIT, {"cut": "request"}, "could not be reached", 2),
        (UPLOAD, {"status": 500}, "500", 0),
        (UPLOAD, {"status": 413}, "--max-shard-size", 0),
        (UPLOAD, {"cut": "request"}, "could not be reached", 0),
        (PREUPLOAD, {"status": 401}, "hf auth login", 0),
        (PREUPLOAD, {"status": 404}, "no such repository", 0),
        (BATCH, {"status": 503}, "answered 503", 0),
    ],
)
def test_an_interrupted_upload_leaves_the_old_revision_as_it_was_and_a_repeat_succeeds(
    hub, folders, request_, fault, message, num_tries
):
    upload(folders[0], tag="v1.0")
    before = state(hub)
    hub.fail(*request_, **fault)
    with pytest.raises(PublishError, match=message) as error:
        upload(folders[1], tag="v2.0", retries=1)
    text = str(error.value)
    assert text.endswith("Nothing was published.") and "\n" not in text and "hf_writer" not in text
    assert state(hub) == before
    assert hub.count(*COMMIT) == 1 + num_tries, "only temporary failures are retried"
    hub.heal()
    upload(folders[1], tag="v2.0")
    assert published(hub) == content(folders[1])
    assert len(titles(hub)) == 3


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (COMMIT, {"status": 500}),
        (COMMIT, {"status": 409}),
        (COMMIT, {"status": 429}),
        (COMMIT, {"cut": "request"}),
        (COMMIT, {"cut": "response"}),  # the commit was made, but the client does not know
        (UPLOAD, {"cut": "request"}),
        (PREUPLOAD, {"status": 429}),
        (PREUPLOAD, {"cut": "response"}),
        (BATCH, {"status": 500}),
        (BATCH, {"cut": "response"}),
        (TAG, {"status": 500}),
        (TAG, {"cut": "response"}),
        (CREATE, {"cut": "response"}),
        (("GET", "/api/models/"), {"cut": "response"}),
    ],
)
def test_what_may_pass_is_tried_again_and_done_once(hub, folders, request_, fault):
    hub.fail(*request_, **fault, times=2)
    result = upload(folders[0], tag="v1.0", retries=2)
    assert published(hub) == published(hub, "v1.0") == content(folders[0])
    assert titles(hub) == ["Publish sam-lightening", "initial commit"]
    assert result.commit == hub.repository(REPO).find("main").sha


def test_a_tag_that_could_not_be_made_is_made_by_a_repeat(hub, folders):
    hub.fail(*TAG, 403)
    with pytest.raises(PublishError, match="Published as [0-9a-f]{40}, but the tag was not made"):
        upload(folders[0], tag="v1.0")
    assert published(hub) == content(folders[0])
    hub.heal()
    result = upload(folders[0], tag="v1.0")
    assert hub.repository(REPO).tags == {"v1.0": result.commit}
    assert len(titles(hub)) == 2


def test_a_commit_of_somebody_else_in_between_is_kept(hub, folders):
    """A concurrent commit moves the head: the publisher reads the new one and tries again."""
    upload(folders[0])
    repo = hub.repository(REPO)
    commit = repo.commit

    def after_somebody_else(revision, lines, create_pr=False):
        repo.commit = commit
        note = {"key": "file", "value": {"path": "notes.txt", "content": "bWluZQ==", "encoding": "base64"}}
        commit("main", [{"key": "header", "value": {"summary": "theirs"}}, note])
        return commit(revision, lines, create_pr)

    repo.commit = after_somebody_else
    upload(folders[1], retries=1)
    assert published(hub) == {**content(folders[1]), "notes.txt": b"mine"}
    assert titles(hub) == ["Publish sam-lightening", "theirs", "Publish sam-lightening", "initial commit"]


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_reader"])
def test_tokens_that_do_not_do(hub, folders, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=r"hf auth login|may not write"):
        upload(folders[0])
    assert not hub.repositories


def test_a_repository_of_others(hub, folders):
    with pytest.raises(PublishError, match="others/model: the Hub answered 403"):
        publish(folders[0], "others/model", verify=False)


def test_without_a_network(hub, folders, monkeypatch):
    hub.stop()
    with pytest.raises(PublishError, match="could not be reached"):
        upload(folders[0], retries=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        upload(folders[0])


def test_a_dry_run_asks_nothing(hub, folders):
    dry = upload(folders[0], dry_run=True, tag="v1")
    assert dry == PublishedRevision(REPO, None, f"{hub.url}/{REPO}", "main", "v1")
    assert not hub.requests
