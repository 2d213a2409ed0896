"""The run of a benchmark: its parts one after another; rows are printed, and written as JSON after each."""

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import transformers

from ..kernels.support import on_device
from ..loading import quiet_transformers
from ..utils.atomic_files import atomic_write
from ..utils.json_files import read_json
from .attention import attention_rows, projection_rows
from .candidates import candidate_rows
from .clicks import click_rows
from .encoders import encoder_rows, resolution_rows
from .equality import equality_rows
from .generation import box_rows, generation_rows
from .head import head_rows
from .kernels import profile_rows
from .linear import linear_rows
from .machine import describe_machine
from .masks import decoder_rows, prompt_rows
from .measure import attempt, reason, release_memory
from .peers import peer_rows
from .report import check_targets, encoders_table, plot_resolution, targets_table
from .settings import Settings
from .start import start_rows
from .sustained import sustained_rows
from .training import training_rows


Part = Callable[[Settings], Iterable[dict]]
PARTS: dict[str, Part] = {
    "encoder": encoder_rows,
    "sustained": sustained_rows,
    "peers": peer_rows,
    "decoder": decoder_rows,
    "prompt": prompt_rows,
    "resolution": resolution_rows,
    "attention": attention_rows,
    "training": training_rows,
    "equality": equality_rows,
    "candidates": candidate_rows,
    "projection": projection_rows,
    "linear": linear_rows,
    "head": head_rows,
    "profile": profile_rows,
    "clicks": click_rows,
    "start": start_rows,
    "boxes": box_rows,
    "generation": generation_rows,
}
# Those of `samlight benchmark --report`: what people wait for.
REPORT_PARTS = ("start", "encoder", "sustained", "boxes", "prompt", "generation", "clicks", "equality", "candidates")
_OPTIONAL_PACKAGES = ("timm", "triton", "flash-attn-4")


def run_benchmark(
    settings: Settings,
    parts: Iterable[str],
    out: Path | None = None,
    plot: Path | None = None,
    append: bool = False,
    available: Mapping[str, Part] = PARTS,
) -> dict:
    """Run parts of the benchmark, print their rows and a summary, and return everything.

    Args:
        settings: the settings.
        parts: names of the parts.
        out: a JSON file, written after each row.
        plot: a PNG of the part "resolution".
        append: whether rows of other parts that are in `out` already are kept, with the head of their run under
            "earlier".
        available: all parts by name.

    Returns:
        The content of the JSON file.
    """
    parts = list(parts)
    result = {**_head(settings, parts), "rows": []}
    if append and out and out.exists():
        _take_over(result, read_json(out, dict), parts)
    new = len(result["rows"])
    if settings.on_cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gc.collect()
    gc.freeze()  # existing objects stay; searching them before each row takes longer than most rows
    try:
        # Events, streams and graphs of the measurements are of the current device.
        with quiet_transformers(), on_device(settings.device):
            for row in _rows(settings, parts, available):
                result["rows"].append(row)
                print(one_row(row), flush=True)
                _write(result, out)
    finally:
        gc.unfreeze()
    result["targets"] = check_targets(result["rows"])
    _write(result, out)
    _print_summary(result, new, settings.on_cuda)
    if plot:
        _plot(result, plot)
    return result


def _rows(settings: Settings, parts: list[str], available: Mapping[str, Part]) -> Iterator[dict]:
    yield attempt({"part": "ceiling", "dtype": settings.dtype_name}, lambda: settings.ceiling)
    for name in parts:
        try:
            yield from available[name](settings)
        except Exception as error:  # raised between two rows: this part ends, and the others continue
            yield {"part": name, "cannot_run": reason(error)}
        release_memory(settings.device)


def _head(settings: Settings, parts: list[str]) -> dict:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if settings.on_cuda:
        versions["cudnn"] = torch.backends.cudnn.version()
    for package in _OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = (
        torch.cuda.get_device_name(settings.device) if settings.on_cuda else platform.processor() or platform.machine()
    )
    return {
        "command": _command(sys.argv),
        "date": datetime.date.today().isoformat(),
        "device": name,
        "machine": describe_machine(),
        "settings": {**_plain(vars(settings)), "threads": torch.get_num_threads()},
        "versions": versions,
        "parts": parts,
    }


def _command(argv: list[str]) -> str:
    """Return the command without the folders of absolute paths, which name people."""
    program = ["python", argv[0]] if argv[0].endswith(".py") else [Path(argv[0]).name]
    arguments = [argument.rpartition("=") for argument in (*program, *argv[1:])]
    return shlex.join(
        option + equals + (Path(value).name if os.path.isabs(value) else value) for option, equals, value in arguments
    )


def _plain(values: dict) -> dict:
    """Return the settings as JSON can hold them, without paths, which name people."""
    left_out = ("config", "checkpoint", "images", "device", "ceiling")
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in values.items()
        if name not in left_out
    }


def _take_over(result: dict, earlier: dict, parts: list[str]):
    """Keep the rows of an earlier run whose parts are not measured again."""
    old_rows = [row for row in earlier.pop("rows", []) if row["part"] not in (*parts, "ceiling")]
    earlier.pop("targets", None)
    heads = [*earlier.pop("earlier", []), earlier]
    result["earlier"] = [head for head in heads if set(head.get("parts", ())) - set(parts)]
    result["rows"] = old_rows


def one_row(row: dict) -> str:
    """Return a row as one line for the terminal: numbers with their names, and at most 90 characters of each text."""
    numbers = (int, float)
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, numbers) and not isinstance(value, bool) else str(value)[:90]
        for name, value in row.items()
        if value is not None
    )


def _write(result: dict, out: Path | None):
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


def _print_summary(result: dict, new: int, with_targets: bool):
    rows = result["rows"]
    if table := encoders_table(rows):
        print(f"\n{table}")
    failed = [row for row in rows[new:] if "cannot_run" in row]
    print(f"\n{len(rows) - new} rows, {len(failed)} of them cannot run here ({result['device']}, {result['date']}).")
    if with_targets:
        print(f"\n{targets_table(result['targets'])}")
        print("Targets are for one H100 or H200 in bfloat16.")


def _plot(result: dict, path: Path):
    try:
        if plot_resolution(result["rows"], path, result["device"]):
            print(f"\n{path}")
    except ImportError as error:
        print(f"\nno plot: {error}. Install what it needs: pip install 'samlight-hf[eval]'")
