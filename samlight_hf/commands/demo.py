"""`samlight demo`: segment the example images by boxes, by points, and everything; write a contact sheet."""

import argparse
import time
from pathlib import Path

from ..utils.json_files import read_json
from .options import (
    EXAMPLE_IMAGES,
    add_model_arguments,
    load_from_options,
    make_folder,
    model_path_of,
)
from .summary import Row, Summary, describe_prompts, progress, write_result


DEMO_POINTS_PER_SIDE = 16


def add_demo_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/demo"), metavar="DIR", help="folder of results (%(default)s)"
    )
    add_model_arguments(parser)


def run_demo(args: argparse.Namespace) -> int:
    """Segment each example image by boxes, by points, and everything; they are a row of the contact sheet.

    Returns:
        The exit status.

    Raises:
        ArgumentTypeError: outside a clone of the repository.
    """
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
    settings = MaskGenerationSettings(DEMO_POINTS_PER_SIDE)
    summary = Summary(args.out, columns=3)
    examples = read_json(prompts_file, dict)
    for name, prompts in progress(examples.items(), len(examples)):
        image = open_image(EXAMPLE_IMAGES / name)
        boxes, points = prompts["boxes_xyxy"], prompts["points_xy"]
        start = time.perf_counter()
        encoded = predictor.encode(image)
        of_boxes = predict_prompts(predictor, boxes, image=encoded)
        of_points = predict_prompts(predictor, points_xy=points, image=encoded)
        everything = generator.generate(image_tensor(image), settings, encoded=encoded)
        results: list[tuple] = [
            ("boxes", of_boxes, boxes, []), ("points", of_points, [], points), ("everything", everything, [], []),
        ]  # fmt: skip
        seconds = (time.perf_counter() - start) / len(results)  # of one encoding of the image, and all decoding
        for kind, result, shown_boxes, shown_points in results:
            output = args.out / f"{Path(name).stem}_{kind}.png"
            prompt = describe_prompts(shown_boxes, shown_points)
            _, panel = write_result(output, "overlay", image, name, prompt, result, shown_boxes, shown_points)
            summary.add(Row(name, image.size, prompt, len(result), seconds, output), panel)
    return summary.finish()
