"""The model of all sessions, on threads of its own."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.preprocessing import image_tensor
from ..inference.crops import MaskGenerationSettings
from ..inference.encoded_image import EncodedImage
from ..inference.mask_generation import MaskGenerator
from ..inference.predictor import Predictor
from ..masks.results import GeneratedMasks
from ..masks.rle import RunLengthMasks
from .state import Candidates, Prompt


# Of the model: clicks of more users wait. Two decode while one encodes.
MODEL_THREADS = 2


class Segmenter:
    """The model of all sessions: one predictor and one mask generator, which threads may share.

    Args:
        model: A SAM of transformers or a `SamLighteningModel`, on its device.
        processor: The model's processor.
        max_memory_mb: The memory that a CUDA device may allocate, see `Predictor`.
    """

    def __init__(self, model, processor, max_memory_mb: float = 1500):
        self.predictor = Predictor(model, processor, max_memory_mb=max_memory_mb)
        self.generator = MaskGenerator(model, processor, max_memory_mb=max_memory_mb)
        self.device = model.device
        # Threads of its own: each keeps memory that it has used, so that the many threads of a server would keep much.
        self._threads = ThreadPoolExecutor(MODEL_THREADS, thread_name_prefix="samlight-clicks")
        self._everything = ThreadPoolExecutor(1, thread_name_prefix="samlight-everything")

    def encode(self, image: Image.Image) -> EncodedImage:
        """Encode an image, and wait until the device has done it."""

        def run() -> EncodedImage:
            encoded = self.predictor.encode(image)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return encoded

        return self._threads.submit(run).result()

    def candidates(self, prompt: Prompt, feedback: np.ndarray | None, encoded: EncodedImage) -> Candidates:
        """Return three masks for a prompt, and before them one for the whole prompt where that is unambiguous.

        Args:
            prompt: Points, a box, or both.
            feedback: Logits (h, w) to refine.
            encoded: The image.
        """
        arguments: dict[str, Any] = {
            "points_xy": [[point[:2] for point in prompt.points]] if prompt.points else None,
            "labels": [[point[2] for point in prompt.points]] if prompt.points else None,
            "boxes_xyxy": None if prompt.box_xyxy is None else [prompt.box_xyxy],
            "logits": None if feedback is None else feedback[None],
            "image": encoded,
        }

        def run() -> Candidates:
            parts, titles = [self.predictor.predict(**arguments, multimask_output=True)], []
            if len(prompt.points) > 1 or prompt.box_xyxy is not None:
                parts.insert(0, self.predictor.predict(**arguments, multimask_output=False))
                titles.append("one mask")
            masks, scores, logits = (
                np.concatenate([getattr(part, name)[0] for part in parts]) for name in ("masks", "scores", "logits")
            )
            titles += [f"candidate {number}" for number in range(1, len(masks) - len(titles) + 1)]
            suggested = 0 if len(parts) > 1 else int(scores.argmax())
            return Candidates(RunLengthMasks.from_masks(masks), scores, logits, tuple(titles), suggested)

        return self._threads.submit(run).result()

    def everything(
        self, image: Image.Image, encoded: EncodedImage, settings: MaskGenerationSettings, progress
    ) -> GeneratedMasks:
        """Segment everything in an image that is encoded, see `MaskGenerator.generate`."""
        generate = self.generator.generate
        return self._everything.submit(lambda: generate(image_tensor(image), settings, progress, encoded)).result()
