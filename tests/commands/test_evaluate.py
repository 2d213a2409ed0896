"""`samlight evaluate` as a user runs it, on small files in the layouts of SA-1B, COCO val2017 and LVIS v1."""

import gzip
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samlight_hf import SamLighteningModel
from samlight_hf.commands.cli import main
from samlight_hf.commands.evaluate import EVERYTHING
from samlight_hf.data import SkipReason
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.evaluation.models import PromptableModel
from samlight_hf.loading import load_model, weights_fingerprint
from tests.conftest import tiny_config
from tests.data.files import annotation, box_mask, jpeg, png, rle, sa1b_json, write_coco, write_tar


@pytest.fixture
def models(tmp_path):
    """Two tiny models; the second has other weights."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"model-{seed}"))
        SamLighteningModel(tiny_config()).save_pretrained(paths[-1])
    return paths


@pytest.fixture
def tar(tmp_path):
    members = {}
    for number in range(3):
        members[f"sa_{number}.jpg"] = jpeg(seed=number)
        members[f"sa_{number}.json"] = sa1b_json(
            annotation(2 * number), annotation(2 * number + 1, box_mask(1, 2, 20, 20))
        )
    return str(write_tar(tmp_path / "sa_000000.tar", members))


@pytest.fixture
def coco(tmp_path):
    """Annotations in the layout of instances_val2017.json, with a crowd, and their folder of images."""
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30} for i in (139, 285)]
    annotations = [
        {"id": 1, "image_id": 139, "category_id": 1, "iscrowd": 0, "area": 80, "bbox": [5, 4, 10, 8],
         "segmentation": [[5, 4, 15, 4, 15, 12, 5, 12]]},
        {"id": 2, "image_id": 285, "category_id": 2, "iscrowd": 0, "area": 400, "bbox": [1, 2, 20, 20],
         "segmentation": [[1, 2, 21, 2, 21, 22, 1, 22]]},
        {"id": 3, "image_id": 285, "category_id": 1, "iscrowd": 1, "area": 80, "bbox": [5, 4, 10, 8],
         "segmentation": rle(box_mask())},
    ]  # fmt: skip
    path, folder = write_coco(
        tmp_path, images, annotations, {image["file_name"]: jpeg(seed=image["id"]) for image in images}
    )
    content = {
        **json.loads(path.read_text()),
        "categories": [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "r"}],
    }
    path.write_text(json.dumps(content))
    return str(path), str(folder)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["evaluate", *map(str, arguments), "--device", "cpu", "--num-workers", "1"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def report(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_two_models_side_by_side(models, tar, tmp_path, capsys):
    out = tmp_path / "report"
    status, printed, _ = run(
        capsys, "--model", models[0], "--model", models[1], "--dataset", tar, "--clicks", 1, 2, "--boundary-iou",
        "--out", out,
        "--worst", 3,
    )  # fmt: skip
    assert status == 0
    assert "model-0" in printed and "model-1" in printed
    content = report(out)
    first, second = content["models"]
    assert set(first["scores"]) == {
        f"{p}/{c}" for p in ("box", "1 click", "2 clicks") for c in ("single", "predicted", "oracle")
    }
    assert first["scores"]["box/single"]["iou"]["n"] == 6
    assert first["scores"]["box/single"]["boundary_iou"]["mean"] is not None
    assert second["settings"]["num_pictures"] == 3
    assert second["settings"]["weights"] == weights_fingerprint(load_model(models[1], "cpu")[0])
    assert list(first["levels"]) == ["box", "1 click", "2 clicks"]
    of_click = first["levels"]["1 click"]["small"]  # all six objects are
    assert of_click["best"]["first"]["n"] == 6 and of_click["mean_area"]["third"]["mean"] is not None
    shares = [of_click["no_overlap"], *of_click["best"].values()]
    assert sum(share["mean"] for share in shares) == pytest.approx(1)
    assert sum(share["mean"] for share in of_click["predicted_best"].values()) == pytest.approx(1)
    assert "best: 1st, 2nd, 3rd" in printed
    assert "p_value" in content["comparisons"][0]["protocols"]["box/single"]
    names = {path.name for path in out.iterdir()}
    assert {
        "report.md",
        "iou_histogram.png",
        "iou_by_object_size.png",
        "iou_by_clicks.png",
        "latency_against_miou.png",
    } <= names
    assert [name for name in names if name.startswith("worst_")]
    page = (out / "report.md").read_text()
    for words in (
        "## Which of the three masks",
        "multimask_output=False",
        "deepest inside the mask",
        "crowd instances left out",
        "samlight evaluate --model",
    ):
        assert words in page
    with gzip.open(out / "records_model-0.jsonl.gz", "rt") as file:
        assert len(file.readlines()) == 6


def test_optimized_models_have_the_same_scores(models, tar, tmp_path, capsys):
    arguments = "--model", models[0], "--dataset", tar, "--clicks", 1, 3, "--no-plots", "--out"
    for folder, options in (("plain", ()), ("fast", ("--optimize",))):
        assert run(capsys, *arguments, tmp_path / folder, *options)[0] == 0
    plain, fast = (report(tmp_path / folder)["models"][0] for folder in ("plain", "fast"))
    assert fast["settings"]["weights"] == plain["settings"]["weights"]
    assert fast["scores"].keys() == plain["scores"].keys()
    for name, scores in fast["scores"].items():
        assert scores["iou"]["mean"] == pytest.approx(plain["scores"][name]["iou"]["mean"], abs=1e-3)
    assert "samlight_hf.optimize" in (tmp_path / "fast" / "report.md").read_text()
    assert "samlight_hf.optimize" not in (tmp_path / "plain" / "report.md").read_text()
    status, _, errors = run(capsys, *arguments, tmp_path / "fast")  # not with the records of --optimize
    assert status == 1 and "fast" in errors


def test_optimized_models_decode_in_fewer_operations(models, tar, tmp_path, capsys, monkeypatch):
    decoded = []
    decode = FastMaskDecoder.decode
    monkeypatch.setattr(FastMaskDecoder, "decode", lambda self, *a, **k: decoded.append(1) or decode(self, *a, **k))
    arguments = "--model", models[0], "--dataset", tar, "--clicks", 2, "--mask-choice", "single", "--no-plots", "--out"
    assert run(capsys, *arguments, tmp_path / "plain")[0] == 0 and not decoded
    assert run(capsys, *arguments, tmp_path / "fast", "--optimize")[0] == 0 and decoded


def test_what_cannot_be_optimized_is_told_in_one_line(models, tar, tmp_path, capsys, monkeypatch):
    reason = "it has no mask decoder of SAM's own architecture."

    def refuse(*arguments):
        raise ValueError(reason)

    monkeypatch.setattr(PromptableModel, "optimized", refuse)
    status, _, errors = run(
        capsys, "--model", models[0], "--dataset", tar, "--no-plots", "--out", tmp_path / "report", "--optimize"
    )
    assert status != 0 and f"--optimize is not for {models[0]}: {reason}" in errors


def test_started_again_it_computes_nothing_and_says_the_same(models, tar, tmp_path, capsys):
    arguments = ("--model", models[0], "--dataset", tar, "--clicks", 1, "--no-plots", "--out", tmp_path / "report")
    run(capsys, *arguments)
    first = report(tmp_path / "report")["models"][0]
    status, _, _ = run(capsys, *arguments)
    again = report(tmp_path / "report")["models"][0]
    assert status == 0
    assert again["scores"] == first["scores"]
    assert again["settings"]["latency_ms"]["encoder"] is None


def test_a_report_of_another_model_or_dataset_is_not_overwritten(models, tar, tmp_path, capsys):
    options = ("--dataset", tar, "--protocol", "box", "--no-plots", "--out", tmp_path / "report")
    run(capsys, "--model", models[0], *options)
    before = (tmp_path / "report" / "report.json").read_bytes()
    status, _, errors = run(capsys, "--model", models[1], *options)
    assert status == 2 and f"is the report of model-0 on {tar}. Choose another --out." in errors
    assert (tmp_path / "report" / "report.json").read_bytes() == before
    status, _, _ = run(capsys, "--model", models[0], "--model", models[1], *options)
    assert status == 0 and len(report(tmp_path / "report")["models"]) == 2


def test_numbers_of_another_config_with_the_same_weights_are_not_reported_again(models, tar, tmp_path, capsys):
    """Ablations of the attention's pattern change config.json alone."""
    arguments = (
        "--model",
        models[0],
        "--dataset",
        tar,
        "--protocol",
        "box",
        "--no-plots",
        "--out",
        tmp_path / "report",
    )
    assert run(capsys, *arguments)[0] == 0
    config = Path(models[0]) / "config.json"
    content = json.loads(config.read_text())
    content["transformers_version"] = "5.0.0"  # no mask depends on it
    config.write_text(json.dumps(content))
    assert run(capsys, *arguments)[0] == 0
    content["vision_config"]["dilation_rate"] = [1, 1, 1]
    config.write_text(json.dumps(content))
    status, _, errors = run(capsys, *arguments)
    assert status == 1 and "was written with another model_settings" in errors


