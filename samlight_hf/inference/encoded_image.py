"""An image after the image encoder, as a value: encoded once, prompted any number of times, from any thread."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..kernels.upscaled_masks import Frame
from ..utils.reprs import ShortRepr
from ..utils.turns import read_here


@dataclass(frozen=True, eq=False, repr=False)
class EncodedImage(ShortRepr):
    """An image that `Predictor.encode` has encoded, to be given to `Predictor.predict` as `image`.

    It never changes, so any number of threads may prompt it at once. It belongs to the model that encoded it and to
    that model's device, and can be pickled.

    Attributes:
        embedding: The image embedding in the layout of the model's mask decoder: image tokens (1, N, C), or (1, C, h,
            w) for models that run their own decoder.
        size: (height, width) of the image in pixels.
        resized: (height, width) of the image inside the model's input, at its top left corner.
        padded: (height, width) of the model's input.

    Example:
        >>> image = predictor.encode("photo.jpg")
        >>> height, width = image.size
        >>> prediction = predictor.predict(boxes_xyxy=[(0, 0, width / 2, height)], image=image)
    """

    embedding: torch.Tensor
    size: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]

    @cached_property
    def scale(self) -> np.ndarray:
        """The factors from pixels of the image to pixels of the model's input, float32 (4,), for x, y, x, y."""
        (height, width), (new_height, new_width) = self.size, self.resized
        return np.array([new_width / width, new_height / height] * 2, dtype=np.float32)

    @cached_property
    def frame(self) -> Frame:
        """The place of the decoder's logits in the image."""
        return Frame(self.padded, self.resized, self.size, (0, 0), self.size)

    def read(self) -> torch.Tensor:
        """Return the embedding for kernels of the current stream, which may differ from the stream that wrote it."""
        return read_here(self.embedding)
