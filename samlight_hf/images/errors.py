"""The error of one image among many: it names the image, and stands where its result would."""

import os

from ..utils.messages import one_line
from .reading import ImageError


# What concerns one image: it is damaged or cannot be used, its prompts are wrong, or it does not fit into memory.
IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


def check_errors(errors: str):
    """Raises ValueError for what is no way to tell errors."""
    if errors not in ("return", "raise"):
        raise ValueError(f"errors={errors!r} must be 'return' or 'raise'.")


def error_of_image(place: int, error: Exception, image=None) -> ImageError:
    """The error as that of image number `place`, counted from 0; of a path, that is named too. It holds no stack frames."""
    message, name = one_line(error), f"image {place}"
    if not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    if isinstance(image, str | os.PathLike) and not message.startswith(os.fspath(image)):
        name = f"{name}, {os.fspath(image)}"
    return ImageError(f"{name}: {message}")
