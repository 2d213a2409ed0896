r"""Compare settings of a distillation: train with each of them, with the same budget and several seeds.

    python examples/distill.py && python examples/ablation.py     # the layer weights of the demonstration, on a CPU
    python examples/ablation.py --config examples/configs/sa1b_vit_b.yaml --seeds 0 1 2
    python examples/ablation.py --config examples/configs/bsds_student.yaml \
        --variants examples/configs/bsds_ablation.yaml ...

By default, dynamic, uniform and output-only layer weights are compared: the encoder stage of a config with each of
them, followed by the decoder stage. A YAML file of variants has a name for each, with the options of `samlight distill`
that differ from those of the command line. Mean and standard deviation over seeds are printed for each metric of the
evaluation. Finished runs are kept: the command can be interrupted and started again. The students are in
OUT/VARIANT-SEED/student, where `samlight evaluate` can compare them.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from samlight_hf.distillation import distill, parse_arguments
from samlight_hf.utils.atomic_files import atomic_write, read_yaml
from samlight_hf.utils.messages import make_console_safe, one_line
from samlight_hf.utils.processes import is_main_process, leave_process_group, one_voice


SCHEDULES = ("dynamic", "uniform", "output_only")


def main():
    make_console_safe()
    with one_voice():
        options, distill_options = make_parser().parse_known_args()
    variants = {schedule: f"--layer-weights {schedule}" for schedule in SCHEDULES}
    if options.variants:
        variants = read_variants(options.variants)
    shared = ["--config", options.config, "--stages", *options.stages, *distill_options]
    shared += ["--resume", "--disable-tqdm", "true", "--logging-steps", "100"]
    results = {name: [] for name in variants}
    for seed in options.seeds:
        for name, arguments in variants.items():
            folder = options.out / f"{name}-{seed}"
            own = ["--output-dir", str(folder), "--seed", str(seed)]
            run, stages = parse_arguments([*shared, *shlex.split(arguments), *own])
            distill(run, stages)
            if is_main_process():
                results[name].append({"seed": seed, "stages": read_metrics(folder, run.stages)})
                content = {"shared": shared, "variants": variants, "results": results}
                write_json(options.out / "ablation.json", content)
    if is_main_process():
        print_table(results)
    leave_process_group()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs/demo.yaml"))
    parser.add_argument("--stages", nargs="+", default=["encoder", "decoder"])
    parser.add_argument("--variants", help="a YAML file; by default the layer weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    return parser


def read_variants(path: str) -> dict[str, str]:
    """Return the options of each variant by its name. Raises ValueError for a file of another form."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(value, str | None) for value in content.values()):
        raise ValueError(
            f"{path}: must hold a name and options of each variant, such as uniform: --layer-weights uniform."
        )
    return {str(name): arguments or "" for name, arguments in content.items()}


def read_metrics(folder: Path, stages: list[str]) -> dict[str, dict]:
    """Return the metrics of a finished run by stage."""
    results = {stage: (folder / stage / "result.json").read_text(encoding="utf-8") for stage in stages}
    return {stage: json.loads(text)["metrics"] for stage, text in results.items()}


def write_json(path: Path, content: dict):
    text = json.dumps(content, indent=1) + "\n"
    atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def print_table(results: dict[str, list[dict]]):
    """Print each metric of each stage: mean and standard deviation over seeds, and the values."""
    metrics = [
        (stage, name) for runs in results.values() for stage, values in runs[0]["stages"].items() for name in values
    ]
    width = max(map(len, results))
    for stage, name in dict.fromkeys(metrics):
        if name == "epoch":
            continue
        print(f"{stage}: {name.removeprefix('eval_')}")
        for variant, runs in results.items():
            values = [run["stages"][stage][name] for run in runs if name in run["stages"].get(stage, {})]
            if not values:
                continue
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            listed = ", ".join(f"{value:.4f}" for value in values)
            print(f"  {variant:{width}} {statistics.mean(values):.4f} ± {deviation:.4f}   ({listed})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
