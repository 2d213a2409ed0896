"""Features of a network of timm as a second source of training."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from samlight_hf.distillation import FeatureTeacher, MaskStage
from samlight_hf.distillation.checkpoints import CheckpointChangedError
from samlight_hf.distillation.teacher import normalize_pixels

from .conftest import logged, make_arguments, make_examples, make_student, make_trainer
from .test_run import run
from .test_stages import LOSS_WEIGHTS


timm = pytest.importorskip("timm", reason='pip install "samlight-hf[timm]"')


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """Write a small network with random weights in timm's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network")
    timm.models.save_for_hf(timm.create_model("test_efficientnet"), str(path), safe_serialization=True)
    return str(path)


@pytest.fixture(scope="module")
def batch() -> dict:
    examples = make_examples(2)
    return torch.utils.data.default_collate([examples[0], examples[1]])


def make_teacher(network, **options) -> FeatureTeacher:
    return FeatureTeacher(network, torch.float32, **{"image_size": 64, **options})


def test_targets_are_the_networks_maps_of_its_own_pixels(network, batch):
    teacher = make_teacher(network)
    pixel_values = normalize_pixels(batch["pixel_values"], batch["reshaped_input_sizes"])
    targets = teacher.targets(pixel_values, 8)
    assert [tuple(target.shape) for target in targets] == [(2, 8, 8, width) for width in teacher.widths]
    assert not any(target.requires_grad or target.is_inference() for target in targets)
    plain = timm.create_model(f"local-dir:{network}", pretrained=True).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = F.interpolate(batch["pixel_values"] / 255, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        maps = plain.forward_intermediates((pixels - mean) / std, indices=2, intermediates_only=True)
    for target, features in zip(targets, maps):
        expected = F.interpolate(features, (8, 8), mode="bilinear").permute(0, 2, 3, 1)
        torch.testing.assert_close(target, F.layer_norm(expected, expected.shape[-1:]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 64), ("test_resnet", 64)])
def test_other_architectures_give_maps_of_the_students_grid(tmp_path, name, size):
    timm.models.save_for_hf(timm.create_model(name), str(tmp_path), safe_serialization=True)
    teacher = make_teacher(str(tmp_path), image_size=size + 3)  # rounded to a multiple of the stride
    assert teacher.image_size == size
    assert [target.shape[:3] for target in teacher.targets(torch.zeros(1, 3, 96, 96), 6)] == [(1, 6, 6)] * 2


def test_the_loss_is_the_error_of_the_projections(network, batch):
    teacher, student = make_teacher(network), make_student()
    module = MaskStage(student, "end_to_end", LOSS_WEIGHTS, feature_widths=teacher.widths, feature_weight=0.5)
    plain = MaskStage(student, "end_to_end", LOSS_WEIGHTS)
    prompts = {name: batch[name] for name in ("masks", "boxes", "points", "uniforms")}
    pixel_values = batch["pixel_values"] / 255
    targets = teacher.targets(pixel_values, 8)
    outputs, masks_alone = module(pixel_values, **prompts, features=targets), plain(pixel_values, **prompts)
    states = student.vision_encoder(pixel_values, output_hidden_states=True).hidden_states[-1]
    states = F.layer_norm(states, states.shape[-1:])
    losses = [F.mse_loss(layer(states), target) for layer, target in zip(module.projections, targets)]
    torch.testing.assert_close(outputs["feature_loss"], torch.stack(losses).mean())
    torch.testing.assert_close(outputs["loss"], masks_alone["loss"] + 0.5 * outputs["feature_loss"])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values, **prompts, features=targets), outputs)


def test_a_training_learns_the_features_and_keeps_its_projections(network, tmp_path):
    options = {
        "max_steps": 20,
        "learning_rate": 1e-2,
        "feature_weight": 3.0,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    trainer = make_trainer(make_arguments(tmp_path, **options), feature_teacher=make_teacher(network))
    trainer.train()
    losses = logged(trainer, "feature_loss")
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert not any("projections" in name for name in trainer.student.state_dict())
    resumed = make_trainer(make_arguments(tmp_path, **options), feature_teacher=make_teacher(network))
    resumed.train(str(tmp_path / "checkpoint-10"))
    torch.testing.assert_close(logged(resumed, "feature_loss")[-10:], losses[-10:])
    without = make_trainer(make_arguments(tmp_path, **options))
    with pytest.raises(CheckpointChangedError, match="feature_teacher=None"):
        without.train(str(tmp_path / "checkpoint-10"))


def test_a_run_names_it_in_its_settings(network, folder, tmp_path):
    run(folder, tmp_path, "--feature_teacher", network, stages=("end_to_end",))
    state = (tmp_path / "end_to_end/trainer_state.json").read_text()
    assert "feature_loss" in state
    with pytest.raises(ValueError, match="not possible in the stage encoder"):
        run(folder, tmp_path / "other", "--feature_teacher", network, stages=("encoder", "decoder"))


@pytest.mark.parametrize("name", ["no_such_network_of_timm", "empty"])
def test_a_name_that_timm_cannot_load_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"feature_teacher={name} cannot be loaded"):
        FeatureTeacher(name)


@pytest.mark.parametrize(("name", "message"), [("swin_tiny_patch4_window7_224", "shapes"), ("hiera_tiny_224", "64 px")])
def test_an_architecture_that_gives_no_maps_of_such_an_image_is_refused(tmp_path, name, message):
    timm.models.save_for_hf(timm.create_model(name), str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match=f"feature_teacher=.*{message}"):
        make_teacher(str(tmp_path))


def test_weights_that_a_file_lacks_are_not_made_up(network, tmp_path):
    shutil.copytree(network, tmp_path / "cut")
    path = tmp_path / "cut/model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "blocks.2" not in name}, path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights, which would stay random, such as blocks.2"):
        make_teacher(str(tmp_path / "cut"))


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"samlight-hf\[timm\]"):
        FeatureTeacher("resnet18")
