"""Results are printed in a line."""

import numpy as np
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import MaskGenerator, Prediction, Predictor
from samlight_hf.masks.rle import RunLengthMasks
from tests.inference.conftest import random_model


def test_results_are_printed_with_the_shapes_of_their_arrays():
    model, image = random_model(), Image.new("RGB", (50, 30), "red")
    processor = make_processor(model.config.vision_config)
    predictor = Predictor(model, processor, output="torch")
    encoded = predictor.encode(image)
    sizes = "size=(30, 50), resized=(19, 32), padded=(32, 32)"
    assert repr(encoded) == f"EncodedImage(embedding=float32 (1, 64, 32), {sizes})"
    printed = repr(predictor.predict(boxes_xyxy=[(1, 2, 20, 20)], image=encoded))
    assert printed == "Prediction(masks=bool (1, 3, 30, 50), scores=float32 (1, 3), logits=float32 (1, 3, 32, 32))"
    printed = repr(MaskGenerator(model, processor)(image, points_per_crop=2))
    assert printed.startswith("GeneratedMasks(masks=RunLengthMasks(height=30, width=50, runs=int64")
    assert "\n" not in printed and len(printed) < 400


def test_what_is_no_array_is_printed_as_it_is():
    masks = RunLengthMasks.from_masks(np.zeros((2, 3, 4), bool))
    assert repr(masks) == "RunLengthMasks(height=3, width=4, runs=int64 (2,), offsets=int64 (3,))"
    elsewhere = Prediction(None, torch.zeros(1, 2, device="meta"), torch.zeros(1, 2, 3, 3))
    assert repr(elsewhere) == "Prediction(masks=None, scores=float32 (1, 2) on meta, logits=float32 (1, 2, 3, 3))"
