"""Part "everything" of run.py: everything mode and single prompts against transformers' own, in one run.

    python benchmarks/run.py everything --out benchmarks/results/everything_h100.json

One photograph of 1024x683, the bundled checkpoint, 32x32 points; input is a PIL image, output a dictionary with RLE.
Times are medians of wall-clock times with the device synchronized. On a CPU there are few points, to test the script
and for the ratio.

The floors of the stages are arithmetic for an H100 SXM (989 TFLOP/s in bfloat16, 67 in float32, 3.35 TB/s): the
operations, and the bytes read and written if every stage were one kernel. Such kernels need not exist.
"""

import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from samlight_hf import MaskGenerationSettings, MaskGenerator, Predictor
from samlight_hf.commands.segment_run import EverythingSegmenter, Job, Run
from samlight_hf.engine import image_encoder
from samlight_hf.engine.cuda_graphs import GraphedFunction
from samlight_hf.inference import mask_generation
from samlight_hf.inference.candidates import Candidates
from samlight_hf.kernels import layer_norm, upscaled_masks
from samlight_hf.loading import load_model, quiet_transformers
from samlight_hf.masks.files import write_masks


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "images"
POINTS_PER_SIDE = 32 if CUDA else 4
THRESHOLDS = {  # the number of kept masks determines the time of all stages after the decoder
    "many masks": {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.65},
    "few masks": {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.9},
}
FLOPS = {torch.bfloat16: 989e12, torch.float32: 67e12}
BYTES_PER_SECOND = 3.35e12


def everything_rows(checkpoint: str) -> Iterator[dict]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with quiet_transformers(), torch.inference_mode():
        image = Image.open(EXAMPLES / "coffee.jpg").resize((1024, 683), Image.Resampling.LANCZOS)
        for kept, thresholds in THRESHOLDS.items():
            yield from _pipelines(checkpoint, image, kept, thresholds)
        if CUDA:
            yield from _memory(checkpoint, image)
        yield from _folder(checkpoint)
        yield from _single_prompts(checkpoint, image)
        yield from _stages(checkpoint, image)


def _median_ms(function: Callable, repeats: int, warmup: int = 2) -> float:
    times = []
    for _ in range(repeats + (warmup if CUDA else 0)):
        _synchronize()
        start = time.perf_counter()
        function()
        _synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[-repeats:])


def _synchronize():
    if CUDA:
        torch.cuda.synchronize()


def _pipelines(checkpoint: str, image: Image.Image, kept: str, thresholds: dict) -> Iterator[dict]:
    settings = {**thresholds, "points_per_crop": POINTS_PER_SIDE}
    stock = pipeline("mask-generation", model=checkpoint, device=DEVICE, dtype=torch.float32)
    points_per_batch = 64 if CUDA else 8

    def run_stock():
        return stock(image, output_rle_mask=True, points_per_batch=points_per_batch, **settings)

    stock_ms = _median_ms(run_stock, repeats=3 if CUDA else 1, warmup=1)
    expected = run_stock()
    common = {"part": "everything", "masks": kept, "points": POINTS_PER_SIDE**2}
    yield {
        **common,
        "what": "stock mask-generation",
        "dtype": "float32",
        "ms": stock_ms,
        "num_masks": len(expected["masks"]),
    }
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16} if CUDA else {"float32": torch.float32}
    for name, dtype in dtypes.items():
        for cuda_graphs in (True, False) if CUDA else (False,):
            task = pipeline(
                "fast-mask-generation", model=checkpoint, device=DEVICE, dtype=dtype, cuda_graphs=cuda_graphs
            )
            start = time.perf_counter()
            result = task(image, output_rle_mask=True, **settings)
            first_ms = 1e3 * (time.perf_counter() - start)

            def run(task=task):
                return task(image, output_rle_mask=True, output_masks=False, **settings)

            milliseconds = _median_ms(run, repeats=(20 if cuda_graphs else 5) if CUDA else 1)
            yield {
                **common, "what": "fast-mask-generation", "dtype": name, "cuda_graphs": cuda_graphs,
                "ms": milliseconds, "first_call_ms": first_ms, "times_stock_float32": stock_ms / milliseconds,
                "num_masks": len(result["masks"]), "ran": _batches(task.generator.decoder).last_ran,
                **_agreement(expected["masks"], result["masks"]), "why_not_triton": _why_not_triton(task.generator),
            }  # fmt: skip


