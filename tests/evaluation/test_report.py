"""The report shows every number with its protocol, names what is missing, and leaves only complete files."""

import gzip
import json
import math
import os
import sys

import numpy as np
import pytest
from PIL import Image

import samlight_hf.evaluation.worst_cases as drawing
from samlight_hf.evaluation.report import ModelResult, console_table, worst_cases, write_report
from samlight_hf.utils import atomic_files as files


PROTOCOLS = tuple(
    f"{prompt}/{taken}" for prompt in ("box", "1 click", "3 clicks") for taken in ("single", "predicted", "oracle")
)
SENTENCES = ["Box: the true mask's box is the prompt, instance mean.", "Clicks: the first lies deepest in the mask."]
PLOTS = "iou_histogram.png", "iou_by_object_size.png", "iou_by_clicks.png", "latency_against_miou.png"


def result_of(name="org/model", gain=0.0, num_images=25, protocols=PROTOCOLS, **settings) -> ModelResult:
    generator = np.random.default_rng(0)
    records = []
    for number in range(4 * num_images):
        iou = {protocol: float(np.clip(generator.normal(0.5 + gain, 0.1), 0, 1)) for protocol in protocols}
        records.append({
            "picture": f"sa_{number // 4}", "instance": number, "area": (300, 5000, 20_000)[number % 3],
            "width": 64, "height": 48, "iou": iou, "boundary_iou": {key: 0.8 * value for key, value in iou.items()},
            "predicted_iou": dict.fromkeys(iou, 0.5),
        })  # fmt: skip
    settings = {
        "model": name, "dataset": "toy set", "protocols": SENTENCES, "command": f"samlight evaluate --model {name}",
        "date": "2026-11-24", "device": "cpu", "dtype": "float32", "versions": {"torch": "2.11.0"},
        "skipped": {"zero area": 3}, "num_pictures": num_images, "num_instances": len(records),
        "seconds": {"model": 1.5, "total": 2.0}, "latency_ms": {"encoder": 12.5, "decoder": 4.0},
        "extra": {"COCO AP": 0.3333333}, **settings,
    }  # fmt: skip
    return ModelResult(settings, records)


def with_levels(result: ModelResult) -> ModelResult:
    """Add which of three masks was taken: the second is the best, the third the predicted best; areas are 0.5, 1, 2."""
    for record in result.records:
        record["mask_index"] = {key: 1 if "oracle" in key else 2 for key in record["iou"] if "single" not in key}
        record["relative_area"] = {"1 click/first": 0.5, "1 click/second": 1.0, "1 click/third": 2.0}
    return result


def read(folder):
    def no_constants(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=no_constants)


@pytest.fixture
def forget_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_report_holds_settings_scores_comparisons_and_records(tmp_path):
    first, second = result_of(), result_of("org/better", gain=0.1)
    page = write_report(tmp_path / "new" / "folder", [first, second], plots=False)
    folder = page.parent
    written = read(folder)
    assert [model["settings"] for model in written["models"]] == [first.settings, second.settings]
    assert written["models"][1]["scores"] == second.scores
    assert set(written["models"][0]["scores"]) == set(PROTOCOLS)
    [comparison] = written["comparisons"]
    assert (comparison["baseline"], comparison["model"]) == ("org/model", "org/better")
    assert comparison["protocols"]["box/single"]["p_value"] < 0.001
    assert comparison["protocols"]["box/single"]["difference"] == pytest.approx(0.1, abs=0.01)
    for model, result in zip(written["models"], (first, second)):
        with gzip.open(folder / model["records"], "rt") as file:
            assert [json.loads(line) for line in file] == result.records


