"""Segment an object with a SAM of `samlight export`, without torch: pip install numpy pillow onnxruntime

python examples/onnx_segment.py outputs/onnx examples/images/cat.jpg mask.png 200,150,1
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("folder", "image", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("prompt", nargs="+", help="X,Y,LABEL: 1 object, 0 background, 2 and 3 two corners of a box")
args = parser.parse_args()
onnxruntime.set_default_logger_severity(3)
graphs = (args.folder / "onnx" / f"{name}.onnx" for name in ("vision_encoder", "prompt_encoder_mask_decoder"))
encoder, decoder = (onnxruntime.InferenceSession(path) for path in graphs)
image = ImageOps.exif_transpose(Image.open(args.image)).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")  # clear parts: white
config = json.loads((args.folder / "preprocessor_config.json").read_text())
size = config["size"]["longest_edge"]  # resize the longest side, normalise, pad at the right and at the bottom
width, height = (int(side * size / max(image.size) + 0.5) for side in image.size)
levels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) * config["rescale_factor"]
pixel_values = np.zeros((1, 3, size, size), np.float32)
pixel_values[0, :, :height, :width] = ((levels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1)
embeddings, positions = encoder.run(None, {"pixel_values": pixel_values})  # once for an image, for any prompts

prompt = np.array([text.split(",") for text in args.prompt], np.float32)[None, None]  # (images, objects, points, 3)
points, labels = prompt[..., :2] * np.float32([width / image.width, height / image.height]), prompt[..., 2]
inputs = {"image_embeddings": embeddings, "image_positional_embeddings": positions}
inputs |= {"input_points": points, "input_labels": labels.astype(np.int64)}
scores, logits = decoder.run(["iou_scores", "pred_masks"], inputs)  # of three masks, the best by predicted IoU
best = Image.fromarray(logits[0, 0, scores.argmax()]).resize((size, size), Image.Resampling.BILINEAR)
best = best.crop((0, 0, width, height)).resize(image.size, Image.Resampling.BILINEAR)
Image.fromarray(np.uint8(np.asarray(best) > 0) * 255).save(args.out)