def test_a_task_that_a_model_cannot_do_is_refused_before_another_is_done(models, tar, tmp_path, capsys, monkeypatch):
    from samlight_hf.evaluation import models as promptable

    monkeypatch.setitem(promptable.SUPPORTED, "sam_lightening", False)  # its frame is SAM 2's
    status, _, errors = run(
        capsys, "--model", models[0], "--dataset", tar, "--protocol", "box", "everything", "--no-plots",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert status == 1 and "everything mode takes SAM's frame" in errors
    assert not (tmp_path / "report").exists()


def test_a_journal_of_an_earlier_version_without_the_newest_measures_is_refused(models, tar, tmp_path, capsys):
    arguments = ("--model", models[0], "--dataset", tar, "--clicks", 1, "--no-plots", "--out", tmp_path / "report")
    run(capsys, *arguments)
    (journal,) = (tmp_path / "report/journal").glob("*.jsonl")
    header, *lines = map(json.loads, journal.read_text().splitlines())
    del header["records_version"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    status, _, said = run(capsys, *arguments)
    assert status == 1 and "was written with another records_version. Choose another --out" in said


@pytest.mark.parametrize("changed", ["dataset", "detections"])
def test_numbers_of_files_that_have_changed_are_not_reported_again(models, coco, tmp_path, capsys, changed):
    path, folder = coco
    detections = tmp_path / "boxes.json"
    box = {"image_id": 139, "category_id": 1, "bbox": [5, 4, 10, 8], "score": 0.9}
    detections.write_text(json.dumps([box]))
    arguments = (
        "--model", models[0], "--annotations", path, "--images", folder, "--protocol", "box",
        "--detections", detections, "--no-plots",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments)[0] == 0
    if changed == "dataset":
        content = json.loads(Path(path).read_text())
        content["annotations"][0]["segmentation"] = [[5, 4, 9, 4, 9, 12, 5, 12]]
        Path(path).write_text(json.dumps(content))
    else:
        detections.write_text(json.dumps([{**box, "bbox": [1, 2, 20, 20]}]))
    status, _, errors = run(capsys, *arguments)
    assert status == 1
    assert f"was written with another {changed}_content. Choose another --out" in errors


def test_a_tar_that_has_changed_is_noticed(models, tar, tmp_path, capsys):
    arguments = (
        "--model", models[0], "--dataset", tar, "--protocol", "box", "--no-plots", "--out", tmp_path / "report"
    )  # fmt: skip
    assert run(capsys, *arguments)[0] == 0
    os.utime(tar, ns=(0, 0))
    status, _, errors = run(capsys, *arguments)
    assert status == 1 and "another dataset_content" in errors


def test_a_folder_of_masks(models, tmp_path, capsys):
    masks = tmp_path / "mine" / "masks" / "a.png"
    for path, content in ((tmp_path / "mine" / "images" / "a.jpg", jpeg()), (masks, png(box_mask()))):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    arguments = (
        "--model", models[0], "--dataset", tmp_path / "mine", "--protocol", "box", "--no-plots",
        "--out", tmp_path / "report"
    )  # fmt: skip
    assert run(capsys, *arguments)[0] == 0
    masks.write_bytes(png(box_mask(1, 2, 20, 20)))
    status, _, errors = run(capsys, *arguments)
    assert status == 1 and "another dataset_content" in errors


def folder_of_masks(folder, **masks: bytes):
    for name, mask in masks.items():
        for path, content in ((f"images/{name}.jpg", jpeg()), (f"masks/{name}.PNG", mask)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    return folder


def test_mask_files_of_grey_levels_and_void(models, tmp_path, capsys):
    grey = np.tile(np.clip(8 * np.abs(np.arange(40) - 20) - 20, 0, 255), (30, 1)).astype(np.uint8)
    void = np.where(box_mask(), 7, np.where(box_mask(1, 1, 20, 20), 255, 0)).astype(np.uint8)
    mine = folder_of_masks(tmp_path / "mine", grey=png(grey), void=png(void))
    arguments = ("--model", models[0], "--dataset", mine, "--protocol", "box", "--no-plots", "--out")

    def skipped(out, *options):
        status, _, errors = run(capsys, *arguments, tmp_path / out, *options)
        assert status == 0, errors
        settings = report(tmp_path / out)["models"][0]["settings"]
        return settings["num_instances"], settings["skipped"], errors

    number, reasons, errors = skipped("a")
    assert number == 1
    assert reasons == {f"image, {SkipReason.GREY_MASK}": 1, f"instance, {SkipReason.VOID_LABEL}": 1}
    assert "grey.jpg (masks/grey.PNG)" in errors and "threshold it" in errors
    assert skipped("b", "--ignore-label", "none")[:2] == (2, {f"image, {SkipReason.GREY_MASK}": 1})
    assert skipped("c", "--ignore-label", 255)[:2] == (1, {f"image, {SkipReason.GREY_MASK}": 1})
    assert skipped("d", "--binary-masks")[:2] == (2, {})
    status, _, errors = run(capsys, *arguments, tmp_path / "a", "--ignore-label", "none")
    assert status == 1 and "was written with another mask_reading" in errors


def test_a_folder_of_grey_levels_alone_is_refused_by_name_in_one_line(models, tmp_path, capsys):
    grey = np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))
    mine = folder_of_masks(tmp_path / "mine", a=png(grey))
    status, _, errors = run(
        capsys, "--model", models[0], "--dataset", mine, "--protocol", "box", "--no-plots", "--out", tmp_path / "a"
    )
    assert status == 1 and "Caught" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("samlight: error: nothing could be evaluated.") and "a.jpg (masks/a.PNG)" in last


def test_how_mask_files_are_read_goes_with_mask_files(models, tar, tmp_path, capsys):
    for options, said in (
        (("--binary-masks",), "they go with a folder with images/ and masks/"),
        (("--ignore-label", "255"), "they go with a folder with images/ and masks/"),
        (("--ignore-label", "void"), "--ignore-label: ignore_label=void must be a label's number, auto or none"),
        (("--ignore-label", "255", "--binary-masks"), "give one of them"),
    ):
        status, _, errors = run(capsys, "--model", models[0], "--dataset", tar, "--out", tmp_path / "a", *options)
        assert status == 2 and said in errors


def test_coco_with_a_detectors_boxes_a_teacher_and_everything(models, coco, tmp_path, capsys):
    """Run the README's commands for COCO val2017 on files of the same layout."""
    boxes = [
        {"image_id": 139, "category_id": 1, "bbox": [5, 4, 10, 8], "score": 0.9},
        {"image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1},
        {"image_id": 139, "category_id": 0, "bbox": [5, 4, 10, 8], "score": 0.9},
    ]
    (tmp_path / "vitdet.json").write_text(json.dumps(boxes))
    status, printed, errors = run(
        capsys, "--model", models[0], "--annotations", coco[0], "--images", coco[1], "--protocol", "box", "everything",
        "--points-per-side", 3, "--detections", tmp_path / "vitdet.json", "--teacher", models[1], "--no-plots",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert status == 0
    (result,) = report(tmp_path / "report")["models"]
    assert result["scores"]["box/single"]["iou"]["n"] == 2  # without the crowd
    extra = result["settings"]["extra"]
    assert {"AP all", "AP50", "AR@1000 all", "embedding cosine", "mIoU with the teacher's masks, box/single"} <= set(
        extra
    )
    assert "AP all" in printed
    page = (tmp_path / "report" / "report.md").read_text()
    assert "1 boxes of other images left out; 1 boxes of categories that" in page
    assert "warning" in errors and "1 boxes of categories that" in errors


def test_an_image_that_cannot_be_read_counts_in_no_score(models, coco, tmp_path, capsys, monkeypatch):
    """Predict masks that fill their boxes, as the annotations do: AP is 1 on the images that can be read."""
    from samlight_hf.evaluation.models import PromptableModel

    def filled(model, encoded, boxes_xyxy, multimask_output):
        masks = [box_mask(x, y, right - x, bottom - y) for x, y, right, bottom in boxes_xyxy.int().tolist()]
        return SimpleNamespace(masks=torch.tensor(np.array(masks))[:, None])

    monkeypatch.setattr(PromptableModel, "predict", filled)
    annotations = json.loads(Path(coco[0]).read_text())["annotations"]
    boxes = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in annotations[:2]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (image,) = Path(coco[1]).glob("*139.jpg")
    image.write_bytes(image.read_bytes()[:200])
    status, _, _ = run(
        capsys, "--model", models[0], "--annotations", coco[0], "--images", coco[1], "--protocol", EVERYTHING,
        "--points-per-side", 2,
        "--detections", tmp_path / "boxes.json", "--no-plots", "--out", tmp_path / "report",
    )  # fmt: skip
    assert status == 0
    settings = report(tmp_path / "report")["models"][0]["settings"]
    assert settings["num_pictures"] == 1
    assert settings["extra"]["AP all"] == pytest.approx(1.0)


def test_what_ap_lacks_is_said_before_anything_is_evaluated(models, coco, tmp_path, capsys):
    content = json.loads(Path(coco[0]).read_text())
    del content["categories"]
    Path(coco[0]).write_text(json.dumps(content))
    box = {"image_id": 139, "category_id": 1, "bbox": [5, 4, 10, 8], "score": 0.9}
    (tmp_path / "boxes.json").write_text(json.dumps([box]))
    status, _, errors = run(
        capsys, "--model", models[0], "--annotations", coco[0], "--images", coco[1],
        "--detections", tmp_path / "boxes.json",
        "--no-plots", "--out", tmp_path / "report",
    )  # fmt: skip
    assert status == 1 and "no categories" in errors
    assert not (tmp_path / "report").exists()


def test_lvis(models, coco, tmp_path, capsys):
    """Evaluate LVIS v1: coco_url instead of file_name, categories by frequency, federated annotations."""
    path, folder = coco
    content = json.loads(Path(path).read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    lvis = tmp_path / "lvis_v1_val.json"
    lvis.write_text(json.dumps(content))
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"image_id": 139, "category_id": 1, "bbox": [5, 4, 10, 8], "score": 0.9}])
    )
    status, printed, _ = run(
        capsys, "--model", models[0], "--annotations", lvis, "--images", folder, "--protocol", "box",
        "--mask-choice", "single",
        "--detections", tmp_path / "boxes.json", "--lvis", "--include-crowd", "--no-plots",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert status == 0
    assert "AP frequent" in printed
    assert report(tmp_path / "report")["models"][0]["scores"]["box/single"]["iou"]["n"] == 3


def test_everything_alone(models, tar, tmp_path, capsys):
    status, printed, _ = run(
        capsys, "--model", models[0], "--dataset", tar, "--protocol", "everything", "--points-per-side", 2,
        "--no-plots", "--out", tmp_path / "report"
    )  # fmt: skip
    assert status == 0
    assert "AR@1000 all" in printed and "masks per image" in printed
    page = (tmp_path / "report" / "report.md").read_text()
    assert "no instance was evaluated" not in printed + page and "No score is missing." in page


def test_everything_in_crops_and_tiles(models, tar, tmp_path, capsys):
    everything = ["--protocol", "everything", "--points-per-side", 1, "--limit", 1, "--no-plots"]
    base = ["--model", models[0], "--dataset", tar, *everything]
    options = ["--crops-n-layers", 1, "--tile", 20, "--overlap", 4]
    status, printed, _ = run(capsys, *base, *options, "--out", tmp_path / "report")
    assert status == 0
    found = float(re.search(r"masks per image (\S+)", printed)[1])
    page = (tmp_path / "report" / "report.md").read_text()
    assert "1x1 points, crops_n_layers=1, in tiles of 20 px with an overlap of 4" in page
    assert float(re.search(r"masks per image (\S+)", run(capsys, *base, "--out", tmp_path / "plain")[1])[1]) < found
    status, _, errors = run(capsys, *base, "--tile", 20, "--overlap", 8, "--out", tmp_path / "report")
    assert status == 1 and "crops_n_layers, tiles" in errors  # another measurement is not mixed with this one
    for wrong, said in (
        (["--tile", 20, "--overlap", 20], "overlap=20 of tiles must be smaller than their size=20"),
        (["--overlap", 4], "--overlap is for tiles"),
        (["--points-per-side", 0], "'0' is not a positive integer"),
        (["--tile", 20, "--protocol", "box"], "add --protocol everything"),
    ):
        status, _, errors = run(capsys, *base, *wrong, "--out", tmp_path / "wrong")
        assert status == 2 and said in errors


def test_what_was_skipped_is_told(models, tmp_path, capsys):
    tar = write_tar(
        tmp_path / "bad.tar",
        {"a.jpg": jpeg(), "a.json": sa1b_json(annotation(1)), "b.jpg": jpeg()[:200],
         "b.json": sa1b_json(annotation(2)), "c.jpg": jpeg()},
    )  # fmt: skip
    status, _, errors = run(
        capsys, "--model", models[0], "--dataset", tar, "--protocol", "box", "--no-plots", "--out", tmp_path / "report"
    )
    assert status == 0
    assert "warning" in errors and "skipped" in errors
    settings = report(tmp_path / "report")["models"][0]["settings"]
    assert sum(count for reason, count in settings["skipped"].items() if reason.startswith("image")) == 2
    assert settings["num_pictures"] == 1


def test_ctrl_c_says_that_the_same_command_goes_on(models, tar, tmp_path, capsys, monkeypatch):
    from samlight_hf.evaluation import evaluator

    def interrupt(*arguments):
        raise KeyboardInterrupt

    arguments = ("--model", models[0], "--dataset", tar, "--clicks", 1, "--no-plots", "--out", tmp_path / "report")
    with monkeypatch.context() as context:
        context.setattr(evaluator, "evaluate", interrupt)
        status, _, errors = run(capsys, *arguments)
    assert (status, errors) == (130, "samlight: interrupted: the same command goes on where it stopped.\n")
    assert run(capsys, *arguments)[0] == 0


@pytest.mark.parametrize("package", ["accelerate", "pycocotools", "faster_coco_eval", "matplotlib"])
def test_a_package_that_is_missing_is_told_before_anything_is_evaluated(models, tar, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, errors = run(capsys, "--model", models[0], "--dataset", tar, "--protocol", "everything")
    (line,) = errors.splitlines()
    assert status == 2 and package in line and "pip install 'samlight-hf[eval]'" in line


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "--dataset"),
        (["--dataset", "{tar}", "--annotations", "x.json"], 2, "--dataset"),
        (["--dataset", "{tar}", "--detections", "x.json"], 2, "--annotations"),
        (["--dataset", "nowhere.tar"], 1, "nowhere.tar"),
        (["--dataset", "{empty}"], 1, "no image that can be used"),
        (["--dataset", "{tar}", "--batch-size", "0"], 2, "--batch-size: '0' is not"),
        (["--dataset", "{tar}", "--lvis"], 2, "--detections"),
        (["--dataset", "{tar}", "--pred-iou-thresh", "0.5"], 2, "--protocol everything"),
        (["--dataset", "{tar}", "--clicks", "0"], 2, "--clicks: '0' is not"),
        (["--dataset", "{tar}", "--max-instances", "-1"], 2, "--max-instances: '-1' is not"),
        (["--annotations", "{coco}"], 2, "--annotations and --images"),
        (["--dataset", "{tar}", "--out", "{tar}"], 2, "--out {tar} is a file"),
        (["--dataset", "{tar}", "--model", "{model}"], 2, "twice"),
        (["--dataset", "{tar}", "--model", "nowhere"], 1, "nowhere"),
        (["--annotations", "{coco}", "--images", "{images}", "--detections", "{other}"], 1, "none of its 1 boxes"),
    ],
)
def test_bad_input_is_refused_in_one_line(models, tar, coco, tmp_path, capsys, arguments, status, said):
    empty = write_tar(tmp_path / "empty.tar", {})
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}]))
    names = {"tar": tar, "empty": empty, "model": models[0], "coco": coco[0], "images": coco[1], "other": other}
    arguments = [argument.format(**names) for argument in arguments]
    found, _, errors = run(capsys, "--model", models[0], "--out", tmp_path / "report", *arguments, "--no-plots")
    assert found == status
    assert said.format(**names) in errors
    assert len(errors.strip().splitlines()) == 1