def _batches(decoder) -> GraphedFunction:
    """Return what decodes a batch of points."""
    return decoder.ahead if decoder.use_head_kernel else decoder.transform


def _why_not_triton(generator: MaskGenerator) -> dict[str, str | None]:
    return {
        "layer norm": layer_norm.why_not_triton(
            torch.ones(1, 1, 64, device=DEVICE), torch.nn.LayerNorm(64, device=DEVICE)
        ),
        "attention of the decoder": generator.decoder.why_not_triton["attention"],
        "end of the decoder": generator.decoder.why_not_triton["head"],
        "masks at the image's size": upscaled_masks.why_not_triton(torch.empty(0, device=DEVICE)),
    }


def _agreement(expected, found) -> dict:
    """Return the share of the expected masks that have a match with an IoU of 0.95, and the lowest IoU with a match."""
    if not len(expected) or not len(found):
        return {"matched_at_0.95": float(len(expected) == len(found)), "lowest_iou": None}
    expected, found = (
        torch.stack([torch.as_tensor(np.ascontiguousarray(mask)) for mask in masks]).flatten(1).to(DEVICE).float()
        for masks in (expected, found)
    )
    intersection = expected @ found.T
    iou = intersection / (expected.sum(1)[:, None] + found.sum(1)[None] - intersection).clamp(min=1)
    best = iou.amax(dim=1)
    return {"matched_at_0.95": (best >= 0.95).float().mean().item(), "lowest_iou": best.min().item()}


def _memory(checkpoint: str, image: Image.Image) -> Iterator[dict]:
    settings = {**THRESHOLDS["many masks"], "points_per_crop": POINTS_PER_SIDE}
    for dtype in ("float32", "bfloat16"):
        results = {}
        for megabytes in (1500, 512):
            gc.collect()  # earlier graphs, which are in reference cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            model, processor = load_model(checkpoint, DEVICE, dtype)
            generator = MaskGenerator(model, processor, max_memory_mb=megabytes)
            results[megabytes] = generator(image, **settings)
            milliseconds = _median_ms(lambda g=generator: g(image, **settings), repeats=5)
            yield {
                "part": "everything", "what": "memory", "dtype": dtype, "max_memory_mb": megabytes,
                "peak_allocated_mb": (torch.cuda.max_memory_allocated() - before[0]) / 2**20,
                "peak_reserved_mb": (torch.cuda.max_memory_reserved() - before[1]) / 2**20, "ms": milliseconds,
                "allocated_before_mb": before[0] / 2**20,
                "points_per_batch": generator.budget.points_per_batch, "num_masks": len(results[megabytes]),
                **_agreement(list(results[1500].masks), list(results[megabytes].masks)),
            }  # fmt: skip
            del model, generator


def _folder(checkpoint: str) -> Iterator[dict]:
    """Measure `samlight segment --format coco` with reading JPEGs and writing JSON, without loading the model."""
    dtype, count = ("bfloat16", 100) if CUDA else ("float32", 2)
    generator = MaskGenerator(*load_model(checkpoint, DEVICE, dtype))
    settings = MaskGenerationSettings(POINTS_PER_SIDE, **THRESHOLDS["many masks"])
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for number in range(count):
            photographs = sorted(EXAMPLES.glob("*.jpg"))
            path = Path(folder) / f"{number:03}.jpg"
            with Image.open(photographs[number % len(photographs)]) as photograph:
                photograph.resize((1024, 683)).save(path, quality=90)
            jobs.append(Job(path, path.with_suffix(".json")))

        def write(segmented):
            write_masks(segmented.job.output, "coco", segmented.image, segmented.job.path.name, segmented.result)
            return len(segmented.result)

        def skip(error, path):
            raise error

        run = Run(EverythingSegmenter(generator, settings), write, skip, batch_size=4)
        list(run(jobs[: 8 if CUDA else 1]))  # warm-up
        start = time.perf_counter()
        masks = sum(run(jobs))
        seconds = time.perf_counter() - start
    yield {
        "part": "everything", "what": "folder to COCO JSON", "dtype": dtype, "pictures": count,
        "masks_per_picture": masks / count, "pictures_per_second": count / seconds,
    }  # fmt: skip


