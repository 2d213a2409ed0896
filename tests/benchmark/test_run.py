"""`samlight benchmark`: its measurements, its summaries, and that a part that cannot run does not stop the others."""

import argparse
import json
import runpy
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samlight_hf import SamLighteningConfig, SamLighteningModel
from samlight_hf.benchmark import candidates, clicks, equality, masks, measure, peers, run, start, sustained
from samlight_hf.benchmark.encoders import (
    DILATED,
    FULL,
    FUSED_GRAPH,
    SAME_GROUPS,
    encoder_gflop,
    fused_encoder,
    resolution_patterns,
)
from samlight_hf.benchmark.head import head_rows
from samlight_hf.benchmark.kernels import kernels_of
from samlight_hf.benchmark.linear import CUDA, linear_rows
from samlight_hf.benchmark.report import check_targets, format_table
from samlight_hf.benchmark.run import PARTS, REPORT_PARTS, run_benchmark
from samlight_hf.benchmark.settings import Settings
from samlight_hf.commands.benchmark import PART_NAMES, add_benchmark_arguments, run_benchmark_command, settings_of
from samlight_hf.inference.predictor import Predictor
from tests.conftest import tiny_config


CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def tiny_settings(device: torch.device = CPU, **settings) -> Settings:
    sizes = {"prompt_counts": (1, 3), "resolutions": (16, 32), "image_sizes": ((20, 30),), "compile": False}
    return Settings(device, **{"config": tiny_config(), "training_batch_size": 2, **sizes, **settings})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch):
    """The large product and the large copy take a second, and are not needed for a tiny model."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(Settings, "ceiling", {"tflops": 0.1, "gb_per_s": 10.0})


@pytest.mark.slow
def test_every_part_of_ours_runs_on_a_cpu(tmp_path, checkpoint, capsys):
    settings = tiny_settings(checkpoint=checkpoint, images=ROOT / "examples" / "images")
    out, plot = tmp_path / "results" / "cpu.json", tmp_path / "cpu.png"
    parts = [
        name
        for name in PARTS
        if name not in ("peers", "attention", "projection", "linear", "head", "profile", "start", "sustained")
    ]
    result = run_benchmark(settings, parts, out, plot)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))  # lists for tuples
    for part in parts:
        measured = [row for row in result["rows"] if row["part"] == part and "cannot_run" not in row]
        assert measured, [row for row in result["rows"] if row["part"] == part]
        assert all(row["ms"] > 0 and row.get("repeats", 3) >= 3 for row in measured if "ms" in row)
        assert part in ("equality", "candidates") or any("ms" in row for row in measured)
    assert {row["num_prompts"] for row in result["rows"] if row["part"] == "decoder"} == {1, 3}
    plain = [row for row in result["rows"] if row["part"] == "equality" and row.get("mode") == "eager"]
    assert len(plain) == 4 and all(row["embedding_error"] == 0 and row["mask_iou_min"] == 1 for row in plain)
    rounded = [row for row in result["rows"] if row["part"] == "equality" and row.get("mode") in equality.FP8]
    assert len(rounded) == 4 * len(equality.FP8) and all(1e-3 < row["embedding_error"] < 0.1 for row in rounded)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "encoder, batch 1" not in capsys.readouterr().out  # targets are for GPUs
    run._print_summary(result, 0, with_targets=True)
    printed = capsys.readouterr().out
    assert "encoder, batch 1" in printed and "not measured" in printed


def test_what_cannot_run_is_recorded_and_the_rest_goes_on(tmp_path):
    def broken(settings):
        yield measure.attempt({"part": "broken", "row": 1}, lambda: torch.ones(2) @ torch.ones(3))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 5 GiB.")

    def sound(settings):
        yield measure.attempt({"part": "sound"}, lambda: {"ms": 1.0})

    out = tmp_path / "out.json"
    run_benchmark(tiny_settings(), ["broken", "sound"], out, available={"broken": broken, "sound": sound})
    _, row, end, after = json.loads(out.read_text())["rows"]
    assert row["cannot_run"].startswith("RuntimeError: ") and row["row"] == 1
    assert end == {
        "part": "broken",
        "cannot_run": "OutOfMemoryError: CUDA out of memory. Tried to allocate 5 GiB.",
    }
    assert after == {"part": "sound", "ms": 1.0}


def test_a_gpu_that_is_measured_is_the_current_one(monkeypatch):
    """Without a GPU, and with whatever asks for one replaced."""
    current = ["cuda:0"]

    @contextmanager
    def device(wanted):
        current.append(str(wanted))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Settings, "ceiling", {"tflops": 0.1, "gb_per_s": 10.0})
    monkeypatch.setattr(run, "_head", lambda settings, parts: {"device": "a GPU", "date": "today"})
    monkeypatch.setattr(run, "release_memory", lambda device: None)
    available = {"one": lambda settings: iter([{"part": "one", "current": current[-1]}])}
    rows = run_benchmark(tiny_settings(torch.device("cuda", 1)), ["one"], available=available)["rows"]
    assert rows[-1]["current"] == "cuda:1" and current == ["cuda:0"]


def test_clicks_are_measured_and_compared(tmp_path):
    settings = tiny_settings(image_sizes=((60, 80),))
    rows = run_benchmark(settings, ["clicks"], tmp_path / "out.json")["rows"][1:]
    assert [row["mode"] for row in rows] == ["distance transforms, one by one", "search by bounds"]
    assert all(row["same_clicks"] and row["ms"] > row["next_clicks_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_a_report_is_one_command_and_one_file(tmp_path, checkpoint, monkeypatch, capsys):
    """Every part of the report runs on a CPU, and its file has the machine, the versions and the sizes, and no path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "samlight_hf.commands.benchmark.settings_of",
        lambda args: tiny_settings(
            checkpoint=checkpoint, images=ROOT / "examples" / "images", image_sizes=((20, 30),), box_counts=(4, 9),
            points_per_side=2, folder_size=2,
        ),
    )  # fmt: skip
    monkeypatch.setattr(equality, "FP8", {})
    parser = argparse.ArgumentParser()
    add_benchmark_arguments(parser)
    assert run_benchmark_command(parser.parse_args(["--report"])) == 0
    text = (tmp_path / "samlight-report.json").read_text()
    report = json.loads(text)
    assert report["parts"] == list(REPORT_PARTS) and "samlight-report.json" in capsys.readouterr().out
    assert report["machine"]["cores"] >= 1 and report["machine"]["processor"]
    assert {"torch", "transformers", "python"} <= set(report["versions"])
    assert report["settings"]["dtype"] == "float32" and report["settings"]["box_counts"] == [4, 9]
    assert str(tmp_path) not in text and str(Path.home()) not in text
    rows = {part: [row for row in report["rows"] if row["part"] == part] for part in REPORT_PARTS}
    failed = {row["part"]: row["cannot_run"] for row in report["rows"] if "cannot_run" in row}
    assert not set(failed) - {"encoder"}, failed  # attention implementations for GPUs
    assert [row["mode"] for row in rows["start"]] == ["cold cache", "warm cache", "cold cache, graphs when needed"]
    assert all(row["optimize_seconds"] > 0 and row["first_mask_seconds"] > 0 for row in rows["start"])
    assert [row["num_boxes"] for row in rows["boxes"]] == [4, 9] and all(row["ms"] > 0 for row in rows["boxes"])
    assert {(row["mode"], row["dtype"]) for row in rows["candidates"]} == {("optimize()", "float32")}
    one, folder = rows["generation"]
    assert one["ms"] > 0 and folder["images_per_second"] > 0 and one["weights"] == checkpoint.name


