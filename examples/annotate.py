"""Annotate images with a model's masks and write a tar in SA-1B's layout, as training data for the next model.

    python examples/annotate.py photos/ --out photos.tar --model checkpoints/sam-lightening-tiny --dtype bfloat16
    accelerate launch --multi_gpu examples/annotate.py photos/ --out photos.tar --model ...    # shares the images

This is the fully automatic stage of Segment Anything's data engine (arXiv 2304.02643, section 4). Existing masks (of
tars, or of `images/` with `masks/`) are kept, and further masks found by the model are added. Images and masks get new
names and ids. The tar appears when it is complete, and does not depend on the number of processes. Until then each
process writes a part in a hidden folder beside it. Finished parts stay there if the run fails.
"""

import argparse
import contextlib
import heapq
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from samlight_hf import MaskGenerationSettings, MaskGenerator
from samlight_hf.data import ImageDataset, SkipReason, SkipReport, load_dataset
from samlight_hf.data.sa1b import add_sample
from samlight_hf.images.levels import is_turned
from samlight_hf.images.preprocessing import check_size
from samlight_hf.loading import load_model
from samlight_hf.masks.files import coco_document
from samlight_hf.masks.rle import text_rle
from samlight_hf.utils.atomic_files import atomic_write, beside
from samlight_hf.utils.messages import make_console_safe, one_line
from samlight_hf.utils.processes import process_group, tell, tell_error
from samlight_hf.utils.termination import explained_end


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
    with explained_end(lambda: not_written(args.out)), process_group(cpu=args.device == "cpu") as state:
        annotate(args, state)


def annotate(args: argparse.Namespace, state: PartialState):
    """Write the tar. Each process annotates its share of the images, and the main one joins the parts."""
    if args.out.exists():
        raise ValueError(f"{args.out} exists already. Move it away, or choose another --out.")
    dataset = load_dataset(args.images, limit=args.limit, require_masks=False)
    settings = MaskGenerationSettings(
        args.points_per_side,
        pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh,
    )
    device = str(state.device) if args.device == "auto" and state.num_processes > 1 else args.device
    generator = MaskGenerator(*load_model(args.model, device=device, dtype=args.dtype))
    report = SkipReport()
    indices = range(state.process_index, len(dataset), state.num_processes)
    annotated_images = annotated(dataset, indices, generator, settings, args.min_area, report)
    samples = tqdm(annotated_images, total=len(indices), unit="image", disable=not state.is_main_process)
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

    folder = parts_folder(args.out)
    if state.is_main_process:
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob(".*.part"):  # of a run that was killed
            unfinished.unlink()
    state.wait_for_everyone()
    parts = [folder / f"{number}.tar" for number in range(state.num_processes)]
    try:
        with samples:  # closes the progress bar before an error is printed
            atomic_write(parts[state.process_index], write)
        state.wait_for_everyone()
        if state.is_main_process:
            finish(parts, args.out)
    finally:
        with contextlib.suppress(OSError):  # not if a part is in it
            folder.rmdir()
    num_new = sum(gather_object([num_new]))
    total = SkipReport().merge(dataset.index_report)
    for skipped in gather_object([report.to_dict()]):
        total.merge(SkipReport.from_dict(skipped))
    tell(f"{args.out}: {num_new} new masks. {total.summary()}")


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts of a tar, which has the same name in each run."""
    return beside(out, ".parts")


def not_written(out: Path) -> str:
    """Say that the tar was not written, and which parts of it are finished."""
    finished = sorted(map(str, parts_folder(out).glob("[0-9]*.tar")))
    kept = f" Finished parts of it, tars of the same layout, are kept until it is: {', '.join(finished)}."
    return f"{out} was not written.{kept if finished else ''}"


def finish(parts: Sequence[Path], out: Path):
    """Write the tar from its parts, and remove these. Raises OSError, with the parts kept, if it cannot be written."""
    try:
        whole = parts[0] if len(parts) == 1 else parts[0].with_name(".whole.part")
        if len(parts) > 1:
            atomic_write(whole, lambda path: join(parts, path))
        os.replace(whole, out)
    except OSError as error:
        raise OSError(f"{one_line(error)}. {not_written(out)}") from error
    shutil.rmtree(parts[0].parent, ignore_errors=True)  # another process may just remove the empty folder


def join(parts: Sequence[Path], path: Path):
    """Write the images of several tars to one, in the order of their numbers."""
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(part)) for part in parts]
        joined = stack.enter_context(tarfile.open(path, "w"))
        for _, tar, member in heapq.merge(*map(_numbered, tars), key=lambda entry: entry[0]):
            joined.addfile(member, tar.extractfile(member))


def _numbered(tar: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the number of the image, the tar and the member, for each member."""
    for member in tar:
        yield int(Path(member.name).stem.rpartition("_")[2]), tar, member


def annotated(
    dataset: ImageDataset,
    indices: Sequence[int],
    generator: MaskGenerator,
    settings: MaskGenerationSettings,
    min_area: int,
    report: SkipReport,
):
    """Yield index, sample, existing annotations and new annotations of each image.

    Skipped images and masks are added to `report`. New masks have at least `min_area` pixels.
    """
    for index in indices:
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
    """Return suffix and content of the file, or of a PNG of the image.

    It is a PNG where SA-1B's layout has no such format, and where EXIF data turn the file: no reader turns a PNG out of
    the frame of its masks.
    """
    with Image.open(io.BytesIO(file)) as opened:
        if opened.format in SUFFIXES and not is_turned(opened):
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
    except (ValueError, OSError, RuntimeError) as error:
        tell_error(f"error: {one_line(error)}")
        sys.exit(1)
