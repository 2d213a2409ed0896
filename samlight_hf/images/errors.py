"""Errors of single images in a batch: each names its image, and takes the place of its result."""

import os

from ..utils.messages import one_line
from .reading import ImageError


# Errors that concern one image: it is damaged or unusable, its prompts are wrong, or it does not fit into memory.
IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


def check_errors(errors: str):
    """Raise ValueError unless `errors` is "return" or "raise"."""
    if errors not in ("return", "raise"):
        raise ValueError(f"errors={errors!r} must be 'return' or 'raise'.")


def error_of_image(index: int, error: Exception, image=None) -> ImageError:
    """Return the error of one image, with the image's name and without stack frames.

    Args:
        index: the image's number in the batch, from 0.
        error: raised for the image.
        image: as the caller passed it; a path is named in the message.
    """
    message, name = one_line(error), f"image {index}"
    if not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    if isinstance(image, str | os.PathLike) and not message.startswith(os.fspath(image)):
        name = f"{name}, {os.fspath(image)}"
    return ImageError(f"{name}: {message}")