def _single_prompts(checkpoint: str, image: Image.Image) -> Iterator[dict]:
    """Measure one prompt on an encoded image, with logits and scores on the device as outputs."""
    prompts = {"point": {"points_xy": [[(500.0, 300.0)]]}, "box": {"boxes_xyxy": [(300.0, 200.0, 700.0, 600.0)]}}
    repeats = 100 if CUDA else 3
    for dtype in ("bfloat16", "float32") if CUDA else ("float32",):
        model, processor = load_model(checkpoint, DEVICE, dtype)
        point = torch.tensor([[[[500.0, 300.0]]]], device=DEVICE)
        box = torch.tensor([[[300.0, 200.0, 700.0, 600.0]]], device=DEVICE)
        predictors = {
            cuda_graphs: Predictor(model, processor, output="torch", cuda_graphs=cuda_graphs).set_image(image)
            for cuda_graphs in ((True, False) if CUDA else (False,))
        }
        side = model.config.prompt_encoder_config.image_embedding_size
        embeddings = predictors[False].images[0].embedding.transpose(1, 2).unflatten(2, (side, side))
        row = {"part": "everything", "what": "one prompt, logits out", "dtype": dtype}
        for name, arguments in prompts.items():
            stock = {"input_points": point} if name == "point" else {"input_boxes": box}
            milliseconds = _median_ms(lambda s=stock, m=model, e=embeddings: m(image_embeddings=e, **s), repeats)
            yield {**row, "prompt": name, "way": "SamModel.forward, eager", "ms": milliseconds}
            for cuda_graphs, predictor in predictors.items():

                def run(predictor=predictor, arguments=arguments):
                    predictor.predict(**arguments, full_size=False)

                way = f"Predictor, {'CUDA graph' if cuda_graphs else 'eager'}"
                yield {**row, "prompt": name, "way": way, "ms": _median_ms(run, repeats)}
                if cuda_graphs:
                    graph = next(reversed(predictor.decoder.all_masks[True, False]._graphs.values()))[0]
                    yield {**row, "prompt": name, "way": "the graph alone", "ms": _median_ms(graph.replay, repeats)}


