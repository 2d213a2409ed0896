"""Runs protocols over a dataset: batched, with images read ahead, on any number of processes, and restartable.

The unit of work is a batch of consecutive images, whoever takes it: the same images are encoded together in one process
or in eight, before and after an interruption, and so the numbers are the same.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import ImageDataset, Sample, SkipReport
from ..utils.atomic_files import atomic_write, fit_name
from .models import PromptableModel
from .tasks import EvaluationTask


_RANK = ".00000.jsonl"  # room for a process's number behind a journal's name


class Journal:
    """A file with one line for each evaluated image, from which an interrupted run goes on.

    Each process appends to a file of its own and all read everybody's, so that the number of processes may change. A last
    line that was cut off is dropped.

    Raises:
        ValueError: for a journal of other settings.
    """

    def __init__(self, folder: Path, name: str, settings: dict):
        self.done: dict[int, dict] = {}
        name = fit_name(name, _RANK).removesuffix(_RANK)
        self._folder, self._name = folder, name
        self._header = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        self.read()
        PartialState().wait_for_everyone()  # nobody writes before everybody has read
        path = folder / f"{name}.{PartialState().process_index}.jsonl"
        lines = _whole_lines(path) or [self._header]  # without one that was cut off, which nothing may be appended to
        atomic_write(path, lambda aside: aside.write_text("".join(map(_to_line, lines)), encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def read(self):
        """Reads what all processes have written."""
        for path in sorted(self._folder.glob(f"{self._name}.*.jsonl")):
            header, *lines = _whole_lines(path) or [self._header]
            if header != self._header:
                changed = sorted(k for k in {*header, *self._header} if header.get(k) != self._header.get(k))
                raise ValueError(
                    f"{path} was written with another {', '.join(changed)}. Choose another --out, or delete that file."
                )
            self.done.update((line["index"], line) for line in lines)

    def add(self, index: int, records: list[dict], skipped: SkipReport):
        """Nothing is sure to be on disk before `flush`."""
        line = {"index": index, "records": records, "skipped": skipped.to_dict()}
        self.done[index] = line
        self._file.write(_to_line(line))

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def evaluate(
    model: PromptableModel,
    dataset: ImageDataset,
    work: EvaluationTask,
    journal: Journal,
    batch_size: int = 4,
    num_workers: int = 2,
    title: str = "",
) -> tuple[list[dict], SkipReport, float]:
    """The records of all images in the dataset's order, what was skipped, and this process's seconds.

    Under `accelerate launch` each process takes every so-many-th batch, and all return everything.

    Raises:
        ValueError: if no image of the dataset gave a record.
    """
    state = PartialState()
    start = time.perf_counter()
    indices = range(len(dataset))
    batches = [indices[first : first + batch_size] for first in indices[::batch_size]]
    batches = batches[state.process_index :: state.num_processes]
    batches = [batch for batch in batches if not all(index in journal.done for index in batch)]
    with tqdm(
        total=sum(map(len, batches)), unit="image", desc=title, disable=not state.is_main_process or None
    ) as progress:
        # Processes, not threads: decoding JSON, RLE and JPEG keeps the interpreter busy. What is pinned comes through a
        # thread, which receives the next batches meanwhile.
        pin_memory = num_workers > 0 and model.model.device.type == "cuda"
        loader = DataLoader(
            _Batches(dataset, batches, work.prepare),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
        )
        for batch, loaded in zip(batches, loader):
            usable = [sample for sample, _, _ in loaded if sample is not None]
            encodes = usable and work.needs_embeddings
            encoded = model.encode([sample.image for sample in usable]) if encodes else [None] * len(usable)
            prepared = [its for sample, its, _ in loaded if sample is not None]
            records = iter(work.batch(model, encoded, prepared))
            for index, (sample, _, skipped) in zip(batch, loaded, strict=True):
                its_records = [] if sample is None else next(records)
                if index not in journal.done:
                    journal.add(index, its_records, skipped)
            journal.flush()
            progress.update(len(batch))
    seconds = time.perf_counter() - start
    journal.close()
    state.wait_for_everyone()
    journal.read()
    report = SkipReport()
    report.merge(dataset.index_report)
    records = []
    for index in range(len(dataset)):
        records += journal.done[index]["records"]
        report.merge(SkipReport.from_dict(journal.done[index]["skipped"]))
    if not records:
        raise ValueError(f"nothing could be evaluated. {report.summary(dataset.num_images)}")
    return records, report, seconds


class _Batches(Dataset):
    """`ImageDataset.load` of each image of a batch and what `prepare` makes of it, for a DataLoader."""

    def __init__(self, dataset: ImageDataset, batches: list[range], prepare: Callable[[Sample], Any]):
        self.dataset, self.batches, self.prepare = dataset, batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> list[tuple[Sample | None, Any, SkipReport]]:
        loaded = (self.dataset.load(index) for index in self.batches[place])
        return [(sample, None if sample is None else self.prepare(sample), skipped) for sample, skipped in loaded]


def _as_it_is(batch):
    return batch


def _to_line(content: dict) -> str:
    return json.dumps(content) + "\n"


def _whole_lines(path: Path) -> list[dict]:
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(json.JSONDecodeError):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
    return lines