def test_a_file_names_no_folder_of_its_owner(tmp_path, monkeypatch):
    """Neither the command nor the reason of a row that cannot run: it can be sent to others."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def fail(settings):
        raise OSError(f"{tmp_path / 'weights'} cannot be read")
        yield

    command = [str(tmp_path / "bin" / "samlight"), "--out", str(tmp_path / "a.json"), f"--images={tmp_path / 'photos'}"]
    for program, told in ((command[0], "samlight"), (str(tmp_path / "run.py"), "python run.py")):
        monkeypatch.setattr(sys, "argv", [program, *command[1:]])
        run_benchmark(tiny_settings(), ["bad"], tmp_path / "a.json", available={"bad": fail})
        text = (tmp_path / "a.json").read_text()
        assert json.loads(text)["command"] == f"{told} --out a.json --images=photos"
        assert "~/weights cannot be read" in text and str(tmp_path) not in text


def test_masks_of_everything_mode_are_those_above_the_thresholds_in_float32(tmp_path, checkpoint, monkeypatch):
    """Default thresholds keep the first mask alone, the low ones also the last, of which half is missing."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photograph.jpg")
    masks = torch.ones(3, 20, 30, dtype=torch.bool)
    expected = masks, torch.tensor([0.9, 0.9, 0.5]), torch.tensor([0.96, 0.5, 0.99])
    found = masks.clone(), torch.ones(3), torch.ones(3)
    found[0][2, :10] = False
    reference = SamLighteningModel
    monkeypatch.setattr(candidates, "_predict", lambda model, *_, **__: expected if type(model) is reference else found)
    rows = list(candidates.candidate_rows(tiny_settings(checkpoint=checkpoint, images=tmp_path, points_per_side=1)))
    rows = [row for row in rows if row["mode"] == "optimize()"]
    assert [(row["masks"], row["mask_iou_min"], row["masks_below_0.97"]) for row in rows] == [(1, 1, 0), (2, 0.5, 1)]
    assert [row["pred_iou_thresh"] for row in rows] == [0.88, 0.3] and rows[0]["dtype"] == "float32"