def test_page_has_one_table_with_models_side_by_side_below_the_protocols(tmp_path):
    text = write_report(tmp_path, [result_of(), result_of("a|b", gain=0.1)], plots=False).read_text()
    score = result_of().score("1 click/predicted")
    row = next(line for line in text.splitlines() if line.startswith("| 1 click | best predicted IoU | 100 |"))
    assert f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in row
    assert "p < 0.001" in row
    assert text.index(SENTENCES[0]) < text.index(SENTENCES[1]) < text.index(row)
    assert "a\\|b mIoU" in text
    for told in ("toy set", "cpu", "float32", "2026-11-24", "2.11.0", "samlight evaluate --model org/model", "95%"):
        assert told in text
    assert "| skipped: zero area | 3 | 3 |" in text
    assert "| extra: COCO AP | 0.3333 | 0.3333 |" in text
    assert "No score is missing." in text and "worded differently" not in text and "fewer than 20" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_which_of_the_three_masks_is_told_by_prompt_size_and_model(tmp_path):
    results = [with_levels(result_of()), with_levels(result_of("b"))]
    text = write_report(tmp_path, results, plots=False).read_text()
    row = "| 0%, 100%, 0% | 0%, 0%, 100% | 0.50, 1.00, 2.00 | 0% |"
    for part, number in (("all", 100), ("small", 34), ("medium", 33), ("large", 33)):
        for name in ("org/model", "b"):
            assert f"| 1 click | {part} | {name} | {number} {row}" in text
            assert f"| 3 clicks | {part} | {name} | {number} {row.replace('0.50, 1.00, 2.00', 'missing')}" in text
    levels = read(tmp_path)["models"][1]["levels"]
    assert list(levels) == ["box", "1 click", "3 clicks"]
    expected = {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 33}
    assert levels["1 click"]["large"]["best"]["second"] == expected
    *_, header, rule, box, _, click, _, three, _ = console_table(results).splitlines()
    assert header.startswith("prompt") and set(rule) == {"-", " "}
    for line, prompt, areas in (
        (box, "box", "missing"),
        (click, "1 click", "0.50, 1.00, 2.00"),
        (three, "3", "missing"),
    ):
        assert line.startswith(prompt) and " ".join(line.split()).endswith(f"0%, 100%, 0% 0%, 0%, 100% {areas} 0%")
    assert "Which of the three" not in write_report(tmp_path, [result_of()], plots=False).read_text()


def test_models_that_were_asked_differently_are_told_apart(tmp_path):
    text = write_report(tmp_path, [result_of(), result_of("b", protocols=PROTOCOLS[:3])], plots=False).read_text()
    assert "b, mIoU: not evaluated (1 click/single" in text
    other = result_of("c")
    other.settings["protocols"] = ["Boxes of a detector."]
    text = write_report(tmp_path, [result_of(), other], plots=False).read_text()
    assert "worded differently" in text and "Boxes of a detector." in text


def test_missing_numbers_are_said(tmp_path):
    whole, broken = result_of(), result_of("broken", extra={"COCO AP": math.nan}, versions={"torch": np.float32(2)})
    broken.records[5]["iou"]["box/single"] = math.nan
    broken.records[6]["predicted_iou"] = None
    for name in ("protocols", "skipped", "device"):
        del broken.settings[name]
    broken.settings["num_instances"] = 101
    text = write_report(tmp_path, [whole, broken]).read_text()
    assert "broken, mIoU: 1 of 100 values are missing or not finite, first: image sa_1, instance 5 (box/single)" in text
    for measure in ("gap", "error"):
        assert f"broken, calibration {measure}: 1 of 100 values are missing" in text
    assert "num_instances is 101, but there are 100 records" in text
    assert "Protocol missing" in text
    assert "| skipped: zero area | 3 | missing |" in text
    assert "| extra: COCO AP | 0.3333 | missing |" in text
    assert "| device | cpu | missing |" in text
    assert "broken is not comparable with org/model where it says so: 1 of 100" in text
    scores = read(tmp_path)["models"][1]["scores"]
    assert scores["box/single"]["iou"]["mean"] is None and scores["box/single"]["iou"]["reason"]
    assert scores["box/oracle"]["iou"]["mean"] is not None
    assert "broken, mIoU: 1 of 100" in console_table([whole, broken])


def test_one_image_and_none(tmp_path):
    text = write_report(tmp_path, [result_of(num_images=1)], plots=False).read_text()
    assert "no interval: one image" in text and "Images: 1. With fewer than 20" in text
    nothing = result_of(num_images=0)
    text = write_report(tmp_path, [nothing, result_of("b", num_images=0)]).read_text()
    assert "no instance was evaluated (all protocols)" in text and "No IoU histogram: no model has a mean IoU." in text
    assert "no instance was evaluated" in console_table([nothing])


def test_plots_are_drawn_and_shown(tmp_path):
    text = write_report(
        tmp_path, [result_of(), result_of("b", 0.1), result_of("c", latency_ms={"encoder": 1.0})]
    ).read_text()
    for name in PLOTS:
        assert f"]({name})" in text
        with Image.open(tmp_path / name) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(2**20)) > 20
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_plots_that_cannot_be_drawn_say_why(tmp_path):
    text = write_report(tmp_path, [result_of(protocols=PROTOCOLS[:6], latency_ms=None)]).read_text()
    assert "No IoU by clicks: fewer than two numbers of clicks were evaluated." in text
    assert "No latency against mIoU: no model has the latencies of both" in text
    assert not (tmp_path / "iou_by_clicks.png").exists()


