"""Part "evaluation" of run.py: boxes, and three clicks, of `samlight evaluate`, end to end.

python benchmarks/run.py evaluation --dataset val-000000.tar --out benchmarks/results/evaluation_h200.json
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from samlight_hf.data import load_dataset
from samlight_hf.evaluation.evaluator import Journal, evaluate
from samlight_hf.evaluation.models import PromptableModel
from samlight_hf.evaluation.protocols import InstanceProtocols, ProtocolSettings
from samlight_hf.loading import load_model


CUDA = torch.cuda.is_available()
PROMPTS = {"box/single": "box", "3 clicks/single": "clicks"}  # of protocols
BATCH_SIZE = 8


class Repeated:
    """A dataset whose images are repeated, for `evaluate`."""

    def __init__(self, dataset, times: int):
        self.dataset, self.times, self.index_report = dataset, times, dataset.index_report

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def load(self, index: int):
        return self.dataset.load(index % len(self.dataset))


def evaluation_rows(dataset_path: str, checkpoint: str, max_instances: int = 36, times: int = 3) -> Iterator[dict]:
    """Measure how many images are read, decoded, segmented and scored a second, after a warm-up.

    The start of a run (worker processes start and read a first batch) takes much of the time of a small dataset. A
    second row repeats the images; from the two follow the time of the start and the rate after it.
    """
    dataset = load_dataset(dataset_path, limit=None if CUDA else 8)
    dtypes = ("float32", "bfloat16") if CUDA else ("float32",)
    for dtype, (protocol, prompt), fast in itertools.product(dtypes, PROMPTS.items(), (False, True)):
        loaded = load_model(checkpoint, "auto", dtype)
        model = PromptableModel.optimized(*loaded, BATCH_SIZE) if fast else PromptableModel(*loaded)
        work = InstanceProtocols(ProtocolSettings((prompt,), ("single",), num_clicks=(3,), max_instances=max_instances))
        row = {"part": "evaluation", "protocol": protocol, "dtype": dtype, "optimize": fast}

        def measure(images, model=model, work=work, row=row) -> dict:
            before = sum(model.seconds.values())
            with tempfile.TemporaryDirectory() as folder:
                journal = Journal(Path(folder), "benchmark", {})
                records, _, seconds = evaluate(model, images, work, journal, BATCH_SIZE, num_workers=4 if CUDA else 2)
            return {
                **row, "pictures": len(images),
                "instances_per_picture": len(records) / len(images), "pictures_per_second": len(images) / seconds,
                "seconds_total": seconds, "seconds_model": sum(model.seconds.values()) - before,
            }  # fmt: skip

        measure(dataset)  # warm-up
        once, repeated = measure(dataset), measure(Repeated(dataset, times))
        steady = (times - 1) * len(dataset) / (repeated["seconds_total"] - once["seconds_total"])
        yield once
        yield {
            **repeated, "times_over": times, "pictures_per_second_under_way": steady,
            "seconds_to_start": once["seconds_total"] - len(dataset) / steady,
        }  # fmt: skip