@pytest.mark.parametrize("option", ["--model", "--images"])
def test_a_folder_that_is_not_there_is_told_at_once(option, tmp_path):
    parser = argparse.ArgumentParser()
    add_benchmark_arguments(parser)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{option} .*nowhere: no such folder"):
        run_benchmark_command(parser.parse_args(["equality", option, str(tmp_path / "nowhere")]))


@pytest.mark.parametrize("arguments", [["encoder", "--report"], ["--report", "--append", "--out", "a.json"]])
def test_a_report_has_its_own_parts(arguments):
    parser = argparse.ArgumentParser()
    add_benchmark_arguments(parser)
    with pytest.raises(argparse.ArgumentTypeError, match="give no PART and no --append"):
        run_benchmark_command(parser.parse_args(arguments))


def test_a_process_that_fails_is_recorded(monkeypatch):
    monkeypatch.setattr(sys, "executable", str(ROOT / "no-such-python"))
    rows = list(start.start_rows(tiny_settings()))
    assert all("no-such-python" in row["cannot_run"] for row in rows) and len(rows) == 3


def test_the_median_of_the_processes_with_a_filled_cache_counts(monkeypatch):
    seconds = iter((8.0, 1.2, 0.8, 0.9, 0.1))
    monkeypatch.setattr(start, "_start_once", lambda *_: {"optimize_seconds": next(seconds)})
    rows = list(start.start_rows(tiny_settings()))
    assert [row["optimize_seconds"] for row in rows] == [8.0, 0.9, 0.1]
    assert rows[1]["optimize_seconds_of_each"] == [0.8, 0.9, 1.2]


def test_what_nvidia_smi_says_of_power_is_optional(monkeypatch):
    says = {"stdout": "698.12, 700.00, 1545\n"}
    monkeypatch.setattr(sustained.subprocess, "run", lambda *_, **__: SimpleNamespace(**says))
    assert sustained._power_and_clock("1-2") == {"power_w": 698.12, "power_limit_w": 700.0, "clock_mhz": 1545.0}
    says["stdout"] = "[N/A], 700.00, 1545\n"
    assert sustained._power_and_clock("1-2") == {}


def test_rows_are_written_as_they_come(tmp_path):
    out, seen = tmp_path / "out.json", []

    def part(settings):
        for number in range(3):
            yield {"part": "numbers", "number": number}
            seen.append(len(json.loads(out.read_text())["rows"]))

    run_benchmark(tiny_settings(), ["numbers"], out, available={"numbers": part})
    assert seen == [2, 3, 4]  # the ceiling's among them