def test_models_in_folders_of_one_name_are_told_apart(models, tar, tmp_path, capsys):
    paths = [tmp_path / name / "student" for name in ("first", "second")]
    for model, path in zip(models, paths):
        shutil.copytree(model, path)
    status, _, _ = run(
        capsys, "--model", paths[0], "--model", paths[1], "--dataset", tar, "--protocol", "box", "--no-plots",
        "--out", tmp_path / "report"
    )  # fmt: skip
    assert status == 0
    names = [result["settings"]["model"] for result in report(tmp_path / "report")["models"]]
    assert names == ["first/student", "second/student"]


def test_models_whose_files_would_have_one_name_are_refused_at_once(models, tar, tmp_path, capsys):
    paths = [tmp_path / "a b", tmp_path / "a_b"]
    for model, path in zip(models, paths):
        shutil.copytree(model, path)
    status, _, errors = run(
        capsys, "--model", paths[0], "--model", paths[1], "--dataset", tar, "--no-plots", "--out", tmp_path / "report"
    )
    assert status == 2
    assert "would not tell apart" in errors and str(paths[0]) in errors
    assert not (tmp_path / "report").exists()


def test_a_model_of_another_kind_is_refused(tar, tmp_path, capsys):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    status, _, errors = run(
        capsys, "--model", tmp_path / "clip", "--dataset", tar, "--no-plots", "--out", tmp_path / "report"
    )
    assert status == 1
    assert "model_type='clip_vision_model'" in errors
