"""Scores of a student on images with masks, during and after its training."""

from collections.abc import Callable, Iterable

from ..data import ImageDataset, Sample
from ..evaluation.models import PromptableModel
from ..evaluation.protocols import InstanceProtocols, ProtocolSettings


# Protocol of the evaluation -> name of its mean.
METRICS = {"box/single": "box_miou", "1 click/predicted": "point_miou", "1 click/oracle": "point_oracle_miou"}


def evaluate_images(
    images: ImageDataset, indices: Iterable[int], evaluate: Callable[[Sample], list[dict[str, float]]]
) -> tuple[list[dict[str, float]], int]:
    """Evaluate some images of a dataset.

    Args:
        images: images with masks.
        indices: the indexes of the images to evaluate.
        evaluate: returns the records of a sample.

    Returns:
        All records, and the number of images that could not be read.
    """
    records: list[dict[str, float]] = []
    num_skipped = 0
    for index in indices:
        sample, _ = images.load(index)
        if sample is None:
            num_skipped += 1
        else:
            records += evaluate(sample)
    return records, num_skipped


def mask_records(promptable: PromptableModel, sample: Sample, max_instances: int) -> list[dict[str, float]]:
    """Compute the IoUs of the first objects of a sample, at the image's own size.

    Args:
        promptable: the model.
        sample: an image with masks.
        max_instances: the number of objects that are evaluated at most.

    Returns:
        A record for each object, with the IoU of each protocol by the names of `METRICS`.
    """
    settings = ProtocolSettings(num_clicks=(1,), max_instances=max_instances)
    (encoded,) = promptable.encode([sample.image])
    records = InstanceProtocols(settings)(promptable, encoded, sample)
    return [{name: record["iou"][protocol] for protocol, name in METRICS.items()} for record in records]


def mean_records(records: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each name over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record[name] for record in records if name in record] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
