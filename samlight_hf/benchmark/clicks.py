"""The clicks of an evaluation: those of all instances of an image, beside one distance transform after another."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from ..data.clicks import deepest_point, deepest_point_reference
from ..evaluation.clicks import next_clicks
from ..kernels.deepest_pixels import why_not_triton
from .measure import attempt, time_calls
from .settings import Settings


NUM_INSTANCES, NUM_CLICKS = 32, 3
SEARCH, REFERENCE = "search by bounds", "distance transforms, one by one"
ON_GPU = "distances on the GPU"  # after first clicks by search
WAYS = ON_GPU, SEARCH  # of `samlight evaluate`, which takes the first one that can run


def click_rows(settings: Settings) -> Iterator[dict]:
    """Measure how long the three clicks on each of 32 instances of an image take, without the model.

    The masks are random blobs of sides from a thirtieth of the image to half of it. Worker processes find the first
    clicks; `next_clicks_ms` is what is left to the process of the model, for one choice of the mask. `ms` is both. Each
    row says whether the clicks are those of the reference.
    """
    for size in settings.image_sizes:
        on_gpu = why_not_triton(torch.empty(0, *size, dtype=torch.bool, device=settings.device)) is None
        for way in (REFERENCE, SEARCH, ON_GPU) if on_gpu else (REFERENCE, SEARCH):
            row = {"part": "clicks", "mode": way, "picture_height": size[0], "picture_width": size[1]}
            row.update(num_instances=NUM_INSTANCES, num_clicks=NUM_CLICKS)
            yield attempt(row, partial(_time_clicks, way, size, settings))


def _time_clicks(way: str, size: tuple[int, int], settings: Settings) -> dict:
    predicted, targets = (masks.to(settings.device) for masks in blobs(size))
    host = targets.cpu().numpy()
    first, following = {
        REFERENCE: (deepest_point_reference, lambda: _next_clicks_reference(predicted, targets)),
        SEARCH: (deepest_point, lambda: _as_list(*next_clicks(predicted.cpu(), targets.cpu()))),
        ON_GPU: (deepest_point, lambda: _as_list(*next_clicks(predicted, targets))),
    }[way]
    times = _times(lambda: [first(mask) for mask in host], following, settings)
    points_agree = [first(mask) for mask in host] == [deepest_point_reference(mask) for mask in host]
    same = points_agree and following() == _next_clicks_reference(predicted, targets)
    return {**times, "same_clicks": same}


def _times(first: Callable, following: Callable, settings: Settings) -> dict:
    first_ms, next_ms = (time_calls(call, settings.device, repeats=5)["ms"] for call in (first, following))
    next_ms *= NUM_CLICKS - 1
    return {
        "ms": first_ms + next_ms, "first_clicks_ms": first_ms, "next_clicks_ms": next_ms,
        "images_per_second": 1e3 / (first_ms + next_ms), "images_per_second_of_next_clicks": 1e3 / next_ms,
    }  # fmt: skip


def blobs(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make predicted masks and the targets that they miss in parts: bool (32, H, W) each, the same every time."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, NUM_INSTANCES, *size, dtype=torch.bool)
    for index, side in enumerate(
        np.geomspace(max(2, min(size) / 30), max(2, min(size) / 2), NUM_INSTANCES).astype(int).tolist()
    ):
        line = torch.linspace(-1, 1, side)
        radius = torch.hypot(line[:, None], line)
        coarse, fine = (
            F.interpolate(torch.randn(1, 1, cells, cells, generator=generator), (side, side), mode="bicubic")[0, 0]
            for cells in (4, 12)
        )
        top, left = (int(torch.randint(0, length - side + 1, (), generator=generator)) for length in size)
        target = radius + coarse / 4 < 0.8
        own = (slice(top, top + side), slice(left, left + side))
        masks[0, index][own] = radius + coarse / 4 + fine / 8 < 0.8
        masks[1, index][own] = target
    return masks[0], masks[1]


def _next_clicks_reference(predicted: torch.Tensor, targets: torch.Tensor) -> list[tuple]:
    clicks = []
    for own, target in zip(predicted.cpu().numpy(), targets.cpu().numpy()):
        (missing, missing_depth), (excess, excess_depth) = (
            deepest_point_reference(region) for region in (target & ~own, own & ~target)
        )
        if max(missing_depth, excess_depth) == 0:
            clicks.append((*deepest_point_reference(target)[0], 1))
        else:
            clicks.append((*missing, 1) if missing_depth >= excess_depth else (*excess, 0))
    return clicks


def _as_list(points: torch.Tensor, labels: torch.Tensor) -> list[tuple]:
    return [(*point, label) for point, label in zip(points.tolist(), labels.tolist())]
