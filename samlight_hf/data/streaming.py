"""Make training examples from SA-1B tars that are read from start to end: over the network, or too many to index.

Needs the package `datasets`.
"""

import hashlib
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .augmentation import Augmentation
from .cutouts import Cutouts
from .dataset import open_stored_image
from .examples import ExampleMaker
from .lazy import LazySample
from .prompts import PromptSampling
from .sa1b import IMAGE_SUFFIXES, check_tar, find_tars, parse_json
from .samples import MAX_SKIPPED_SHARE, CutoutError, SampleError, SkipReason, SkipReport
from .skip_counter import CUTOUTS, SkipCounter


_IMAGE_FIELDS = sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)

# Declared explicitly: inference from the first samples can be wrong.
_FEATURES = datasets.Features(
    {
        "__key__": datasets.Value("string"),
        "__url__": datasets.Value("string"),
        **{field: datasets.Value("binary") for field in [*_IMAGE_FIELDS, "json"]},
    }
)

# Keys of the random generators, one for each purpose, so that their draws are independent.
_VIEW, _PROMPTS, _ORDER, _REPLACEMENT = range(5, 9)

_BEGINNING: dict[str, Any] = {"epoch": 0, "stream": None, "position": 0}


class _UndecodedTars(WebDataset):
    """Reader of tar members as bytes. With decoding, one malformed JSON would end the whole stream."""

    DECODERS: ClassVar[dict] = {}