def test_append_keeps_other_parts_and_replaces_its_own(tmp_path):
    out, available = tmp_path / "out.json", {}
    for number, parts in enumerate((["first", "second"], ["second"])):
        for name in parts:
            available[name] = lambda settings, p=name, n=number: [{"part": p, "run": n}]
        result = run_benchmark(tiny_settings(), parts, out, append=True, available=available)
    rows = [(row["part"], row.get("run")) for row in result["rows"]]
    assert rows == [("first", 0), ("ceiling", None), ("second", 1)]
    assert [head["parts"] for head in result["earlier"]] == [["first", "second"]] and result["parts"] == ["second"]


def test_gflop_are_those_of_the_architecture():
    """The count equals one by hand for the published shape: for each token its products and its attention."""
    width, tokens, layers = 384, 64 * 64, 6
    products = layers * 12 * width**2 + 16 * 16 * 3 * width + 256 * width + 9 * 256 * 256
    attended = 3 * 512 + 3 * 2048
    expected = 2 * tokens * (products + 2 * attended * width)
    assert encoder_gflop(SamLighteningConfig()) == pytest.approx(expected / 1e9, rel=1e-6)


def test_gflop_of_the_decoder_are_those_of_its_prompts():
    """Each of 4,096 places has ten projections, five attentions with seven tokens, two transposed convolutions, four
    masks.
    """
    config = SamLighteningConfig()
    place = 10 * 256 * 128 + 5 * 2 * 7 * 128 + 256 * 4 * 64 + 4 * 64 * 4 * 32 + 16 * 32 * 4
    assert masks.decoder_gflop(config, 1) == pytest.approx(2 * 4096 * place / 1e9, rel=0.02)
    assert masks.decoder_gflop(config, 16) == pytest.approx(16 * masks.decoder_gflop(config, 1), rel=1e-6)


def test_gflop_are_counted_where_autocast_is_off():
    """Modules like EfficientViT's attention are counted, which switch autocast off on the device of their tensors."""

    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x)

    assert measure.count_gflop(Exact(3, 5), torch.zeros(7, 3)) == pytest.approx(2e-9 * 7 * 3 * 5)


def test_kernels_that_start_early_count_from_the_end_of_the_one_before():
    """In each of two calls b starts 3 us before a ends; nothing runs for 5 us before a's second launch."""
    call = [(0.0, 10.0, "a"), (7.0, 15.0, "b"), (20.0, 21.0, "a")]
    spans = [(start + later, end + later, name) for later in (100.0, 200.0) for start, end, name in reversed(call)]
    assert kernels_of(spans, 2) == [
        {"kernel": "a", "launches": 2, "us": pytest.approx(11)},
        {"kernel": "b", "launches": 1, "us": pytest.approx(5)},
    ]


def test_patterns_of_one_resolution_differ_in_what_they_say():
    config = {
        name: SamLighteningConfig(vision_config={**layers, "image_size": 2048})
        for name, layers in resolution_patterns(2048, 16).items()
    }
    gflop = {name: encoder_gflop(config) for name, config in config.items()}
    assert gflop[DILATED] == gflop[SAME_GROUPS] < gflop[FULL] / 5


def test_time_calls_is_a_median_and_bounds_its_repeats():
    durations = iter([0.05, *[0.002] * 30, *[0.02, 0.001] * 200])
    timing = measure.time_calls(lambda: time.sleep(next(durations)), CPU, repeats=20, seconds=1)
    assert 2 <= timing["ms"] < 25 and timing["first_call_s"] >= 0.05 and 20 <= timing["repeats"] <= 100
    slow = measure.time_calls(lambda: time.sleep(0.1), CPU, repeats=20, seconds=0.2)
    assert slow["repeats"] == 5 and slow["ms"] >= 100


