"""What `evaluate` does with the images of a dataset."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..data import Sample
from .models import Encoded, PromptableModel


class EvaluationTask(ABC):
    """Records of one image, by a call; of a batch, by `batch`, which is for those to override that gain by it.

    `needs_embeddings` False leaves `encoded` None.
    """

    needs_embeddings = True

    @abstractmethod
    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        """Records that go to JSON."""

    @staticmethod  # what overrides it may need the work, which is then sent to the worker processes
    def prepare(sample: Sample) -> Any:
        """What worker processes make of a sample for `batch`."""
        return sample

    def batch(
        self, model: PromptableModel, encoded: Sequence[Encoded | None], prepared: Sequence[Any]
    ) -> list[list[dict]]:
        """The records of each image."""
        return [self(model, each, its) for each, its in zip(encoded, prepared, strict=True)]
