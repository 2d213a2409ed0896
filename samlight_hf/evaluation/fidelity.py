"""Agreement of a student with its teacher: embeddings, layers and masks. It needs annotations only as prompts."""

import statistics
from typing import Any

import torch

from ..data import Sample
from ..data.clicks import deepest_point
from ..masks.boxes import xywh_to_xyxy
from .metrics.mask_iou.iou import mask_iou
from .models import Encoded, PromptableModel
from .protocols import check_max_instances, select
from .tasks import EvaluationTask


class Fidelity(EvaluationTask):
    """A task that compares the evaluated student with `teacher` on the same images and prompts.

    It returns one record for each image: {"picture", "cosine": of the image embeddings, mean over positions, "mse",
    "layers": {"student layer i ~ teacher layer j": linear CKA of their tokens}, "mask_iou": {"box/single": [IoU of the
    two models' masks for each instance], "1 click/predicted": [...]}}.

    Layers of different widths have no cosine; linear CKA (Kornblith et al., ICML 2019) compares them up to rotation and
    scale, 1 being equal. Student layer i of n is matched to teacher layer round(i * m / n) of m.

    Args:
        teacher: the teacher.
        max_instances: number of instances of an image that are prompted at most.

    Raises:
        ValueError: for a teacher whose image embeddings have another shape, and for `max_instances` below 1.
    """

    def __init__(self, teacher: PromptableModel, max_instances: int | None = None):
        check_max_instances(max_instances)
        self.teacher, self.max_instances = teacher, max_instances

    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        assert encoded is not None
        (teacher_encoded,) = self.teacher.encode([sample.image])
        student_embedding, teacher_embedding = _final(encoded).float(), _final(teacher_encoded).float()
        if student_embedding.shape != teacher_embedding.shape:
            raise ValueError(
                f"the student's image embeddings are {tuple(student_embedding.shape[1:])}, the teacher's "
                f"{tuple(teacher_embedding.shape[1:])}: fidelity needs the same width and grid."
            )
        cosine = torch.nn.functional.cosine_similarity(student_embedding, teacher_embedding, dim=1).mean()
        return [
            {
                "picture": sample.id,
                "cosine": cosine.item(),
                "mse": (student_embedding - teacher_embedding).square().mean().item(),
                "layers": self._layers(model, sample),
                "mask_iou": self._masks(model, encoded, teacher_encoded, sample),
            }
        ]

    def _layers(self, model: PromptableModel, sample: Sample) -> dict[str, float]:
        student, teacher = (m.hidden_states(sample.image) for m in (model, self.teacher))
        if not student or not teacher:
            return {}
        similarities = {}
        for i in range(1, len(student)):
            j = round(i * (len(teacher) - 1) / (len(student) - 1))
            if student[i].shape[:-1] == teacher[j].shape[:-1]:
                name = f"student layer {i} ~ teacher layer {j}"
                similarities[name] = linear_cka(student[i].flatten(0, -2), teacher[j].flatten(0, -2)).item()
        return similarities

    def _masks(
        self, model: PromptableModel, encoded: Encoded, teacher_encoded: Encoded, sample: Sample
    ) -> dict[str, list[float]]:
        instances = [instance for instance in sample.instances if not instance.is_crowd][: self.max_instances]
        if not instances:
            return {}
        points = [[deepest_point(instance.mask())[0]] for instance in instances]
        boxes = torch.tensor([xywh_to_xyxy(instance.bbox_xywh) for instance in instances])
        labels = torch.ones(len(points), 1, dtype=torch.long)
        prompts: dict[str, dict[str, Any]] = {
            "box/single": {"boxes_xyxy": boxes, "multimask_output": False},
            "1 click/predicted": {"points_xy": torch.tensor(points), "labels": labels},
        }
        agreement = {}
        for name, prompt in prompts.items():
            masks = []
            for promptable, embeddings in ((model, encoded), (self.teacher, teacher_encoded)):
                prediction = promptable.predict(embeddings, **prompt)
                masks.append(select(prediction.masks, prediction.predicted_iou.argmax(dim=1)))
            agreement[name] = mask_iou(*masks).tolist()
        return agreement


def summarize_fidelity(records: list[dict]) -> dict[str, float]:
    """Return means over images for embeddings and layers, and over instances for masks."""
    scores = {
        "embedding cosine": statistics.fmean(record["cosine"] for record in records),
        "embedding MSE": statistics.fmean(record["mse"] for record in records),
    }
    for name in records[0]["layers"]:
        scores[f"CKA, {name}"] = statistics.fmean(record["layers"][name] for record in records)
    for name in {name: None for record in records for name in record["mask_iou"]}:
        values = [value for record in records for value in record["mask_iou"].get(name, [])]
        scores[f"mIoU with the teacher's masks, {name}"] = statistics.fmean(values)
    return scores


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute the linear centered kernel alignment of two sets of features of the same N tokens.

    Args:
        x: (N, C).
        y: (N, D).

    Returns:
        A scalar from 0 to 1 (Kornblith et al., 2019, equation 5).
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (x, y))
    cross = (x.T @ y).square().sum()
    return cross / ((x.T @ x).norm() * (y.T @ y).norm())


def _final(encoded: Encoded) -> torch.Tensor:
    embeddings = encoded.embeddings["image_embeddings"]
    return embeddings[-1] if isinstance(embeddings, list) else embeddings
