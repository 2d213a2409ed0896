"""`samlight segment`: write the masks of images to files, with a contact sheet and a table.

Modules that read images and run models are imported inside the functions that need them.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.termination import exit_status
from .options import (
    add_grid_options,
    add_model_arguments,
    load_from_options,
    make_folder,
    model_path_of,
    not_empty,
    parse_box,
    parse_fraction,
    parse_point,
    parse_positive,
)
from .prompt_files import FORM, parse_points, prompts_from_options
from .result_folder import RULE, Place, ResultFolder, identity_of
from .segment_tiles import OBJECT_FORMATS, add_tile_arguments, check_tile_options, run_tiled_jobs, tile_settings
from .streams import Streams, standard_streams
from .summary import (
    MAX_PANELS,
    Row,
    Summary,
    count,
    describe_prompts,
    path_from,
    point_progress,
    progress,
    report_skipped,
    telling_where,
    write_result,
)


if TYPE_CHECKING:
    from ..masks.drawing import Panel
    from .prompt_files import Prompts


ONE_JSON = "instances.json"
_MODEL_SETTINGS = "config.json", "preprocessor_config.json", "processor_config.json"
FORMATS = ("overlay", "png", "labels", "coco", "labelme", "yolo", "npz", *OBJECT_FORMATS)


def add_segment_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "paths",
        nargs="+",
        type=not_empty,
        metavar="PATH",
        help="images, folders of images, or patterns like '*.jpg'; - is an image from standard input",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/segment"), metavar="DIR",
        help=f"folder of results (%(default)s): {RULE}; - writes the result of one image to standard output",
    )  # fmt: skip
    parser.add_argument(
        "--box", type=parse_box, action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="segment what is in this box, in pixels of the image; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--point", type=parse_point, action="append", default=[], metavar="X,Y",
        help="segment what is at this point; may be repeated, each for an object of its own",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=parse_points, action="append", default=[], metavar="'X,Y X,Y,0'",
        help="segment one object by several clicks: X,Y on it, and X,Y,0 beside it; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help=f"segment what these prompts of each image point at: {FORM}"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="overlay",
        help="overlay: a PNG of the image under its masks; png: a folder with a PNG for each mask; labels: a PNG of 16 "
        "bits, in which i is the i-th mask, and the best one where masks overlap; coco: JSON with run lengths, which "
        "pycocotools reads; labelme, yolo: polygons for labelme and Ultralytics; npz: numpy arrays; geojson, gpkg: "
        "polygons, with --tile (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--one-json", action="store_true", help=f"with --format coco: {ONE_JSON}, too, of all images, with unique ids"
    )
    parser.add_argument(
        "--min-hole-area", type=parse_positive, default=0, metavar="PIXELS", help="fill smaller holes of masks"
    )
    parser.add_argument(
        "--min-region-area", type=parse_positive, default=0, metavar="PIXELS",
        help="drop smaller parts of masks that are not connected with the rest; the largest part stays",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="leave images alone whose results are in --out already")
    parser.add_argument(
        "--batch-size", type=parse_positive, default=4, metavar="N", help="images encoded together (%(default)s)"
    )
    _add_everything_arguments(parser)
    add_tile_arguments(parser)
    add_model_arguments(parser)


def _add_everything_arguments(parser: argparse.ArgumentParser):
    everything = parser.add_argument_group("everything mode, without prompts")
    add_grid_options(everything)
    everything.add_argument(
        "--points-per-batch", type=parse_positive, metavar="N", help="points at once (what suits the device)"
    )
    everything.add_argument(
        "--pred-iou-thresh", type=parse_fraction, default=0.88, metavar="T",
        help="keep masks with a predicted IoU above it (%(default)s)",
    )  # fmt: skip
    everything.add_argument(
        "--stability-score-thresh", type=parse_fraction, default=0.95, metavar="T",
        help="keep masks with a stability above it (%(default)s)",
    )  # fmt: skip
    everything.add_argument(
        "--min-area", type=parse_positive, default=1, metavar="PIXELS", help="of a mask (%(default)s)"
    )
    everything.add_argument("--max-masks", type=parse_positive, metavar="N", help="keep the N best of an image (all)")
    everything.add_argument(
        "--max-memory-mb", type=parse_positive, default=1500, metavar="MB", help="of the GPU's memory (%(default)s)"
    )


def run_segment(args: argparse.Namespace) -> int:
    """Segment each image that can be read, and name the others on stderr.

    Returns:
        The exit status: 0; 1 where no image could be segmented; 130 after Ctrl-C; 143 after SIGTERM.

    Raises:
        ArgumentTypeError: for options that do not fit the files, such as `--resume` with other settings.
        DiskError: where results can no longer be written.
    """
    with standard_streams(args) as streams:
        return _run_segment(args, streams)


def _run_segment(args: argparse.Namespace, streams: Streams) -> int:
    from ..images.formats import describe_left_out
    from ..images.reading import common_folder, find_images

    _check_options(args)
    check_tile_options(args)
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
    prompts = prompts_from_options(args, images, root, summary)
    if streams.is_output and len(prompts) > 1 and not args.one_json:
        raise argparse.ArgumentTypeError(f"--out - is the result of one image, and there are {len(prompts)}.")
    status = _segment(args, prompts, root, model_path, summary, streams)
    return summary.finish() if status is None else status


def _segment(
    args: argparse.Namespace, prompts: "dict[Path, Prompts]", root: Path | None, model_path: str, summary: Summary,
    streams: Streams,
) -> int | None:  # fmt: skip
    """Segment the images that `prompts` names and that have no result yet; return an interrupt's status, or None."""
    settings, temporary = _settings(args, model_path, prompts), streams.source and streams.source.parent
    results, places, to_do = _plan(args, list(prompts), root, settings, temporary)
    summary.already = len(places) - len(to_do)
    if to_do:
        model, processor = load_from_options(model_path, args)
        # Again: another run may have begun here meanwhile.
        results, places, to_do = _plan(args, list(prompts), root, settings, temporary)
    one_json = results.file_of_all(ONE_JSON, args.paths, places) if args.one_json else None
    if to_do or one_json:
        if args.format == "overlay" and not args.tile:
            summary.sheet = results.file_of_all(summary.sheet.name, args.paths)
        replaced = {place for place in to_do if results.is_replaced(place)}
        with telling_where(results.note, ends_the_run=True):
            results.begin(settings, root, to_do)
    if to_do:
        try:
            segment = _segmenter(model, processor, args)
            if args.tile:
                run_tiled_jobs(to_do, segment, args, summary, results, replaced, streams.shown)
            else:
                _run_jobs(to_do, prompts, segment, args, summary, results, replaced, streams)
        except KeyboardInterrupt as interrupt:  # of Ctrl-C or SIGTERM
            print(
                f"samlight: interrupted: {results.num_finished + summary.already} of {len(places)} images are done. "
                "The same command with --resume goes on from there.",
                file=sys.stderr,
            )
            return exit_status(interrupt)
    streams.result = one_json or places[0].output
    failed = {place.output for place in to_do} - {row.output for row in summary.rows}
    documents = [place.output for place in places if place.output not in failed]
    if one_json and documents:
        _write_one_json(one_json, documents)
    return None


