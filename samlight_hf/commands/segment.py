"""`samlight segment`: write the masks of images to files, with a contact sheet and a table.

Modules that read images and run models are imported inside the functions that need them.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    BUNDLED_THRESHOLDS,
    DEFAULT_THRESHOLDS,
    add_model_arguments,
    load_from_options,
    make_folder,
    model_path_of,
    not_empty,
    parse_box,
    parse_fraction,
    parse_point,
    parse_positive,
    thresholds_of,
)
from .result_folder import RULE, Place, ResultFolder, identity_of
from .summary import (
    MAX_PANELS,
    Row,
    Summary,
    describe_prompts,
    point_progress,
    progress,
    report_skipped,
    telling_where,
    write_result,
)


if TYPE_CHECKING:
    from ..masks.drawing import Panel


FORMATS = ("overlay", "png", "coco", "npz")


def add_segment_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "paths",
        nargs="+",
        type=not_empty,
        metavar="PATH",
        help="images, folders of images, or patterns like '*.jpg'",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/segment"), help=f"folder of results (%(default)s): {RULE}"
    )
    parser.add_argument(
        "--box", type=parse_box, action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="segment what is in this box, in pixels of the image; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--point", type=parse_point, action="append", default=[], metavar="X,Y",
        help="segment what is at this point; may be repeated, each for an object of its own",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="overlay",
        help="overlay: a PNG of the image under its masks; png: a folder with a PNG for each mask; coco: JSON with run "
        "lengths, which pycocotools reads; npz: numpy arrays (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="leave images alone whose results are in --out already")
    parser.add_argument(
        "--batch-size", type=parse_positive, default=4, metavar="N", help="images encoded together (%(default)s)"
    )
    everything = parser.add_argument_group("everything mode, without --box and --point")
    everything.add_argument(
        "--points-per-side", type=parse_positive, default=32, metavar="N", help="N x N points are tried (%(default)s)"
    )
    everything.add_argument(
        "--points-per-batch", type=parse_positive, metavar="N", help="points at once (what suits the device)"
    )
    for option, what, default, bundled in (
        ("--pred-iou-thresh", "predicted IoU", DEFAULT_THRESHOLDS[0], BUNDLED_THRESHOLDS[0]),
        ("--stability-score-thresh", "stability", DEFAULT_THRESHOLDS[1], BUNDLED_THRESHOLDS[1]),
    ):
        everything.add_argument(
            option, type=parse_fraction, metavar="T",
            help=f"keep masks with a {what} above it ({default}; {bundled} for the bundled checkpoint)",
        )  # fmt: skip
    everything.add_argument(
        "--min-area", type=parse_positive, default=1, metavar="PIXELS", help="of a mask (%(default)s)"
    )
    everything.add_argument("--max-masks", type=parse_positive, metavar="N", help="keep the N best of an image (all)")
    everything.add_argument(
        "--max-memory-mb", type=parse_positive, default=1500, metavar="MB", help="of the GPU's memory (%(default)s)"
    )
    add_model_arguments(parser)


def run_segment(args: argparse.Namespace) -> int:
    """Segment each image that can be read, and name the others on stderr.

    Returns:
        The exit status: 0; 1 where no image could be segmented; 130 after Ctrl-C.

    Raises:
        ArgumentTypeError: for options that do not fit the files, such as `--resume` with other settings.
        DiskError: where results can no longer be written.
    """
    from ..images.formats import describe_left_out
    from ..images.reading import common_folder, find_images

    model_path = model_path_of(args.model)
    make_folder(args.out)
    for path in map(Path, args.paths):
        if path.is_dir() and path.resolve() == args.out.resolve():
            raise argparse.ArgumentTypeError(f"--out {args.out} is the folder of the images. Choose another one.")
    left_out: Counter[str] = Counter()
    images, problems = find_images(args.paths, exclude=args.out, left_out=left_out)
    summary = Summary(args.out, skipped=len(problems))
    for problem in problems:
        report_skipped(problem)
    if not images:
        return 1
    if left_out:
        print(f"samlight: {describe_left_out(left_out)}", file=sys.stderr)
    root = common_folder(args.paths)
    settings = _settings(args, model_path)
    _, to_do = _plan(args, images, root, settings)
    summary.already = len(images) - len(to_do)
    if to_do:
        model, processor = load_from_options(model_path, args)
        results, to_do = _plan(args, images, root, settings)  # again: another run may have begun here meanwhile
        if args.format == "overlay":
            summary.sheet = results.sheet(summary.sheet.name, args.paths)
        replaced = {place for place in to_do if results.is_replaced(place)}
        with telling_where(results.note, ends_the_run=True):
            results.begin(settings, root, to_do)
        try:
            _run_jobs(to_do, model, processor, args, model_path, summary, results, replaced)
        except KeyboardInterrupt:
            print(
                f"samlight: interrupted: {len(summary.rows) + summary.already} of {len(images)} images are done. The "
                "same command with --resume goes on from there.",
                file=sys.stderr,
            )
            return 130
    return summary.finish()


def _plan(
    args: argparse.Namespace, images: Sequence[Path], root: Path | None, settings: dict
) -> tuple[ResultFolder, list[Place]]:
    """Return the folder of results in its present state, and the images that are still to be segmented."""
    from ..masks.files import ENDINGS

    results = ResultFolder(args.out)
    if args.resume:
        results.check_settings(settings)
    places = results.places(images, root, ENDINGS[args.format])
    resumes = args.resume and results.settings == settings
    return results, [place for place in places if not (resumes and results.is_done(place))]


def _run_jobs(
    places: Sequence[Place], model, processor, args: argparse.Namespace, model_path: str, summary: Summary,
    results: ResultFolder, replaced: Collection[Place],
):  # fmt: skip
    """Segment the images, add them to the summary, and note each finished result.

    Args:
        places: the images, and where their results go.
        model_path: for the default thresholds.
        summary: gets a row for each image.
        results: the folder of results, whose note has been begun.
        replaced: places with an earlier result.
    """
    from .segment_run import Job, Run, Segmented

    prompt = describe_prompts(args.box, args.point)
    everything = not (args.box or args.point)
    num_points = args.points_per_side**2
    bar = point_progress(num_points, places[0].image.name) if everything and len(places) == 1 else None
    place_of = {place.output: place for place in places}

    def write(segmented: Segmented) -> "tuple[Row, Panel | None]":
        job, result, image = segmented.job, segmented.result, segmented.image
        with_panel = args.format == "overlay" and job.output in shown
        panel = write_result(job.output, args.format, image, job.name, prompt, result, args.box, args.point, with_panel)
        with telling_where(results.note, ends_the_run=True):
            results.finish(place_of[job.output])
        return Row(str(job.path), image.size, prompt, len(result), segmented.seconds, job.output), panel

    def skip(error: BaseException, path: Path):
        report_skipped(error, path)
        with counting:
            summary.skipped += 1

    shown, counting = {place.output for place in places[:MAX_PANELS]}, threading.Lock()
    segment = _segmenter(model, processor, args, model_path)
    jobs = [Job(place.image, place.output, place.name) for place in places]
    start = time.perf_counter()
    with closing(Run(segment, write, skip, args.batch_size, bar)(jobs)) as rows:
        for row, panel in progress(rows, len(jobs)):
            summary.add(row, panel)
            summary.replaced += place_of[row.output] in replaced
    summary.seconds = time.perf_counter() - start
    if bar is not None:
        bar.close()


def _segmenter(model, processor, args: argparse.Namespace, model_path: str):
    from ..inference.crops import MaskGenerationSettings
    from ..inference.mask_generation import MaskGenerator
    from ..inference.predictor import Predictor
    from .segment_run import EverythingSegmenter, PromptSegmenter

    if args.box or args.point:
        predictor = Predictor(model, processor, output="torch", max_memory_mb=args.max_memory_mb)
        return PromptSegmenter(predictor, args.box, args.point)
    generator = MaskGenerator(model, processor, args.max_memory_mb, args.points_per_batch)
    pred_iou_thresh, stability_score_thresh = thresholds_of(args, model_path)
    settings = MaskGenerationSettings(
        args.points_per_side, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
    )
    return EverythingSegmenter(generator, settings, args.min_area, args.max_masks)


def _settings(args: argparse.Namespace, model_path: str) -> dict:
    """Return the settings that results depend on; the note keeps them, so that `--resume` can compare them."""
    pred_iou_thresh, stability_score_thresh = thresholds_of(args, model_path)
    folder = Path(model_path).expanduser()
    weights = [identity_of(file) for file in sorted(folder.resolve().glob("*.safetensors"))]
    return {
        "--model": str(folder.resolve()) if folder.is_dir() else model_path,
        "the model's weights": hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:8],
        "--dtype": args.dtype, "--format": args.format,
        "--box": [*map(list, args.box)], "--point": [*map(list, args.point)], "--points-per-side": args.points_per_side,
        "--pred-iou-thresh": pred_iou_thresh, "--stability-score-thresh": stability_score_thresh,
        "--min-area": args.min_area, "--max-masks": args.max_masks,
    }  # fmt: skip
