"""`samlight publish` as a user runs it, with the bundled checkpoint and a tiny one, on a fake Hub."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from safetensors.torch import load_file

from samlight_hf import SamLighteningModel
from samlight_hf.commands import cli
from tests.conftest import tiny_config

from .client import ROOT


CHECKPOINT = ROOT / "checkpoints" / "sam-lightening-tiny"
REPORT = ROOT / "benchmarks" / "results" / "evaluation_bsds500_val.json"
REPO = "org/student"


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_the_bundled_checkpoint_is_verified_on_a_photograph_and_published(hub, capsys):
    status, out, err = run(
        capsys, "publish", CHECKPOINT, REPO, "--private", "--tag", "v1.0", "--evaluation", REPORT, "--message", "First",
        "--max-shard-size", "20MB",
    )  # fmt: skip
    assert status == 0, err
    assert "Verified on coffee.jpg" in out and "the same 4 outputs bit by bit" in out
    info = HfApi().model_info(REPO, revision="v1.0", files_metadata=True)
    assert f'revision="{info.sha}", trust_remote_code=True' in out and info.private
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename != ".gitattributes"}
    assert "model-00002-of-00002.safetensors" in sizes and "LICENSE" in sizes
    for name, size in sizes.items():
        assert re.search(rf"^ *{size:,}  {re.escape(name)}$", out, flags=re.M), (name, out)
    card = ModelCard.load(hf_hub_download(REPO, "README.md", revision="v1.0"))
    assert card.data.license_name == "non-commercial-research" and len(card.data.eval_results) == 18
    assert f'model="{REPO}", revision="v1.0", trust_remote_code=True' in card.text
    shards = [load_file(path) for path in CHECKPOINT.glob("*.safetensors")]
    original = {name: tensor for shard in shards for name, tensor in shard.items()}
    for name in sizes:
        if name.endswith(".safetensors"):
            for key, weight in load_file(hf_hub_download(REPO, name)).items():
                assert torch.equal(weight, original.pop(key))
    assert not original
    assert [commit.title for commit in HfApi().list_repo_commits(REPO)] == ["First", "initial commit"]
    assert "README.md publishes the one that is there" in err


def test_dry_run_shows_everything_and_asks_nothing(hub, folder, capsys):
    """A dry run does everything but the upload: it also verifies, here on another image with another model."""
    image = ROOT / "examples" / "images" / "cat.jpg"
    status, out, err = run(
        capsys, "publish", folder, REPO, "--dry-run", "--license", "mit", "--image", image, "--revision", "try"
    )
    assert status == 0, err
    assert f'model="{REPO}", revision="try", trust_remote_code=True' in out, "main may have another model"
    for name in ("config.json", "model.safetensors", "modeling_sam_lightening.py", "processor_config.json", "LICENSE"):
        assert re.search(rf"^ +[\d,]+  {re.escape(name)}$", out, flags=re.M)
    assert "Verified on cat.jpg" in out
    assert "license: mit" in out and "## Limits and biases" in out
    assert "nothing was sent" in out
    assert not hub.requests


def test_a_licence_is_asked_for(hub, folder, capsys):
    status, _, err = run(capsys, "publish", folder, REPO, "--dry-run")
    assert status == 2 and "--license" in err and err.count("\n") == 1
    (folder / "mine.md").write_text("---\nlibrary_name: transformers\n---\n# Mine\n")
    status, _, err = run(capsys, "publish", folder, REPO, "--card", folder / "mine.md")
    assert status == 2 and "licence" in err
    status, _, err = run(capsys, "publish", folder, REPO, "--card", folder / "mine.md", "--license", "mit")
    assert status == 2 and "--license is for a card that is made here" in err and "mine.md" in err
    (folder / "latin.md").write_bytes(b"# M\xfcnchen")
    status, _, err = run(capsys, "publish", folder, REPO, "--card", folder / "latin.md")
    assert status == 1 and "latin.md: no text in UTF-8" in err
    status, _, err = run(capsys, "publish", folder, REPO, "--license", "mit", "--license-name", "mine")
    assert status == 2 and "--license other" in err
    assert not hub.requests


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "arguments", "status", "words"),
    [
        (lambda folder: shutil.rmtree(folder), [], 1, "no such folder"),
        (pickled, [], 1, "Convert it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), [], 1, "damaged"),
        (lambda folder: (folder / "processor_config.json").unlink(), [], 1, "no processor_config.json"),
        (lambda folder: None, ["--tag", "a b"], 2, "tag='a b'"),
        (lambda folder: None, ["--tag", "v1", "--pr"], 2, "exclude each other"),
        (lambda folder: None, ["--retries", "-1"], 2, "--retries"),
        (lambda folder: None, ["--evaluation", "nowhere.json"], 1, "nowhere.json"),
        (lambda folder: None, ["--card", "nowhere.md"], 1, "nowhere.md"),
        (lambda folder: None, ["--max-shard-size", "much"], 2, "--max-shard-size: 'much' is not a size such as"),
        (lambda folder: None, ["--max-shard-size", "0GB"], 2, "--max-shard-size: '0GB' is not a size such as"),
        (lambda folder: None, ["--image", "nowhere.jpg"], 1, "nowhere.jpg"),
        (lambda folder: None, ["--training", "config.json"], 1, "config.json"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(hub, folder, capsys, spoil, arguments, status, words):
    spoil(folder)
    exit_status, _, err = run(capsys, "publish", folder, REPO, "--license", "mit", *arguments)
    assert exit_status == status and words in err, err
    assert "Traceback" not in err and "internal error" not in err
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["student", "a/b/c", "org/a b", "", "../student"])
def test_repo_ids_that_cannot_be(hub, folder, capsys, repo_id):
    status, _, err = run(capsys, "publish", folder, repo_id, "--license", "mit")
    assert status == 2 and "samlight" in err
    assert not hub.requests


def test_card_of_a_folder(folder, capsys, tmp_path):
    training = tmp_path / "result.json"
    training.write_text(json.dumps({"stage": "encoder", "settings": {"max_steps": 7}}))
    status, out, _ = run(
        capsys, "card", folder, "--license", "other", "--license-name", "mine", "--license-link", "https://host/x",
        "--base-model", "facebook/sam-vit-base", "--training", training, "--repo-id", REPO,
    )  # fmt: skip
    assert status == 0
    data = ModelCard(out).data
    assert (data.license, data.license_name, data.base_model) == ("other", "mine", "facebook/sam-vit-base")
    assert "| max_steps | 7 |" in out and f'"{REPO}"' in out
    status, out, err = run(capsys, "card", tmp_path / "nowhere")
    assert (status, out) == (1, "") and "no such folder" in err
    for place, words in ((tmp_path / "none" / "README.md", "no such folder"), (folder, "a folder, not a file")):
        status, out, err = run(capsys, "card", folder, "--out", place)
        assert (status, out) == (1, "") and words in err and ".part" not in err


def test_licence_on_the_command_line_replaces_the_folders(folder, capsys):
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    (folder / "card.yaml").write_text("license: other\nlicense_name: research\nlicense_link: https://host/terms\n")
    assert "license_name: research" in run(capsys, "card", folder)[1]
    out = run(capsys, "card", folder, "--license", "mit")[1]
    assert "license: mit" in out and "research" not in out.split("# ")[0] and "https://host/terms" not in out
