"""The documents name files, functions and pages that exist."""

import ast
import importlib
import re
from functools import lru_cache
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "model_card.md"})

_FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^()\s#]+)(?:#[^()\s]*)?\)")
# `name` in `path`
_PLACE = re.compile(r"`([A-Za-z_][\w.]*)`\s+in\s+`((?:samlight_hf|modeling|tests)/[\w/.-]+)`")
_PATH = re.compile(r"`((?:samlight_hf|modeling|tests|examples|benchmarks|docs|checkpoints)(?:/[\w.-]+)*/?)`")
# Files that a reader of the architecture is told to make, and folders that `make web` makes.
_TO_BE_MADE = {"samlight_hf/commands/NAME.py", "examples/web/model", "examples/web/vendor"}


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


@lru_cache
def names_in(path: Path) -> frozenset[str]:
    """All functions, classes, methods and module constants of a file, or of a folder's files."""
    if path.is_dir():
        return frozenset().union(*(names_in(file) for file in path.glob("*.py")))
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(path):
    text = prose(path)
    missing = [target for target in _LINK.findall(text) if not (path.parent / target).exists()]
    missing += [name for name in _PATH.findall(text) if name not in _TO_BE_MADE and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_are_where_the_documents_say(path):
    places = [(name.split(".")[-1], file) for name, file in _PLACE.findall(prose(path))]
    assert not [place for place in places if place[0] not in names_in(ROOT / place[1])]


def test_the_architecture_names_many():
    assert len(_PLACE.findall(prose(ROOT / "docs" / "architecture.md"))) > 60


@pytest.mark.parametrize("module", ["", ".loading", ".conversion", ".data", ".distillation", ".export", ".hub"])
def test_the_reference_has_all_public_names(module):
    module = importlib.import_module(f"samlight_hf{module}")
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    assert not set(getattr(module, "__all__", ())) - documented


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    at_the_root = ["changelog.md", "contributing.md"]  # docs/hooks.py makes pages of them
    own = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted(own + at_the_root)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
