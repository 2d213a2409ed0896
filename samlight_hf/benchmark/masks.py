"""Mask decoders by the number of prompts, and the whole path from an image to a mask: time and memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import SamImageProcessor

from .. import SamLighteningConfig
from ..engine.build import make_decoder
from ..images.preprocessing import preprocess, resized_size
from ..inference.predictor import Prediction, Predictor
from ..kernels.upscaled_masks import Frame, masks, why_not_triton
from ..modeling.modeling_sam_lightening import make_processor
from .encoders import COMPILED, EAGER, GRAPH, OPTIMIZED, OURS, optimized, report_of
from .measure import (
    MEGABYTE,
    arithmetic,
    attempt,
    capture,
    count_gflop,
    peak_memory,
    random_tensor,
    synchronize,
    time_calls,
    wall_clock_ms,
)
from .settings import Settings


PREDICTOR, PREDICTOR_GRAPHS = "Predictor, eager", "Predictor, CUDA graphs"
COMPILED_PROMPT_COUNTS = (1, 64)  # each takes a while to compile


def decoder_rows(settings: Settings) -> Iterator[dict]:
    """Measure decoders for one point a prompt on one encoded image: three masks each, logits and scores as outputs.

    `gflop` is that of the model's own decoder, of which the fast ones need half.
    """
    graph = (GRAPH,) if settings.on_cuda else ()
    compiled = (COMPILED,) if settings.compile else ()
    gflop = {num_prompts: decoder_gflop(settings.config, num_prompts) for num_prompts in settings.prompt_counts}
    for mode in (EAGER, *graph, *compiled, PREDICTOR, *([PREDICTOR_GRAPHS] if graph else []), OPTIMIZED):
        for num_prompts in settings.prompt_counts:
            if mode == COMPILED and num_prompts not in COMPILED_PROMPT_COUNTS:
                continue
            row = {
                "part": "decoder", "model": OURS, "mode": mode, "dtype": settings.dtype_name, "num_prompts": num_prompts
            }  # fmt: skip
            yield attempt(row, partial(_time_decoder, mode, num_prompts, gflop[num_prompts], settings))


@torch.inference_mode()
def _time_decoder(mode: str, num_prompts: int, gflop: float, settings: Settings) -> dict:
    device, side = settings.device, settings.config.prompt_encoder_config.image_embedding_size
    channels, image_size = settings.config.vision_config.output_channels, settings.config.vision_config.image_size
    with peak_memory(device) as memory:
        with torch.inference_mode(False):
            model = settings.make_model()
            if mode == OPTIMIZED:
                model = optimized(model, settings, image_batch_sizes=(1,), prompt_counts=(num_prompts,))
        embeddings = random_tensor((1, channels, side, side), device, settings.dtype)
        points = random_tensor((1, num_prompts, 1, 2), device, torch.float32, seed=1).sigmoid() * image_size
        if mode in (PREDICTOR, PREDICTOR_GRAPHS):
            decoder = make_decoder(model, cuda_graphs=mode == PREDICTOR_GRAPHS)
            image, labels = decoder.prepare(embeddings), torch.ones(num_prompts, 1, dtype=torch.long, device=device)

            def call():
                return decoder.decode(image, points[0], labels, repeated=num_prompts == 1)  # as Predictor does
        else:
            if mode == COMPILED:
                model.mask_decoder.compile(dynamic=False)

            def call():
                return model(image_embeddings=embeddings, input_points=points)

        timing = time_calls(capture(call) if mode == GRAPH else call, device)
    if mode in (COMPILED, OPTIMIZED):
        torch.compiler.reset()
    report = report_of(model) if mode == OPTIMIZED else {}
    counted = arithmetic(gflop, timing["ms"], settings.ceiling["tflops"])
    return {**timing, "prompts_per_second": 1e3 * num_prompts / timing["ms"], **memory, **counted, **report}


def decoder_gflop(config: SamLighteningConfig, num_prompts: int) -> float:
    """Count 10^9 operations of the mask decoder for a number of prompts of one point on one image."""
    meta, side = torch.device("meta"), config.prompt_encoder_config.image_embedding_size
    channels = config.vision_config.output_channels
    decoder = Settings(meta, config=config, dtype=torch.float32).make_model().mask_decoder
    decoder.forward = partial(decoder.forward, multimask_output=True)
    image = torch.empty(1, channels, side, side, device=meta)
    return count_gflop(decoder, image, image, torch.empty(1, num_prompts, 2, channels, device=meta), image)


def image_to_mask(
    model: nn.Module, image_processor: SamImageProcessor, image: torch.Tensor, point_xy: tuple[float, float]
) -> torch.Tensor:
    """Predict the mask of highest predicted IoU for one point. Nothing waits for the device.

    Args:
        model: any SAM of transformers.
        image_processor: its image processor.
        image: uint8 (3, H, W).
        point_xy: the point, in pixels of the image.

    Returns:
        bool (H, W).
    """
    (height, width), padded = image.shape[-2:], image_processor.pad_size
    size = (height, width)
    resized = resized_size(height, width, image_processor.size["longest_edge"])
    point = [point_xy[0] * resized[1] / size[1], point_xy[1] * resized[0] / size[0]]
    points = torch.tensor([[[point]]]).to(image.device, non_blocking=True)
    dtype = cast(torch.dtype, model.dtype)
    pixel_values = preprocess(image_processor, [image], image.device, dtype)
    outputs = model(pixel_values=pixel_values, input_points=points)
    best = outputs.iou_scores[0, 0].argmax(dim=0, keepdim=True)
    logits = outputs.pred_masks[0, 0].index_select(0, best)
    frame = Frame((padded["height"], padded["width"]), resized, size, (0, 0), size)
    return masks(logits, frame, 0.0, len(logits), why_not_triton(logits) is None)[0]


def prompt_rows(settings: Settings) -> Iterator[dict]:
    """Measure the path from an image on the device and one point to a mask at the image's size, and its end steps.

    `ms` is between events on the device, `wall_clock_ms` from the call to the end of the device's work.
    """
    compiled = (COMPILED,) if settings.compile else ()
    graphs = (PREDICTOR_GRAPHS,) if settings.on_cuda else ()
    for mode in (EAGER, *compiled, PREDICTOR, *graphs, OPTIMIZED):
        for size in settings.image_sizes:
            row = _prompt_row(mode, size, settings)
            yield attempt(row, partial(_time_prompt, mode, size, settings))
    for size in settings.image_sizes:
        for step, make in {"preprocessing": _preprocessing, "mask at the image's size": _upscaling}.items():
            row = {**_prompt_row(EAGER, size, settings), "step": step}
            yield attempt(row, partial(_time_step, make, size, settings))


def _prompt_row(mode: str, size: tuple[int, int], settings: Settings) -> dict:
    return {
        "part": "prompt", "model": OURS, "mode": mode, "dtype": settings.dtype_name, "picture_height": size[0],
        "picture_width": size[1],
    }  # fmt: skip


def _image(size: tuple[int, int], settings: Settings) -> torch.Tensor:
    generator = torch.Generator(settings.device).manual_seed(0)
    return torch.randint(0, 256, (3, *size), device=settings.device, generator=generator, dtype=torch.uint8)


def _time_step(make: Callable[..., Callable[[], object]], size: tuple[int, int], settings: Settings) -> dict:
    return _times(make(size, settings), settings)


def _times(call: Callable[[], object], settings: Settings) -> dict:
    with torch.inference_mode():
        timing = time_calls(call, settings.device)
        return {**timing, "wall_clock_ms": wall_clock_ms(call, settings.device, int(timing["repeats"]))}


def _time_prompt(mode: str, size: tuple[int, int], settings: Settings) -> dict:
    with peak_memory(settings.device) as memory:
        before = torch.cuda.memory_reserved(settings.device) if settings.on_cuda else 0
        call, model = prompt_call(mode, size, settings)
        timing = _times(call, settings)
        serving = serving_memory(call, settings, before)
    if mode not in (EAGER, PREDICTOR, PREDICTOR_GRAPHS):
        torch.compiler.reset()
    return {**timing, **memory, **serving, **(report_of(model) if mode == OPTIMIZED else {})}


def prompt_call(mode: str, size: tuple[int, int], settings: Settings) -> tuple[Callable[[], torch.Tensor], nn.Module]:
    """Return a function from an image and a point to a mask in that mode, and the model that it calls."""
    model = settings.make_model()
    image_processor = make_processor(settings.config.vision_config).image_processor
    image, point = _image(size, settings), (size[1] / 3, size[0] / 2)
    if mode == OPTIMIZED:
        model = optimized(model, settings, image_batch_sizes=(1,), prompt_counts=(1,))
    if mode == COMPILED:
        model.vision_encoder.compile(dynamic=False)
        model.mask_decoder.compile(dynamic=False)
    if mode not in (PREDICTOR, PREDICTOR_GRAPHS):
        return lambda: image_to_mask(model, image_processor, image, point), model
    predictor = Predictor(model, image_processor, output="torch", cuda_graphs=mode == PREDICTOR_GRAPHS)

    def predict() -> torch.Tensor:
        prediction = cast(Prediction, predictor.set_image(image).predict(points_xy=[[point]], full_size=False))
        best = prediction.scores[0].argmax(dim=0, keepdim=True)
        return predictor.to_masks(prediction.logits[0].index_select(0, best))[0]

    return predict, model


@torch.inference_mode()
def serving_memory(call: Callable[[], object], settings: Settings, before: int) -> dict[str, float]:
    """Return the peak of the memory, in MB, that torch reserves while a warm `call` runs, above `before` bytes.

    It includes weights, graphs and workspaces. Memory that only the warm-up used is released first.
    """
    if not settings.on_cuda:
        return {}
    synchronize(settings.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(settings.device)
    for _ in range(3):
        call()
    synchronize(settings.device)
    return {"serving_memory_mb": (torch.cuda.max_memory_reserved(settings.device) - before) / MEGABYTE}


def _preprocessing(size: tuple[int, int], settings: Settings) -> Callable[[], torch.Tensor]:
    image_processor = make_processor(settings.config.vision_config).image_processor
    image = _image(size, settings)
    return lambda: preprocess(image_processor, [image], settings.device, settings.dtype)


def _upscaling(size: tuple[int, int], settings: Settings) -> Callable[[], torch.Tensor]:
    image_size = settings.config.vision_config.image_size
    side = 4 * settings.config.prompt_encoder_config.image_embedding_size
    logits = random_tensor((1, side, side), settings.device, settings.dtype)
    frame = Frame((image_size, image_size), resized_size(*size, image_size), size, (0, 0), size)
    return lambda: masks(logits, frame, 0.0, 1, why_not_triton(logits) is None)
