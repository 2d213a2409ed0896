"""Cache decoded images in a folder: decoding is a third of the cost of a training example, and images repeat."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from .dataset import decode_image
from .lazy import planes


class ImageCache:
    """Cache of decoded images, shared by all processes of a machine.

    Each image is a `.npy` file, uint8 (3, H, W), named by a hash of the image file. Files are memory-mapped: the
    operating system keeps those read often in memory. Nothing is deleted; 5,000 images of 640 x 480 take 4.6 GB.

    Args:
        folder: created if it does not exist. Several runs may share it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def pixels(self, data: bytes, size: tuple[int, int] | None, upright: bool = False) -> np.ndarray:
        """Return the decoded image, from the cache if it is there.

        Args:
            data: the bytes of the image file.
            size: (width, height) of the annotated image in pixels, or None: see `decode_image`.
            upright: see `decode_image`.

        Returns:
            uint8 (3, H, W), which must not be changed.

        Raises:
            SampleError: if the file is damaged or has another size.
        """
        digest = hashlib.blake2b((repr(size) + "upright" * upright).encode() + data, digest_size=16).hexdigest()
        path = self.folder / digest[:2] / f"{digest}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):  # the last two: a file truncated by a crash
            pixels = planes(decode_image(data, size, upright))
        aside = path.with_name(f".{digest}.{os.getpid()}.npy")
        try:
            path.parent.mkdir(exist_ok=True)
            np.save(aside, pixels)
            aside.replace(path)
        except OSError as error:  # for example a full disk: the image is decoded again next time
            aside.unlink(missing_ok=True)
            warnings.warn(
                f"{self.folder}: cannot be written ({error.strerror}), so images are decoded again.", stacklevel=2
            )
        return pixels
