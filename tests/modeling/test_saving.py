"""Tests of the folder that save_pretrained writes: it loads with the package, and with transformers alone."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    SamImageProcessor,
    SamProcessor,
    modeling_utils,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import hub

from samlight_hf import (
    SamLighteningConfig,
    SamLighteningImageProcessor,
    SamLighteningModel,
    SamLighteningVisionModel,
)
from tests.conftest import tiny_config


MODELING = Path(sys.modules["samlight_hf.modeling"].__file__).parent
CODE = {
    "configuration_sam_lightening.py",
    "dilated_attention.py",
    "image_processing_sam_lightening.py",
    "modeling_sam_lightening.py",
}
COMPLETE = CODE | {"config.json", "model.safetensors", "processor_config.json"}


def run_without_the_package(script: str, cache: Path, *arguments) -> str:
    """Run a script in a new process where samlight_hf cannot be imported; check that stderr is empty, return stdout."""
    preamble = "import sys; sys.modules['samlight_hf'] = None\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "TRANSFORMERS_VERBOSITY": "warning"}
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", preamble + script, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=cache,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    noise = [line for line in process.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert not [line for line in noise if "it/s]" not in line], process.stderr
    return process.stdout


def own_image_processor() -> SamImageProcessor:
    sizes = {"size": {"longest_edge": 32}, "pad_size": {"height": 32, "width": 32}}
    return SamImageProcessor(**sizes, image_mean=[0.5, 0.5, 0.5])


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_folder_is_complete(folder):
    assert {path.name for path in folder.iterdir()} == COMPLETE
    for name in CODE:
        assert (folder / name).read_bytes() == (MODELING / name).read_bytes()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_sam_lightening.SamLighteningConfig",
        "AutoModel": "modeling_sam_lightening.SamLighteningModel",
        "AutoModelForMaskGeneration": "modeling_sam_lightening.SamLighteningModel",
    }
    image_processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    assert image_processor["image_processor_type"] == "SamLighteningImageProcessor"
    assert image_processor["auto_map"] == {
        "AutoImageProcessor": "image_processing_sam_lightening.SamLighteningImageProcessor"
    }


def test_auto_classes_load_it(folder, model, pixel_values):
    assert type(AutoConfig.from_pretrained(folder)) is SamLighteningConfig
    for auto_class in (AutoModel, AutoModelForMaskGeneration):
        loaded = auto_class.from_pretrained(folder)
        assert type(loaded) is SamLighteningModel
        assert torch.equal(loaded.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is SamProcessor
    assert type(processor.image_processor) is SamLighteningImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is SamLighteningImageProcessor
    assert processor.image_processor.size["longest_edge"] == 32
    assert processor.image_processor.mask_size["longest_edge"] == 32
    assert type(AutoModel.from_config(model.config)) is SamLighteningModel
    assert type(AutoModel.from_config(model.config.vision_config)) is SamLighteningVisionModel


def test_checkpoint_without_a_processor_still_finds_one(folder):
    """For an old folder, or one whose processor file was lost, the registration names the class."""
    (folder / "processor_config.json").unlink()
    image_processor = {"size": {"longest_edge": 32}, "pad_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    assert type(AutoProcessor.from_pretrained(folder)) is SamProcessor
    found = AutoImageProcessor.from_pretrained(folder)
    assert type(found) is SamLighteningImageProcessor
    assert found.size["longest_edge"] == 32


def test_a_processor_of_ones_own_is_kept(model, tmp_path):
    processor = SamProcessor(own_image_processor())
    processor.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    for order in ("first", "second"):
        kept = AutoProcessor.from_pretrained(tmp_path / order).image_processor
        assert type(kept) is SamImageProcessor
        assert kept.image_mean[0] == 0.5


@pytest.mark.parametrize("part", ["processor", "image processor"])
def test_the_processor_saved_alone_brings_its_code(model, tmp_path, part):
    processor = make_processor(model.config.vision_config)
    (processor if part == "processor" else processor.image_processor).save_pretrained(tmp_path)
    name = "image_processing_sam_lightening.py"
    assert {path.name for path in tmp_path.glob("*.py")} == {name}
    assert (tmp_path / name).read_bytes() == (MODELING / name).read_bytes()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SamLighteningImageProcessor


def test_a_processor_of_another_size_is_replaced(model, tmp_path):
    SamLighteningModel(tiny_config(image_size=64, segment_length=None, dilation_rate=1)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size["longest_edge"] == 32


@pytest.mark.parametrize("pad_size", [{}, {"pad_size": {"height": 32, "width": 64}}, {"pad_size": None}], ids=str)
def test_a_processor_that_pads_to_another_size_is_replaced(model, image, tmp_path, pad_size):
    SamProcessor(SamImageProcessor(size={"longest_edge": 32}, **pad_size)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert model(**processor(image, return_tensors="pt")).pred_masks.shape[-2:] == (32, 32)


@pytest.mark.parametrize("part", ["model", "encoder"])
def test_push_while_saving_uploads_everything(model, tmp_path, monkeypatch, part):
    """All files of the folder are passed to huggingface_hub, whose functions are replaced here."""
    uploaded = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, *args, **kwargs): ...

        def create_commit(self, repo_id, operations, **kwargs):
            uploaded.extend(operation.path_in_repo for operation in operations)

    for module in (modeling_utils, hub):
        monkeypatch.setattr(module, "hf_api", Api, raising=False)
        for name in ("create_repo", "create_branch", "create_commit"):
            monkeypatch.setattr(module, name, getattr(Api(), name), raising=False)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None)
    )
    saved = model if part == "model" else model.vision_encoder
    saved.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="org/name")
    assert set(uploaded) >= {path.name for path in (tmp_path / "model").iterdir()}
    assert set(uploaded) >= (COMPLETE if part == "model" else COMPLETE - CODE | {"image_processing_sam_lightening.py"})


def test_parts_and_subclasses_save_too(model, tmp_path):
    model.vision_encoder.save_pretrained(tmp_path / "encoder")
    assert (tmp_path / "encoder" / "model.safetensors").is_file()

    class Subclass(SamLighteningModel): ...

    Subclass(model.config).save_pretrained(tmp_path / "subclass", True, None)
    assert type(AutoModel.from_pretrained(tmp_path / "subclass")) is SamLighteningModel


def test_shards(model, tmp_path, pixel_values):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))


def test_other_ranks_write_no_processor(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "processor_config.json").exists()


def test_vision_model_folder(model, tmp_path, pixel_values):
    vision_model = SamLighteningVisionModel(model.config.vision_config).eval()
    vision_model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == COMPLETE
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SamLighteningVisionModel
    assert torch.equal(loaded(pixel_values).last_hidden_state, vision_model(pixel_values).last_hidden_state)


def test_pipeline(folder, image):
    everything = pipeline("mask-generation", model=str(folder), points_per_batch=16)
    found = everything(image, points_per_crop=4, pred_iou_thresh=-1.0, stability_score_thresh=0.0)
    assert found["masks"]
    assert found["masks"][0].shape == (20, 30)


def test_loads_with_remote_code_alone_saves_again_and_loads_again(folder, model, pixel_values, image, tmp_path):
    """All ways to load a folder work without the package, and so do those for a folder that this process saves."""
    stock = tmp_path / "stock"  # as an older checkpoint has it: a processor of transformers' own, which needs no trust
    SamProcessor(own_image_processor()).save_pretrained(stock)
    stock_processor = (stock / "processor_config.json").read_bytes()
    torch.save(pixel_values, tmp_path / "pixels.pt")
    image.save(tmp_path / "image.png")
    script = """
