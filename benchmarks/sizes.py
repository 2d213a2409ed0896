"""mIoU and time of one checkpoint at several image sizes: a table and a plot.

    python benchmarks/sizes.py --dataset val.tar --sizes 256 384 512 768 1024 1536 --bands image tokens --out report/

The checkpoint is converted to each size (`samlight convert`), without any training, and evaluated by `samlight
evaluate`, whose report stays in `--out`; a second run with the same options goes on from there. The time of the image
encoder, batch 1, is the least of three: on a CPU, seconds of one core, which other processes do not change much. A
checkpoint that was trained at one of the sizes is given by `--also DIR`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from samlight_hf.commands.cli import main as samlight
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.loading import load_model
from samlight_hf.utils.messages import text_table


SCORES = ("box/single", "1 click/predicted", "1 click/oracle")


def main() -> int:
    args = parse_arguments()
    models = {str(args.model): args.model}
    size_of_model = load_model(args.model, "cpu")[0].config.vision_config.image_size
    for size in args.sizes:
        for bands in args.bands if size != size_of_model else ():
            folder = args.out / "models" / f"{size}-{bands}"
            options = ["--model", str(args.model), "--image-size", str(size), "--bands", bands, "--out", str(folder)]
            if not folder.exists() and samlight(["convert", *options]):
                return 1
            models[str(folder)] = folder
    models |= {str(folder): folder for folder in args.also}
    options = [option for folder in models.values() for option in ("--model", str(folder))]
    options += ["--dataset", args.dataset, "--clicks", "1", "--batch-size", "1", "--num-workers", "0", "--no-plots"]
    options += ["--limit", str(args.limit)] if args.limit else []
    options += ["--max-instances", str(args.max_instances)] if args.max_instances else []
    if samlight(["evaluate", *options, "--dtype", args.dtype, "--out", str(args.out)]):
        return 1
    report = json.loads((args.out / "report.json").read_text(encoding="utf-8"))
    rows = [row_of(folder, entry) for folder, entry in zip(models.values(), report["models"], strict=True)]
    rows.sort(key=lambda row: (row["size"], row["bands"]))
    print_table(rows)
    (args.out / "sizes.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.out / "sizes.png")
    print(f"{args.out / 'sizes.png'}: {sys.argv[0]} on {report['models'][0]['settings']['device']}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, help="%(default)s")
    parser.add_argument("--also", type=Path, action="append", default=[], help="a checkpoint of another size")
    parser.add_argument("--dataset", required=True, help="as for `samlight evaluate`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--bands", nargs="+", choices=("image", "tokens"), default=["image", "tokens"])
    parser.add_argument("--limit", type=int, help="the first images")
    parser.add_argument("--max-instances", type=int, help="the first instances of each image")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("outputs/sizes"))
    return parser.parse_args()


def row_of(folder: Path, entry: dict) -> dict:
    config = load_model(folder, "cpu")[0].config.vision_config
    scores = entry["scores"]
    name = folder.name.rpartition("-")[2]
    row = {"size": config.image_size, "bands": name if name in ("image", "tokens") else "as trained"}
    row["segments"] = ", ".join(str(length or "all") for length in dict.fromkeys(config.segment_length))
    row["encoder_ms"] = encoder_ms(folder)
    for protocol in SCORES:
        score = scores[protocol]["iou"] if "iou" in scores[protocol] else scores[protocol]
        row[protocol] = [score["mean"], score["low"], score["high"]]
    return row


@torch.inference_mode()
def encoder_ms(folder: Path, num_calls: int = 3) -> float:
    """Return the least time of one image in the encoder, on the device that `samlight evaluate` takes."""
    model = load_model(folder)[0]
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


def print_table(rows: list[dict]):
    table = [["size", "bands", "segments", *SCORES, "encoder, ms"]]
    for row in rows:
        scores = [f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "") for mean, low, high in
                  (row[name] for name in SCORES)]  # fmt: skip
        table.append([str(row["size"]), row["bands"], row["segments"], *scores, f"{row['encoder_ms']:.0f}"])
    print(text_table(table, rule=True))


def plot(rows: list[dict], path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    quality, time = figure.subplots(1, 2)
    for bands, marker in (("image", "o"), ("tokens", "s"), ("as trained", "*")):
        own = [row for row in rows if row["bands"] == bands]
        for name, colour in zip(SCORES, ("C0", "C1", "C2")):
            label = f"{name}, bands: {bands}"
            line = "" if bands == "as trained" else "-" if bands == "image" else "--"
            quality.plot([row["size"] for row in own], [row[name][0] for row in own], marker + line, color=colour,
                         label=label)  # fmt: skip
        time.plot([row["size"] for row in own], [row["encoder_ms"] for row in own], marker, label=bands)
    quality.set(xlabel="image size, px", ylabel="mIoU")
    quality.legend(fontsize="xx-small")
    time.set(xlabel="image size, px", ylabel="encoder, ms an image", yscale="log")
    time.legend(fontsize="xx-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
