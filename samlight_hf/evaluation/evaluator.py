"""Evaluation of a model over a dataset: batched, with images read ahead, on any number of processes, and resumable.

The unit of work is a batch of consecutive images. The same images are always encoded together, on one process or on
eight, before and after an interruption, so the numbers are the same.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import ImageDataset, Sample, SkipReason, SkipReport
from ..utils.atomic_files import atomic_write, fit_name
from .models import PromptableModel
from .tasks import EvaluationTask


_RANK = ".00000.jsonl"  # room for a process's rank after a journal's name


class Journal:
    """A file with one line for each evaluated image, from which an interrupted run resumes.

    Each process appends to a file of its own, and all read every file, so that the number of processes may change. A
    last line that was cut off is dropped.

    Args:
        folder: the folder of the files.
        name: the beginning of the files' names.
        settings: settings that must be the same in a resumed run.

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
        PartialState().wait_for_everyone()  # no process writes before all have read
        path = folder / f"{name}.{PartialState().process_index}.jsonl"
        # Without a line that was cut off, to which nothing may be appended.
        lines = _whole_lines(path) or [self._header]
        atomic_write(path, lambda aside: aside.write_text("".join(map(_to_line, lines)), encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def read(self):
        """Read the files of all processes."""
        for path in sorted(self._folder.glob(f"{self._name}.*.jsonl")):
            header, *lines = _whole_lines(path) or [self._header]
            if header != self._header:
                changed = sorted(k for k in {*header, *self._header} if header.get(k) != self._header.get(k))
                raise ValueError(
                    f"{path} was written with another {', '.join(changed)}. Choose another --out, or delete that file."
                )
            self.done.update((line["index"], line) for line in lines)

    def add(self, index: int, records: list[dict], skipped: SkipReport):
        """Add the records of an image. They are on disk only after `flush`."""
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
    """Evaluate a model on all images of a dataset.

    Under `accelerate launch` the batches are distributed over the processes, and all of them return everything.

    Args:
        model: the model.
        dataset: the images.
        work: the task that computes the records.
        journal: where records are written, and from which images already evaluated are taken. It is closed at the end.
        batch_size: images that are encoded together.
        num_workers: processes that load images.
        title: title of the progress bar.

    Returns:
        The records of all images in the dataset's order, the skipped images, and this process's seconds.

    Raises:
        ValueError: if no image of the dataset gave a record.
    """
    state = PartialState()
    start = time.perf_counter()
    indices = range(len(dataset))
    batches = [indices[first : first + batch_size] for first in indices[::batch_size]]
    batches = batches[state.process_index :: state.num_processes]
    batches = [batch for batch in batches if not all(index in journal.done for index in batch)]
    bar = tqdm(total=sum(map(len, batches)), unit="image", desc=title, disable=not state.is_main_process or None)
    with bar as progress:
        loader = _make_loader(_Batches(dataset, batches, work.prepare), num_workers, model.model.device)
        for batch, read in zip(batches, loader):
            loaded = [_without_thin(model, work, *each) for each in read]
            records_of_batch = iter(_run_batch(model, work, loaded))
            for index, (sample, _, skipped) in zip(batch, loaded, strict=True):
                image_records = [] if sample is None else next(records_of_batch)
                if index not in journal.done:
                    journal.add(index, image_records, skipped)
            journal.flush()
            progress.update(len(batch))
    seconds = time.perf_counter() - start
    journal.close()
    state.wait_for_everyone()
    journal.read()
    report = SkipReport()
    report.merge(dataset.index_report)
    records: list[dict] = []
    for index in range(len(dataset)):
        records += journal.done[index]["records"]
        report.merge(SkipReport.from_dict(journal.done[index]["skipped"]))
    if not records:
        nothing = f"The {len(dataset)} images have no object but those that the settings leave out, such as crowds."
        raise ValueError(f"nothing could be evaluated. {report.summary(dataset.num_images) if report else nothing}")
    return records, report, seconds


def _make_loader(batches: "_Batches", num_workers: int, device: torch.device) -> DataLoader:
    # Processes, not threads: decoding JSON, RLE and JPEG keeps the interpreter busy. Pinning uses a thread, which
    # receives the next batches meanwhile.
    pin_memory = num_workers > 0 and device.type == "cuda"
    return DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=_unchanged, pin_memory=pin_memory)


def _without_thin(
    model: PromptableModel, work: EvaluationTask, sample: Sample | None, inputs: Any, skipped: SkipReport
) -> tuple[Sample | None, Any, SkipReport]:
    """Return what was loaded of an image, or None, counted as skipped, for an image that the model cannot take."""
    if sample is None or not work.is_too_thin(model, sample):
        return sample, inputs, skipped
    report = SkipReport()
    report.add_image(SkipReason.TOO_THIN, sample.id)
    report.add_instances(SkipReason.IMAGE_SKIPPED, sample.id, len(sample.instances) + skipped.num_instances)
    return None, None, report


def _run_batch(model: PromptableModel, work: EvaluationTask, loaded: Sequence[tuple]) -> list[list[dict]]:
    """Return the records of each image of a batch that could be read."""
    samples = [sample for sample, _, _ in loaded if sample is not None]
    prepared = [inputs for sample, inputs, _ in loaded if sample is not None]
    encodes = samples and work.needs_embeddings
    encoded = model.encode([sample.image for sample in samples]) if encodes else [None] * len(samples)
    return work.batch(model, encoded, prepared)


class _Batches(Dataset):
    """Batches for a DataLoader: for each image the sample, the inputs that `prepare` returned, and the skip report."""

    def __init__(self, dataset: ImageDataset, batches: list[range], prepare: Callable[[Sample], Any]):
        self.dataset, self.batches, self.prepare = dataset, batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> list[tuple[Sample | None, Any, SkipReport]]:
        loaded = (self.dataset.load(index) for index in self.batches[place])
        return [(sample, None if sample is None else self.prepare(sample), skipped) for sample, skipped in loaded]


def _unchanged(batch):
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
