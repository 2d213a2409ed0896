"""`samlight benchmark` with two more parts, which need this repository or a dataset: times and memory, in one run.

    python benchmarks/run.py encoder peers decoder prompt resolution --out benchmarks/results/speed_h200.json
    python benchmarks/run.py everything --out benchmarks/results/everything_h100.json
    python benchmarks/run.py evaluation --dataset val-000000.tar --out benchmarks/results/evaluation_h200.json

Parts of `samlight benchmark`:

- "encoder": the image encoder, plain in every attn_implementation, compiled and optimized;
- "sustained": the same after a pause and in continuous work;
- "peers": transformers' SAM, SAM 2 and EdgeTAM, and the backbones of light SAMs;
- "decoder": the mask decoder by the number of prompts;
- "prompt": from an image to a mask;
- "resolution": full attention against dilated;
- "attention": every backend, forward and backward;
- "training": a training step;
- "equality": fast results against plain ones;
- "candidates": masks of a grid of points, chosen as in everything mode, against float32;
- "projection": ways to project into the layout in which dilation is free;
- "linear": the encoder's linear layers by every kernel;
- "head": the end of the mask decoder by every kernel;
- "profile": the encoder's kernels;
- "clicks": the clicks of an evaluation;
- "start": the first use in a process;
- "boxes": many boxes on an encoded image;
- "generation": everything mode, one image and a folder.

Further parts: "everything", everything mode and single prompts; with --dataset, "evaluation", boxes and three
clicks of `samlight evaluate`, end to end.
"""

import argparse
import sys

from samlight_hf.commands.benchmark import PART_NAMES, add_benchmark_arguments, run_benchmark_command
from samlight_hf.utils.messages import make_console_safe


def everything(settings):
    from everything import everything_rows

    yield from everything_rows(str(settings.checkpoint))


def main() -> int:
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_benchmark_arguments(parser, (*PART_NAMES, "everything", "evaluation"))
    parser.add_argument("--dataset", help="a tar of SA-1B's layout, for the part evaluation")
    args = parser.parse_args()

    def evaluation(settings):
        if not args.dataset:
            raise ValueError("the part evaluation needs --dataset, a tar of SA-1B's layout.")
        from evaluation import evaluation_rows

        yield from evaluation_rows(args.dataset, str(settings.checkpoint))

    from samlight_hf.benchmark.run import PARTS

    try:
        return run_benchmark_command(args, {**PARTS, "everything": everything, "evaluation": evaluation})
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
