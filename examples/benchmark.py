"""Time and memory of the image encoder and of its attention, side by side in one run.

    python examples/benchmark.py --out benchmarks/results/model_h100.json

Part "encoder": SAM-Lightening tiny in every attn_implementation that can run here, eager and compiled, against
transformers' SAM ViT-H and ViT-B, random weights and inputs. Part "attention": every backend, forward and backward, on
the groups of one layer, with its error against float64. Part "projection": ways to bring q, k and v into the layout in
which dilation is free. Part "everything": everything mode and single prompts, see benchmark_everything.py. Part
"evaluation" (with --dataset): the box protocol of `samlight evaluate`, end to end. Times are medians of CUDA events after
warm-up; "graph" rows are replays of a CUDA graph, so that launches do not count. Peak memory includes weights and inputs. Without a GPU a short list runs on the CPU.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from benchmark_everything import everything_rows
from samlight_hf.modeling.dilated_attention import (
    BACKENDS,
    dense_attention,
    dilated_attention,
    dilated_attention_reference,
    why_not,
)
from transformers import SamConfig, SamModel, SamVisionConfig

from samlight_hf import SamLighteningConfig, SamLighteningModel


VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": (2, 5, 8, 11)}
VIT_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": (7, 15, 23, 31),
}
IMPLEMENTATIONS = ["dilated_flash_attention", "sdpa", "eager", *(f"flash_attention_{version}" for version in (2, 3, 4))]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def time_ms(function, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one call, in ms."""
    for _ in range(warmup if CUDA else 1):
        function()
    times = []
    for _ in range(repeats if CUDA else 3):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def graph_time_ms(function, calls: int = 10) -> float:
    """Median time of one call, in ms, where `calls` of them are replayed from one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()  # Python's calls are made while capturing, and not on replay
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return time_ms(graph.replay) / calls


def measure_encoder(name: str, encoder, batch_size: int, dtype: torch.dtype, **settings) -> dict:
    pixel_values = torch.randn(batch_size, 3, 1024, 1024, device=DEVICE, dtype=dtype)
    with torch.inference_mode():
        encoder(pixel_values)
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        milliseconds = time_ms(lambda: encoder(pixel_values))
    row = {
        "part": "encoder", "model": name, "dtype": str(dtype).removeprefix("torch."), "batch_size": batch_size,
        **settings, "ms": milliseconds, "images_per_second": 1e3 * batch_size / milliseconds,
    }  # fmt: skip
    if CUDA:
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def encoder_rows(batch_sizes: list[int]):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    half = torch.bfloat16 if CUDA else torch.float32
    sams = {"SAM ViT-B": VIT_B, **({"SAM ViT-H": VIT_H} if CUDA else {})}
    for name, shape in sams.items():
        for attn_implementation, dtype in (("eager", torch.float32), ("sdpa", half)):
            vision_config = SamVisionConfig(**shape, attn_implementation=attn_implementation)
            encoder = SamModel(SamConfig(vision_config=vision_config)).vision_encoder.to(DEVICE, dtype).eval()
            for batch_size in batch_sizes:
                yield measure_encoder(
                    name, encoder, batch_size, dtype, attn_implementation=attn_implementation, mode="eager"
                )
            del encoder
    model = SamLighteningModel(SamLighteningConfig()).to(DEVICE, half).eval()
    for attn_implementation in IMPLEMENTATIONS:
        settings = {"attn_implementation": attn_implementation}
        try:
            model.set_attn_implementation(attn_implementation)
        except (ImportError, ValueError) as error:
            yield {"part": "encoder", "model": "SAM-Lightening tiny", **settings, "cannot_run": str(error)}
            continue
        for batch_size in batch_sizes:
            yield measure_encoder(
                "SAM-Lightening tiny", model.vision_encoder, batch_size, half, **settings, mode="eager"
            )
    model.set_attn_implementation("dilated_flash_attention")
    for mode in ("default", "reduce-overhead") if CUDA else ("default",):
        for attn_implementation in ("dilated_flash_attention", "sdpa"):
            model.set_attn_implementation(attn_implementation)
            for batch_size in batch_sizes:
                torch.compiler.reset()
                compiled = torch.compile(model.vision_encoder, fullgraph=True, mode=mode)
                settings = {"attn_implementation": attn_implementation, "mode": f"torch.compile, {mode}"}
                yield measure_encoder("SAM-Lightening tiny", compiled, batch_size, half, **settings)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    return ((output.double() - reference).norm() / reference.norm()).item()


def attention_rows():
    """One layer's groups: (B*N/w, w/r, r*H, D) of the whole image with r=2, and of the bands of 512 tokens."""
    functions = {backend: (lambda *t, b=backend: dense_attention(*t, backend=b)) for backend in BACKENDS}
    for shape in ((1, 2048, 12, 64), (8, 512, 6, 64), (8, 2048, 12, 64), (64, 512, 6, 64), (32, 2048, 12, 64)):
        tokens = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        direction = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        doubles = [t[:1].detach().double().requires_grad_() for t in tokens]
        expected, _ = dilated_attention_reference(*doubles, shape[1])
        expected_gradients = torch.autograd.grad(expected, doubles, direction[:1].double())
        flops = 4 * shape[0] * shape[2] * shape[1] ** 2 * shape[3]
        for name, function in functions.items():
            row = {"part": "attention", "backend": name, "dtype": "bfloat16", "shape_blhd": list(shape)}
            with torch.no_grad():
                reason = why_not(name, *tokens)
                try:
                    output = None if reason else function(*tokens)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if reason:
                    yield {**row, "direction": "forward", "cannot_run": reason}
                    continue
                milliseconds = graph_time_ms(lambda f=function, t=tokens: f(*t))
                launched = time_ms(lambda f=function, t=tokens: f(*t))
            error = relative_error(output[:1], expected)
            yield {
                **row,
                "direction": "forward",
                "ms": milliseconds,
                "ms_launched_alone": launched,
                "tflops": flops / milliseconds / 1e9,
                "error": error,
            }
            if reason := why_not(name, *tokens):
                yield {**row, "direction": "forward and backward", "cannot_run": reason}
                continue

            def both(function=function, tokens=tokens, direction=direction):
                return torch.autograd.grad(function(*tokens), tokens, direction)

            errors = [relative_error(g[:1], e) for g, e in zip(both(), expected_gradients, strict=True)]
            milliseconds = graph_time_ms(both)
            yield {**row, "direction": "forward and backward", "ms": milliseconds, "gradient_errors_qkv": errors}


