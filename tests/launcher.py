"""Scripts on several processes of this machine, as `accelerate launch` would start them."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def torchrun(script: Path, num_ranks: int, *arguments, cuda: bool = False) -> str:
    """What the script prints on `num_ranks` processes, all of which must succeed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_ranks),
        script,
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    process = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
