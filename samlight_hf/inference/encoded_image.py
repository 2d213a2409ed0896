"""One image after the image encoder, as a value: encoded once, prompted often, by whoever has it."""

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.upscaled_masks import Frame
from ..utils.turns import read_here


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What `Predictor.encode` makes of an image. It is never changed: any number of threads may prompt it at once.

    It goes with the model that made it, on that model's device, and can be pickled.

    Attributes:
        embedding: as the model's mask decoder reads it: image tokens (1, N, C), or (1, C, h, w) for decoders of other builds.
        size: (height, width) of the image.
        resized: (height, width) of the image in the model's input, at its top and left.
        padded: (height, width) of the model's input.
    """

    embedding: torch.Tensor
    size: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]

    @property
    def scale(self) -> np.ndarray:
        """From pixels of the image to those of the model's input, float32 (4,): of x, y, x, y."""
        (height, width), (new_height, new_width) = self.size, self.resized
        return np.array([new_width / width, new_height / height] * 2, dtype=np.float32)

    @property
    def frame(self) -> Frame:
        """Where a decoder's logits lie in the image."""
        return Frame(self.padded, self.resized, self.size, (0, 0), self.size)

    def read(self) -> torch.Tensor:
        """The embedding, for kernels of the current stream, which need not be the one that it was made on."""
        return read_here(self.embedding)