def test_without_matplotlib_nothing_is_written_but_plots_can_be_left_out(tmp_path, forget_matplotlib):
    with pytest.raises(ImportError, match=r"samlight-hf\[eval\]"):
        write_report(tmp_path / "report", [result_of()])
    assert not (tmp_path / "report").exists()
    assert "No plots: not asked for." in write_report(tmp_path, [result_of()], plots=False).read_text()


def test_interrupted_writing_leaves_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path, [result_of()], plots=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, [result_of(gain=0.2)], plots=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_same_results_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, [result_of()], plots=False)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("results", [[], ["org/x", "org/x"], ["org/x", "org--x"]])
def test_no_models_and_models_of_one_name_are_refused(tmp_path, results):
    with pytest.raises(ValueError, match="at least one model|name of its own"):
        write_report(tmp_path, [result_of(name, num_images=1) for name in results], plots=False)


def test_console_table_is_aligned_plain_text():
    lines = console_table([result_of(), result_of("b", gain=0.1)]).splitlines()
    assert len(lines) == 2 + 2 * len(PROTOCOLS)
    assert lines[0].split("  ")[0] == "prompt" and set(lines[1]) == {"-", " "}
    small = [f"{score['mean']:.3f}" for score in (result_of().scores["box/single"]["by_size"]["small"],)]
    assert lines[0].split()[-6:] == ["small", "medium", "large", "minus", "the", "first"]
    assert lines[2].split()[-3] == small[0] and len(lines[2].split()[-1]) == 5
    start = lines[0].index("mIoU")
    assert all(line[start:].startswith("0.") for line in lines[2:])
    assert "p < 0.001" in lines[3] and "p <" not in lines[2]


def square(left, top, size=20) -> np.ndarray:
    mask = np.zeros((48, 64), dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_worst_cases_draw_the_lowest_first_a_sheet_at_a_time(tmp_path):
    result = result_of()
    result.records[0]["iou"]["box/single"] = math.nan
    drawn = []

    def draw_inputs(record):
        drawn.append(record)
        return Image.new("RGB", (64, 48), "grey"), square(5, 5), square(40, 20), {"boxes_xyxy": [(5, 5, 25, 25)]}

    paths = worst_cases(tmp_path, result, draw_inputs, "box/single", num_cases=23)
    assert [path.name for path in paths] == [f"worst_org--model_box--single_{number}.png" for number in (1, 2)]
    iou = [record["iou"]["box/single"] for record in drawn]
    assert iou == sorted(record["iou"]["box/single"] for record in result.records[1:])[:23]
    with Image.open(paths[0]) as first, Image.open(paths[1]) as second:
        assert first.height > second.height
    assert f"]({paths[1].name})" in write_report(tmp_path, [result], paths, plots=False).read_text()


def test_contours_lie_where_the_masks_end():
    image = Image.new("RGB", (64, 48), (90, 90, 90))
    panel = np.asarray(drawing._draw_case(image, square(4, 14), square(40, 14), None, "here"))
    scale = panel.shape[1] / 64  # both masks and their surroundings are the whole image
    for colour, left in ((drawing._TRUE_COLOUR, 4), (drawing._PREDICTED_COLOUR, 40)):
        rows, columns = np.nonzero((panel == colour).all(axis=2))
        found = np.array([columns.min(), columns.max(), rows.min(), rows.max()]) / scale
        assert found == pytest.approx([left, left + 20, 14, 34], abs=1)
    assert (panel[round(24 * scale), round(14 * scale)] == 90).all()  # nothing is painted inside


@pytest.mark.parametrize("masks", [(square(0, 0, 0), square(0, 0, 0)), (square(60, 44), square(0, 0, 1))])
def test_empty_masks_and_masks_at_the_border_can_be_drawn(masks):
    prompts = {"points_xy": [(63, 47)], "boxes_xyxy": [(60, 44, 64, 48)]}
    assert drawing._draw_case(Image.new("L", (64, 48)), *masks, prompts, "here").mode == "RGB"


def test_worst_cases_refuse_what_does_not_fit(tmp_path):
    result = result_of(num_images=1)
    with pytest.raises(ValueError, match="no protocol 'box/best', only: box/single"):
        worst_cases(tmp_path, result, None, "box/best")
    with pytest.raises(ValueError, match=r"image sa_0, instance \d: a mask is \(48, 64\)"):
        turned = square(0, 0).T
        worst_cases(tmp_path, result, lambda _: (Image.new("RGB", (64, 48)), turned, turned, None), "box/single")
