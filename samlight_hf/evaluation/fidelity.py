"""How close a student is to its teacher: embeddings, layers and masks. Needs no annotation but places to prompt."""

import statistics

import torch

from ..data import Sample
from ..masks.boxes import xywh_to_xyxy
from .clicks import deepest_point
from .metrics.mask_iou.iou import mask_iou
from .models import Encoded, PromptableModel
from .protocols import check_max_instances, select
from .tasks import EvaluationTask


class Fidelity(EvaluationTask):
    """The student, which `evaluate` runs, against `teacher` on the same images and prompts.

    One record for each image: {"picture", "cosine": of the image embeddings, mean over positions, "mse", "layers":
    {"student layer i ~ teacher layer j": linear CKA of their tokens}, "mask_iou": {"box/single": [IoU of the two models'
    masks for each instance], "1 click/predicted": [...]}}.

    Layers of different widths have no cosine; linear CKA (Kornblith et al., ICML 2019) compares them up to rotation and
    scale, 1 being equal. Student layer i of n is matched to teacher layer round(i * m / n) of m.

    Raises:
        ValueError: for a teacher whose image embeddings have another shape, and for `max_instances` below 1.
    """

    def __init__(self, teacher: PromptableModel, max_instances: int | None = None):
        check_max_instances(max_instances)
        self.teacher, self.max_instances = teacher, max_instances

    def __call__(self, model: PromptableModel, encoded: Encoded, sample: Sample) -> list[dict]:
        (theirs,) = self.teacher.encode([sample.image])
        ours = _final(encoded), _final(theirs)
        if ours[0].shape != ours[1].shape:
            raise ValueError(
                f"the student's image embeddings are {tuple(ours[0].shape[1:])}, the teacher's {tuple(ours[1].shape[1:])}: "
                "fidelity needs the same width and grid."
            )
        student_embedding, teacher_embedding = (embedding.float() for embedding in ours)
        cosine = torch.nn.functional.cosine_similarity(student_embedding, teacher_embedding, dim=1).mean()
        return [
            {
                "picture": sample.id,
                "cosine": cosine.item(),
                "mse": (student_embedding - teacher_embedding).square().mean().item(),
                "layers": self._layers(model, sample),
                "mask_iou": self._masks(model, encoded, theirs, sample),
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
        self, model: PromptableModel, encoded: Encoded, theirs: Encoded, sample: Sample
    ) -> dict[str, list[float]]:
        instances = [instance for instance in sample.instances if not instance.is_crowd][: self.max_instances]
        if not instances:
            return {}
        points = [[deepest_point(instance.mask())[0]] for instance in instances]
        box = {"boxes_xyxy": torch.tensor([xywh_to_xyxy(i.bbox_xywh) for i in instances]), "multimask_output": False}
        click = {"points_xy": torch.tensor(points), "labels": torch.ones(len(points), 1, dtype=torch.long)}
        agreement = {}
        for name, prompts in (("box/single", box), ("1 click/predicted", click)):
            masks = []
            for each, its_encoding in ((model, encoded), (self.teacher, theirs)):
                prediction = each.predict(its_encoding, **prompts)
                masks.append(select(prediction.masks, prediction.predicted_iou.argmax(dim=1)))
            agreement[name] = mask_iou(*masks).tolist()
        return agreement


def summarize_fidelity(records: list[dict]) -> dict[str, float]:
    """Means over images of embeddings and layers, and over instances of masks."""
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
    """Linear centred kernel alignment of (N, C) and (N, D) features, 0 to 1 (Kornblith et al., 2019, equation 5)."""
    x, y = (features.double() - features.double().mean(dim=0) for features in (x, y))
    cross = (x.T @ y).square().sum()
    return cross / ((x.T @ x).norm() * (y.T @ y).norm())


def _final(encoded: Encoded) -> torch.Tensor:
    embeddings = encoded.embeddings["image_embeddings"]
    return embeddings[-1] if isinstance(embeddings, list) else embeddings
