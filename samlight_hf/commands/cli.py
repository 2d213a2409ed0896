"""The command `samlight`. Its subcommands import models and data sets only when they run."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from safetensors import SafetensorError

from .. import __version__
from ..utils.messages import log_to_stderr, make_console_safe, one_line
from ..utils.processes import one_voice, tell_error
from ..utils.termination import Terminated, sigterm_interrupts
from . import app as app_command
from . import benchmark as benchmark_command
from . import convert, demo, distill
from . import evaluate as evaluate_command
from . import export as export_command
from . import publish as hub_command
from . import segment as segment_command


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        name: the word after `samlight`.
        summary: one line for the help.
        add_arguments: adds the options to a parser.
        run: takes the parsed arguments and returns the exit status. Heavy imports belong inside it. An exception
            becomes one line on stderr: argparse.ArgumentTypeError means wrong usage (status 2), others status 1.
        parses_itself: `run` parses the arguments, options included, which it gets as the list `arguments`.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    parses_itself: bool = False


COMMANDS = (
    Command(
        "segment",
        "draw the masks of images: of everything, or for boxes and points",
        segment_command.add_segment_arguments,
        segment_command.run_segment,
    ),
    Command(
        "app",
        "a page in the browser: click on objects, keep and download their masks",
        app_command.add_app_arguments,
        app_command.run_app,
    ),
    Command(
        "demo",
        "segment the example images with the bundled checkpoint (from a clone of the repository)",
        demo.add_demo_arguments,
        demo.run_demo,
    ),
    Command(
        "evaluate",
        "mIoU for boxes and clicks, AP, AR and fidelity to a teacher, of several models side by side",
        evaluate_command.add_evaluate_arguments,
        evaluate_command.run_evaluate,
    ),
    Command(
        "distill",
        "train a SAM-Lightening from any SAM; without options, a demonstration of three minutes",
        distill.add_distill_arguments,
        distill.run_distill,
        parses_itself=True,
    ),
    Command(
        "convert",
        "a checkpoint for another image size, or from an original .pth file",
        convert.add_convert_arguments,
        convert.run_convert,
    ),
    Command(
        "export",
        "write ONNX files for onnxruntime and transformers.js, in float32, float16 or int8, and check them",
        export_command.add_export_arguments,
        export_command.run_export,
    ),
    Command(
        "publish",
        "build a folder that loads anywhere, verify it, and upload it to the Hub in one commit",
        hub_command.add_publish_arguments,
        hub_command.run_publish,
    ),
    Command(
        "card",
        "write a checkpoint's model card from its config, training and evaluation",
        hub_command.add_card_arguments,
        hub_command.run_card,
    ),
    Command(
        "benchmark",
        "time and memory of the model beside its peers, in one run",
        benchmark_command.add_benchmark_arguments,
        benchmark_command.run_benchmark_command,
    ),
)


class _Parser(argparse.ArgumentParser):
    """A parser that tells wrong usage in one line; subparsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"samlight: error: {message.rstrip('.')}. `{self.prog} --help` lists what it takes.\n")

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # told here, since argparse names the outer parser, which has no options
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="samlight", description="SAM-Lightening: Segment Anything with dilated flash attention.")
    parser.add_argument("--version", action="version", version=f"samlight {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        # With a prefix that no option has, argparse takes all options, --help too, for plain arguments.
        prefix, add_help = ("\0", False) if command.parses_itself else ("-", True)
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary, prefix_chars=prefix, add_help=add_help
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `samlight ARGUMENTS`.

    An error is reported in one line on stderr. The environment variable SAMLIGHT_DEBUG adds its traceback.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit status. 0: done. 1: nothing succeeded. 2: wrong usage. 130: interrupted. 143: ended by SIGTERM.
    """
    make_console_safe()
    try:
        with log_to_stderr("samlight: "):
            with sigterm_interrupts():
                status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error can still be reported
        return status
    except Terminated as error:
        return _fail("ended by SIGTERM.", error.status)
    except KeyboardInterrupt:
        return _fail("interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout, such as `head`, has left. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except argparse.ArgumentTypeError as error:
        return _fail(f"error: {one_line(error)}", EXIT_USAGE)
    except (ValueError, OSError, RuntimeError, MemoryError, SafetensorError) as error:  # the last: a full disk, say
        return _fail(f"error: {one_line(error)}", EXIT_FAILED)
    except Exception as error:  # a bug: users get a line that they can report
        message = f"internal error: {type(error).__name__}: {one_line(error)} (SAMLIGHT_DEBUG=1 shows where)"
        return _fail(message, EXIT_FAILED)


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with one_voice():
            parsed = build_parser().parse_args(_join_negative_values(arguments))
    except SystemExit as exit_request:  # after --help, and after wrong usage
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_OK
    parsed.command_line = shlex.join(["samlight", *arguments])
    return parsed.run(parsed)


def _join_negative_values(arguments: list[str]) -> list[str]:
    """Join `--box -5,0,9,9` to `--box=-5,0,9,9`: argparse would take the box for an option and report that instead."""
    joined: list[str] = []
    for argument in arguments:
        if (
            joined
            and joined[-1] in ("--box", "--point", "--points")
            and argument[:1] == "-"
            and argument[1:2].isdigit()
        ):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _fail(message: str, status: int) -> int:
    if os.environ.get("SAMLIGHT_DEBUG"):
        traceback.print_exc()
    tell_error(f"samlight: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main())
