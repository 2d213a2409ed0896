"""Decoded images in a folder: decoding is a third of what a training example costs, and each image comes many times."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from .dataset import decode_image
from .lazy import planes


class ImageCache:
    """Images decoded once, for all processes of a machine, each a `.npy` file of uint8 (3, H, W) named by its content.

    The operating system keeps in memory what is read often. Nothing is deleted: 5,000 images of 640 x 480 are 4.6 GB.

    Args:
        folder: made if it is not there. Several runs may share it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def pixels(self, data: bytes, size: tuple[int, int] | None) -> np.ndarray:
        """What `decode_image` makes of an image's file, uint8 (3, H, W), not to be changed.

        Raises:
            SampleError: for a file that is damaged, or of another size.
        """
        digest = hashlib.blake2b(repr(size).encode() + data, digest_size=16).hexdigest()
        path = self.folder / digest[:2] / f"{digest}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):  # the last two: cut short by a machine that went down
            pixels = planes(decode_image(data, size))
        aside = path.with_name(f".{digest}.{os.getpid()}.npy")
        try:
            path.parent.mkdir(exist_ok=True)
            np.save(aside, pixels)
            aside.replace(path)
        except OSError as error:  # full: what is not kept is decoded again
            aside.unlink(missing_ok=True)
            warnings.warn(
                f"{self.folder}: cannot be written ({error.strerror}), so images are decoded again.", stacklevel=2
            )
        return pixels
