"""`samlight distill`: train a SAM-Lightening from any SAM, in stages."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.json_files import read_json
from ..utils.messages import one_line
from ..utils.processes import is_main_process, leave_process_group, lost_process, one_voice, tell
from ..utils.termination import exit_status, explained_end
from .options import EXAMPLE_CONFIGS, missing_package


if TYPE_CHECKING:
    from ..distillation import DistillationArguments, RunArguments


# The folder with the settings of the demonstration. examples/distill.py sets it to the one beside itself.
CONFIGS = EXAMPLE_CONFIGS


def add_distill_arguments(parser: argparse.ArgumentParser):
    """Take all arguments unparsed: to list the options, transformers' Trainer must be imported."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run_distill(args: argparse.Namespace) -> int:
    """Train the student and print the metrics of each stage; without arguments, run the demonstration.

    Returns:
        The exit status: 0, or `exit_status` of an interrupt.

    Raises:
        ArgumentTypeError: for wrong options and settings, and where packages of the `train` extra are missing.
        ValueError, RuntimeError, OSError: for models and data that cannot be used.
    """
    try:
        import accelerate  # noqa: F401  (first, because transformers' own error does not name it)
        import matplotlib  # noqa: F401  (which draws the curves at the end)

        return _distill(args.arguments) if args.arguments else _demonstrate()
    except KeyboardInterrupt as interrupt:
        how = " with --resume" if args.arguments else ""  # the demonstration resumes by itself
        tell(f"samlight: stopped: the same command{how} goes on from the last checkpoint.", file=sys.stderr)
        return exit_status(interrupt)
    except ImportError as error:
        raise missing_package(error, "training", "train") from error


def _distill(arguments: Sequence[str]) -> int:
    from ..distillation import parse_arguments

    try:
        with one_voice():
            run, stages = parse_arguments(list(arguments), prog="samlight distill")
    except SystemExit:  # after --help
        return 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    student = _train(run, stages)
    if is_main_process():
        _print_metrics(stages)
        print(f"The student: {student}")
    leave_process_group()
    return 0


def _train(run: "RunArguments", stages: "Sequence[DistillationArguments]") -> Path:
    """Run the stages. An error during a training says from which checkpoint it goes on."""
    from ..distillation import CheckpointNotSavedError, TrainingDivergedError, distill

    def advice() -> str:
        return _how_to_go_on(stages)

    with explained_end(advice):
        try:
            return distill(run, stages)
        except (CheckpointNotSavedError, TrainingDivergedError):
            raise  # they say themselves how to go on
        except (RuntimeError, OSError, MemoryError) as error:
            message = one_line(error)
            if lost_process(error) or "--resume" in message:
                raise  # with the advice, or because it gives one itself
            raise RuntimeError(f"{message.rstrip('.')}. {advice()}") from error


def _how_to_go_on(stages: "Sequence[DistillationArguments]") -> str:
    from ..distillation.checkpoints import last_checkpoint

    checkpoints = [checkpoint for args in stages if (checkpoint := last_checkpoint(args.output_dir))]
    if not checkpoints:
        return "No checkpoint had been saved."
    return f"The last whole checkpoint is {checkpoints[-1]}: the same command with --resume goes on from it."


def _demonstrate() -> int:
    from ..distillation import demonstrate

    teacher, student = CONFIGS / "demo_teacher.yaml", CONFIGS / "demo.yaml"
    if not teacher.is_file() or not student.is_file():
        raise argparse.ArgumentTypeError(
            f"the demonstration's settings are not here ({CONFIGS}). Run it from a clone of the repository, or give "
            "--config or other options: samlight distill --help lists them."
        )
    demonstrate(teacher, student)
    leave_process_group()
    return 0


def _print_metrics(stages: "Sequence[DistillationArguments]"):
    for args in stages:
        metrics = read_json(Path(args.output_dir, "result.json"), dict)["metrics"]
        if metrics:
            print(args.stage, json.dumps(metrics))
