import json
import pickle

import pytest

from samlight_hf.data import SkipReason, load_dataset
from samlight_hf.evaluation.average_precision import EverythingTask
from samlight_hf.evaluation.evaluator import Journal, evaluate
from samlight_hf.evaluation.fidelity import Fidelity
from samlight_hf.evaluation.protocols import InstanceProtocols, ProtocolSettings
from samlight_hf.evaluation.tasks import EvaluationTask
from tests.data.files import annotation, box_mask, counts, jpeg, sa1b_json, write_tar
from tests.launcher import ROOT, backends, launch, output_of, torchrun


SETTINGS = ProtocolSettings(num_clicks=(1, 2), with_crowd=True)
EXAMPLE = ROOT / "examples" / "evaluate.py"


def run(promptable, dataset, folder, settings=SETTINGS, batch_size=2, num_workers=2):
    journal = Journal(folder, "model", {"model": promptable.fingerprint(), **settings.to_dict()})
    return evaluate(promptable, dataset, InstanceProtocols(settings), journal, batch_size, num_workers)


def test_records_are_in_the_order_of_the_dataset(promptable, dataset, tmp_path):
    records, report, seconds = run(promptable, dataset, tmp_path / "journal")
    expected = [(sample.id, instance.id) for sample in dataset.samples(report) for instance in sample.instances]
    assert [(record["picture"], record["instance"]) for record in records] == expected
    assert seconds > 0
    assert promptable.count["encoder"] == len(dataset)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 1), (100, 4)])
def test_batches_and_workers_change_nothing(promptable, dataset, tmp_path, batch_size, num_workers):
    records, _, _ = run(promptable, dataset, tmp_path / "a")
    others, _, _ = run(promptable, dataset, tmp_path / "b", batch_size=batch_size, num_workers=num_workers)
    for ours, theirs in zip(records, others, strict=True):
        assert ours["iou"] == pytest.approx(theirs["iou"], abs=2e-2)  # a pixel on the threshold may flip


def test_an_interrupted_run_goes_on(promptable, dataset, tmp_path):
    expected, _, _ = run(promptable, dataset, tmp_path / "whole")
    run(promptable, dataset, tmp_path / "half")
    (path,) = (tmp_path / "half").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])  # two images are done, and the third's line was cut off
    promptable.count["encoder"] = 0
    records, _, _ = run(promptable, dataset, tmp_path / "half")
    assert records == expected
    assert promptable.count["encoder"] == 3
    promptable.count["encoder"] = 0
    assert run(promptable, dataset, tmp_path / "half")[0] == expected
    assert promptable.count["encoder"] == 0


def test_what_is_done_before_an_error_is_kept(promptable, dataset, tmp_path):
    class Failing(InstanceProtocols):
        def batch(self, model, encoded, prepared):
            if promptable.count["encoder"] > 2:
                raise RuntimeError("out of memory")
            return super().batch(model, encoded, prepared)

    journal = Journal(tmp_path / "half", "model", {"model": promptable.fingerprint(), **SETTINGS.to_dict()})
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(promptable, dataset, Failing(SETTINGS), journal, batch_size=2)
    promptable.count["encoder"] = 0
    assert run(promptable, dataset, tmp_path / "half")[0] == run(promptable, dataset, tmp_path / "whole")[0]
    assert promptable.count["encoder"] == 3 + 5


def test_workers_get_what_they_need_and_no_model(promptable):
    prepare = pickle.loads(pickle.dumps(InstanceProtocols(SETTINGS).prepare))
    assert prepare.__self__.settings == SETTINGS
    assert pickle.loads(pickle.dumps(Fidelity(promptable).prepare)) is EvaluationTask.prepare


def test_a_journal_of_other_settings_is_refused(promptable, dataset, tmp_path):
    run(promptable, dataset, tmp_path)
    with pytest.raises(ValueError, match="written with another num_clicks. Choose another --out"):
        run(promptable, dataset, tmp_path, ProtocolSettings(num_clicks=(1,), with_crowd=True))
    with pytest.raises(ValueError, match="written with another model"):
        next(promptable.model.parameters()).data += 1.0
        run(promptable, dataset, tmp_path)


