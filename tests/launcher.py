"""Start of scripts on several processes of this machine, as `accelerate launch` does it."""

import atexit
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
TWO_GPUS = (
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs two CUDA devices, and torch sees {torch.cuda.device_count()}"
    ),
)
_ENDED = "process {rank} ended, in a group: {in_group}"


def backends(*marks_of_gloo):
    """Return the values of a test's parameter `backend`: gloo on two CPU processes, and nccl on two GPUs."""
    return [pytest.param("gloo", marks=marks_of_gloo), pytest.param("nccl", marks=TWO_GPUS)]


def main(script: str, *arguments: str):
    """Run a script as `__main__`, and print at its end whether it has left the process group."""

    def tell_end():  # with the end of the line in the same write, or lines of two processes could become one
        in_group = torch.distributed.is_initialized()
        print(_ENDED.format(rank=os.environ["RANK"], in_group=in_group) + "\n", end="", flush=True)

    atexit.register(tell_end)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def launch(script: Path, num_ranks: int, *arguments, cuda: bool = False) -> subprocess.Popen:
    """Start a script on `num_ranks` processes, with its output in pipes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_ranks),
        __file__,
        script,
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*map(str, command), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)


def output_of(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for a process of `launch` and return what it printed to stdout and stderr."""
    try:
        return process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def torchrun(script: Path, num_ranks: int, *arguments, cuda: bool = False) -> str:
    """Return the output of a script on `num_ranks` processes, all of which must succeed and leave their group."""
    process = launch(script, num_ranks, *arguments, cuda=cuda)
    printed, complaints = output_of(process)
    assert process.returncode == 0, complaints[-3000:]
    for rank in range(num_ranks):
        ended = _ENDED.format(rank=rank, in_group=False) + "\n"
        assert printed.count(ended) == 1, printed
        printed = printed.replace(ended, "")
    return printed


if __name__ == "__main__":
    main(*sys.argv[1:])