def test_a_graphs_launch_is_little_of_what_it_replays(monkeypatch):
    """A graph has calls of 0.02 ms in all for a function that takes 0.005 ms, and for one that takes 1 ms."""
    monkeypatch.setattr(measure, "capture", lambda function, calls: lambda: 0.02 + calls * function())
    monkeypatch.setattr(measure, "_cuda_ms", lambda replay: replay())
    monkeypatch.setattr(measure, "time_calls", lambda replay, device: {"ms": replay()})
    assert measure.graph_time_ms(lambda: 0.005, torch.device("cuda")) == pytest.approx(0.005, rel=0.02)
    assert measure.graph_calls(lambda: 1.0) == 10


def test_targets_say_how_far():
    h = {"part": "peers", "model": "SAM ViT-H", "mode": "eager", "batch_size": 1}
    rows = [
        {"part": "encoder", "mode": "eager", "batch_size": 1, "ms": 1.2, "images_per_second": 833},
        {"part": "encoder", "mode": "optimize()", "batch_size": 1, "ms": 0.5, "images_per_second": 2000},
        {"part": "encoder", "mode": "optimize()", "batch_size": 32, "ms": 8.0, "images_per_second": 4000},
        {**h, "attn_implementation": "sdpa", "dtype": "bfloat16", "ms": 50.0},
        {**h, "attn_implementation": "sdpa", "dtype": "bfloat16", "ms": 40.0, "mode": "CUDA graph"},
        {**h, "attn_implementation": "eager", "dtype": "float32", "cannot_run": "out of memory"},
        {"part": "prompt", "mode": "eager", "ms": 3.0, "serving_memory_mb": 90},
        {"part": "prompt", "mode": "optimize()", "ms": 0.6, "serving_memory_mb": 130, "picture_width": 1024},
        {"part": "prompt", "mode": "optimize()", "ms": 0.9, "serving_memory_mb": 230, "picture_width": 3000},
        {"part": "prompt", "mode": "eager", "step": "preprocessing", "ms": 0.1},
        *(
            {"part": "resolution", "image_size": 4096, "mode": "optimize()", "pattern": pattern, "ms": ms}
            for pattern, ms in ((FULL, 40.0), (DILATED, 5.0), (SAME_GROUPS, 4.0))
        ),
        *(
            {"part": "sustained", "dtype": dtype, "work": work, "images_per_second": rate}
            for dtype, work, rate in (
                ("bfloat16", sustained.PAUSE, 4000),
                ("bfloat16", sustained.WORK, 3600),
                ("float16", sustained.WORK, 9000),
            )
        ),
        *(
            {"part": "candidates", "mode": "optimize()", "dtype": dtype, "pred_iou_thresh": limit, "mask_iou_min": iou}
            for dtype, limit, iou in (("bfloat16", 0.88, 0.98), ("bfloat16", 0.3, 0.8), ("float16", 0.88, 0.9))
        ),
        *(
            {
                "part": "clicks", "mode": mode, "picture_height": height, "images_per_second_of_next_clicks": rate,
            }
            for mode, height, rate in (
                (clicks.SEARCH, 683, 90.0), (clicks.ON_GPU, 683, 40.0), (clicks.ON_GPU, 2000, 8.0)
            )
        ),
    ]  # fmt: skip
    checked = {row["target"]: row for row in check_targets(rows)}
    assert checked["encoder, batch 1"]["says"] == "missed by 51.5%"
    assert checked["encoder, best batch"]["met"] and checked["encoder, best batch, after a pause"]["met"]
    assert checked["encoder, best batch, in continuous work"]["value"] == 3600
    assert checked["masks of everything mode, lowest IoU of any"]["value"] == 0.98
    assert checked["clicks of 32 instances, 683x1024"]["value"] == 40
    sdpa, eager = (checked[name] for name in checked if name.startswith("SAM ViT-H"))
    assert sdpa["value"] == 80 and sdpa["says"] == "missed by 11.1%" and eager["says"] == "not measured"
    assert checked["image in to mask of one point"]["value"] == 0.9
    assert checked["4096 px: full attention against w=4096, r=4"]["value"] == 8
    assert checked["4096 px: dilation's overhead over the same groups"]["value"] == pytest.approx(25)
    assert checked["memory, one image (1024 px) and one prompt"]["value"] == 130  # of the mode that is that fast


