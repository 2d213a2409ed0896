"""Check which folder may import which, and that no other modules are at the root of the package."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "samlight_hf"

# Each folder may import itself and those before it. "samlight_hf" stands for the package's own __init__.
ORDER = (
    "modeling", "utils", "masks", "kernels", "images", "engine", "inference", "samlight_hf", "loading", "app", "data",
    "conversion", "export", "publishing", "hub", "evaluation", "benchmark", "distillation", "commands", "cli",
)  # fmt: skip

# Modules with public names, and the one that maps names from before there were folders.
ROOT_MODULES = {"__init__", "cli", "hub", "loading", "old_names"}


def folder_of(module: str) -> str:
    """Return the entry of ORDER that a dotted name belongs to: samlight_hf.data.coco -> data."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "samlight_hf"


def imports_of(source: str, module: str) -> list[tuple[int, str]]:
    """Return the line and the dotted name of each import from the package, also inside functions."""
    imports = []
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            imports += [(node.lineno, f"{target}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in imports if name.split(".")[0] == "samlight_hf"]


def arrows_back(source: str, module: str) -> list[str]:
    """Return a sentence for each import of a folder that comes later in ORDER."""
    own = folder_of(module)
    return [
        f"{module}:{line} imports {name}: {own} comes before {folder_of(name)}"
        for line, name in imports_of(source, module)
        if ORDER.index(folder_of(name)) > ORDER.index(own)
    ]


def modules() -> dict[str, Path]:
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return files | {f"samlight_hf.modeling.{path.stem}": path for path in (ROOT / "modeling").glob("*.py")}


def test_imports_go_one_way():
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    errors = [error for name, source in sources.items() for error in arrows_back(source, name)]
    assert not errors, "\n".join(errors)


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(ORDER), folders - set(ORDER)


def test_no_loose_files_at_the_root():
    loose = {path.name for path in PACKAGE.iterdir() if path.is_file()} - {f"{name}.py" for name in ROOT_MODULES}
    assert loose <= {"py.typed"}, f"{sorted(loose)}: which folder are they of?"


def test_modeling_imports_nothing_but_its_own_files():
    for path in (ROOT / "modeling").glob("*.py"):
        for line, name in imports_of(path.read_text(encoding="utf-8"), f"samlight_hf.modeling.{path.stem}"):
            assert name.startswith("samlight_hf.modeling."), f"{path.name}:{line} imports {name}"


def test_commands_do_not_import_each_other():
    """Only `cli` imports commands; code that several commands share is in modules that are not commands."""
    commands = {"app", "benchmark", "convert", "demo", "distill", "evaluate", "export", "publish", "segment"}
    for path in (PACKAGE / "commands").glob("*.py"):
        if path.stem not in commands:
            continue
        for line, name in imports_of(path.read_text(encoding="utf-8"), f"samlight_hf.commands.{path.stem}"):
            parts = name.split(".")
            assert parts[1] != "commands" or parts[2] not in commands, f"{path.name}:{line} imports {name}"


def test_tests_mirror_the_folders():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - {"examples"} <= set(ORDER)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("samlight_hf.masks.files", "from ..inference.predictor import Predictor"),
        ("samlight_hf.kernels.hopper.linear", "from ...images import preprocessing"),
        ("samlight_hf.utils.messages", "from .. import loading"),
        ("samlight_hf.engine.build", "def f():\n    from samlight_hf.data import load_dataset"),
        ("samlight_hf.modeling.modeling_sam_lightening", "import samlight_hf.utils.messages"),
        ("samlight_hf.masks.rle", "from .. import MaskGenerator"),
        ("samlight_hf.loading", "from .commands.cli import main"),
    ],
)
def test_an_arrow_back_is_found(module, source):
    assert len(arrows_back(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("samlight_hf.commands.segment", "from ..masks.files import write_masks\nimport torch"),
        ("samlight_hf.loading", "from . import SamLighteningModel"),
        ("samlight_hf.publishing.checks", "from .. import modeling"),
        ("samlight_hf.kernels.linear", "from .hopper import linear"),
    ],
)
def test_other_imports_may_be(module, source):
    assert not arrows_back(source, module)
