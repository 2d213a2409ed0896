"""Verification of a folder before it is published: loaded and run with transformers alone, in a separate process."""

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
_IMAGE = Path(__file__).parents[2] / "examples" / "images" / "coffee.jpg"  # only in a clone of the repository
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


@dataclass(frozen=True)
class VerificationReport:
    """Result of `verify_folder`.

    Attributes:
        folder: Absolute path of the folder.
        num_bytes: Size of its files.
        image: Name of the image that was segmented.
        outputs: Shapes of the compared tensors, by their names.
        seconds: Duration of the verification.
    """

    folder: Path
    num_bytes: int
    image: str
    outputs: Mapping[str, tuple[int, ...]]
    seconds: float


def verify_folder(
    folder: str | os.PathLike, image: str | os.PathLike | None = None, timeout: float = 900
) -> VerificationReport:
    """Check a folder, run it on an image without this package, and compare the outputs with those of the package.

    After `check_folder`, both run on the CPU in float32: masks and scores for a box, and transformers' mask-generation
    pipeline. The outputs must be equal bit by bit. The other process has no network, no Hub token and an empty cache of
    remote code. Takes about ten seconds.

    Args:
        folder: Folder made by `build_folder`.
        image: Image file. Default: a photograph of the repository or, in an installed package, a synthetic scene.
        timeout: Seconds that the other process may take.

    Raises:
        FolderError: For a folder that must not be published, does not load or run, or gives other outputs.
        ImageError: For an image that cannot be used.
    """
    start = time.monotonic()
    image_name, test_image = _test_image(image)
    check_folder(folder)
    folder = Path(folder).expanduser().resolve()
    with tempfile.TemporaryDirectory(prefix="samlight-verify-") as workspace:
        actual = _predict_without_package(folder, test_image, Path(workspace), timeout)
        with quiet_transformers():
            expected = predict(str(folder), test_image, trust_remote_code=False)
    compare_outputs(folder, image_name, expected, actual)
    return VerificationReport(
        folder=folder,
        num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        image=image_name,
        outputs={name: tuple(tensor.shape) for name, tensor in sorted(expected.items())},
        seconds=time.monotonic() - start,
    )


def compare_outputs(folder: Path, image: str, expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]):
    """Raise FolderError unless both hold the same tensors, bit by bit. `folder` and `image` are for the message."""
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual or name not in expected or not torch.equal(expected[name], actual[name]):
            raise FolderError(
                f"{folder}: {name} of {image} are not what this package computes from the same weights. "
                "The folder is not to be used."
            )


def _test_image(image: str | os.PathLike | None) -> tuple[str, Image.Image]:
    if image is not None or _IMAGE.is_file():
        path = Path(image or _IMAGE)
        return path.name, open_image(path)
    from ..data import SyntheticScenes  # an installed package has no photographs

    scene, _ = SyntheticScenes(1, 512).load(0)
    return "a drawn scene", scene.image


def _predict_without_package(
    folder: Path, image: Image.Image, workspace: Path, timeout: float
) -> dict[str, torch.Tensor]:
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(workspace / "home"), "HF_MODULES_CACHE": str(workspace / "modules"),
        "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    image_path, outputs_path = workspace / "image.png", workspace / "outputs.safetensors"
    image.save(image_path)
    # -P keeps the script's folder, which is part of the package, out of sys.path.
    command = [
        sys.executable, "-P", str(SCRIPT), str(folder), str(image_path), str(outputs_path),
        str(torch.get_num_threads()),
    ]  # fmt: skip
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment,
            cwd=workspace, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FolderError(f"{folder}: did not load and run within {timeout:.0f} s in a process of its own.") from error
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise FolderError(f"{folder}: does not load and run without the package: {last}")
    return load_file(outputs_path)