class StreamedExamples(torch.utils.data.IterableDataset):
    """Iterable dataset of training examples from SA-1B tars, on the network or on disk.

    Examples have the keys described in `TrainingExamples`. An example depends on `seed`, the name of its image and the
    epoch; the order also depends on `rank`, `world_size` and the number of workers. Tars are distributed over the
    workers of all ranks; if there are fewer tars than workers, several workers share the samples of a tar. Each epoch
    has another order of tars, and samples are shuffled within blocks. In each of its epochs a worker reads the part of
    the next one: parts differ in size, and else the images of small ones would be read more often. A sample that cannot
    be used is counted, and a random one of its block replaces it, with other prompts.

    There are two exact ways to resume: `state_dict` and `load_state_dict` in the process that iterates, which stateful
    data loaders call; and `skip_batches`, which reads the skipped samples but does not decode them.

    Args:
        tars: paths, folders, patterns, `https://` or `hf://datasets/...` addresses, or a sequence of these. The image
            and the JSON of a sample must be adjacent in a tar.
        image_size, mask_size, augmentation, prompts, cutouts, num_views, seed, max_skipped: as in `TrainingExamples`.
        rank, world_size: index of this process, and number of processes that share the work.
        num_epochs: number of passes over the tars; None for endless iteration.
        block_size: number of samples that are shuffled together. Each worker has their files in memory.

    Raises:
        ValueError: if no tar is found, if one on disk is no tar or cut short, or if an argument is invalid. Iteration
            raises it for a damaged tar, and if too many images cannot be used.

    Example:
        >>> examples = StreamedExamples("sa1b/*.tar", image_size=512, prompts=PromptSampling())
        >>> loader = torch.utils.data.DataLoader(examples, batch_size=8, num_workers=4)
    """

    def __init__(
        self,
        tars: str | os.PathLike | Sequence[str | os.PathLike],
        image_size: int,
        *,
        mask_size: int | None = None,
        augmentation: Augmentation | None = None,
        prompts: PromptSampling | None = None,
        cutouts: Cutouts | None = None,
        num_views: int | None = None,
        seed: int = 0,
        max_skipped: float = MAX_SKIPPED_SHARE,
        rank: int = 0,
        world_size: int = 1,
        num_epochs: int | None = None,
        block_size: int = 128,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}.")
        for name, value, lowest in (("block_size", block_size, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}={value!r} must be an integer of at least {lowest}.")
        for name, number in (("num_views", num_views), ("num_epochs", num_epochs)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name}={number!r} must be None or an integer of at least 1.")
        self.num_views, self.seed, self.num_epochs, self.block_size = num_views, seed, num_epochs, block_size
        self.maker = ExampleMaker.create(image_size, mask_size, augmentation, prompts, cutouts)
        self._tars, stream = _open_stream(tars)
        self._stream, self._rank, self._world_size = stream, rank, world_size
        self._counter = SkipCounter(max_skipped)
        self._start = self._state = _BEGINNING
        self._skip = (0, 1)

    def skip_batches(self, num_batches: int, batch_size: int):
        """Start iteration after the first batches of a DataLoader.

        Args:
            num_batches: number of batches to skip.
            batch_size: batch size of the DataLoader, which must have the same number of workers as before.
        """
        self._skip = (num_batches, batch_size)

    def preprocessing(self) -> dict:
        """Return all settings that determine the views, for JSON, as `TrainingExamples.preprocessing` does."""
        tars = [os.path.basename(tar) for tar in self._tars]
        return {"tars": tars, "num_views": self.num_views, "seed": self.seed, **self.maker.preprocessing()}

    def order(self) -> dict:
        """Return the settings, besides `preprocessing`, that determine the prompts."""
        return {"prompts": repr(self.maker.prompts)}

    def state_dict(self) -> dict:
        """Return the position of iteration in this process: after the last example."""
        return dict(self._state)

    def load_state_dict(self, state: dict):
        """Start the next iteration at the position of a `state_dict`."""
        self._start = dict(state)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        part, num_parts, skip = self._own_part()
        start, self._start = self._start, _BEGINNING  # later iterations begin at the start
        epochs = itertools.count() if self.num_epochs is None else range(self.num_epochs)
        for epoch in itertools.islice(epochs, start["epoch"], None):
            is_empty = start == _BEGINNING
            stream = self._part((part + epoch) % num_parts, num_parts)
            for before, block in self._blocks(stream, epoch, start["stream"]):
                is_empty = False
                first = start["position"]
                start = _BEGINNING
                skipped = min(skip, len(block) - first)
                skip -= skipped
                generator = np.random.default_rng((self.seed, _ORDER, epoch, _number(block[0]["__key__"])))
                block = [block[i] for i in generator.permutation(len(block))]
                for position in range(first + skipped, len(block)):
                    self._state = {"epoch": epoch, "stream": before, "position": position + 1}
                    yield self._usable(block, position, epoch)
            if is_empty and self.num_epochs is None:
                raise ValueError(f"Nothing for one of the workers: fewer samples than workers in {self._tars}.")

    def _own_part(self) -> tuple[int, int, int]:
        """Return the part of this worker of this rank, the number of parts, and how many of its examples to skip."""
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        num_batches, batch_size = self._skip
        # Workers make batches in turn, so after a restart this one continues the part of the worker that would be next.
        number = (number + num_batches) % num_workers
        skip = len(range(number, num_batches, num_workers)) * batch_size
        return number * self._world_size + self._rank, num_workers * self._world_size, skip

    def _part(self, part: int, num_parts: int) -> datasets.IterableDataset:
        """Return the stream of one of `num_parts` parts of the tars."""
        num_tars = self._stream.num_shards
        if num_tars >= num_parts:
            stream = self._stream.shard(num_parts, part, contiguous=False)
        else:  # several workers read the same tar, and each takes every n-th sample
            stream = self._stream.shard(num_tars, part % num_tars, contiguous=False)
            stream = split_dataset_by_node(stream, part // num_tars, len(range(part % num_tars, num_parts, num_tars)))
        # With a buffer of one, `datasets` shuffles tars only. Samples are shuffled here, where the state is exact.
        return stream.shuffle(seed=self.seed, buffer_size=1)

    def _blocks(
        self, stream: datasets.IterableDataset, epoch: int, state: dict | None
    ) -> Iterator[tuple[dict | None, list[dict]]]:
        """Yield (state of the stream before the block, block of up to `block_size` samples)."""
        stream.set_epoch(epoch)
        if state is not None:
            stream.load_state_dict(state)
        url, batches = "the first", stream.iter(self.block_size)
        while True:
            try:
                columns = next(batches, None)
            except tarfile.ReadError as error:
                raise ValueError(
                    f"{url}, or a tar read after it, is damaged or cut short. Copy or download it again."
                ) from error
            if columns is None:
                return
            block = [dict(zip(columns, row)) for row in zip(*columns.values())]
            url = block[-1]["__url__"]
            yield state, block
            state = stream.state_dict()

    def _usable(self, block: list[dict], position: int, epoch: int) -> dict[str, torch.Tensor]:
        """Make the example of the sample at a position, or of a random other one if it cannot be used."""
        failures = SkipReport()
        for number, sample in enumerate(self._candidates(block, position, epoch)):
            report = SkipReport()
            instead_of = (_number(block[position]["__key__"]),) if number else ()
            example, cutout = self._example(sample, (epoch, *instead_of), report)
            tar = self._tars.index(sample["__url__"])
            self._counter.add(report, *((tar, 0) if cutout is None else (CUTOUTS, cutout)))
            if example is not None:
                return example
            self._counter.check(self._name)
            failures.merge(report)
        raise ValueError(f"None of {len(block)} samples of a block can be used. {failures.summary()}")

    def _candidates(self, block: list[dict], position: int, epoch: int) -> Iterator[dict]:
        """Yield the sample at a position, then the others in random order.

        The next one would be an example of its own, and the following batch would have it again.
        """
        yield block[position]
        generator = np.random.default_rng((self.seed, _REPLACEMENT, epoch, _number(block[position]["__key__"])))
        yield from (block[i] for i in generator.permutation(len(block)) if i != position)

    def _example(self, sample: dict, turn: tuple[int, ...], report: SkipReport) -> tuple[dict | None, int | None]:
        """Return the example of a sample, or None; and the index of a cut-out that cannot be pasted, or None.

        `turn` has the epoch, and the key of an unusable sample that this one replaces.
        """
        key, epoch = _number(sample["__key__"]), turn[0]
        view = epoch if self.num_views is None else epoch % self.num_views
        try:
            example = self.maker(
                _opened(sample),
                np.random.default_rng((self.seed, _VIEW, key, view)),
                np.random.default_rng((self.seed, _PROMPTS, key, *turn)),
                report,
            )
        except SampleError as error:
            report.add_image(error.reason, sample["__key__"])
            return None, error.index if isinstance(error, CutoutError) else None
        return {**example, "example_id": torch.tensor(_number(f"{sample['__key__']} {view}"))}, None

    @property
    def num_read(self) -> int:
        """Number of images read so far by this process and its workers, including the skipped ones."""
        return self._counter.num_read

    def skip_report(self, with_index: bool = True) -> SkipReport:
        """Return a report of the data skipped by this process and its workers so far.

        Examples are names of tars, and of cut-outs.

        Args:
            with_index: not used, because a stream has no index; part of the signature of `TrainingExamples`.
        """
        return self._counter.report(self._name)

    def _name(self, tar: int, cutout: int) -> str:
        if tar == CUTOUTS:
            assert self.maker.cutouts is not None
            return self.maker.cutouts.where(cutout)
        return os.path.basename(self._tars[tar])


def _open_stream(tars: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[list[str], datasets.IterableDataset]:
    """Return the names of the tars and a stream of their samples."""
    files: list[str] = []
    for path in [tars] if isinstance(tars, (str, os.PathLike)) else tars:
        if "://" in os.fspath(path):
            files.append(os.fspath(path))
            continue
        for tar in find_tars(path):
            check_tar(tar)  # a stream that stops at the end of a member looks complete
            files.append(str(tar.absolute()))
    if not files:
        raise ValueError("No tar file was given.")
    try:
        builder = _UndecodedTars(data_files={"train": list(dict.fromkeys(files))}, features=_FEATURES)
        return list(builder.config.data_files["train"]), builder.as_streaming_dataset("train")
    except FileNotFoundError as error:
        raise ValueError(f"{error}. Check the address, and that you are logged in where that is needed.") from error


def _opened(sample: dict) -> LazySample:
    """Open a sample of the stream. Raises SampleError if it has no image or no annotations."""
    image = next((sample[field] for field in _IMAGE_FIELDS if sample[field] is not None), None)
    if image is None:
        raise SampleError(SkipReason.JSON_ALONE)
    if sample["json"] is None:
        raise SampleError(SkipReason.MISSING_JSON)
    annotations, size = parse_json(sample["json"])
    return LazySample(sample["__key__"], open_stored_image(image, size), annotations)


def _number(name: str) -> int:
    """Hash a name to 63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