def _check_options(args: argparse.Namespace):
    """Raise ArgumentTypeError for options that do not fit each other, and for a package that they need."""
    from ..masks.files import POLYGON_FORMATS
    from ..masks.formats import require_opencv

    if args.prompts is not None and (args.box or args.point or args.points):
        raise argparse.ArgumentTypeError(
            "--prompts gives each image its own prompts: leave out either it, or --box, --point and --points."
        )
    if args.one_json and args.format != "coco":
        raise argparse.ArgumentTypeError(f"--one-json is for --format coco, not {args.format}.")
    if args.format in POLYGON_FORMATS or args.min_hole_area or args.min_region_area:
        try:
            require_opencv()
        except ImportError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


def _plan(
    args: argparse.Namespace, images: Sequence[Path], root: Path | None, settings: dict, temporary: Path | None
) -> tuple[ResultFolder, list[Place], list[Place]]:
    """Return the folder of results in its present state, all images, and those that are still to be segmented."""
    from ..masks.files import ENDINGS
    from ..masks.object_files import OBJECT_ENDINGS

    results = ResultFolder(args.out, temporary)
    if args.resume:
        results.check_settings(settings)
    places = results.places(images, root, {**OBJECT_ENDINGS, **ENDINGS}[args.format])
    resumes = args.resume and results.settings == settings
    return results, places, [place for place in places if not (resumes and results.is_done(place))]


