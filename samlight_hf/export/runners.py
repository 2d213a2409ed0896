"""A SAM in torch and an exported one in onnxruntime behind one interface, so that they can be compared."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from .graphs import BOX_LABELS, DECODER, ENCODER
from .precision import SUFFIXES


class Runner(Protocol):
    """Encodes pixel values and decodes prompts; all coordinates are pixels of the model's input."""

    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image embeddings and positional embeddings, (B, 256, S/16, S/16) each."""

    def decode(
        self,
        embeddings: tuple[np.ndarray, np.ndarray],
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return predicted IoU (B, P, 3) and logits (B, P, 3, S/4, S/4).

        Args:
            embeddings: of `encode`.
            points, labels: (B, P, N, 2) and (B, P, N), 1 for the object and 0 for background.
            boxes: (B, P, 4).
            masks: logits (B, 1, S/4, S/4), one for each image.
        """


class TorchRunner:
    """The model itself, called as transformers documents it.

    Args:
        model: a SAM in float32 on the CPU.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embeddings = self.model.get_image_embeddings(torch.from_numpy(pixel_values))
        positions = self.model.get_image_wide_positional_embeddings()
        return embeddings.numpy(), positions.expand(len(embeddings), -1, -1, -1).numpy()

    @torch.inference_mode()
    def decode(self, embeddings, points=None, labels=None, boxes=None, masks=None):
        prompts = {"input_points": points, "input_labels": labels, "input_boxes": boxes, "input_masks": masks}
        tensors = {name: torch.from_numpy(value) for name, value in prompts.items() if value is not None}
        outputs = self.model(image_embeddings=torch.from_numpy(embeddings[0]), **tensors)
        return outputs.iou_scores.numpy(), outputs.pred_masks.numpy()


class OnnxRunner:
    """An exported folder in onnxruntime, on the CPU.

    Args:
        folder: of `export_onnx`.
        dtype: of the files to load.
        num_threads: of onnxruntime; 0 lets it choose.

    Raises:
        ValueError: where the folder has no files of this dtype.
    """

    def __init__(self, folder: str | os.PathLike, dtype: str = "fp32", num_threads: int = 0):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3  # it warns that the masks' default values are no constants
        sessions = []
        for name in (ENCODER, DECODER):
            path = Path(folder) / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx"
            if not path.is_file():
                raise ValueError(f"{path}: no such file. Export with --dtype {dtype}.")
            sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        self.encoder, self.decoder = sessions

    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embeddings, positions = self.encoder.run(None, {"pixel_values": pixel_values})
        return embeddings, positions

    def decode(self, embeddings, points=None, labels=None, boxes=None, masks=None):
        parts = [] if points is None else [(points, labels)]
        if boxes is not None:
            corners = boxes.reshape(*boxes.shape[:2], 2, 2)
            parts.append((corners, np.broadcast_to(np.array(BOX_LABELS), corners.shape[:3])))
        feeds = {
            "input_points": np.concatenate([points for points, _ in parts], axis=2).astype(np.float32),
            "input_labels": np.concatenate([labels for _, labels in parts], axis=2).astype(np.int64),
            "image_embeddings": embeddings[0],
            "image_positional_embeddings": embeddings[1],
        }
        if masks is not None:
            feeds |= {"input_masks": masks, "has_input_masks": np.ones(1, np.float32)}
        scores, logits = self.decoder.run(["iou_scores", "pred_masks"], feeds)
        return scores, logits