def test_bad_data_is_counted_once_and_left_out(promptable, tmp_path):
    tar = write_tar(
        tmp_path / "bad.tar",
        {
            "a.jpg": jpeg(), "a.json": sa1b_json(annotation(1)),
            "b.jpg": jpeg()[:300], "b.json": sa1b_json(annotation(2)),
            "c.jpg": jpeg(),
            "c.json": sa1b_json(annotation(3), annotation(4, segmentation={"size": [9, 9], "counts": "0"})),
            "d.jpg": jpeg(),
        },
    )  # fmt: skip
    for attempt in range(2):  # the second time from the journal alone
        records, report, _ = run(promptable, load_dataset(tar), tmp_path / "journal")
        assert [record["instance"] for record in records] == [1, 3], attempt
        assert {reason: s.count for reason, s in report.images.items()} == {
            SkipReason.BROKEN_IMAGE: 1,
            SkipReason.MISSING_JSON: 1,
        }
        assert sum(s.count for s in report.instances.values()) == 2


@pytest.mark.parametrize("task", [InstanceProtocols(SETTINGS), EverythingTask(2)], ids=["instances", "everything"])
def test_an_image_that_is_too_thin_for_the_model_is_skipped(promptable, tmp_path, task):
    mask = box_mask(0, 0, 9, 1, image=(1, 3000))
    members = {"a.jpg": jpeg(), "a.json": sa1b_json(annotation(1)), "b.jpg": jpeg(3000, 1)}
    tar = write_tar(tmp_path / "thin.tar", {**members, "b.json": sa1b_json(annotation(2, mask), width=3000, height=1)})
    journal = Journal(tmp_path / "journal", "model", {})
    records, report, _ = evaluate(promptable, load_dataset(tar), task, journal, batch_size=2, num_workers=0)
    assert {record["picture"] for record in records} == {"a"}
    assert counts(report) == ({SkipReason.TOO_THIN: 1}, {SkipReason.IMAGE_SKIPPED: 1})


def test_nothing_to_evaluate_is_an_error(promptable, tmp_path):
    tar = write_tar(tmp_path / "empty.tar", {"a.jpg": jpeg(), "a.json": sa1b_json()})
    with pytest.raises(ValueError, match="nothing could be evaluated. The 1 images have no object"):
        run(promptable, load_dataset(tar), tmp_path / "journal")


@pytest.mark.parametrize("backend", backends())
def test_two_processes_equal_one(promptable, tar, tmp_path, backend):
    """Run torchrun with two ranks, as `accelerate launch` would; the reports have the same scores."""
    is_cuda = backend == "nccl"
    arguments = [
        "--model", promptable.model.name_or_path, "--dataset", tar, "--clicks", "1", "--batch-size", "2", "--no-plots",
        "--device", "auto" if is_cuda else "cpu", "--include-crowd", "--num-workers", "1",
    ]  # fmt: skip
    for count in (1, 2):
        printed = torchrun(EXAMPLE, count, *arguments, "--out", tmp_path / str(count), cuda=is_cuda)
        assert printed.count("Report:") == 1
    one, two = (json.loads((tmp_path / count / "report.json").read_text())["models"][0] for count in "12")
    assert two["scores"] == one["scores"] and two["levels"] == one["levels"]
    assert (" x 2" in two["settings"]["device"]) and (" x 2" not in one["settings"]["device"])
    assert len(list((tmp_path / "2" / "journal").glob("*.jsonl"))) == 2


_KILLED = """
import os, runpy, signal, sys
from samlight_hf.evaluation.protocols import InstanceProtocols

batch, calls = InstanceProtocols.batch, []

def killed(self, *arguments):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, *arguments)

InstanceProtocols.batch = killed
sys.argv = ["evaluate.py", *sys.argv[1:]]
runpy.run_path("examples/evaluate.py", run_name="__main__")
"""


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_the_same_command_goes_on(promptable, tar, tmp_path):
    (tmp_path / "killed.py").write_text(_KILLED)
    arguments = [
        "--model", promptable.model.name_or_path, "--dataset", tar, "--clicks", "1", "--batch-size", "1", "--no-plots",
        "--device", "cpu", "--num-workers", "1", "--out", tmp_path / "report",
    ]  # fmt: skip
    process = launch(tmp_path / "killed.py", 2, *arguments)
    _, complaints = output_of(process)
    assert process.returncode != 0
    (line,) = (line for line in complaints.splitlines() if "samlight: error" in line)
    assert "another process" in line and line.endswith("The same command goes on where it stopped.")
    lines = [path.read_text().splitlines() for path in sorted((tmp_path / "report/journal").glob("*.jsonl"))]
    assert [len(each) for each in lines] in ([1 + n, 1 + 1] for n in (1, 2, 3))  # a header, and what was done
    assert "Report:" in torchrun(EXAMPLE, 1, *arguments)
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert content["models"][0]["settings"]["num_pictures"] == 5
