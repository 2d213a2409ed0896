"""Loads a checkpoint through transformers' Auto classes and its pipeline and runs it on an image.

As a script it does so where samlight_hf cannot be imported: `python -P run_without_package.py FOLDER IMAGE OUTPUTS NUM_THREADS`.
"""

import sys


if __name__ == "__main__":
    sys.modules["samlight_hf"] = None  # importing it is an error from here on

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline


@torch.inference_mode()
def predict(location: str, image: Image.Image, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Masks and scores for a box in the middle, logits and float32; and of everything on a grid of 2 x 2 points, bool and float32."""
    options = {"trust_remote_code": trust_remote_code}
    model = AutoModelForMaskGeneration.from_pretrained(
        location, dtype=torch.float32, use_safetensors=True, **options
    ).eval()
    processor = AutoProcessor.from_pretrained(location, **options)
    width, height = image.size
    box = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    outputs = model(**processor(image, input_boxes=[[box]], return_tensors="pt"))
    everything = AutoModel.from_pretrained(location, dtype=torch.float32, use_safetensors=True, **options).eval()
    generator = pipeline("mask-generation", model=everything, image_processor=processor.image_processor, device="cpu")
    settings = {"pred_iou_thresh": -1.0, "stability_score_thresh": -1.0, "crops_nms_thresh": 1.0}
    found = generator(image, points_per_crop=2, points_per_batch=4, **settings)
    tensors = {"box masks": outputs.pred_masks, "box scores": outputs.iou_scores}
    tensors["scores of everything"] = torch.as_tensor(found["scores"])
    if len(found["masks"]):
        tensors["masks of everything"] = torch.stack([torch.as_tensor(mask) for mask in found["masks"]])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    folder, image, outputs, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))  # sums are taken in another order by another number
    save_file(predict(folder, Image.open(image), trust_remote_code=True), outputs)