import torch
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline)
source, target, stock, pixels, image, output = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model = AutoModel.from_pretrained(source, trust_remote_code=True)
generator = AutoModelForMaskGeneration.from_pretrained(source, trust_remote_code=True)
assert type(model).__name__ == type(generator).__name__ == "SamLighteningModel", type(model)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
for image_processor in (processor.image_processor, AutoImageProcessor.from_pretrained(source, trust_remote_code=True)):
    assert type(image_processor).__name__ == "SamLighteningImageProcessor", type(image_processor)
    assert type(image_processor).__module__.startswith("transformers_modules."), type(image_processor).__module__
for auto_class in (AutoProcessor, AutoImageProcessor):
    try:
        auto_class.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        assert "pass the argument `trust_remote_code=True`" in str(error), error
    else:
        raise AssertionError("code was run without trust")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    found = pipeline("mask-generation", model=source, trust_remote_code=True, dtype=dtype)(
        image, points_per_crop=4, pred_iou_thresh=-1.0, stability_score_thresh=0.0)
    assert found["masks"], found
torch.save(model.get_image_embeddings(torch.load(pixels)), output)
generator.save_pretrained(target)  # makes a processor
generator.save_pretrained(target)  # keeps it
processor.save_pretrained(target + " processor")
assert type(AutoProcessor.from_pretrained(stock).image_processor).__name__ == "SamImageProcessor"
generator.save_pretrained(stock)
try:
    import samlight_hf
except ImportError:
    print("ran without the package")
"""
    saved_again = tmp_path / "again"
    for source, target in ((folder, saved_again), (saved_again, tmp_path / "third")):
        arguments = (source, target, stock, tmp_path / "pixels.pt", tmp_path / "image.png", tmp_path / "output.pt")
        (cache := tmp_path / f"cache of {source.name}").mkdir()
        assert run_without_the_package(script, cache, *arguments) == "ran without the package\n"
        assert torch.equal(torch.load(tmp_path / "output.pt"), model.get_image_embeddings(pixel_values))
        assert {path.name for path in target.iterdir()} == COMPLETE
        for name in ("processor_config.json", *CODE):
            assert (target / name).read_bytes() == (folder / name).read_bytes(), name
        alone = tmp_path / f"{target.name} processor"
        assert {path.name for path in alone.iterdir()} == {
            "processor_config.json",
            "image_processing_sam_lightening.py",
        }
        for path in alone.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path
        assert (stock / "processor_config.json").read_bytes() == stock_processor
        first, again = (json.loads((where / "config.json").read_text()) for where in (folder, target))
        assert again["auto_map"] == first["auto_map"]
        assert again["vision_config"].items() >= first["vision_config"].items()


def test_package_and_remote_code_side_by_side(folder, model, pixel_values, tmp_path, monkeypatch):
    """With the package imported too, trust_remote_code=True gives a second class of the same name; both work."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for loaded in (remote, AutoModel.from_pretrained(folder, trust_remote_code=False)):
        assert torch.equal(loaded.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))
    name = "image_processing_sam_lightening.SamLighteningImageProcessor"
    remote_class = get_class_from_dynamic_module(name, str(folder))
    assert remote_class is not SamLighteningImageProcessor
    for kind in (remote_class, SamLighteningImageProcessor):  # either's processor may be saved where the other's was
        SamProcessor(kind.from_pretrained(folder)).save_pretrained(folder)
        remote.save_pretrained(folder)
        assert type(AutoProcessor.from_pretrained(folder).image_processor) is SamLighteningImageProcessor


def test_modeling_is_self_contained():
    """The files import only torch, transformers, huggingface_hub, the standard library and their siblings."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for name in CODE:
        for node in ast.walk(ast.parse((MODELING / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, (name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "flash_attn.cute":
                assert node.module.split(".")[0] in allowed, (name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in CODE, (name, node.lineno)