def _run_jobs(
    places: Sequence[Place], prompts: "dict[Path, Prompts]", segment, args: argparse.Namespace, summary: Summary,
    results: ResultFolder, replaced: Collection[Place], streams: Streams,
):  # fmt: skip
    """Segment the images, add them to the summary, and note each finished result.

    Args:
        places: the images, and where their results go.
        prompts: of each image; none for everything mode.
        segment: segments a batch of images, see `Run`.
        summary: gets a row for each image.
        results: the folder of results, whose note has been begun.
        replaced: places with an earlier result.
        streams: what stands for standard input and output.
    """
    from .segment_run import Job, Run, Segmented

    # Of the image and all of its crops.
    num_points = args.points_per_side**2 * sum(4**layer for layer in range(args.crops_n_layers + 1))
    everything = len(places) == 1 and not prompts[places[0].image]
    bar = point_progress(num_points, places[0].image.name) if everything else None
    place_of = {place.output: place for place in places}

    def write(segmented: Segmented) -> "tuple[Row, Panel | None]":
        job, result, image = segmented.job, segmented.result, segmented.image
        boxes, points = job.shown_prompts()
        prompt, name = describe_prompts(boxes, points), job.name
        if args.format == "labelme" and job.path != streams.source:
            name = path_from(Path() if streams.is_output else job.output.parent, job.path)
        has_panel = job.output in shown
        left_out, panel = write_result(job.output, args.format, image, name, prompt, result, boxes, points, has_panel)
        with telling_where(results.note, ends_the_run=True):
            results.finish(place_of[job.output])
        shown_path = streams.shown(job.path)
        return Row(shown_path, image.size, prompt, len(result), segmented.seconds, job.output, left_out), panel

    def skip(error: BaseException, path: Path):
        report_skipped(error, path, streams.shown(path))
        with counting:
            summary.skipped += 1

    has_sheet, counting = args.format == "overlay" and not streams.is_output, threading.Lock()
    shown = {place.output for place in places[:MAX_PANELS]} if has_sheet else set()
    jobs = [Job(place.image, place.output, place.name, prompts[place.image]) for place in places]
    start = time.perf_counter()
    with closing(Run(segment, write, skip, args.batch_size, bar)(jobs)) as rows:
        for row, panel in progress(rows, len(jobs)):
            summary.add(row, panel)
            summary.replaced += place_of[row.output] in replaced
    summary.seconds = time.perf_counter() - start
    if bar is not None:
        bar.close()


def _write_one_json(path: Path, documents: Sequence[Path]):
    from ..masks.files import write_coco_of_many

    with telling_where(path):
        write_coco_of_many(path, documents)
    print(f"COCO of {count(len(documents), 'image')}: {path}")


def _segmenter(model, processor, args: argparse.Namespace):
    from ..inference.crops import MaskGenerationSettings
    from ..inference.mask_generation import MaskGenerator
    from ..inference.predictor import Predictor
    from .segment_run import EverythingSegmenter, PromptSegmenter

    min_areas = args.min_hole_area, args.min_region_area
    if args.prompts or args.box or args.point or args.points:
        predictor = Predictor(model, processor, output="torch", max_memory_mb=args.max_memory_mb)
        return PromptSegmenter(predictor, min_areas)
    generator = MaskGenerator(model, processor, args.max_memory_mb, args.points_per_batch)
    settings = MaskGenerationSettings(
        args.points_per_side,
        args.crops_n_layers,
        pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh,
    )
    return EverythingSegmenter(generator, settings, args.min_area, args.max_masks, min_areas)


def _settings(args: argparse.Namespace, model_path: str, prompts: "dict[Path, Prompts]") -> dict:
    """Return the settings that results depend on; the note keeps them, so that `--resume` can compare them."""
    folder = Path(model_path).expanduser()
    files = [*sorted(folder.resolve().glob("*.safetensors")), *(folder.resolve() / name for name in _MODEL_SETTINGS)]
    weights = [identity for file in files if (identity := identity_of(file))]
    later: dict = {  # which the notes of earlier versions lack: None stands for what these did
        "--points": [[[*map(list, prompt.points_xy)], [*prompt.labels]] for prompt in args.points],
        "--prompts": args.prompts and _digest([[os.path.abspath(image), repr(own)] for image, own in prompts.items()]),
        "--crops-n-layers": args.crops_n_layers, "--min-hole-area": args.min_hole_area,
        "--min-region-area": args.min_region_area, **tile_settings(args),
    }  # fmt: skip
    return {
        "--model": str(folder.resolve()) if folder.is_dir() else model_path,
        "the model's files": _digest(weights),
        "--dtype": args.dtype, "--format": args.format,
        "--box": [*map(list, args.box)], "--point": [*map(list, args.point)], "--points-per-side": args.points_per_side,
        "--pred-iou-thresh": args.pred_iou_thresh, "--stability-score-thresh": args.stability_score_thresh,
        "--min-area": args.min_area, "--max-masks": args.max_masks,
        **{name: value for name, value in later.items() if value},
    }  # fmt: skip


def _digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
