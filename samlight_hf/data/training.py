"""Training examples as a pure function of their number: no epochs, no global random state, nothing to save.

Resuming at step t, sharing the work between ranks and between worker processes are then index arithmetic.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .cutouts import Cutouts
from .dataset import ImageDataset
from .examples import ExampleMaker
from .folders import MaskFolderDataset
from .label_maps import MaskReading
from .order import ExampleOrder
from .prompts import PromptSampling
from .samples import MAX_SKIPPED_SHARE, SampleError, SkipReport
from .skip_counter import SkipCounter


# Images tried for one example before giving up.
MAX_TRIES = 100

# Keys of random generators: no two purposes draw the same numbers.
_VIEW, _PROMPTS, _REPLACEMENT = range(2, 5)


class TrainingExamples(Dataset):
    """`num_examples` training examples from images; the same n gives the same example, in any process and order.

    An example is a dict of tensors in SAM's frame of S = `image_size` pixels a side, the image at its upper left:

    - `pixel_values`: uint8 (3, S, S), RGB, zeros at right and bottom.
    - `reshaped_input_sizes`: int64 (2,), height and width of the image in the frame.
    - `example_id`: int64 (), unique for each source, image and view, so that with `num_views` what a frozen model
      makes of `pixel_values` can be kept under it. It does not depend on `prompts`, nor do the pixels.

    and with `prompts`, for P = `prompts.num_prompts` objects:

    - `masks`: bool (P, M, M), M = `mask_size`, true where a cell is at least half object.
    - `boxes`: float32 (P, 4), xyxy in pixels of the frame, with noise, within the image and never without area.
    - `points`: float32 (P, 2), x and y of a pixel of the frame, inside the mask.
    - `uniforms`: float32 (P, `prompts.num_uniforms`) in [0, 1), for what the trainer draws.

    Each source is walked through without replacement in another random order in each of its epochs, and the sources
    take turns. An image that cannot be used is counted, and another one takes its place.

    Args:
        sources: one or more datasets.
        num_examples: the length. Examples do not depend on it.
        image_size: side of the frame in pixels.
        mask_size: side of the masks in cells; divides `image_size`; by default a quarter of it.
        augmentation: by default none: the longest side becomes `image_size`.
        prompts: None gives images alone, for which no mask is decoded.
        cutouts: objects to paste onto the images.
        source_weights: how often each source is taken, relative to the others; by default as its size.
        num_views: each image is augmented in so many ways, one after another in the epochs of its source. None: in
            another way in each epoch.
        seed: not negative.
        max_skipped: the share of unusable images above which an error is raised, once 100 have been read.

    Raises:
        ValueError: for arguments that do not fit, where more than `max_skipped` of a source was left out when it was
            indexed, and from `__getitem__` where too many of the images read cannot be used.
    """

    def __init__(
        self,
        sources: ImageDataset | Sequence[ImageDataset],
        num_examples: int,
        image_size: int,
        *,
        mask_size: int | None = None,
        augmentation: Augmentation | None = None,
        prompts: PromptSampling | None = None,
        cutouts: Cutouts | None = None,
        source_weights: Sequence[float] | None = None,
        num_views: int | None = None,
        seed: int = 0,
        max_skipped: float = MAX_SKIPPED_SHARE,
    ):
        self.sources = [sources] if isinstance(sources, ImageDataset) else list(sources)
        if not self.sources or not all(len(source) for source in self.sources):
            raise ValueError("Give at least one source, and none without images.")
        if prompts and not cutouts and not all(source.has_masks for source in self.sources):
            names = ", ".join(type(source).__name__ for source in self.sources if not source.has_masks)
            raise ValueError(
                f"prompts= needs masks, and {names} has none. Give a dataset with masks, or cutouts= to paste."
            )
        if not isinstance(num_examples, int) or num_examples < 1:
            raise ValueError(f"num_examples={num_examples!r} must be an integer of at least 1.")
        if num_views is not None and (not isinstance(num_views, int) or num_views < 1):
            raise ValueError(f"num_views={num_views!r} must be None or an integer of at least 1.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer of at least 0.")
        self.num_examples, self.num_views, self.seed = num_examples, num_views, seed
        self.maker = ExampleMaker.create(image_size, mask_size, augmentation, prompts, cutouts)
        sizes = [len(source) for source in self.sources]
        self._order = ExampleOrder(sizes, source_weights, seed)
        self._first_ids = np.cumsum([0, *sizes]).tolist()
        self._counter = SkipCounter(max_skipped, sum(len(source) for source in self.sources))
        self._check_indices()

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        n = range(self.num_examples)[n]  # negative ones, and IndexError
        source, epoch, image = self._order(n)
        view = epoch if self.num_views is None else epoch % self.num_views
        failures = SkipReport()
        for attempt in range(MAX_TRIES):
            if attempt:
                generator = np.random.default_rng((self.seed, _REPLACEMENT, n, attempt))
                image = int(generator.integers(len(self.sources[source])))
            report = SkipReport()
            example = self._example(n, source, image, view, report)
            self._counter.add(report, source, image)
            if example is not None:
                return example
            self._counter.check(self._name)
            failures.merge(report)
        raise ValueError(f"No usable image in {MAX_TRIES} tries for example {n}. {failures.summary()}")

    def _example(self, n: int, source: int, image: int, view: int, report: SkipReport) -> dict | None:
        try:
            example = self.maker(
                self.sources[source].open(image),
                np.random.default_rng((self.seed, _VIEW, source, image, view)),
                np.random.default_rng((self.seed, _PROMPTS, n)),
                report,
            )
        except SampleError as error:
            report.add_image(error.reason, error.where or self._name(source, image))
            return None
        example_id = view * self._first_ids[-1] + self._first_ids[source] + image
        return {**example, "example_id": torch.tensor(example_id)}

    @property
    def num_ids(self) -> int:
        """How many views there are: `example_id` is below it. Raises ValueError without `num_views`."""
        if self.num_views is None:
            raise ValueError("num_views=None makes a new view each time: give num_views to enumerate them.")
        return self.num_views * self._first_ids[-1]

    def views(self) -> Dataset:
        """All views by `example_id`, without prompts; zeros where an image cannot be used, which no example has."""
        return _Views(self)

    def preprocessing(self) -> dict:
        """What the pixels of a view depend on: two datasets that agree in it have the same views."""
        images = [_fingerprint(source) for source in self.sources]
        return {"pictures": images, "num_views": self.num_views, "seed": self.seed, **self.maker.preprocessing()}

    def order(self) -> dict:
        """What the order of the images, the masks and the prompts depend on, besides `preprocessing`."""
        order = {"turns": self._order.turns, "prompts": repr(self.maker.prompts)}
        readings = [source.reading for source in self.sources if isinstance(source, MaskFolderDataset)]
        if any(reading != MaskReading() for reading in readings):
            order["masks"] = [reading.to_dict() for reading in readings]
        return order

    @property
    def num_read(self) -> int:
        """Images read so far by this process and its workers, the skipped ones included."""
        return self._counter.num_read

    def skip_report(self) -> SkipReport:
        """What was left out when the sources were indexed, and what this process and its workers skipped so far.

        Of each reason one example in each process is named. An image that is read again counts again.
        """
        report = self._counter.report(self._name)
        for source in self.sources:
            report.merge(source.index_report)
        return report

    def _name(self, source: int, image: int) -> str:
        return self.sources[source].sample_id(image)

    def _check_indices(self):
        for source in self.sources:
            skipped, total = source.index_report.num_images, source.num_images
            if skipped > self._counter.max_skipped * total:
                raise ValueError(
                    f"{skipped} of {total} images were left out when the dataset was indexed, more than "
                    f"max_skipped={self._counter.max_skipped:.0%}. Mend the data, or raise max_skipped if this is as it "
                    f"should be. {source.index_report.summary()}"
                )


class _Views(Dataset):
    def __init__(self, examples: TrainingExamples):
        self.examples = examples
        self.maker = replace(examples.maker, prompts=None)

    def __len__(self) -> int:
        return self.examples.num_ids

    def __getitem__(self, example_id: int) -> dict[str, torch.Tensor]:
        examples = self.examples
        view, image = divmod(range(len(self))[example_id], examples._first_ids[-1])
        source = bisect.bisect_right(examples._first_ids, image) - 1
        image -= examples._first_ids[source]
        generator = np.random.default_rng((examples.seed, _VIEW, source, image, view))
        try:
            return self.maker(examples.sources[source].open(image), generator, generator, SkipReport())
        except SampleError:
            size = self.maker.image_size
            return {
                "pixel_values": torch.zeros(3, size, size, dtype=torch.uint8),
                "reshaped_input_sizes": torch.tensor([size, size]),
            }


def _fingerprint(source: ImageDataset) -> str:
    """Of the kind of a dataset and the names of its images in order."""
    digest = hashlib.sha256(f"{type(source).__name__} {len(source)}".encode())
    for index in range(len(source)):
        digest.update(source.sample_id(index).encode() + b"\0")
    return digest.hexdigest()[:16]
