"""Building, checking and verifying folders; test_publish_and_load.py publishes them to a fake Hub."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import AutoModel, SamConfig, SamModel

from samlight_hf import SamLighteningModel, hub
from samlight_hf.images.reading import ImageError
from samlight_hf.loading import CheckpointError, load_model
from samlight_hf.publishing import verify as verification
from samlight_hf.publishing.build import build_folder
from samlight_hf.publishing.checks import CODE, CODE_FOLDER, FolderError, check_folder
from samlight_hf.publishing.upload import publish
from samlight_hf.publishing.verify import compare_outputs, verify_folder
from tests.conftest import tiny_config


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "sam-lightening-tiny"
REPO = "org/student"
COMPLETE = {"LICENSE", "README.md", "config.json", "model.safetensors", "processor_config.json", *CODE}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A checkpoint with the files that the Trainer saves beside it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-20"
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"secret": "hf_" + "a" * 34}, folder / name)
    (folder / "trainer_state.json").write_text('{"output_dir": "/home/me/outputs"}')
    return folder


@pytest.fixture(scope="module")
def built(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "student"
    build_folder(student, folder)
    return folder


@pytest.fixture
def folder(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "folder"))


def test_the_public_module_offers_every_step():
    steps = {"CardFacts", "build_folder", "check_folder", "check_target", "publish", "render_card", "verify_folder"}
    results = {"FolderError", "PublishError", "PublishedRevision", "VerificationReport"}
    assert set(hub.__all__) == steps | results
    assert all(hasattr(hub, name) for name in hub.__all__)


# Building.


def test_a_built_folder_is_complete_and_holds_nothing_else(student, built):
    assert {path.name for path in built.iterdir()} == COMPLETE
    for name in CODE:
        assert (built / name).read_bytes() == (CODE_FOLDER / name).read_bytes()
    assert (built / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    before, after = load_file(student / "model.safetensors"), load_file(built / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    check_folder(built)


def test_shards(student, tmp_path):
    files = build_folder(student, tmp_path / "sharded", max_shard_size="50KB")
    names = {path.name for path in files}
    assert len([name for name in names if name.startswith("model-")]) > 2
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    check_folder(tmp_path / "sharded")
    weights = load_model(student, "cpu")[0].state_dict()
    for name, weight in load_model(tmp_path / "sharded", "cpu")[0].state_dict().items():
        assert torch.equal(weight, weights[name])
    build_folder(tmp_path / "sharded", tmp_path / "whole")  # and back, byte by byte
    build_folder(student, tmp_path / "direct")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()


def test_weights_keep_their_dtype(tmp_path):
    SamLighteningModel(tiny_config()).bfloat16().save_pretrained(tmp_path / "half")
    build_folder(tmp_path / "half", tmp_path / "built")
    assert {weight.dtype for weight in load_file(tmp_path / "built/model.safetensors").values()} == {torch.bfloat16}
    check_folder(tmp_path / "built")
    assert AutoModel.from_pretrained(tmp_path / "built").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_are_loaded_in_their_dtype_whatever_the_config_said(student, tmp_path, name):
    source = Path(shutil.copytree(student, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | {name: "bfloat16"}))
    assert AutoModel.from_pretrained(source).dtype == torch.bfloat16
    build_folder(source, tmp_path / "built")
    loaded = AutoModel.from_pretrained(tmp_path / "built").state_dict()
    for name, weight in load_file(student / "model.safetensors").items():
        assert torch.equal(loaded[name], weight), name


def test_building_again_gives_the_same_bytes(student, built, tmp_path):
    build_folder(student, tmp_path / "again", card=(built / "README.md").read_text())
    build_folder(student, tmp_path / "again", card=(built / "README.md").read_text())  # replaces what it built
    for path in built.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_old_checkpoint_is_completed(student, tmp_path):
    """Code of another release, a remote auto_map and a private name are not copied."""
    old = Path(shutil.copytree(student, tmp_path / "old"))
    (old / "modeling_sam_lightening.py").write_text("raise SystemExit")
    (old / "removed_since.py").write_text("raise SystemExit")
    config = json.loads((old / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "somebody/else--modeling.Model"}, "_name_or_path": "/home/me/student"}
    (old / "config.json").write_text(json.dumps(config))
    build_folder(old, tmp_path / "new")
    check_folder(tmp_path / "new")
    assert not (tmp_path / "new" / "removed_since.py").exists()


def test_an_original_sam_needs_no_code(tmp_path):
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        "output_channels": 32, "num_pos_feats": 16, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 32,
    }  # fmt: skip
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    SamModel(config).save_pretrained(tmp_path / "sam")
    make_processor(config.vision_config).save_pretrained(tmp_path / "sam")
    build_folder(tmp_path / "sam", tmp_path / "built")
    check_folder(tmp_path / "built")
    assert {path.name for path in (tmp_path / "built").iterdir()} == COMPLETE - set(CODE)


def broken(name):
    def missing(folder):
        (folder / name).unlink()

    return missing


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    incomplete = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(incomplete, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["vision_encoder.pos_embed"][0, 0, 0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken("config.json"), "no config.json"),
        (broken("model.safetensors"), "no model.safetensors"),
        (pickled, "Convert it: python -c"),
        (half, "truncated or damaged"),
        (without_a_layer, "weights are missing"),
        (with_nan, "NaN or infinite values in vision_encoder.pos_embed"),
        (lambda folder: (folder / "extra_weights.pkl").write_bytes(b"x"), "the weights are there as safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "model_type='bert'"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
)
def test_sources_that_are_no_checkpoint(student, tmp_path, spoil, words):
    source = Path(shutil.copytree(student, tmp_path / "source"))
    spoil(source)
    with pytest.raises((FolderError, CheckpointError)) as raised:
        build_folder(source, tmp_path / "built")
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*built*")), "nothing is left behind"


def test_a_folder_that_is_not_there(tmp_path):
    for function in (check_folder, verify_folder, lambda folder: build_folder(folder, tmp_path / "out")):
        with pytest.raises(FolderError, match="no such folder"):
            function(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["source", "it's $HOME"])
def test_pickled_weights_are_converted_as_the_message_says(student, tmp_path, name):
    """Run the command from the message."""
    source = Path(shutil.copytree(student, tmp_path / name))
    pickled(source)
    with pytest.raises(FolderError) as raised:
        build_folder(source, tmp_path / "built")
    *_, option, script = shlex.split(str(raised.value).split("Convert it: ")[1])  # as a shell does
    assert option == "-c"
    exec(script, {})
    weights = load_file(student / "model.safetensors")
    converted = load_model(source / "safetensors", "cpu")[0].state_dict()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_destinations_that_hold_something_else_are_left_alone(student, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for destination, words in (
        (tmp_path / "mine", "thesis.tex"),
        (tmp_path / "file", "is a file"),
        (student, "source itself"),
        (tmp_path / "file" / "new", "file is a file"),
        (Path("."), "working directory"),
    ):
        with pytest.raises(ValueError, match=words):
            build_folder(student, destination)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    with pytest.raises(ValueError):
        build_folder(student, tmp_path / "built", max_shard_size="5 bananas")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train.py", "README.md", "LICENSE"), "holds train.py"),
        (("config.json", "pytorch_model.bin"), "holds pytorch_model.bin"),
        (("config.json", "model.safetensors", "processor_config.json", *CODE), "and no LICENSE: it was not built here"),
    ],
    ids=["a project", "pickled weights", "another student"],
)
def test_a_destination_that_only_looks_like_a_built_folder_is_left_alone(student, tmp_path, names, words):
    destination = tmp_path / "mine"
    destination.mkdir()
    for name in names:
        (destination / name).write_text("mine")
    with pytest.raises(ValueError, match=words):
        build_folder(student, destination)
    assert {path.name: path.read_text() for path in destination.iterdir()} == dict.fromkeys(names, "mine")


# Folders that must not be published.


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def append(name, text):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def processor_of_elsewhere(folder):
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["auto_map"] = {"AutoImageProcessor": "somebody/else--module.Processor"}
    (folder / "processor_config.json").write_text(json.dumps(content))


def metadata_in_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "made_by": "/home/me/run"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        *((broken(name), f"has no {name}") for name in sorted(COMPLETE)),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "training_args.bin").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt: does not belong"),
        (lambda folder: (folder / ".env").write_text("x"), ".env: does not belong"),
        (lambda folder: (folder / "helper.py").write_text("x"), "helper.py: does not belong"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"x"), "two sets of weights"),
        (lambda folder: (folder / "runs").mkdir(), "runs: a link or a folder"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "link: a link or a folder"),
        (append("modeling_sam_lightening.py", "\n# changed\n"), "is not the package's own"),
        (edit_json("config.json", auto_map={"AutoModel": "somebody/else--modeling.Model"}), "auto_map"),
        (edit_json("config.json", vision_config={"auto_map": {"AutoConfig": "a/b--c.D"}}), "auto_map"),
        (processor_of_elsewhere, "auto_map"),
        (edit_json("config.json", note="hf_" + "Ab1" * 11), "secret (hf_Ab1...)"),
        (append("README.md", "Key: -----BEGIN OPENSSH PRIVATE KEY-----"), "secret"),
        (append("README.md", "Trained on `/home/me/data/train.tar`."), "/home/me/data/train.tar"),
        (append("README.md", "See C:\\Users\\me\\x."), "C:\\Users"),
        (append("README.md", "See file:///srv/x."), "file:///srv/x"),
        (edit_json("processor_config.json", cache="~/secret/place"), "~/secret/place"),
        (metadata_in_weights, "/home/me/run"),
        (lambda folder: (folder / "README.md").write_text("# A card"), "no metadata"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n# A card"), "cannot be read"),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n"), "library_name"),
        (lambda folder: (folder / "processor_config.json").write_text("[]"), "no JSON object"),
        (edit_json("config.json", model_type="bert"), "model_type='bert'"),
        (half, "truncated or damaged"),
        (without_a_layer, "weights are missing"),
        (with_nan, "NaN or infinite"),
    ],
)  # fmt: skip
def test_a_folder_that_must_not_be_published(folder, spoil, words):
    spoil(folder)
    # publish would raise PublishError if it asked the Hub.
    for function in (check_folder, lambda folder: publish(folder, REPO, verify=False)):
        with pytest.raises(FolderError) as raised:
            function(folder)
        assert words in str(raised.value) and "\n" not in str(raised.value)


def test_links_and_fractions_are_no_places(folder):
    append("README.md", "See https://host/a/b, and/or 1/2 of [this](docs/a/b.md) in ./a/b or ../c/d.")(folder)
    check_folder(folder)


def test_ones_own_token_is_found_whatever_it_looks_like(folder, monkeypatch):
    append("README.md", "Use correct-horse-battery.")(folder)
    check_folder(folder)
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    with pytest.raises(FolderError, match="your own Hub token") as raised:
        check_folder(folder)
    assert "correct-horse" not in str(raised.value)


# Verification in a separate process; test_publish_command.py tests all of it on the bundled checkpoint.


def test_a_folder_that_does_not_run_elsewhere_says_why(built, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "SCRIPT", tmp_path / "run_without_package.py")
    verification.SCRIPT.write_text(
        "import sys\nassert 'samlight_hf' not in sys.modules\nraise ImportError('of the model')\n"
    )
    with pytest.raises(FolderError, match=r"does not load and run without the package: ImportError: of the model"):
        verify_folder(built)
    verification.SCRIPT.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(FolderError, match=r"did not load and run within 0 s"):
        verify_folder(built, timeout=0.1)


def test_an_image_that_is_none(built, tmp_path):
    (tmp_path / "image.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"image\.png"):
        verify_folder(built, tmp_path / "image.png")


def test_one_different_bit_is_seen():
    expected = {"box masks": torch.ones(2, 2), "box scores": torch.zeros(1)}
    compare_outputs(Path("x"), "an image", expected, {name: tensor.clone() for name, tensor in expected.items()})
    for actual in (
        {**expected, "box masks": torch.nextafter(torch.ones(2, 2), torch.tensor(2.0))},
        {"box masks": expected["box masks"]},
        {**expected, "more": torch.ones(1)},
        {**expected, "box masks": torch.full((2, 2), torch.nan)},
    ):
        with pytest.raises(FolderError, match="not what this package computes"):
            compare_outputs(Path("x"), "an image", expected, actual)


# Targets that are refused without asking the Hub.


@pytest.mark.parametrize(
    "repo_id", ["", "student", "a/b/c", "org/-x", "org/x.git", "org/a--b", "org/a b", "../x", "org/" + "x" * 100, None]
)
def test_repo_ids_that_cannot_be(built, repo_id):
    with pytest.raises(ValueError, match="repo_id="):
        publish(built, repo_id, verify=False)


@pytest.mark.parametrize(
    "options",
    [
        {"tag": "v 1"},
        {"tag": "../x"},
        {"tag": ""},
        {"revision": "a..b"},
        {"revision": "-x"},
        {"tag": "v1", "create_pr": True},
        {"retries": -1},
    ],
)
def test_options_that_cannot_be(built, options):
    with pytest.raises(ValueError, match=r"tag|revision|retries"):
        publish(built, REPO, verify=False, **options)
