"""The tasks that `evaluate` runs on the images of a dataset."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..data import Sample
from .models import Encoded, PromptableModel


class EvaluationTask(ABC):
    """A computation of records for the images of a dataset.

    `batch` computes the records of a batch; a subclass overrides it where images gain from being processed together.
    Where `needs_embeddings` is False, `encoded` is None.
    """

    needs_embeddings = True

    def check(self, model: PromptableModel):  # noqa: B027  # most tasks take every model
        """Raise ValueError for a model that this task cannot evaluate, before anything is computed."""

    def is_too_thin(self, model: PromptableModel, sample: Sample) -> bool:
        """Return whether the image of a sample is skipped, since the model cannot take it."""
        return model.is_too_thin(sample.width, sample.height)

    @abstractmethod
    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        """Compute the records of one image, as plain JSON."""

    @staticmethod  # so that the worker processes get no copy of the task; an override may need one
    def prepare(sample: Sample) -> Any:
        """Prepare a sample for `batch`, in a worker process."""
        return sample

    def batch(
        self, model: PromptableModel, encoded: Sequence[Encoded | None], prepared: Sequence[Any]
    ) -> list[list[dict]]:
        """Compute the records of each image."""
        return [self(model, image, sample) for image, sample in zip(encoded, prepared, strict=True)]
