"""Tests that remote code uses no file, network or process, and that hostile folders are refused in one line."""

import ast
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samlight_hf import modeling
from samlight_hf.loading import CheckpointError, load_model
from samlight_hf.publishing.checks import CODE_FOLDER


# os for os.path and os.PathLike alone: see ALLOWED_OF_OS.
ALLOWED_MODULES = {
    "contextlib",
    "functools",
    "huggingface_hub.dataclasses",
    "math",
    "os",
    "torch",
    "transformers",
    "typing",
}
OPTIONAL_MODULES = {"flash_attn"}  # kernels, imported inside try
ALLOWED_OF_OS = {"PathLike", "path"}
ALLOWED_OF_OS_PATH = {"isfile", "join"}
FORBIDDEN_NAMES = {
    "__builtins__", "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "locals",
    "open", "vars",
}  # fmt: skip
FORBIDDEN_ATTRIBUTES = {
    "__builtins__", "__class__", "__globals__", "__loader__", "__subclasses__", "fork", "from_file", "hub", "load",
    "load_state_dict_from_url", "multiprocessing", "popen", "push_to_hub", "remove", "rename", "rmdir", "save", "spawn",
    "system", "tofile", "unlink", "urlopen", "write_bytes", "write_text",
}  # fmt: skip
# Parts of torch and transformers that fetch, build or start something.
FORBIDDEN_PARTS = {"cpp_extension", "dynamic_module_utils", "hub", "multiprocessing", "rpc", "serialization"}
# Functions that may read and write a folder, by transformers, at the user's request.
MAY_READ_AND_WRITE = {"save_pretrained", "_save_processor"}


def violations(source: str) -> list[str]:
    """Return what a file of remote code must not do but does, each as "line: code"."""
    found = []

    def visit(node: ast.AST, function: str, in_try: bool):
        if isinstance(node, ast.Import | ast.ImportFrom):
            local = isinstance(node, ast.ImportFrom) and node.level == 1
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in () if local else names:
                allowed = ALLOWED_MODULES | (OPTIONAL_MODULES if in_try else set())
                if not any(name == each or (name or "").startswith(f"{each}.") for each in allowed):
                    found.append(f"{node.lineno}: import {name}")
                imported = {*(name or "").split("."), *(alias.name for alias in node.names)}
                if forbidden := imported & (FORBIDDEN_PARTS | FORBIDDEN_ATTRIBUTES):
                    found.append(f"{node.lineno}: import {', '.join(sorted(forbidden))}")
                if name in ("os", "os.path") and (isinstance(node, ast.ImportFrom) or node.names[0].asname):
                    found.append(f"{node.lineno}: os under another name")
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if node.attr in FORBIDDEN_ATTRIBUTES and text != "self.__class__":
                found.append(f"{node.lineno}: {text}")
            if text.startswith("os.") and text.split(".")[1] not in ALLOWED_OF_OS:
                found.append(f"{node.lineno}: {text}")
            if text.startswith("os.path.") and text.split(".")[2] not in ALLOWED_OF_OS_PATH:
                found.append(f"{node.lineno}: {text}")
            if node.attr in ("from_pretrained", "save_pretrained") and function not in MAY_READ_AND_WRITE:
                found.append(f"{node.lineno}: {text} in {function or 'the module'}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            # Computed names could reach forbidden attributes: they are only allowed for self and models' configs.
            target = ast.unparse(node.args[0])
            if not (target == "self" or target == "config" or target.endswith(".config")):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function, in_try or isinstance(node, ast.Try))

    visit(ast.parse(source), "", False)
    return found


@pytest.mark.parametrize("path", sorted(CODE_FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_remote_code_does_nothing_forbidden(path):
    assert Path(modeling.__file__).parent == CODE_FOLDER
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "open('x')", "import subprocess", "import os as o", "from os import system", "import os\nos.system('x')",
        "import os\nos.environ['HF_TOKEN']", "import os\nos.path.getsize('x')", "__import__('socket')",
        "import urllib.request", "from pathlib import Path", "import torch\ntorch.load('x')", "import torch\ntorch.hub",
        "import torch\ntorch.save(1, 'x')", "import flash_attn", "exec('x')",
        "f = eval", "getattr(torch, 'lo' + 'ad')('x')", "().__class__.__subclasses__()", "import importlib",
        "from transformers import AutoModel\nAutoModel.from_pretrained('other/repo')",
        "def f(m):\n    m.push_to_hub('x')",
        "import huggingface_hub", "import ctypes", "import pickle", "print.__globals__",
    ],
)  # fmt: skip
def test_violations_are_found(source):
    assert violations(source)


# Hostile folders.


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *words: str):
    with pytest.raises(CheckpointError) as raised:
        load_model(folder, "cpu")
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1000
    for word in words:
        assert word in message, message


def write_index(folder: Path, weight_map):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "{outside}", "model-00001-of-00001.safetensors/../../outside.safetensors",
        "..\\outside.safetensors", "outside.safetensors", 7, None, ["model.safetensors"], {},
    ],
)  # fmt: skip
def test_shards_stay_in_their_folder(folder, shard):
    names = load_file(folder / "model.safetensors")
    if shard == "{outside}":
        shard = str(folder.parent / "outside.safetensors")
    write_index(folder, dict.fromkeys(names, shard))
    refused(folder, "no shard's name")


@pytest.mark.parametrize("weight_map", [None, [], "model-00001-of-00001.safetensors", 1])
def test_an_index_of_another_shape(folder, weight_map):
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError):
        load_model(folder, "cpu")


def test_an_index_that_is_nested_too_deep(folder):
    write_index(folder, {})
    (folder / "model.safetensors.index.json").write_text("[" * 200_000)
    refused(folder, "cannot be read")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63), struct.pack("<Q", 2**64 - 1), struct.pack("<Q", 99_000_000) + b"{}", b"", b"\x80\x04",
        struct.pack("<Q", 10**6) + b"[" * 10**6,
    ],
    ids=["huge", "largest", "longer than the file", "empty", "pickle", "nested"],
)  # fmt: skip
def test_headers_that_lie(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "truncated or damaged")


@pytest.mark.parametrize("offsets", [[0, 10**12], [-4, 0], [4, 0]])
def test_offsets_that_lie(folder, offsets):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(folder, "truncated or damaged")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_of_a_wrong_dtype(folder, dtype):
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "is stored as")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "NaN or infinite")


def test_a_config_that_asks_for_other_code(folder, tmp_path):
    """The package's own code runs whatever auto_map says; the other file would leave a trace."""
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(config["auto_map"], "evil.Evil")
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder, "cpu")
    assert not trace.exists()


def test_a_config_too_large_for_any_memory(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 2**42
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_model(folder, "cpu")


def test_the_untouched_folder_loads(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    load_model(tmp_path / "copy", "cpu")
