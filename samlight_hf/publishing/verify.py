"""A folder that is to be published, loaded and run as a stranger would: by transformers alone, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from ..images.reading import open_image
from ..loading import quiet_transformers
from .checks import FolderError, check_folder
from .run_without_package import predict


SCRIPT = Path(__file__).with_name("run_without_package.py")
_IMAGE = Path(__file__).parents[2] / "examples" / "images" / "coffee.jpg"  # in a clone of the repository
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


@dataclass(frozen=True)
class VerificationReport:
    """What was verified. `outputs` are the shapes of the tensors that were equal."""

    folder: Path
    num_bytes: int
    image: str
    outputs: Mapping[str, tuple[int, ...]]
    seconds: float


def verify_folder(
    folder: str | os.PathLike, image: str | os.PathLike | None = None, timeout: float = 900
) -> VerificationReport:
    """Checks the folder (`check_folder`), then runs it on an image without this package, and compares with the package.

    Both run on the CPU in float32, on one photograph (`image`; by default one of the repository's, or a drawn scene where there is
    none): masks and scores for a box, and everything mode through transformers' pipeline. They must be equal, bit by bit. The
    other process has no network, no Hub token and an empty cache of remote code. Takes some ten seconds.

    Raises:
        FolderError: for a folder that must not be published, that does not load or run, or gives other outputs.
        ImageError: for an image that cannot be used.
    """
    start = time.monotonic()
    shown, photograph = _image(image)
    check_folder(folder)
    folder = Path(folder).expanduser().resolve()
    with tempfile.TemporaryDirectory(prefix="samlight-verify-") as place:
        theirs = _predict_without_the_package(folder, photograph, Path(place), timeout)
        with quiet_transformers():
            ours = predict(str(folder), photograph, trust_remote_code=False)
    compare_outputs(folder, shown, ours, theirs)
    return VerificationReport(
        folder=folder,
        num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        image=shown,
        outputs={name: tuple(tensor.shape) for name, tensor in sorted(ours.items())},
        seconds=time.monotonic() - start,
    )


def compare_outputs(folder: Path, image: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]):
    """Raises FolderError unless both hold the same tensors, bit by bit."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours or not torch.equal(ours[name], theirs[name]):
            raise FolderError(
                f"{folder}: {name} of {image} are not what this package computes from the same weights. "
                "The folder is not to be used."
            )


def _image(image: str | os.PathLike | None) -> tuple[str, Image.Image]:
    if image is not None or _IMAGE.is_file():
        path = Path(image or _IMAGE)
        return path.name, open_image(path)
    from ..data import SyntheticScenes  # a wheel has no photographs

    scene, _ = SyntheticScenes(1, 512).load(0)
    return "a drawn scene", scene.image


def _predict_without_the_package(
    folder: Path, image: Image.Image, place: Path, timeout: float
) -> dict[str, torch.Tensor]:
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HF_MODULES_CACHE": str(place / "modules"),
        "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    shown, out = place / "image.png", place / "outputs.safetensors"
    image.save(shown)
    # -P: the package's folder, where the script lies, is not a place to import from.
    command = [sys.executable, "-P", str(SCRIPT), str(folder), str(shown), str(out), str(torch.get_num_threads())]
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment,
            cwd=place, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FolderError(f"{folder}: did not load and run within {timeout:.0f} s in a process of its own.") from error
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise FolderError(f"{folder}: does not load and run without the package: {last}")
    return load_file(out)