def test_fp8_keeps_three_bits_of_each_number_and_each_rows_largest():
    values = torch.tensor([[448.0, 17.0, -1.0, 0.0], [44.8, 1.7, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    kept = torch.tensor([[448.0, 16.0, -1.0, 0.0], [44.8, 1.6, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(equality._to_fp8_and_back(values), kept)


def test_comparison_sees_a_difference():
    torch.manual_seed(0)
    reference = {
        "embeddings": torch.randn(1, 4, 2, 2),
        "logits": torch.randn(2, 3, 4, 4),
        "iou_scores": torch.rand(2, 3),
    }
    reference["masks"] = reference["logits"].flatten(0, 1) > 0
    found = {name: tensor.clone() for name, tensor in reference.items()}
    found["embeddings"] *= 1.01
    found["masks"][0] = ~found["masks"][0]
    compared = equality._compare(found, reference)
    assert compared["embedding_error"] == pytest.approx(0.01, rel=1e-3) and compared["logits_error"] == 0
    assert compared["mask_iou_min"] == 0 and compared["mask_iou_mean"] == pytest.approx(5 / 6)
    empty = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert equality.mask_iou(empty, empty).tolist() == [1.0]


def test_image_to_mask_is_the_predictors_best_mask(config, model):
    image_processor = make_processor(config.vision_config).image_processor
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mask = masks.image_to_mask(model, image_processor, image, (11.0, 7.0))
    prediction = Predictor(model, image_processor, output="torch").set_image(image).predict([[(11.0, 7.0)]])
    assert mask.shape == (20, 30)
    assert torch.equal(mask, prediction.masks[0, prediction.scores[0].argmax()])


def test_a_peer_that_cannot_be_built_is_one_row():
    backbone = peers.Backbone("no_such_backbone", "nobody", True)
    rows = list(peers._rows({"part": "peers"}, lambda: peers.make_backbone(backbone), tiny_settings(), ("eager",)))
    assert len(rows) == 1 and ("no_such_backbone" in rows[0]["cannot_run"] or "timm" in rows[0]["cannot_run"])


def test_peers_weights_are_not_nearly_zero(monkeypatch):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    monkeypatch.setitem(peers.SAM_SHAPES, "small", shape)
    with measure.building(CPU, torch.bfloat16):
        encoder = peers.make_sam("small", "sdpa")
    assert encoder.layers[0].mlp.lin1.weight.dtype == torch.bfloat16
    assert encoder.layers[0].mlp.lin1.weight.float().std() > 0.01
    assert torch.get_default_dtype() == torch.float32


def test_sam_makes_its_positions_where_a_graph_can_have_them(monkeypatch):
    """Operations are counted on "meta", where the positions that SAM creates on the CPU are real."""
    monkeypatch.setitem(
        peers.SAM_SHAPES, "small", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    device = torch.device("meta")
    with measure.building(device, torch.bfloat16):
        encoder = peers.make_sam("small", "sdpa").eval()
    pixel_values = torch.empty(1, 3, 1024, 1024, device=device, dtype=torch.bfloat16)

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            found.update(tensor.device for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor))
            return output

    for module, expected in ((encoder, {CPU, device}), (peers._MakesTensorsOn(device, encoder), {device})):
        found = set()
        with Devices():
            module(pixel_values)
        assert found == expected


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_benchmark_arguments(parser)
    return parser.parse_args(arguments)


def test_arguments_become_settings():
    assert list(PART_NAMES) == list(PARTS)
    settings = settings_of(parse("--device", "cpu", "--batch-sizes", "2", "4", "--compile", "--resolutions", "64"))
    assert (settings.batch_sizes, settings.resolutions, settings.compile) == ((2, 4), (64,), True)
    assert settings.prompt_counts == (1, 16) and settings.dtype == torch.float32
    with pytest.raises(argparse.ArgumentTypeError, match="no part is called encodr"):
        run_benchmark_command(parse("encodr"))
    with pytest.raises(argparse.ArgumentTypeError, match="--out"):
        run_benchmark_command(parse("--append"))


def test_the_script_runs_a_part_by_name(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    script = ROOT / "benchmarks" / "run.py"
    monkeypatch.setattr(sys, "argv", [str(script), "projection", "evaluation", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    result = json.loads(out.read_text())
    assert [row["part"] for row in result["rows"]] == ["ceiling", *["projection"] * 3, "evaluation"]
    assert all(row["error"] < 1e-5 for row in result["rows"][1:4])
    assert "--dataset" in result["rows"][4]["cannot_run"]


def test_table_puts_numbers_flush_right():
    lines = format_table(["name", "ms"], [["a", "1.5"], ["bcdefg", "10"]]).splitlines()
    assert lines == ["name     ms", "------  ---", "a       1.5", "bcdefg   10"]


@pytest.mark.gpu
def test_graphs_and_memory_on_a_gpu():
    device = torch.device("cuda")
    with measure.peak_memory(device) as memory:
        layer = nn.Linear(1024, 1024, bias=False, device=device)  # 4 MB
        values = measure.random_tensor((256, 1024), device, torch.float32)  # 1 MB
        output = torch.empty_like(values)
        with torch.inference_mode():
            replay = measure.capture(lambda: output.copy_(layer(values)))
            output.zero_()
            replay()
            torch.cuda.synchronize()
            assert measure.relative_error(output, layer(values)) < 1e-5
    assert 7 <= memory["peak_memory_mb"] <= memory["peak_reserved_mb"]


@pytest.mark.gpu
def test_linear_layers_and_the_fused_encoder_on_a_gpu():
    settings = Settings(torch.device("cuda"), batch_sizes=(1,))
    rows = list(linear_rows(settings))
    assert len(rows) == 15 and all(row["error"] < 6e-3 for row in rows if row["kernel"] != CUDA)
    assert all(row["error"] < 6e-3 for row in rows if "error" in row)
    with torch.inference_mode():
        assert fused_encoder(settings.config, settings)(
            torch.zeros(1, 3, 1024, 1024, device="cuda").bfloat16()
        ).shape == (1, 256, 64, 64)


@pytest.mark.gpu
def test_the_rate_after_a_pause_and_in_continuous_work_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sustained, "_SECONDS", 0.1)
    rows = list(sustained.sustained_rows(Settings(torch.device("cuda"), batch_sizes=(1, 8))))
    assert [(row["dtype"], row["batch_size"], row["work"]) for row in rows] == [
        (dtype, batch_size, work)
        for dtype in ("bfloat16", "float16")
        for batch_size in (1, 8)
        for work in (sustained.PAUSE, sustained.WORK)
    ]
    assert all(0.1 < row["ms"] < 100 for row in rows)
    told = [row for row in rows[1::2] if "power_w" in row]  # where there is nvidia-smi
    assert all(0 < row["power_w"] <= 1.2 * row["power_limit_w"] and row["clock_mhz"] > 0 for row in told)


@pytest.mark.gpu
def test_the_end_of_the_decoder_by_every_kernel_on_a_gpu():
    rows = list(head_rows(Settings(torch.device("cuda"), prompt_counts=(2,))))
    assert len(rows) == 2 * 2 * 3 and all(row["difference"] < 3e-3 for row in rows if row["kernel"] != CUDA)
    assert all(row["difference"] < 3e-3 for row in rows if "difference" in row)


@pytest.mark.gpu
def test_every_part_of_ours_runs_on_a_gpu(checkpoint):
    settings = tiny_settings(
        torch.device("cuda"), batch_sizes=(1, 2), checkpoint=checkpoint, images=ROOT / "examples" / "images"
    )
    parts = ["encoder", "decoder", "prompt", "resolution", "training", "equality", "candidates"]
    rows = run_benchmark(settings, parts)["rows"]
    # The tiny encoder is too narrow to be fused.
    failed = [
        row
        for row in rows
        if "cannot_run" in row and row.get("mode") != FUSED_GRAPH and "flash" not in row.get("attn_implementation", "")
    ]
    assert not failed
    assert {"CUDA graph", "optimize()"} <= {row.get("mode") for row in rows}
    assert all(row["peak_memory_mb"] > 0 for row in rows if row["part"] in ("encoder", "decoder") and "ms" in row)
