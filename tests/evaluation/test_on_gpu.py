"""On a GPU the evaluation gives the CPU's numbers, waits for the device once a batch, and measures the model's time."""

import itertools
import time

import pytest
import torch

from samlight_hf.evaluation import protocols
from samlight_hf.evaluation.evaluator import Journal, evaluate
from samlight_hf.evaluation.models import PromptableModel
from samlight_hf.evaluation.protocols import InstanceProtocols, ProtocolSettings
from samlight_hf.evaluation.timing import ForwardTimer


pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(promptable):
    return PromptableModel(promptable.model.to("cuda"), promptable.processor, prompts_per_batch=3)


def test_records_are_those_of_the_cpu(promptable, dataset, monkeypatch):
    """Both devices get the same embeddings, because resizing rounds gray levels differently."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    work = InstanceProtocols(ProtocolSettings(num_clicks=(1,), with_boundary_iou=True))
    samples = [dataset[index] for index in range(3)]
    prepared = [work.prepare(sample) for sample in samples]
    encoded = promptable.encode([sample.image for sample in samples])
    on_cpu = work.batch(promptable, encoded, prepared)
    promptable.model.to("cuda")
    for each in encoded:
        each.embeddings = {name: tensor.to("cuda") for name, tensor in each.embeddings.items()}
    on_gpu = work.batch(promptable, encoded, prepared)
    for ours, theirs in zip(itertools.chain(*on_gpu), itertools.chain(*on_cpu), strict=True):
        assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=1e-3)
        assert ours["iou"] == pytest.approx(theirs["iou"], abs=2e-2)  # a pixel on the threshold may flip


def test_a_dataset(on_gpu, dataset, tmp_path):
    work = InstanceProtocols(ProtocolSettings(num_clicks=(1, 2)))
    records, _, seconds = evaluate(on_gpu, dataset, work, Journal(tmp_path, "model", {}), batch_size=2)
    instances = [i.id for index in range(len(dataset)) for i in dataset[index].instances if not i.is_crowd]
    assert [record["instance"] for record in records] == instances
    assert all(0 <= iou <= 1 for record in records for iou in record["iou"].values())
    assert 0 < sum(on_gpu.seconds.values()) < seconds


@pytest.mark.parametrize("fast", [False, True])
def test_instances_are_prompted_and_scored_without_a_wait(on_gpu, dataset, fast):
    if fast:
        on_gpu = PromptableModel.optimized(on_gpu.model, on_gpu.processor, batch_size=2)
    settings = ProtocolSettings(num_clicks=(1, 3), with_boundary_iou=True)
    work = InstanceProtocols(settings)
    samples = [dataset[0], dataset[3]]
    encoded = on_gpu.encode([sample.image for sample in samples])
    pieces = [(each, work.prepare(sample)) for each, sample in zip(encoded, samples, strict=True)]

    def score():
        scores = [protocols._Scores(True) for _ in pieces]
        protocols._box_protocol(on_gpu, pieces, scores, settings)
        for (image, piece), piece_scores in zip(pieces, scores, strict=True):
            protocols._click_protocol(on_gpu, image, piece, piece_scores, settings)
        return scores

    for _ in range(3):  # kernels are tried, graphs captured, and libraries wait when they start
        expected = score()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = score()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, expected = (protocols._records([piece for _, piece in pieces], each) for each in (scores, expected))
    assert found == expected


def test_the_devices_time_is_counted_behind_the_hosts_back():
    timer, device = ForwardTimer(), torch.device("cuda")
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        with timer.measure("sleep", device):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
    queued = time.perf_counter() - start
    seconds = timer.seconds("sleep")
    waited = time.perf_counter() - start
    assert queued < 0.5 * waited
    assert seconds == pytest.approx(waited, rel=0.2)
    assert timer.seconds("other") == 0.0
