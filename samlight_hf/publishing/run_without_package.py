"""Prediction with transformers' Auto classes and pipeline alone.

As a script it runs where samlight_hf cannot be imported:

    python -P run_without_package.py FOLDER IMAGE OUTPUTS NUM_THREADS
"""

import sys


if __name__ == "__main__":
    sys.modules["samlight_hf"] = None  # type: ignore[assignment]  # makes importing it an error

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline


@torch.inference_mode()
def predict(location: str, image: Image.Image, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Predict masks for a box in the middle of the image, and masks of everything with a grid of 2 x 2 points.

    Args:
        location: Folder of the checkpoint.
        image: RGB image.
        trust_remote_code: Run the code beside the weights, instead of the registered classes.

    Returns:
        "box masks" (1, 1, num_masks, h, w), logits, and "box scores" (1, 1, num_masks); "scores of everything" (n,);
        and, where there are any, "masks of everything" (n, height, width), bool.
    """
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
    everything_masks = generator(image, points_per_crop=2, points_per_batch=4, **settings)
    tensors = {"box masks": outputs.pred_masks, "box scores": outputs.iou_scores}
    tensors["scores of everything"] = torch.as_tensor(everything_masks["scores"])
    if len(everything_masks["masks"]):
        tensors["masks of everything"] = torch.stack([torch.as_tensor(mask) for mask in everything_masks["masks"]])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    folder, image, outputs, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))  # another number of threads adds in another order
    save_file(predict(folder, Image.open(image), trust_remote_code=True), outputs)
