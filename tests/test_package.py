"""Check the package as a user installs and imports it."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
CHECKPOINTS = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())


def run(*arguments, **kwargs) -> str:
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)
    assert process.returncode == 0, process.stderr
    return process.stdout


# The imports of every user of SAM through the Auto classes (with accelerate and triton, where they are installed).
TRANSFORMERS_SAM = (
    "from transformers import AutoModelForMaskGeneration, AutoProcessor, SamImageProcessor, SamModel, SamProcessor"
)


def test_import_brings_in_nothing_that_transformers_sam_does_not():
    script = f"""
import sys
{TRANSFORMERS_SAM}
before = set(sys.modules)
import samlight_hf
print(sorted(set(sys.modules) - before))
"""
    added = ast.literal_eval(run("-c", script))
    heavy = ("datasets", "accelerate", "triton", "cuda", "matplotlib", "evaluate", "pycocotools", "flash_attn", "onnx")
    assert not [name for name in added if name.startswith(heavy)]


def test_import_takes_no_longer_than_transformers_sam():
    """Measure the time that `import samlight_hf` adds to the import of transformers, in a fresh process."""
    script = f"""
import time
start = time.perf_counter()
{TRANSFORMERS_SAM}
middle = time.perf_counter()
import samlight_hf
print((time.perf_counter() - middle) / (middle - start))
"""
    assert min(float(run("-c", script)) for _ in range(2)) < 0.1


def test_wheel_and_sdist_hold_the_package(tmp_path):
    run("-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "samlight_hf/__init__.py",
        "samlight_hf/py.typed",
        "samlight_hf/commands/cli.py",
        "samlight_hf/publishing/model_card.md",
        "samlight_hf/kernels/hopper/common.cuh",
        "samlight_hf/kernels/hopper/linear.cu",
        "samlight_hf/kernels/hopper/attention.cu",
        "samlight_hf/modeling/modeling_sam_lightening.py",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "modeling/", "examples", "checkpoints"))]
    assert any(name.endswith("LICENSE") for name in names)

    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, sdist)
    script = """
import samlight_hf
from samlight_hf.publishing.build import build_folder
print(samlight_hf.__file__, samlight_hf.SamLighteningModel.__module__)
samlight_hf.SamLighteningModel(samlight_hf.SamLighteningConfig()).save_pretrained("student")
build_folder("student", "built")
"""
    where, module = run("-c", script, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}, cwd=tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert module == "samlight_hf.modeling.modeling_sam_lightening"
    assert (tmp_path / "built" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "built" / "README.md").read_text().count("\n## ") == 7


def code(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_bundled_checkpoints_have_this_code(checkpoint):
    """trust_remote_code=True on a bundled checkpoint runs the code of the package."""
    assert code(checkpoint) == code(ROOT / "modeling"), f"{checkpoint} differs from modeling/: run `make sync`"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_sync_refreshes_the_copies(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "model_card.md", tmp_path)
    shutil.copytree(ROOT / "modeling", tmp_path / "modeling")
    (tmp_path / "samlight_hf" / "publishing").mkdir(parents=True)
    folders = [tmp_path / "checkpoints" / name for name in ("one", "two words")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "dilated_attention.py").write_text("an older version")
        (folder / "removed_since.py").write_text("a file that modeling/ no longer has")
    subprocess.run(["make", "sync"], cwd=tmp_path, check=True, capture_output=True)
    for folder in folders:
        assert code(folder) == code(ROOT / "modeling")
        assert not (folder / "__init__.py").exists()
        assert (folder / "config.json").read_text() == "{}"
    assert (tmp_path / "samlight_hf/publishing/model_card.md").read_bytes() == (ROOT / "model_card.md").read_bytes()
