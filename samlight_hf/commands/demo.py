"""`samlight demo`: boxes, points and everything on the example images, a contact sheet, and a table."""

import argparse
import time
from pathlib import Path

from ..utils.json_files import read_json
from .options import (
    BUNDLED_THRESHOLDS,
    EXAMPLE_IMAGES,
    add_model_arguments,
    load_from_options,
    make_folder,
    model_path_of,
)
from .summary import Row, Summary, describe_prompts, progress, write_result


DEMO_POINTS_PER_SIDE = 16


def add_demo_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of results (%(default)s)")
    add_model_arguments(parser)


def run_demo(args: argparse.Namespace) -> int:
    """Boxes, points and everything on each example image: a row of three on the contact sheet."""
    from ..images.preprocessing import image_tensor
    from ..images.reading import open_image
    from ..inference.crops import MaskGenerationSettings
    from ..inference.mask_generation import MaskGenerator
    from ..inference.predictor import Predictor
    from ..inference.single_calls import predict_prompts

    prompts_file = EXAMPLE_IMAGES.parent / "prompts.json"
    if not prompts_file.is_file():
        raise argparse.ArgumentTypeError(
            f"the example images are not here ({EXAMPLE_IMAGES}). Run the demo from a clone of the repository, or "
            "use samlight segment on images of your own."
        )
    model_path = model_path_of(args.model)
    make_folder(args.out)
    model, processor = load_from_options(model_path, args)
    predictor, generator = Predictor(model, processor), MaskGenerator(model, processor)
    pred_iou_thresh, stability_score_thresh = BUNDLED_THRESHOLDS
    settings = MaskGenerationSettings(
        DEMO_POINTS_PER_SIDE, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
    )
    summary = Summary(args.out, columns=3)
    for name, prompts in progress(list(read_json(prompts_file, dict).items())):
        image = open_image(EXAMPLE_IMAGES / name)
        boxes, points = prompts["boxes_xyxy"], prompts["points_xy"]
        start = time.perf_counter()
        encoded = predictor.encode(image)
        results = [("boxes", predict_prompts(predictor, boxes, image=encoded), boxes, [])]
        results.append(("points", predict_prompts(predictor, points_xy=points, image=encoded), [], points))
        everything = generator.generate(image_tensor(image), settings, encoded=encoded)
        results.append(("everything", everything, [], []))
        seconds = (time.perf_counter() - start) / len(results)  # of one encoding of the image, and all decoding
        for kind, result, shown_boxes, shown_points in results:
            output = args.out / f"{Path(name).stem}_{kind}.png"
            prompt = describe_prompts(shown_boxes, shown_points)
            panel = write_result(output, "overlay", image, name, prompt, result, shown_boxes, shown_points)
            summary.add(Row(name, image.size, prompt, len(result), seconds, output), panel)
    return summary.finish()
