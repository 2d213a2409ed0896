"""What finds small objects, and what it costs: everything mode with denser points, with crops and in small tiles.

    python benchmarks/small_objects.py --dataset val.tar nuclei.tar --limit 20 --json small_objects.json
    python benchmarks/small_objects.py --dataset val.tar --settings 32 64 32,crops=1 16,tile=128,overlap=32

A setting is the side of the grid of points, on the image and on each crop or tile, with `crops=` layers of crops, and
`tile=` and `overlap=` in pixels of the image (a quarter of the tile). The scores are those of `samlight evaluate
--protocol everything`: average recall at 1000 masks an image, of all annotated objects and of those below 32x32 pixels
(small), below 96x96 (medium) and above (large). Seconds are the mean of all images, from the decoded image to run
lengths; on a GPU after one image that warms up.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from samlight_hf import TileSettings
from samlight_hf.benchmark.machine import describe_machine
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, parse_fraction, parse_positive
from samlight_hf.data import load_dataset
from samlight_hf.evaluation.average_precision import SIZES, EverythingTask, summarize_everything
from samlight_hf.evaluation.models import PromptableModel
from samlight_hf.loading import load_model
from samlight_hf.utils.messages import text_table


# About 1,000 points, and four ways to spend about 5,000 on an image of 481x321 pixels.
DEFAULT_SETTINGS = ("32", "64", "32,crops=1", "32,tile=256,overlap=64", "16,tile=128,overlap=32")
COLUMNS = [f"AR@1000 {size}" for size in SIZES]


@dataclass(frozen=True)
class Setting:
    """A row of the table: how everything mode runs."""

    text: str
    points_per_side: int
    crops_n_layers: int
    tiles: TileSettings | None

    @classmethod
    def parse(cls, text: str) -> "Setting":
        points, *others = text.split(",")
        try:
            values = {name: int(value) for name, value in (part.split("=") for part in others)}
            crops, tile, overlap = (values.pop(name, None) for name in ("crops", "tile", "overlap"))
            if values or (tile is None and overlap is not None):
                raise ValueError(f"{', '.join(values) or 'overlap'} is not possible here")
            tiles = None if tile is None else TileSettings.of(tile, overlap)
            setting = cls(text, int(points), crops or 0, tiles)
            setting.task()
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not POINTS[,crops=N][,tile=PX[,overlap=PX]], such as 32,crops=1: {error}"
            ) from error
        return setting

    def task(self, *thresholds: float) -> EverythingTask:
        return EverythingTask(self.points_per_side, *thresholds, crops_n_layers=self.crops_n_layers, tiles=self.tiles)


def main():
    args = parse_arguments()
    model = PromptableModel(*load_model(args.model, args.device, args.dtype))
    rows = []
    for path in args.dataset:
        dataset = load_dataset(path, limit=args.limit)
        samples = [sample for sample, _ in map(dataset.load, range(len(dataset))) if sample is not None]
        if not samples:
            raise SystemExit(f"{path}: no image could be read.")
        for setting in args.settings:
            row = measure(model, samples, setting, args, title=f"{Path(path).name}, {setting.text}")
            rows.append({"dataset": Path(path).name, **row})
    print(table(rows))
    if args.json:
        result = {
            "command": f"python {shlex.join(sys.argv)}", "date": datetime.date.today().isoformat(),
            "machine": describe_machine(), "torch": torch.__version__, "device": str(model.model.device),
            "dtype": args.dtype, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_CHECKPOINT, help="%(default)s")
    parser.add_argument("--dataset", required=True, nargs="+", help="each as for `samlight evaluate`")
    parser.add_argument("--limit", type=parse_positive, help="the first images of each data set")
    parser.add_argument(
        "--settings", type=Setting.parse, nargs="+", default=list(map(Setting.parse, DEFAULT_SETTINGS)),
        metavar="POINTS[,crops=N][,tile=PX[,overlap=PX]]", help=f"({' '.join(DEFAULT_SETTINGS)})",
    )  # fmt: skip
    parser.add_argument("--pred-iou-thresh", type=parse_fraction, default=0.0, help="%(default)s")
    parser.add_argument("--stability-score-thresh", type=parse_fraction, default=0.0, help="%(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--json", type=Path, help="file of the rows")
    return parser.parse_args()


def measure(model: PromptableModel, samples: list, setting: Setting, args: argparse.Namespace, title: str) -> dict:
    """Return a row: the scores of one setting on all images, and the seconds of an image."""
    task = setting.task(args.pred_iou_thresh, args.stability_score_thresh)
    if model.model.device.type != "cpu":  # kernels are compiled, and graphs captured
        task(model, None, samples[0])
    records = []
    start = time.perf_counter()
    for sample in tqdm(samples, desc=title, unit="image", leave=False, disable=None):
        records += task(model, None, sample)
    seconds = (time.perf_counter() - start) / len(samples)
    num_objects = sum(len(record["targets"]) for record in records)
    return {
        "setting": setting.text, "num_images": len(samples), "num_objects": num_objects, "seconds_per_image": seconds,
        **summarize_everything(records),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    cells = [["data set", "images", "objects", "setting", *COLUMNS, "masks an image", "seconds an image"]]
    for row in rows:
        recalls = [f"{row[name]:.3f}" if name in row else "-" for name in COLUMNS]  # a size that no object has
        cells.append(
            [row["dataset"], str(row["num_images"]), str(row["num_objects"]), row["setting"], *recalls,
             f"{row['masks per image']:.0f}", f"{row['seconds_per_image']:.2f}"]
        )  # fmt: skip
    return text_table(cells, rule=True)


if __name__ == "__main__":
    main()
