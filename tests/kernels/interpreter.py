"""Run test modules in Triton's interpreter, which runs kernels on the CPU."""

import os
import subprocess
import sys


def run_in_tritons_interpreter(module: str) -> str:
    """Return the output of `python -m module` in a new process: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
