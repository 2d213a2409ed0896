"""Names that scripts import go on to work: public modules have them, and old modules give them with a warning."""

import importlib
import subprocess
import sys
import warnings

import pytest

import samlight_hf
from samlight_hf.old_names import OLD_NAMES


OLD = [(module, name, new) for module, names in OLD_NAMES.items() for name, new in names.items()]

PUBLIC = {
    "samlight_hf": [
        "EncodedImage", "FastMaskGenerationPipeline", "GeneratedMasks", "ImageError", "MaskGenerationSettings",
        "MaskGenerator", "Prediction", "Predictor", "SamLighteningConfig", "SamLighteningImageProcessor",
        "SamLighteningModel", "SamLighteningVisionConfig", "SamLighteningVisionModel", "optimize",
    ],
    "samlight_hf.cli": ["main"],
    "samlight_hf.conversion": [
        "SamDecoder", "average_models", "change_image_size", "convert_original_checkpoint", "create_student",
        "evenly_spaced_layers", "initialize_decoder", "initialize_positions", "load_decoder", "load_teacher",
        "student_config",
    ],
    "samlight_hf.hub": [
        "FolderError", "PublishError", "PublishedRevision", "VerificationReport", "build_folder", "check_folder",
        "check_target", "publish", "verify_folder",
    ],
    "samlight_hf.loading": [
        "CheckpointError", "find_device", "find_dtype", "load_model", "quiet_transformers", "weight_files",
        "weights_fingerprint",
    ],
}  # fmt: skip


@pytest.fixture
def forgotten():
    """Old modules are imported anew, as in a fresh process."""
    for module in OLD_NAMES:
        sys.modules.pop(f"samlight_hf.{module}", None)
        vars(samlight_hf).pop(module, None)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_modules_have_their_names(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        imported = importlib.import_module(module)
        missing = [name for name in PUBLIC[module] if not hasattr(imported, name)]
    assert missing == []
    if hasattr(imported, "__all__"):
        assert set(PUBLIC[module]) <= set(imported.__all__)
        assert all(hasattr(imported, name) for name in imported.__all__)


@pytest.mark.parametrize(("module", "name", "new"), OLD, ids=[f"{module}.{name}" for module, name, _ in OLD])
def test_an_old_name_is_the_new_one_and_says_where_that_is(forgotten, module, name, new):
    new_module, _, new_name = new.partition(":")
    new_module, new_name = f"samlight_hf.{new_module}", new_name or name
    old = importlib.import_module(f"samlight_hf.{module}")
    with pytest.warns(DeprecationWarning, match=rf"^samlight_hf\.{module}\.{name} is now {new_module}\.{new_name}$"):
        value = getattr(old, name)
    assert value is getattr(importlib.import_module(new_module), new_name)


def test_an_import_statement_warns_at_the_line_of_the_script(forgotten):
    with pytest.warns(DeprecationWarning) as caught:
        from samlight_hf.averaging import average_models
    assert [warning.filename for warning in caught] == [__file__]
    assert average_models is importlib.import_module("samlight_hf.conversion").average_models


def test_an_old_module_has_no_other_names(forgotten):
    old = importlib.import_module("samlight_hf.files")
    with pytest.raises(AttributeError, match=r"module samlight_hf\.files has no attribute 'read_toml'"):
        _ = old.read_toml
    with pytest.raises(ImportError, match="read_toml"):
        from samlight_hf.files import read_toml  # noqa: F401


@pytest.mark.parametrize("module", ["samlight_hf.nothing", "samlight_hf.averaging.more", "averaging"])
def test_no_other_modules_appear(module):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module)


def test_the_package_itself_uses_no_old_name():
    """Importing old modules by the package would warn its users."""
    script = (
        "import sys, samlight_hf, samlight_hf.hub, samlight_hf.commands.cli, samlight_hf.old_names as old\n"
        "print([name for name in old.OLD_NAMES if f'samlight_hf.{name}' in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_command_line_runs_as_the_old_module():
    result = subprocess.run(
        [sys.executable, "-m", "samlight_hf.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "segment" in result.stdout and "evaluate" in result.stdout
