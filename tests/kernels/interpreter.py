"""Triton's interpreter, which runs kernels on the CPU."""

import os
import subprocess
import sys


def run_in_tritons_interpreter(module: str) -> str:
    """What `python -m module` prints, in a process of its own, since Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
