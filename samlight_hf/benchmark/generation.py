"""What users of `Predictor` and of everything mode wait for: boxes on an encoded image, one image, a folder."""

import copy
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..inference.crops import MaskGenerationSettings
from ..inference.mask_generation import MaskGenerator
from ..inference.predictor import Predictor
from ..loading import load_model
from ..modeling.modeling_sam_lightening import make_processor
from .encoders import OURS
from .measure import attempt, peak_memory, time_calls
from .settings import Settings


THRESHOLDS = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.65}


def box_rows(settings: Settings) -> Iterator[dict]:
    """Measure `Predictor.predict` for boxes on an encoded image of random pixels, to masks at the image's size."""
    (height, width), counts = settings.image_sizes[0], settings.box_counts
    row = {"part": "boxes", "model": OURS, "dtype": settings.dtype_name, "picture_height": height}
    made = attempt(row, lambda: {"predictor": _predictor(settings)})
    for count in counts:
        if "cannot_run" in made:
            yield {**made, "num_boxes": count}
            continue
        line = {**row, "picture_width": width, "num_boxes": count}
        yield attempt(line, partial(_time_boxes, made["predictor"], (height, width), count, settings))


def _predictor(settings: Settings) -> Predictor:
    processor = make_processor(settings.config.vision_config)
    return Predictor(settings.make_model(), processor, output="torch")


def _time_boxes(predictor: Predictor, size: tuple[int, int], count: int, settings: Settings) -> dict:
    generator = np.random.default_rng(0)
    image = predictor.encode(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
    corners = generator.random((count, 2, 2)) * (size[1], size[0])
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
    timing = time_calls(lambda: predictor.predict(boxes_xyxy=boxes, image=image), settings.device)
    return {**timing, "boxes_per_second": 1e3 * count / timing["ms"]}


def generation_rows(settings: Settings) -> Iterator[dict]:
    """Measure everything mode: one image to COCO's run lengths, and a folder of images to COCO's JSON.

    With a checkpoint and photographs these are used, otherwise random ones, which give other numbers of masks.
    """
    known = settings.checkpoint if settings.images is not None else None
    row = {
        "part": "generation", "model": OURS, "dtype": settings.dtype_name, "points_per_side": settings.points_per_side,
        "weights": known.name if known else "random", **THRESHOLDS,
    }  # fmt: skip
    made = attempt(row, lambda: {"generator": _generator(settings, known)})
    for what, measure in (("one image", _time_image), ("a folder", _time_folder)):
        line = {**row, "what": what}
        yield {**made, **line} if "cannot_run" in made else attempt(line, partial(measure, made["generator"], settings))


def _generator(settings: Settings, checkpoint: Path | None) -> MaskGenerator:
    if checkpoint is not None:
        model, processor = load_model(checkpoint, str(settings.device), settings.dtype)
    else:
        model, processor = settings.make_model(), make_processor(settings.config.vision_config)
    return MaskGenerator(model, copy.deepcopy(processor))


def _image(settings: Settings) -> Image.Image:
    """Return the first photograph, or noise, at the size of the part "prompt"."""
    height, width = settings.image_sizes[0]
    paths = sorted(Path(settings.images).glob("*.jpg")) if settings.images else []
    if paths and settings.checkpoint is not None:
        return Image.open(paths[0]).convert("RGB").resize((width, height))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _time_image(generator: MaskGenerator, settings: Settings) -> dict:
    image, kept = _image(settings), list[dict]()

    def call():
        result = generator(image, points_per_crop=settings.points_per_side, **THRESHOLDS)
        kept[:] = result.masks.to_coco()

    with peak_memory(settings.device) as memory:
        timing = time_calls(call, settings.device, repeats=10)
    return {**timing, "num_masks": len(kept), **memory}


def _time_folder(generator: MaskGenerator, settings: Settings) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(settings.folder_size)]
        image = _image(settings)
        for path in paths:
            image.save(path, quality=95)
        began, num_masks = time.perf_counter(), 0
        options = MaskGenerationSettings(points_per_crop=settings.points_per_side, **THRESHOLDS)  # type: ignore[arg-type]
        for path, result in zip(paths, generator.generate_many(paths, options, errors="raise")):
            masks = result.masks.to_coco()  # type: ignore[union-attr]  # errors are raised
            path.with_suffix(".json").write_text(json.dumps(masks))
            num_masks += len(masks)
        seconds = time.perf_counter() - began
    return {"images_per_second": len(paths) / seconds, "num_images": len(paths), "num_masks": num_masks / len(paths)}