def projection_rows(batch_sizes: list[int]):
    """From hidden states to the attention output of the whole image with r=2, three ways to project q, k and v."""
    num_tokens, num_heads, head_dim, rate = 4096, 6, 64, 2
    width = num_heads * head_dim
    layer = torch.nn.Linear(width, 3 * width, device=DEVICE, dtype=torch.bfloat16)
    batched_weight = layer.weight.view(3, width, width).transpose(1, 2)
    # Rows of the weight as (head, q/k/v, D): heads of one token, and of the next, then lie at one stride.
    interleaved = copy.deepcopy(layer)
    for parameter in interleaved.parameters():
        parameter.data = parameter.data.view(3, num_heads, head_dim, -1).transpose(0, 1).reshape(parameter.shape)

    def packed(hidden_states):
        return layer(hidden_states).view(-1, num_tokens, 3, num_heads, head_dim).unbind(2)

    def batched(hidden_states):
        flat = hidden_states.view(1, -1, width).expand(3, -1, -1)
        return torch.baddbmm(layer.bias.view(3, 1, width), flat, batched_weight).view(
            3, -1, num_tokens, num_heads, head_dim
        )

    def strided(hidden_states):
        qkv = interleaved(hidden_states).view(-1, num_tokens // rate, rate * num_heads, 3, head_dim)
        return qkv.unbind(3)

    for batch_size in batch_sizes:
        hidden_states = torch.randn(batch_size, num_tokens, width, device=DEVICE, dtype=torch.bfloat16)
        ways = {
            "one product, q k v packed, copied where dilated": lambda h: dilated_attention(*packed(h), None, rate),
            "batched product, q k v contiguous": lambda h: dilated_attention(*batched(h), None, rate),
            "one product, weight rows by head, strided": lambda h: dense_attention(*strided(h)).view(
                -1, num_tokens, num_heads, head_dim
            ),
        }
        with torch.inference_mode():
            expected = dilated_attention(*(t.contiguous() for t in packed(hidden_states)), None, rate, backend="sdpa")
            for name, function in ways.items():
                row = {"part": "projection", "way": name, "batch_size": batch_size}
                yield {
                    **row,
                    "ms": graph_time_ms(lambda f=function, h=hidden_states: f(h)),
                    "error": relative_error(function(hidden_states), expected.double()),
                }


class Repeated:
    """The pictures of a dataset so many times over, for `evaluate`."""

    def __init__(self, dataset, times: int):
        self.dataset, self.times, self.index_report = dataset, times, dataset.index_report

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def load(self, index: int):
        return self.dataset.load(index % len(self.dataset))


def evaluation_rows(dataset_path: str, checkpoint: str, max_instances: int = 36, times: int = 3):
    """Pictures read, decoded, segmented and scored, after a pass that does not count.

    What a run costs before it is under way (processes that read are started, and read a first batch) weighs on a small
    dataset: a second row has the pictures several times over, and from the two follow the start and the rate beyond it.
    """
    from samlight_hf.data import load_dataset
    from samlight_hf.evaluation.evaluator import Journal, evaluate
    from samlight_hf.evaluation.models import PromptableModel
    from samlight_hf.evaluation.protocols import InstanceProtocols, ProtocolSettings
    from samlight_hf.loading import load_model

    dataset = load_dataset(dataset_path, limit=None if CUDA else 8)
    work = InstanceProtocols(ProtocolSettings(("box",), ("single",), max_instances=max_instances))
    for dtype in ("float32", "bfloat16") if CUDA else ("float32",):
        loaded = load_model(checkpoint, "auto", dtype)

        def measure(pictures, loaded=loaded, dtype=dtype) -> dict:
            model = PromptableModel(*loaded)
            with tempfile.TemporaryDirectory() as folder:
                journal = Journal(Path(folder), "benchmark", {})
                records, _, seconds = evaluate(
                    model, pictures, work, journal, batch_size=8, num_workers=4 if CUDA else 2
                )
            return {
                "part": "evaluation", "protocol": "box/single", "dtype": dtype, "pictures": len(pictures),
                "instances_per_picture": len(records) / len(pictures), "pictures_per_second": len(pictures) / seconds,
                "seconds_total": seconds, "seconds_model": sum(model.seconds.values()),
            }  # fmt: skip

        measure(dataset)  # to warm up
        once, repeated = measure(dataset), measure(Repeated(dataset, times))
        steady = (times - 1) * len(dataset) / (repeated["seconds_total"] - once["seconds_total"])
        yield once
        yield {
            **repeated, "times_over": times, "pictures_per_second_under_way": steady,
            "seconds_to_start": once["seconds_total"] - len(dataset) / steady,
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["encoder", "attention", "projection", "evaluation", "everything"]
    parser.add_argument("only", nargs="*", metavar="PART", help=f"the same as --parts: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="JSON file for the raw result")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8] if CUDA else [1])
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--dataset", help="a tar of SA-1B's layout, for the part evaluation")
    parser.add_argument("--checkpoint", default="checkpoints/sam-lightening-tiny", help="for evaluation and everything")
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: choose from {', '.join(names)}.")

    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [],
    }  # fmt: skip
    parts = {
        "encoder": lambda: encoder_rows(args.batch_sizes),
        "everything": lambda: everything_rows(args.checkpoint),
    }
    if CUDA:
        result["versions"]["cudnn"] = torch.backends.cudnn.version()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result["versions"]["flash-attn-4"] = importlib.metadata.version("flash-attn-4")
        parts |= {"attention": attention_rows, "projection": lambda: projection_rows(args.batch_sizes)}
    if args.dataset:
        parts["evaluation"] = lambda: evaluation_rows(args.dataset, args.checkpoint)
    for name in [name for name in args.only or args.parts if name in parts]:
        for row in parts[name]():
            result["rows"].append(row)
            print(", ".join(f"{v:.4g}" if isinstance(v, float) else str(v)[:90] for v in row.values()), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
