"""What the layer weights of the encoder stage are worth: the same student, with the same budget, by each schedule and several seeds.

    python examples/distill.py && python examples/ablation.py     # the demonstration's teacher and student, on a CPU
    python examples/ablation.py --config examples/configs/sa1b_vit_b.yaml --seeds 0 1 2

Trains the stage "encoder" of a config with dynamic, uniform and output-only weights, then the decoder stage on each, and prints
mean and spread over seeds of what the evaluation measures. Finished runs are kept: the command can be interrupted.
"""

import argparse
import json
import statistics
from pathlib import Path

from samlight_hf.distillation import distill, parse_arguments
from samlight_hf.files import write_aside


SCHEDULES = ("dynamic", "uniform", "output_only")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs/demo.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=["encoder", "decoder"])
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    options, more = parser.parse_known_args()
    results = {schedule: [] for schedule in SCHEDULES}
    for seed in options.seeds:
        for schedule in SCHEDULES:
            folder = options.out / f"{schedule}-{seed}"
            arguments = [
                "--config", options.config, "--stages", *options.stages, "--output_dir", str(folder), "--resume", "--seed", str(seed),
                "--layer_weights", schedule, "--disable_tqdm", "true", "--logging_steps", "100", *more,
            ]  # fmt: skip
            distill(*parse_arguments(arguments))
            stages = {
                stage: json.loads((folder / stage / "result.json").read_text())["metrics"] for stage in options.stages
            }
            results[schedule].append({"seed": seed, "stages": stages})
            text = json.dumps({"config": options.config, "options": more, "results": results}, indent=1)
            write_aside(
                options.out / "ablation.json", lambda path, text=text: path.write_text(text + "\n", encoding="utf-8")
            )
    print_table(results)


def print_table(results: dict[str, list[dict]]):
    stages = results[SCHEDULES[0]][0]["stages"]
    columns = [(stage, name) for stage, metrics in stages.items() for name in metrics if name != "epoch"]
    for stage, name in columns:
        print(f"{stage}: {name.removeprefix('eval_')}")
        for schedule, runs in results.items():
            values = [run["stages"][stage][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            listed = ", ".join(f"{value:.4f}" for value in values)
            print(f"  {schedule:12} {statistics.mean(values):.4f} ± {spread:.4f}   ({listed})")


if __name__ == "__main__":
    main()
