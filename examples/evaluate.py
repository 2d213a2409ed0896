"""Box and point mIoU of a checkpoint on SA-1B shaped data: tar files with `NAME.jpg` beside `NAME.json` (COCO RLE masks).

    python examples/evaluate.py val-000000.tar --model checkpoints/sam-lightening-tiny

Protocols, instance mean of the IoU at the picture's own size: the mask's bounding box as prompt, one mask ("box");
one point, the annotation's `point_coords`, three masks: the one with the highest predicted IoU ("point, predicted
best") and the one with the highest true IoU ("point, oracle").
"""

import argparse
import io
import json
import tarfile

import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import AutoModelForMaskGeneration, AutoProcessor

import samlight_hf  # noqa: F401  registers the model with the Auto classes


def read_samples(path: str, max_images: int | None):
    """Yields (PIL picture, its annotations) in the archive's order."""
    with tarfile.open(path) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".jpg"))
        for name in tqdm(names[:max_images], unit="picture"):
            picture = Image.open(io.BytesIO(archive.extractfile(name).read())).convert("RGB")
            yield picture, json.load(archive.extractfile(name.removesuffix(".jpg") + ".json"))["annotations"]


def mask_iou(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks, (..., H, W) x 2 -> (...)."""
    intersection = (predicted & target).sum((-2, -1))
    return intersection / (predicted | target).sum((-2, -1)).clamp(min=1)


@torch.inference_mode()
def evaluate_picture(model, processor, picture, annotations) -> dict[str, torch.Tensor]:
    """IoU of every annotation under each protocol, (instances,) each."""
    # (instances, H, W)
    targets = torch.stack([torch.from_numpy(coco_mask.decode(a["segmentation"])).bool() for a in annotations])
    boxes_xyxy = [[x, y, x + width, y + height] for x, y, width, height in (a["bbox"] for a in annotations)]
    points = [[a["point_coords"][0]] for a in annotations]

    inputs = processor(images=picture, input_boxes=[boxes_xyxy], return_tensors="pt").to(model.device)
    embeddings = model.get_image_embeddings(inputs["pixel_values"])

    def predict(multimask_output, **prompts):
        outputs = model(image_embeddings=embeddings, multimask_output=multimask_output, **prompts)
        masks = processor.image_processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return mask_iou(masks[0].cpu(), targets[:, None]), outputs.iou_scores[0].cpu()

    box_iou, _ = predict(False, input_boxes=inputs["input_boxes"].float())
    prompts = processor(images=picture, input_points=[points], return_tensors="pt").to(model.device)
    point_iou, predicted_iou = predict(True, input_points=prompts["input_points"].float())
    return {
        "box": box_iou[:, 0],
        "point, predicted best": point_iou.gather(1, predicted_iou.argmax(1, keepdim=True))[:, 0],
        "point, oracle": point_iou.max(1).values,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a tar file of SA-1B's layout")
    parser.add_argument("--model", default="checkpoints/sam-lightening-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-images", type=int, help="the first N pictures (default: all)")
    parser.add_argument("--max-instances", type=int, help="the first N annotations of each picture (default: all)")
    args = parser.parse_args()

    model = AutoModelForMaskGeneration.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    results: dict[str, list[torch.Tensor]] = {}
    for picture, annotations in read_samples(args.data, args.max_images):
        if annotations := annotations[: args.max_instances]:
            for protocol, iou in evaluate_picture(model, processor, picture, annotations).items():
                results.setdefault(protocol, []).append(iou)
    for protocol, per_picture in results.items():
        iou = torch.cat(per_picture)
        print(f"{protocol:24s} mIoU {iou.mean():.4f}   ({len(iou)} masks, {len(per_picture)} pictures)")


if __name__ == "__main__":
    main()
