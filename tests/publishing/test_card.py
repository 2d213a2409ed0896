"""Model cards: every statement comes from a file, and unknown parts are called unknown."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import SamConfig, SamModel

from samlight_hf import SamLighteningModel, __version__
from samlight_hf.commands import cli
from samlight_hf.loading import weights_fingerprint
from samlight_hf.publishing.card import CITATION, SAM_CITATION, TEMPLATE, CardFacts, render_card
from samlight_hf.publishing.card_tables import architecture_rows
from samlight_hf.publishing.checks import FolderError
from tests.conftest import tiny_config


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "sam-lightening-tiny"
REPORT = ROOT / "benchmarks" / "results" / "evaluation_bsds500_val.json"
WITH_TEACHER = REPORT.with_name("evaluation_bsds500_second.json")  # of earlier weights
BENCHMARK = ROOT / "benchmarks" / "results" / "speed_h200.json"


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())


def test_the_bundled_card_is_what_the_command_makes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["--evaluation", str(REPORT.relative_to(ROOT)), "--benchmark", str(BENCHMARK.relative_to(ROOT))]
    command = ["card", str(CHECKPOINT.relative_to(ROOT)), *arguments]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == (CHECKPOINT / "README.md").read_text(encoding="utf-8"), (
        f"the card is out of date: samlight {' '.join(command)} --out {CHECKPOINT.relative_to(ROOT)}/README.md"
    )
    assert cli.main([*command, "--out", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_bytes() == (CHECKPOINT / "README.md").read_bytes()


@pytest.mark.parametrize("path", [REPORT, WITH_TEACHER], ids=["alone", "beside its teacher"])
def test_every_number_of_the_report_is_in_metadata_and_table(path, folder):
    text = render_card(CHECKPOINT, evaluation=path)
    results = {result.metric_name: result for result in ModelCard(text).data.eval_results}
    scores, settings = (json.loads(path.read_text())["models"][0][key] for key in ("scores", "settings"))
    assert bool(settings["extra"]) == (path == WITH_TEACHER)
    assert len(results) == 2 * len(scores) + len(settings["extra"])  # mIoU and boundary IoU; likeness to the teacher
    for protocol, score in scores.items():
        prompt, choice = protocol.split("/")
        result = results[f"mIoU ({prompt}, {choice} mask)"]
        assert result.metric_value == round(score["iou"]["mean"], 4)
        assert (result.metric_type, result.dataset_name, result.task_type) == (
            "mean_iou",
            "BSDS500 val",
            "mask-generation",
        )
        row = next(line for line in text.splitlines() if line.startswith(f"| {prompt} | {choice} |"))
        assert f"{score['iou']['mean']:.3f} [{score['iou']['low']:.3f}, {score['iou']['high']:.3f}]" in row
    num_masks = f"{settings['num_instances']:,} masks"
    for sentence in (settings["command"], settings["device"], settings["date"], *settings["protocols"], num_masks):
        assert sentence in text
    assert "evaluated as" not in text
    assert "evaluated as `sam-lightening-tiny`" in render_card(folder, evaluation=path)


def test_the_card_follows_its_report(report):
    """No number is part of the template."""
    changed = json.loads(json.dumps(report))
    changed["models"][0]["scores"] = {"box/single": {"iou": {"mean": 0.98765, "n": 3, "low": None, "high": None}}}
    changed["models"][0]["settings"] |= {"num_pictures": 1234, "device": "an abacus", "latency_ms": {"encoder": 77.123}}
    text = render_card(CHECKPOINT, evaluation=changed)
    assert "| box | single | 0.988 |" in text and "1,234 images" in text and "an abacus" in text and "77.12 ms" in text
    for value in ("0.693", "0.603", "H100", "boundary IoU", "3.03"):
        assert value not in text


def test_calibration_is_told_as_far_as_it_was_measured(report):
    """Old reports have the gap, but no calibration error."""
    changed = json.loads(json.dumps(report))
    iou = changed["models"][0]["scores"]["box/single"]["iou"]
    both = "; its expected calibration error, in ten bins, is 0.057"
    for measured, words in (({}, ""), ({"calibration_error": {"mean": 0.0567}}, both)):
        score = {"iou": iou, "calibration_gap": {"mean": 0.1234}, **measured}
        changed["models"][0]["scores"] = {"box/single": score}
        text = render_card(CHECKPOINT, evaluation=changed)
        assert f"off by 0.12 on average in the evaluation above (box, single mask){words}.\n" in text


def test_metadata(folder):
    facts = CardFacts.of(
        {
            "license": "apache-2.0",
            "base_model": "facebook/sam-vit-huge",
            "training_data": [{"name": "SA-1B", "id": "org/sa-1b", "terms": "research | only"}],
            "tags": ["seed"],
        }
    )
    text = render_card(folder, facts=facts, repo_id="org/my-student")
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "mask-generation",
        "model_name": "my-student", "base_model": "facebook/sam-vit-huge", "datasets": ["org/sa-1b"],
        "tags": ["segment-anything", "sam-lightening", "image-segmentation", "seed"],
    }  # fmt: skip
    assert "| SA-1B | research \\| only |" in text
    assert "https://huggingface.co/facebook/sam-vit-huge" in text


def test_what_nobody_wrote_down_is_said_to_be_unknown(folder):
    text = render_card(folder)
    assert "No results have been recorded" in text
    assert "licence of the weights has not been stated" in text
    assert "The training data have not been recorded." in text
    assert "Not measured" in text
    assert "license" not in ModelCard(text).data.to_dict()
    assert "None" not in text
    assert "{{" not in text.split("```bibtex")[0] and "{%" not in text


def test_architecture_is_read_from_config_and_weights(folder, model):
    text = render_card(folder)
    assert "layers 0, 2: the whole image" not in text  # their dilation rates differ
    assert (
        "layers 0: the whole image, dilation rate 2; layers 1: bands of 16 tokens; "
        "layers 2: the whole image, dilation rate 4"
    ) in text
    total = sum(parameter.numel() for parameter in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert f"| parameters | {total / 1e3:.1f}k" in text
    model.half().save_pretrained(folder)
    assert "| weights | float16," in render_card(folder)


def test_an_original_sam(tmp_path):
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        "output_channels": 32, "num_pos_feats": 16, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 32,
    }  # fmt: skip
    decoder = {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32}
    prompt = {"hidden_size": 32, "image_size": 32, "patch_size": 4}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(tmp_path)
    text = render_card(tmp_path, repo_id="org/teacher")
    assert "original [Segment Anything]" in text and "trust_remote_code" not in text
    assert "windows of 3, with relative positions; global in layers 1" in text
    for changes, attention in (
        ({"use_rel_pos": False}, "windows of 3, without relative positions; global in layers 1"),
        ({"window_size": 0}, "the whole image, with relative positions"),
    ):
        rows = architecture_rows(SamConfig(vision_config=vision | changes), {}, set(), 0)
        assert ["attention", attention] in rows
    assert CITATION not in text and SAM_CITATION in text


def test_a_step_of_a_training(folder):
    training = {
        "teacher": "facebook/sam-vit-huge",
        "stages": [{"stage": "decoder", "settings": {"max_steps": 20000, "learning_rate": 1e-4}}],
    }
    text = render_card(folder, step=1500, training=training)
    assert "**Step 1,500 of 20,000** of a training (stage `decoder`)" in text
    assert ModelCard(text).data.base_model == "facebook/sam-vit-huge"
    assert "| learning_rate | 0.0001 |" in text
    assert "Step" not in render_card(folder, training=training)
    assert "**Step 3**" in render_card(folder, step=3)


def test_results_of_several_stages_stand_side_by_side(folder, tmp_path):
    for stage, steps in (("encoder", 100), ("decoder", 20)):
        settings = {"stage": stage, "max_steps": steps, "bf16": True, "weight_decay": 0.05}
        content = {"stage": stage, "settings": settings, "train_loss": 0.123456, "seconds": 61.5}
        (tmp_path / f"{stage}.json").write_text(json.dumps(content))
    text = render_card(folder, training=[tmp_path / "encoder.json", tmp_path / "decoder.json"])
    for row in (
        "| setting | encoder | decoder |",
        "| max_steps | 100 | 20 |",
        "| bf16 | yes | yes |",
        "| train_loss | 0.1235 | 0.1235 |",
    ):
        assert row in text


def test_muon_is_said(folder):
    stages = [
        {"stage": "encoder", "muon": True, "optim": "adamw_torch_fused"},
        {"settings": {"muon": True}},
        {"muon": False, "optim": "sgd"},
    ]
    text = render_card(folder, training=stages)
    assert (
        "| optim | Muon for matrices, adamw_torch_fused for the rest | Muon for matrices, AdamW for the rest | sgd |"
        in text
    )


@pytest.mark.parametrize("teacher", ["outputs/teacher.pth", "/data/sam_vit_h.pth", "../teacher", 7])
def test_a_teacher_that_the_hub_does_not_know_is_no_base_model(folder, teacher):
    text = render_card(folder, training={"teacher": teacher, "stages": []})
    assert ModelCard(text).data.base_model is None
    assert "/data" not in text


def test_the_examples_run(folder, monkeypatch, tmp_path):
    """Run the card's code on a photograph."""
    text = render_card(CHECKPOINT, repo_id="org/student", revision="v1.0")
    for call in ("pipeline(", "AutoProcessor.from_pretrained(", "AutoModelForMaskGeneration.from_pretrained("):
        (line,) = (line for line in text.splitlines() if call in line)
        assert '"org/student", revision="v1.0", trust_remote_code=True)' in line
    shutil.copyfile(ROOT / "examples" / "images" / "cat.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    facts = CardFacts(thresholds={"pred_iou_thresh": -10.0, "stability_score_thresh": -1.0, "points_per_crop": 2})
    blocks = re.findall(r"```python\n(.*?)```", render_card("student", facts=facts), flags=re.S)
    assert len(blocks) == 2
    everything, box = {}, {}
    for block, variables in zip(blocks, (everything, box)):
        exec(compile(block, "README.md", "exec"), variables)
    assert all(mask.shape == (300, 451) for mask in everything["masks"]) and len(everything["masks"]) > 0
    assert box["masks"][0].shape == (1, 1, 300, 451)
    assert isinstance(box["model"], SamLighteningModel)


def test_places_on_ones_machine_are_left_out(folder, report):
    changed = json.loads(json.dumps(report))
    changed["models"][0]["settings"]["command"] = (
        "samlight evaluate --model /home/me/x/student --dataset=/data/a/val-000000.tar --out ~/r/report"
    )
    changed["models"][0]["settings"]["dataset"] = "/data/a/val-000000.tar"
    text = render_card(folder, evaluation=changed)
    assert "samlight evaluate --model student --dataset=val-000000.tar --out report" in text
    assert "/home" not in text and "/data" not in text
    assert "type: val-000000-tar" in text


def test_a_report_of_several_models(folder, report):
    two = json.loads(json.dumps(report))
    two["models"].append(json.loads(json.dumps(two["models"][0])))
    two["models"][1]["settings"]["model"] = "student"
    two["models"][1]["scores"] = {"box/single": {"iou": {"mean": 0.111, "low": 0.1, "high": 0.2, "n": 9}}}
    assert "0.111 [0.100, 0.200]" in render_card(folder, evaluation=two)
    for number, name in enumerate(("a/student", f"{folder.parent.name}/student")):  # as `samlight evaluate` names them
        two["models"][number]["settings"]["model"] = name
    text = render_card(folder, evaluation=two)
    assert "0.111 [0.100, 0.200]" in text and "evaluated as" not in text
    two["models"][1]["settings"]["model"] = "another"
    with pytest.raises(ValueError, match=r"a/student, another: none of them, or more than one, is student\."):
        render_card(folder, evaluation=two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_of_other_weights_are_called_so(folder, report, model, caplog, dtype):
    """The folder's name may be the same: a student that was trained further where it lay."""
    changed = json.loads(json.dumps(report))
    settings = changed["models"][0]["settings"]
    settings |= {"model": "student", "dtype": dtype, "weights": weights_fingerprint(model.to(getattr(torch, dtype)))}
    assert "other weights" not in render_card(folder, evaluation=changed) and not caplog.records
    settings["model"] = "a copy"
    assert "evaluated as" not in render_card(folder, evaluation=changed), "the same weights by another name"
    with torch.no_grad():
        model.float().vision_encoder.pos_embed += 1
    model.save_pretrained(folder)
    settings["model"] = "student"
    text = render_card(folder, evaluation=changed)
    assert "240 masks; **measured with other weights than these** (`student`)" in " ".join(text.split())
    assert "Evaluate student again" in caplog.text


def test_another_file_for_a_training_or_a_benchmark(folder):
    with pytest.raises(ValueError, match="no setting of a training"):
        render_card(folder, training=BENCHMARK)
    with pytest.raises(ValueError, match="no JSON of benchmarks/run.py"):
        render_card(folder, benchmark=REPORT)


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"format_version": 2, "models": [1]}'])
def test_another_file_for_a_report(folder, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json"):
        render_card(folder, evaluation=tmp_path / "report.json")


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"settings": {"model": "a"}},
        {"settings": {}, "scores": {}},
        {"settings": {"model": "a"}, "scores": {"box": {}}},
    ],
)
def test_a_report_that_lacks_what_a_card_needs(folder, tmp_path, entry, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"format_version": 1, "models": [entry]}))
    assert cli.main(["card", str(folder), "--evaluation", str(tmp_path / "report.json")]) == 1
    error = capsys.readouterr().err
    assert "lacks settings, with the model, or scores" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("licence: mit", "'licence' is not known"),
        ("license: [mit]", "license is a list"),
        ("training_data: [SA-1B]", "needs a name"),
        ("- a", "keys and values"),
        ("a: {", "cannot be read"),
        ("limits: 3", "limits is a int"),
        ("evaluation: {name: 5}", "name of evaluation is 5, which is no text"),
        ("evaluation: {nmae: COCO}", "'nmae' of evaluation is not known. Use some of name, id, split, note"),
        ("training_data: [{name: SA-1B, trems: research}]", "'trems' of training_data is not known"),
        ("training_data: [{name: 5}]", "name of training_data is 5"),
    ],
)
def test_facts_that_are_wrong(folder, content, words):
    (folder / "card.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        render_card(folder)


def test_secrets_are_refused(folder):
    facts = CardFacts(summary="Ask with hf_" + "aB3" * 12 + ".")
    with pytest.raises(FolderError, match=r"hf_aB3\.\.\.") as raised:
        render_card(folder, facts=facts)
    assert "aB3aB3" not in str(raised.value)


def test_folders_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(FolderError, match=r"no config\.json"):
        render_card(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FolderError, match=r"no model\.safetensors"):
        render_card(folder)


def test_no_network_is_asked(folder, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    assert render_card(folder, repo_id="org/student")


def test_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"], citation["type"]) == (__version__, "Apache-2.0", "software")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == re.findall(r"(\w+), \w+(?: and|\})", CITATION)
    assert paper["title"] in CITATION and "2403.09195" in paper["identifiers"][0]["value"]


def test_template_is_at_the_top_and_in_the_package():
    """Two files, not a link, because links do not survive every checkout and archive."""
    assert (ROOT / "model_card.md").read_bytes() == TEMPLATE.read_bytes(), "run `make sync`"
    for heading in (
        "What it is",
        "Use",
        "Results",
        "Training data and terms",
        "Limits and biases",
        "How fast",
        "Citation",
    ):
        assert f"## {heading}\n" in TEMPLATE.read_text(encoding="utf-8")


def test_speed_is_of_the_run_that_measured_it(tmp_path):
    """After three runs with --append, the rows of the encoder are those of the second one."""
    benchmark, path = json.loads(BENCHMARK.read_text()), tmp_path / "speed.json"
    head = {name: benchmark[name] for name in ("device", "versions")}
    runs = [
        {**head, "date": date, "command": f"command of {date}", "parts": parts}
        for date, parts in (("day 1", ["encoder", "peers"]), ("day 2", ["encoder"]), ("day 3", ["training"]))
    ]
    path.write_text(json.dumps({**runs[2], "earlier": runs[:2], "rows": benchmark["rows"]}))
    text = render_card(CHECKPOINT, benchmark=path)
    assert "day 2, torch" in text
    assert "`command of day 2`" in text
    assert "day 3" not in text


def test_speed_of_a_published_shape_alone(folder):
    text = render_card(CHECKPOINT, benchmark=BENCHMARK)
    rows = json.loads(BENCHMARK.read_text())["rows"]
    row = next(r for r in rows if r["part"] == "encoder" and r["mode"] == "optimize()")
    assert (
        f"| image encoder, {row['mode']} | bfloat16 | 1 | {row['ms']:.2f} ms | {row['peak_memory_mb']:.0f} MB |" in text
    )
    assert "Not measured" in render_card(folder, benchmark=BENCHMARK)
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    assert "H100" not in render_card(folder, benchmark=BENCHMARK)
