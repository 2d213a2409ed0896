"""Annotate images with a model's masks and write a tar in SA-1B's layout, as training data for the next model.

    python examples/annotate.py photos/ --out photos.tar --model checkpoints/sam-lightening-tiny --dtype bfloat16

This is the fully automatic stage of Segment Anything's data engine (arXiv 2304.02643, section 4). Existing masks (of
tars, or of `images/` with `masks/`) are kept, and further masks found by the model are added. Images and masks get new
names and ids. The tar appears when it is complete.
"""

import argparse
import io
import sys
import tarfile
from pathlib import Path

from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from samlight_hf import MaskGenerationSettings, MaskGenerator
from samlight_hf.data import ImageDataset, SkipReason, SkipReport, load_dataset
from samlight_hf.data.sa1b import add_sample
from samlight_hf.images.preprocessing import check_size
from samlight_hf.loading import load_model
from samlight_hf.masks.files import coco_document
from samlight_hf.masks.rle import text_rle
from samlight_hf.utils.atomic_files import atomic_write
from samlight_hf.utils.messages import make_console_safe, one_line


SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
SAME = 0.8  # IoU from which two masks count as the same


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder of images, one with images/ and masks/, or tars in SA-1B's layout")
    parser.add_argument("--out", type=Path, required=True, help="tar to write")
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--device", default="auto", help="torch device, or auto (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="dtype of the model (%(default)s)")
    parser.add_argument("--points-per-side", type=int, default=32, help="side of the point grid (%(default)s)")
    parser.add_argument("--pred-iou-thresh", type=float, default=0.5, help="lowest score (%(default)s)")
    parser.add_argument("--stability-score-thresh", type=float, default=0.75, help="lowest stability (%(default)s)")
    parser.add_argument("--min-area", type=int, default=64, help="smallest mask in pixels (%(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="use only the first images")
    args = parser.parse_args()
    dataset = load_dataset(args.images, limit=args.limit, require_masks=False)
    settings = MaskGenerationSettings(
        args.points_per_side,
        pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh,
    )
    generator = MaskGenerator(*load_model(args.model, device=args.device, dtype=args.dtype))
    report = SkipReport()
    report.merge(dataset.index_report)
    samples = tqdm(annotated(dataset, generator, settings, args.min_area, report), total=len(dataset), unit="image")
    num_new = 0

    def write(path: Path):
        nonlocal num_new
        with tarfile.open(path, "w") as tar:
            for index, sample, existing, new in samples:
                num_new += len(new)
                annotations = [{**entry, "id": number} for number, entry in enumerate(existing + new, start=1)]
                name = f"{args.out.stem}_{index + 1}"  # unique among the tars of a folder
                suffix, image = _image(dataset.image_bytes(index), sample.image)
                add_sample(tar, name, suffix, image, sample.width, sample.height, annotations)

    with samples:  # closes the progress bar before an error is printed
        atomic_write(args.out, write)
    print(f"{args.out}: {num_new} new masks. {report.summary()}")


def annotated(dataset: ImageDataset, generator: MaskGenerator, settings, min_area: int, report: SkipReport):
    """Yield index, sample, existing annotations and new annotations of each image.

    Skipped images and masks are added to `report`. New masks have at least `min_area` pixels.
    """
    for index in range(len(dataset)):
        sample, skipped = dataset.load(index)
        report.merge(skipped)
        if sample is None:
            continue
        size = sample.width, sample.height
        try:
            check_size(generator.image_processor, *size[::-1])
        except ValueError:
            report.add_image(SkipReason.TOO_THIN, sample.id)
            continue
        result = generator(sample.image, settings)
        candidates = coco_document(sample.id, size, result[result.masks.areas >= min_area])["annotations"]
        existing = [
            {
                "segmentation": text_rle(instance.rle), "bbox": list(instance.bbox_xywh), "area": instance.area,
                "iscrowd": int(instance.is_crowd),
            }
            for instance in sample.instances
        ]  # fmt: skip
        yield index, sample, existing, _new_masks(candidates, [annotation["segmentation"] for annotation in existing])


def _image(file: bytes, image: Image.Image) -> tuple[str, bytes]:
    """Return suffix and content of the file, or of a PNG of the image where SA-1B's layout has no such format."""
    with Image.open(io.BytesIO(file)) as opened:
        if opened.format in SUFFIXES and opened.size == image.size:
            return SUFFIXES[opened.format], file
    png = io.BytesIO()
    image.save(png, "png")
    return ".png", png.getvalue()


def _new_masks(candidates: list[dict], existing_rles: list[dict]) -> list[dict]:
    """Return the annotations, best first, whose masks differ from the existing ones and from each other."""
    rles, new = list(existing_rles), []
    for annotation in candidates:
        rle = annotation["segmentation"]
        if not rles or coco_mask.iou([rle], rles, [0] * len(rles)).max() < SAME:
            rles.append(rle)
            new.append(annotation)
    return new


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
