"""Masks of one image in Python: for a box and two clicks on it, and of everything in it.

python examples/segment.py
"""

from pathlib import Path

from transformers import AutoModelForMaskGeneration, AutoProcessor, pipeline

from samlight_hf import MaskGenerator, Predictor  # and registers the model with the Auto classes


ROOT = Path(__file__).resolve().parent.parent
checkpoint = ROOT / "checkpoints" / "sam-lightening-tiny"
photograph = str(ROOT / "examples" / "images" / "coffee.jpg")
model = AutoModelForMaskGeneration.from_pretrained(checkpoint).eval()
processor = AutoProcessor.from_pretrained(checkpoint)

# The image is encoded once. Prompts are in pixels of the image: here a box, and then the box with two clicks on it.
predictor = Predictor(model, processor).set_image(photograph)
box = [(310, 215, 400, 330)]
first = predictor.predict(boxes_xyxy=box, multimask_output=False)
print(f"box: {first.masks[0, 0].sum()} pixels, predicted IoU {first.scores[0, 0]:.2f}")
clicks, labels = [[(355, 270), (305, 330)]], [[1, 0]]  # one on the object, one beside it
better = predictor.predict(clicks, labels, box, logits=first.logits[:, 0], multimask_output=False)
print(f"box and clicks: {better.masks[0, 0].sum()} pixels, predicted IoU {better.scores[0, 0]:.2f}")

# Everything, with 8 x 8 points; the default, 32 x 32, is for a GPU.
settings = {"points_per_crop": 8}
everything = MaskGenerator(model, processor)(photograph, **settings)
print(f"everything: {len(everything)} masks, the best of {everything.masks.areas[0]} pixels")

# The same as a task of transformers, with the arguments and the result of its own "mask-generation".
task = pipeline("fast-mask-generation", model=model, image_processor=processor.image_processor)
print(f"as a pipeline: {len(task(photograph, **settings)['masks'])} masks")