def _stages(checkpoint: str, image: Image.Image) -> Iterator[dict]:
    """Measure the stages of one image. Each stage is waited for, so that their sum is more than the whole."""
    for dtype in (torch.bfloat16, torch.float32) if CUDA else (torch.float32,):
        model, processor = load_model(checkpoint, DEVICE, dtype)
        generator = MaskGenerator(model, processor)
        settings = {**THRESHOLDS["many masks"], "points_per_crop": POINTS_PER_SIDE}
        decoder = generator.decoder
        counts = defaultdict(int)
        places = {
            "image to tensor": (mask_generation, "image_tensor"),
            "preprocess": (image_encoder, "preprocess"),
            "encode": (generator.encoder, "encode"),
            "decode": (decoder, "ahead" if decoder.use_head_kernel else "transform"),
            "masks": (decoder, "_masks"),
            "measure": (generator, "_measured"),
            "filter": (generator, "_add"),
            "outlines and run lengths": (Candidates, "outlines"),
            "NMS": (generator, "_select"),
        }

        def counted(tokens, image_tokens, shape, kept, *others, compute=decoder._masks, counts=counts):
            counts["points"] += len(torch.unique(kept // shape[1]))
            counts["masks"] += len(kept)
            return compute(tokens, image_tokens, shape, kept, *others)

        def run(generator=generator, settings=settings):
            return generator(image, **settings)

        with mock.patch.object(decoder, "_masks", counted):
            counts["kept"] = len(run())
        whole = _median_ms(run, repeats=10 if CUDA else 1)
        times = defaultdict(list)
        for _ in range(5 if CUDA else 1):
            with _timed(places) as spent:
                run()
            for name, seconds in spent.items():
                times[name].append(1e3 * seconds)
        milliseconds = {name: statistics.median(times[name] or [0.0]) for name in places}  # 0 where no mask came so far
        milliseconds["NMS"] -= milliseconds["outlines and run lengths"]  # called by NMS
        floors = _floors(model, image, counts, dtype) if CUDA else {}
        row = {"part": "everything", "what": "stage", "dtype": str(dtype).removeprefix("torch.")}
        for name in places:
            yield {**row, "stage": name, "ms": milliseconds[name], "floor_ms": floors.get(name)}
        yield {**row, "stage": "whole, not waiting between", "ms": whole, **counts}


class _SameAttributes:
    """Another way to call a function that has attributes, such as the inputs of its graphs."""

    def __init__(self, function: GraphedFunction, call: Callable):
        self._function, self._call = function, call

    def __call__(self, *arguments, **options):
        return self._call(*arguments, **options)

    def __getattr__(self, name: str):
        return getattr(self._function, name)


@contextmanager
def _timed(places: dict[str, tuple[object, str]]) -> Iterator[dict[str, float]]:
    """Measure the seconds in functions that are attributes of modules or objects, with the device synchronized."""
    spent = defaultdict(float)

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            _synchronize()
            start = time.perf_counter()
            result = function(*arguments, **options)
            _synchronize()
            spent[name] += time.perf_counter() - start
            return result

        return _SameAttributes(function, call) if isinstance(function, GraphedFunction) else call

    patches = [
        mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute)))
        for name, (owner, attribute) in places.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


def _floors(model, image: Image.Image, counts: dict, dtype: torch.dtype) -> dict[str, float]:
    """Return the ms of each stage by arithmetic, for the published shape: N image tokens, 56 rows of attention."""
    tokens, channels, rows, points = 64 * 64, 256, 56, POINTS_PER_SIDE**2
    size, pixels = dtype.itemsize, image.width * image.height
    image_tokens = tokens * channels * size

    def floor(flops: float, num_bytes: float) -> float:
        return 1e3 * max(flops / FLOPS[dtype], num_bytes / BYTES_PER_SECOND)

    attention = 2 * tokens * channels * rows  # one product of the image tokens with the tokens of a prompt
    convolutions = 2 * tokens * channels * channels + 2 * 4 * tokens * 64 * 128 + 2 * 16 * tokens * 32 * 3
    logits = 16 * tokens * 4  # bytes of one mask's, float32
    bilinear = 12 * pixels  # one resize

    def on_plain_cores(flops: float, num_bytes: float) -> float:
        return 1e3 * max(flops / FLOPS[torch.float32], num_bytes / BYTES_PER_SECOND)

    return {
        "preprocess": floor(0, 3 * pixels + 3 * 1024**2 * size),
        "encode": floor(172e9, sum(p.numel() for p in model.vision_encoder.parameters()) * size),
        # One product in the first layer, four in the second, two in the last; each layer's tokens are written and read
        # once.
        "decode": floor(7 * attention * points, 4 * image_tokens * points),
        "masks": floor(convolutions * counts["points"], image_tokens * counts["points"] + logits * counts["masks"]),
        "measure": on_plain_cores(bilinear * counts["masks"], logits * counts["masks"]),
        "outlines and run lengths": on_plain_cores(bilinear * counts["kept"], logits * counts["kept"]),
    }
