"""Image encoders on a CPU, side by side: torch and onnxruntime, this encoder and those of other SAMs.

python benchmarks/onnx_cpu.py --out benchmarks/results/onnx_cpu.json     # needs [export] and timm

All weights and inputs are random: 1024x1024, batch 1, float32 unless said. In each round every variant runs once (SAM
ViT-B: in the first round alone), so that whatever else the machine does falls on all of them; the ratio of a round is
the time of this encoder in torch, eager, over that of the variant. Medians over the rounds. One thread is measured by
the processor's time, more by the clock, for which the machine must be idle. Each number has a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from samlight_hf.modeling.modeling_sam_lightening import SamLighteningVisionModel

from samlight_hf import SamLighteningConfig
from samlight_hf.benchmark.measure import count_gflop
from samlight_hf.benchmark.peers import BACKBONES, make_backbone, make_sam
from samlight_hf.export.precision import quantize


SIZE = 1024
OURS = "SAM-Lightening tiny"
SLOW = ("SAM ViT-B",)  # measured in the first round alone, and not compiled, which takes minutes


def encoders() -> dict[str, Callable[[], torch.nn.Module]]:
    backbones = {backbone.of: backbone for backbone in BACKBONES}
    config = SamLighteningConfig.from_preset("tiny").vision_config
    return {
        OURS: lambda: SamLighteningVisionModel(config).vision_encoder,
        "MobileSAM's TinyViT-5M": lambda: make_backbone(backbones["MobileSAM"]),
        "EdgeSAM's RepViT-M1": lambda: make_backbone(backbones["EdgeSAM"]),
        "SAM ViT-B": lambda: make_sam("SAM ViT-B", "sdpa"),
    }


class Output(torch.nn.Module):
    """An encoder whose output is a tensor alone."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.encoder(pixel_values)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return Output(encoders()[name]()).eval()


def export(folder: Path) -> list[dict]:
    """Write every encoder as two files of onnx, unless they are there, and return their operations and sizes."""
    rows = []
    for number, name in enumerate(encoders()):
        module, pixels = build(name), torch.zeros(1, 3, SIZE, SIZE)
        rows.append({
            "encoder": name, "gflop": count_gflop(module, pixels),
            "million_parameters": sum(parameter.numel() for parameter in module.parameters()) / 1e6,
        })  # fmt: skip
        if (folder / f"{number}-int8.onnx").is_file():
            continue
        with torch.no_grad():
            graph = torch.onnx.export(
                module, (pixels,), dynamo=True, opset_version=18, input_names=["pixel_values"], verbose=False
            ).model_proto
        del graph.graph.value_info[:]
        (folder / f"{number}.onnx").write_bytes(graph.SerializeToString())
        (folder / f"{number}-int8.onnx").write_bytes(quantize(graph, "int8").SerializeToString())
    return rows


def variants(folder: Path, threads: int) -> dict[tuple[str, str], Callable[[], object]]:
    import onnxruntime

    pixels = torch.randn(1, 3, SIZE, SIZE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for number, name in enumerate(encoders()):
        module = build(name)
        calls[name, "torch eager"] = lambda module=module: module(pixels)
        if name not in SLOW:
            compiled = torch.compile(module)
            calls[name, "torch compiled"] = lambda compiled=compiled: compiled(pixels)
        for kind, file in (("onnxruntime fp32", f"{number}.onnx"), ("onnxruntime int8", f"{number}-int8.onnx")):
            session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
            feed = {"pixel_values": pixels.numpy()}
            calls[name, kind] = lambda session=session, feed=feed: session.run(None, feed)
    return calls


@torch.inference_mode()
def measure(folder: Path, threads: int, rounds: int) -> list[dict]:
    torch.set_num_threads(threads)
    calls = variants(folder, threads)
    # On one thread the processor's time, which other processes hardly change; it does not say how fast several are.
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    failed = {}
    for key, call in calls.items():  # compiles, and warms up
        if key[0] in SLOW:
            continue
        try:
            call()
            print(threads, *key, "is warm", file=sys.stderr)
        except Exception as error:  # a variant that cannot run is a row that says so
            failed[key] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for number in range(rounds):
        for key, call in calls.items():
            if key not in failed and (number == 0 or key[0] not in SLOW):
                start = clock()
                call()
                times[key].append(clock() - start)
    rows = []
    for (name, kind), seconds in times.items():
        row = {"encoder": name, "variant": kind, "threads": threads}
        if (name, kind) in failed:
            rows.append({**row, "cannot_run": failed[name, kind]})
            continue
        ratios = [ours / own for ours, own in zip(times[OURS, "torch eager"], seconds)]
        rows.append({**row, "seconds": statistics.median(seconds), "ratio": statistics.median(ratios)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="keep the exported graphs here, and use them again")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the folder of a process for one --threads
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.threads[0], args.rounds)))
        return
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        graphs = (args.graphs or Path(place)).resolve()
        graphs.mkdir(parents=True, exist_ok=True)
        result = {
            "encoders": export(graphs), "rows": [], "rounds": args.rounds, "cpu": _cpu(), "cores": os.cpu_count(),
            "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        for threads in args.threads:
            command = [sys.executable, __file__, "--measure", str(graphs), "--threads", str(threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            output = subprocess.run(
                [*command, "--rounds", str(args.rounds)], env=environment, check=True, stdout=subprocess.PIPE
            ).stdout
            result["rows"] += json.loads(output.splitlines()[-1])
    print("| encoder | GFLOP | variant |" + "".join(f" {threads} thread(s) |" for threads in args.threads))
    print("|---|---|---|" + "---|" * len(args.threads))
    gflop = {row["encoder"]: row["gflop"] for row in result["encoders"]}
    for first in (row for row in result["rows"] if row["threads"] == args.threads[0]):
        same = [row for row in result["rows"] if all(row[key] == first[key] for key in ("encoder", "variant"))]
        cells = [f"{row['seconds']:.2f} s, x{row['ratio']:.2f}" if "ratio" in row else "cannot run" for row in same]
        print(f"| {first['encoder']} | {gflop[first['encoder']]:.0f} | {first['variant']} | {' | '.join(cells)} |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {', '.join(flag for flag in ('avx2', 'avx512f', 'avx512_vnni', 'amx_int8') if flag in flags)}"


if __name__ == "__main__":
    main()
