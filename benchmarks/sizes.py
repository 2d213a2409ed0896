"""mIoU and time of one checkpoint at several image sizes: a table and a plot.

    python benchmarks/sizes.py --dataset val.tar --sizes 256 384 512 768 1024 1536 --json sizes.json
    python benchmarks/sizes.py --dataset val.tar --device cuda --time-on cpu --json sizes.json    # scores by a GPU
    python benchmarks/sizes.py --time-on cpu --json times.json                                    # times alone
    python benchmarks/sizes.py --from scores.json times.json --json sizes.json                    # one table of both

The checkpoint is converted to each size (`samlight convert`), without any training, and evaluated by `samlight
evaluate`, whose report stays in `--out`; a run that was interrupted goes on from there. The time of the image
encoder, batch 1, is the least of three: on a CPU, seconds of one core, which other processes do not change much. A
checkpoint that was trained at one of the sizes is given by `--also DIR`. The plot lies beside `--json`, as .png.
"""

import argparse
import datetime
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

from samlight_hf.benchmark.machine import describe_machine
from samlight_hf.commands.cli import main as samlight
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.loading import find_device, load_model
from samlight_hf.utils.messages import text_table


SCORES = ("box/single", "1 click/predicted", "1 click/oracle")
AS_TRAINED, ALSO = "as trained", "trained at this size"


