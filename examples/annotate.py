"""Writes a tar in SA-1B's layout: photographs with the masks that a model finds on them, to train the next model on.

    python examples/annotate.py photos/ --out photos.tar --model checkpoints/sam-lightening-tiny --dtype bfloat16

Segment Anything calls this the fully automatic stage of its data engine. Masks that the photographs have already (tars, `images/` with
`masks/`) are kept, and those that the model finds besides are added. Names and ids are new, of the masks that are kept too. The tar
appears when it is finished.
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
SAME = 0.8  # IoU from which two masks are one


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder of images, one with images/ and masks/, or tars in SA-1B's layout")
    parser.add_argument("--out", type=Path, required=True, help="the tar that is written")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--pred-iou-thresh", type=float, default=0.5)
    parser.add_argument("--stability-score-thresh", type=float, default=0.75)
    parser.add_argument("--min-area", type=int, default=64, help="pixels of the image")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many images")
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
            for index, sample, given, new in samples:
                num_new += len(new)
                annotations = [{**each, "id": number} for number, each in enumerate(given + new, start=1)]
                name = f"{args.out.stem}_{index + 1}"  # tars beside each other must not share a name
                suffix, image = _image(dataset.image_bytes(index), sample.image)
                add_sample(tar, name, suffix, image, sample.width, sample.height, annotations)

    with samples:  # or an error would be told behind the progress bar, on the same line
        atomic_write(args.out, write)
    print(f"{args.out}: {num_new} new masks. {report.summary()}")


def annotated(dataset: ImageDataset, generator: MaskGenerator, settings, min_area: int, report: SkipReport):
    """Yields index, sample, the annotations that it has and those of new masks; what is skipped is added to `report`."""
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
        found = coco_document(sample.id, size, result[result.masks.areas >= min_area])["annotations"]
        given = [
            {
                "segmentation": text_rle(instance.rle), "bbox": list(instance.bbox_xywh), "area": instance.area,
                "iscrowd": int(instance.is_crowd),
            }
            for instance in sample.instances
        ]  # fmt: skip
        yield index, sample, given, _none_of([annotation["segmentation"] for annotation in given], found)


def _image(file: bytes, image: Image.Image) -> tuple[str, bytes]:
    """A file as it is, where tars of SA-1B may hold its kind, and its suffix; otherwise a PNG of the same pixels."""
    with Image.open(io.BytesIO(file)) as opened:
        if opened.format in SUFFIXES and opened.size == image.size:
            return SUFFIXES[opened.format], file
    png = io.BytesIO()
    image.save(png, "png")
    return ".png", png.getvalue()


def _none_of(given: list[dict], found: list[dict]) -> list[dict]:
    """Those of `found`, the best first, that are none of the `given` masks and none of one another."""
    taken, new = list(given), []
    for annotation in found:
        rle = annotation["segmentation"]
        if not taken or coco_mask.iou([rle], taken, [0] * len(taken)).max() < SAME:
            taken.append(rle)
            new.append(annotation)
    return new


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
