"""Masks of one picture in Python: for a box, and of everything through transformers' pipeline.

python examples/segment.py
"""

from pathlib import Path

from PIL import Image
from transformers import AutoModelForMaskGeneration, AutoProcessor, pipeline

import samlight_hf  # noqa: F401  registers the model with the Auto classes


ROOT = Path(__file__).resolve().parent.parent
checkpoint = ROOT / "checkpoints" / "sam-lightening-tiny"
model = AutoModelForMaskGeneration.from_pretrained(checkpoint).eval()
processor = AutoProcessor.from_pretrained(checkpoint)
picture = Image.open(ROOT / "examples" / "images" / "coffee.jpg")

# One mask for one box, X1, Y1, X2, Y2 in pixels of the picture.
inputs = processor(images=picture, input_boxes=[[[310, 215, 400, 330]]], return_tensors="pt")
sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
outputs = model(**inputs.to(model.dtype), multimask_output=False)
mask = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0, 0]  # (H, W) bool
print(f"box: {int(mask.sum())} pixels, predicted IoU {outputs.iou_scores.item():.2f}")

# Everything. This checkpoint was trained briefly and scores low, so the thresholds are lower than the defaults.
generator = pipeline("mask-generation", model=model, image_processor=processor.image_processor)
result = generator(picture, points_per_crop=8, points_per_batch=16, pred_iou_thresh=0.3, stability_score_thresh=0.65)
print(f"everything: {len(result['masks'])} masks")
