"""Run an example script in the process of the tests: starting Python and importing torch takes longer than it does."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments) -> subprocess.CompletedProcess:
    """Run examples/NAME with these arguments, and return its exit status and output as `subprocess.run` does."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    command = [str(ROOT / "examples" / name), *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        contextlib.chdir(ROOT),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return subprocess.CompletedProcess(command, status, stdout.getvalue(), stderr.getvalue())