def main() -> int:
    args = parse_arguments()
    result = {"command": f"python {shlex.join(sys.argv)}", "date": datetime.date.today().isoformat()}
    if args.merged:
        sources = [json.loads(path.read_text(encoding="utf-8")) for path in args.merged]
        result["from"] = [{name: value for name, value in source.items() if name != "rows"} for source in sources]
        rows = merge([source["rows"] for source in sources])
    else:
        result |= {"dataset": args.dataset, "machine": describe_machine(), "torch": torch.__version__}
        result |= {"device": str(find_device(args.device)), "time_on": args.time_on, "dtype": args.dtype}
        models = convert(args)
        if models is None:
            return 1
        scores = evaluate(models, args) if args.dataset else [{}] * len(models)
        if scores is None:
            return 1
        rows = [row_of(*model, args.time_on) | score for model, score in zip(models, scores, strict=True)]
    rows.sort(key=lambda row: (row["size"], row["bands"], row["model"]))
    print(table(rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.json.with_suffix(".png"))
    print(f"{args.json}, {args.json.with_suffix('.png')}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, help="%(default)s")
    parser.add_argument("--also", type=Path, action="append", default=[], help="a checkpoint of another size")
    parser.add_argument("--dataset", help="as for `samlight evaluate`; without it only times are measured")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--bands", nargs="+", choices=("image", "tokens"), default=["image", "tokens"])
    parser.add_argument("--limit", type=int, help="the first images")
    parser.add_argument("--max-instances", type=int, help="the first instances of each image")
    parser.add_argument("--device", default="auto", help="of the scores: cpu, cuda, ... (%(default)s)")
    parser.add_argument("--time-on", help="the device that is timed: cpu, cuda, or none (--device)")
    parser.add_argument("--dtype", default="float32", help="of the scores; times are in float32")
    parser.add_argument("--out", type=Path, default=Path("outputs/sizes"), help="models and report (%(default)s)")
    parser.add_argument("--json", type=Path, help="file of the rows (sizes.json in --out)")
    parser.add_argument(
        "--from", dest="merged", type=Path, nargs="+", metavar="JSON",
        help="measure nothing, and join the rows of earlier runs that were given the same paths of checkpoints: what a "
        "row lacks is taken from the later files",
    )  # fmt: skip
    args = parser.parse_args()
    if args.merged and args.dataset:
        parser.error("--from measures nothing: leave out either it or --dataset.")
    if args.time_on == "none" and not (args.dataset or args.merged):
        parser.error("without --dataset and with --time-on none there is nothing to measure.")
    args.time_on = args.time_on or str(find_device(args.device))
    args.json = args.json or args.out / "sizes.json"
    return args


def convert(args: argparse.Namespace) -> list[tuple[Path, str, Path]] | None:
    """Return folder, rule for its bands and checkpoint of each model; None after an error that was told."""
    models = [(args.model, AS_TRAINED, args.model)]
    size_of_model = load_model(args.model, "cpu")[0].config.vision_config.image_size
    for size in args.sizes:
        for bands in args.bands if size != size_of_model else ():
            folder = args.out / "models" / f"{size}-{bands}"
            options = ["--model", str(args.model), "--image-size", str(size), "--bands", bands, "--out", str(folder)]
            shutil.rmtree(folder, ignore_errors=True)  # the checkpoint may be another one today
            if samlight(["convert", *options]):
                return None
            models.append((folder, bands, args.model))
    return models + [(folder, ALSO, folder) for folder in args.also]


def evaluate(models: list[tuple[Path, str, Path]], args: argparse.Namespace) -> list[dict] | None:
    """Return the scores of each model, [mean, low, high] of its interval by protocol; None after an error."""
    on_cpu = find_device(args.device).type == "cpu"
    options = [option for folder, *_ in models for option in ("--model", str(folder))]
    options += ["--dataset", args.dataset, "--clicks", "1", "--no-plots", "--device", args.device]
    options += ["--batch-size", "1" if on_cpu else "4", "--num-workers", "0" if on_cpu else "4"]
    options += ["--limit", str(args.limit)] if args.limit else []
    options += ["--max-instances", str(args.max_instances)] if args.max_instances else []
    if samlight(["evaluate", *options, "--dtype", args.dtype, "--out", str(args.out)]):
        return None
    report = json.loads((args.out / "report.json").read_text(encoding="utf-8"))
    rows = []
    for entry in report["models"]:
        row = {"num_images": entry["settings"]["num_pictures"], "num_instances": entry["settings"]["num_instances"]}
        for protocol in SCORES:
            score = entry["scores"][protocol]["iou"]
            row[protocol] = [score["mean"], score["low"], score["high"]]
        rows.append(row)
    return rows


def row_of(folder: Path, bands: str, checkpoint: Path, time_on: str) -> dict:
    """Return the row of a model, under the path of its checkpoint as it was given: folders often share a name."""
    config = load_model(folder, "cpu")[0].config.vision_config
    lengths = config.segment_length if isinstance(config.segment_length, tuple | list) else [config.segment_length]
    segments = ", ".join(str(length or "all") for length in dict.fromkeys(lengths))
    row = {"size": config.image_size, "bands": bands, "model": _path_of(checkpoint), "segments": segments}
    return row if time_on == "none" else row | {"encoder_ms": encoder_ms(folder, time_on)}


def _path_of(checkpoint: Path) -> str:
    """Return the path as it was given; of the bundled checkpoint within the clone, which may be elsewhere tomorrow."""
    is_bundled = checkpoint == BUNDLED_CHECKPOINT
    return "/".join(checkpoint.parts[-2:]) if is_bundled else checkpoint.as_posix()


@torch.inference_mode()
def encoder_ms(folder: Path, device: str, num_calls: int = 3) -> float:
    """Return the least time of one image in the encoder; on a CPU, the processor time of one thread."""
    model = load_model(folder, device)[0]
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(1, 3, size, size, device=model.device)
    on_cuda, times = model.device.type == "cuda", []
    clock = time.perf_counter if on_cuda else time.process_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(num_calls + on_cuda):
        start = clock()
        model.vision_encoder(pixel_values)
        if on_cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
    torch.set_num_threads(threads)
    return 1e3 * min(times)


def merge(tables: list[list[dict]]) -> list[dict]:
    """Join the rows of the same size, bands and checkpoint; of a value that several have, the first counts."""
    rows: dict[tuple, dict] = {}
    for row in (row for own in tables for row in own):
        key = row["size"], row["bands"], row["model"]
        rows[key] = row | rows.get(key, {})
    return list(rows.values())


def table(rows: list[dict]) -> str:
    cells = [["size", "bands", "model", "segments", *SCORES, "encoder, ms"]]
    for row in rows:
        scores = [_score_text(*row[name]) if name in row else "-" for name in SCORES]
        milliseconds = f"{row['encoder_ms']:.0f}" if "encoder_ms" in row else "-"
        cells.append([str(row["size"]), row["bands"], row["model"], row["segments"], *scores, milliseconds])
    return text_table(cells, rule=True)


def _score_text(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def plot(rows: list[dict], path: Path):
    """Draw mIoU and time against the size; a value that a row lacks is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    quality, times = figure.subplots(1, 2)
    for bands, marker, line in (("image", "o", "-"), ("tokens", "s", "--"), (AS_TRAINED, "*", ""), (ALSO, "D", "")):
        own = [row for row in rows if row["bands"] == bands]
        # Lines go through the size that the model was trained at, whose bands need no rule.
        through = [row for row in rows if row["bands"] in (bands, AS_TRAINED)] if line else own
        for name, colour in zip(SCORES, ("C0", "C1", "C2")):
            label = name if line == "-" else None  # the markers are explained beside the times
            draw(quality, through, lambda row, name=name: row[name][0] if name in row else None, colour, line)
            draw(quality, own, lambda row, name=name: row[name][0] if name in row else None, colour, marker, label)
        draw(times, own, lambda row: row.get("encoder_ms"), "black", marker, fillstyle="none")
        if own:
            times.plot([], [], marker, color="black", fillstyle="none", label=bands)
    quality.set(xlabel="image size, px", ylabel="mIoU")
    times.set(xlabel="image size, px", ylabel="encoder, ms an image", yscale="log")
    sizes = sorted({row["size"] for row in rows})
    for axis in (quality, times):
        axis.set(xscale="log", xticks=sizes, xticklabels=map(str, sizes))
        axis.minorticks_off()
        if axis.lines:
            axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, columnspacing=1)
    figure.savefig(path, dpi=80)


def draw(axis, rows: list[dict], value, colour: str, style: str, label: str | None = None, **options):
    points = [(row["size"], value(row)) for row in rows if value(row) is not None]
    if points and style:
        axis.plot(*zip(*points), style, color=colour, label=label, **options)


if __name__ == "__main__":
    sys.exit(main())
