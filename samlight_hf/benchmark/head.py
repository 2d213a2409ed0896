"""The end of the mask decoder, from image tokens to logits, with every kernel that can run it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..engine.build import make_decoder
from ..engine.mask_decoder import FastMaskDecoder
from ..kernels.mask_head import launch_head, launch_hopper, masks_reference, why_not_hopper, why_not_triton
from .linear import CUDA, MODULES, TRITON
from .measure import attempt, graph_time_ms, random_tensor, relative_error, require
from .settings import Settings


_PROMPTS_OF_EVERYTHING = 147  # a batch of everything mode


@torch.inference_mode()
def head_rows(settings: Settings) -> Iterator[dict]:
    """On CUDA, measure it in CUDA graphs, in float16: with one mask and with three, by the number of prompts."""
    if not settings.on_cuda:
        return
    with torch.inference_mode(False):
        decoder = make_decoder(settings.make_model(), dtype=torch.float16)
    assert isinstance(decoder, FastMaskDecoder)
    for num_prompts in (*settings.prompt_counts, _PROMPTS_OF_EVERYTHING):
        for num_masks in (1, 3):
            yield from _head_rows(decoder, num_prompts, num_masks, settings)


def _head_rows(decoder: FastMaskDecoder, num_prompts: int, num_masks: int, settings: Settings) -> Iterator[dict]:
    device, weights, grid = settings.device, decoder.head, decoder.grid_size
    num_tokens, channels = grid[0] * grid[1], weights.weight1.shape[1]
    tokens = random_tensor((num_prompts, num_tokens, channels), device, weights.weight1.dtype)
    hyper = random_tensor((num_prompts, num_masks, channels // 8), device, torch.float32, seed=1)
    slots = torch.arange(num_prompts * num_masks, dtype=torch.int32, device=device).view(num_prompts, num_masks)
    arguments = tokens, hyper, slots, slots.numel(), grid, weights
    expected = masks_reference(*arguments)

    def measure(function: Callable[..., torch.Tensor], reason: str | None) -> dict:
        require(reason)
        milliseconds = graph_time_ms(lambda: function(*arguments), device)
        return {"ms": milliseconds, "difference": relative_error(function(*arguments), expected)}

    for kernel, function, reason in (
        (CUDA, launch_hopper, why_not_hopper(tokens, hyper, grid, weights)),
        (TRITON, launch_head, why_not_triton(weights)),
        (MODULES, masks_reference, None),
    ):
        row = {
            "part": "head", "kernel": kernel, "dtype": str(weights.weight1.dtype).removeprefix("torch."),
            "num_prompts": num_prompts, "num_masks": num_masks,
        }  # fmt: skip
        yield attempt(row, partial(measure, function, reason))
