"""Compute training examples as a pure function of their index: no epochs, no global random state, no state to save.

Resuming at a step, and sharing the work between ranks and worker processes, are then index arithmetic.
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
from .samples import MAX_SKIPPED_SHARE, CutoutError, SampleError, SkipReport
from .skip_counter import CUTOUTS, SkipCounter


# Images tried for one example before an error is raised.
MAX_TRIES = 100

# Keys of the random generators, one for each purpose, so that their draws are independent.
_VIEW, _PROMPTS, _REPLACEMENT = range(2, 5)


class TrainingExamples(Dataset):
    """Map-style dataset of training examples. `examples[n]` depends on n and the arguments only.

    Any process that reads index n, in any order, gets the same example. It is a dict of tensors in SAM's frame: a
    square of S = `image_size` pixels, which has the resized image at its upper left and zeros elsewhere.

    | key | dtype, shape | content |
    |---|---|---|
    | `pixel_values` | uint8 (3, S, S) | the image in RGB, not normalized |
    | `reshaped_input_sizes` | int64 (2,) | height and width of the image within the frame, in pixels |
    | `example_id` | int64 () | number of this view of this image, independent of `prompts` |

    With `prompts`, it also has P = `prompts.num_prompts` objects; M = `mask_size`:

    | key | dtype, shape | content |
    |---|---|---|
    | `masks` | bool (P, M, M) | the frame in M x M cells; True where at least half of a cell is object |
    | `boxes` | float32 (P, 4) | noisy box prompts, xyxy in pixels of the frame, inside the image, never empty |
    | `points` | float32 (P, 2) | point prompts, (x, y) of a pixel of the frame inside the mask |
    | `uniforms` | float32 (P, U) | U = `prompts.num_uniforms` random numbers in [0, 1) for the trainer's choices |

    `pixel_values` does not depend on `prompts` either: the embedding of a frozen image encoder can be cached by
    `example_id` if `num_views` is given.

    Each source is traversed without replacement, in a new random order in each of its epochs. Sources alternate, by
    `source_weights`. An image that cannot be used is counted in `skip_report()`, and another random image of the same
    source replaces it.

    Args:
        sources: one or more datasets.
        num_examples: length of this dataset. The examples do not depend on it.
        image_size: side S of the frame in pixels.
        mask_size: side M of the masks in cells, a divisor of `image_size`; by default a quarter of it.
        augmentation: random changes of the image; by default none, and the longest side is resized to `image_size`.
        prompts: how objects, boxes and points are drawn. None gives images only, and decodes no mask.
        cutouts: objects to paste onto the images.
        source_weights: how often each source is read, relative to the others; by default in proportion to its size.
        num_views: number of augmented versions of each image, which the epochs of its source repeat in turn. None gives
            a new version in each epoch.
        seed: an integer of at least 0.
        max_skipped: share of unusable images, from 0 to 1, above which an error is raised, after 100
            images or all of a smaller set.

    Raises:
        ValueError: if an argument is invalid, or if indexing left out more than `max_skipped` of a source.
            `__getitem__` raises it if too many of the images read cannot be used.

    Example:
        >>> dataset = CocoDataset("instances_train2017.json", "train2017")
        >>> examples = TrainingExamples(dataset, 1000, image_size=512, prompts=PromptSampling(num_prompts=8))
        >>> examples[0]["masks"].shape
        torch.Size([8, 128, 128])
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
            without = [source for source in self.sources if not source.has_masks]
            names = ", ".join(str(getattr(source, "folder", type(source).__name__)) for source in without)
            raise ValueError(f"{names}: images without masks, which prompts need. Give masks too, or cutouts to paste.")
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
        n = range(self.num_examples)[n]  # accepts negative indices, raises IndexError
        source, epoch, image = self._order(n)
        view = epoch if self.num_views is None else epoch % self.num_views
        failures = SkipReport()
        for attempt in range(MAX_TRIES):
            if attempt:
                generator = np.random.default_rng((self.seed, _REPLACEMENT, n, attempt))
                image = int(generator.integers(len(self.sources[source])))
            report = SkipReport()
            example, place = self._example(n, source, image, view, report)
            self._counter.add(report, *place)
            if example is not None:
                return example
            self._counter.check(self._name)
            failures.merge(report)
        raise ValueError(f"No usable image in {MAX_TRIES} tries for example {n}. {failures.summary()}")

    def _example(
        self, n: int, source: int, image: int, view: int, report: SkipReport
    ) -> tuple[dict | None, tuple[int, int]]:
        """Return the example, or None; and what a message has to name: a source and an image, or a cut-out."""
        try:
            example = self.maker(
                self.sources[source].open(image),
                np.random.default_rng((self.seed, _VIEW, source, image, view)),
                np.random.default_rng((self.seed, _PROMPTS, n)),
                report,
            )
        except SampleError as error:
            report.add_image(error.reason, error.where or self._name(source, image))
            return None, (CUTOUTS, error.index) if isinstance(error, CutoutError) else (source, image)
        example_id = view * self._first_ids[-1] + self._first_ids[source] + image
        return {**example, "example_id": torch.tensor(example_id)}, (source, image)

    @property
    def num_ids(self) -> int:
        """Number of views of all images; `example_id` is below it.

        Raises:
            ValueError: if `num_views` is None: the views are then endless.
        """
        if self.num_views is None:
            raise ValueError("num_views=None makes a new view each time: give num_views to enumerate them.")
        return self.num_views * self._first_ids[-1]

    def views(self) -> Dataset:
        """Return a dataset of all views, indexed by `example_id`, without prompts.

        The pixels are zeros where an image cannot be used; no training example refers to these.
        """
        return _Views(self)

    def preprocessing(self) -> dict:
        """Return all settings that determine the views, for JSON. Datasets with equal settings have equal views."""
        images = [_fingerprint(source) for source in self.sources]
        return {"pictures": images, "num_views": self.num_views, "seed": self.seed, **self.maker.preprocessing()}

    def order(self) -> dict:
        """Return the settings, besides `preprocessing`, that determine the image order, the masks and the prompts."""
        order = {"turns": self._order.turns, "prompts": repr(self.maker.prompts)}
        readings = [source.reading for source in self.sources if isinstance(source, MaskFolderDataset)]
        if any(reading != MaskReading() for reading in readings):
            order["masks"] = [reading.to_dict() for reading in readings]
        return order

    @property
    def num_read(self) -> int:
        """Number of images read so far by this process and its workers, including the skipped ones."""
        return self._counter.num_read

    def skip_report(self, with_index: bool = True) -> SkipReport:
        """Return a report of the data skipped while indexing, and by this process and its workers so far.

        It names one example of each reason and process. An image that is read twice counts twice.

        Args:
            with_index: include the data skipped while indexing. Each process has indexed all of the data, so only one
                of several whose reports are merged should.
        """
        report = self._counter.report(self._name)
        for source in self.sources if with_index else ():
            report.merge(source.index_report)
        return report

    def _name(self, source: int, image: int) -> str:
        if source == CUTOUTS:
            assert self.maker.cutouts is not None
            return self.maker.cutouts.where(image)
        return self.sources[source].where(image)

    def _check_indices(self):
        for source in self.sources:
            skipped, total = source.index_report.num_images, source.num_images
            if skipped > self._counter.max_skipped * total:
                raise ValueError(
                    f"{skipped} of {total} images were left out when the dataset was indexed, more than "
                    f"max_skipped={self._counter.max_skipped:.0%}. Mend the data, or raise max_skipped if this is "
                    f"expected. {source.index_report.summary()}"
                )


class _Views(Dataset):
    """All views of the images of `examples`, see `TrainingExamples.views`."""

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
    """Hash the type of a dataset and the ids of its images in order."""
    digest = hashlib.sha256(f"{type(source).__name__} {len(source)}".encode())
    for index in range(len(source)):
        digest.update(source.sample_id(index).encode() + b"\0")
    return digest.hexdigest()[:16]
