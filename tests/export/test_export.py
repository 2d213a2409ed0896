"""Exported folders: the layout of transformers.js, the values of torch, other precisions, and bad input."""

import copy
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import SamLighteningModel, optimize
from samlight_hf.conversion import resize_processor
from samlight_hf.data import SyntheticScenes, load_dataset
from samlight_hf.export import OnnxRunner, TorchRunner, check_folder, export_onnx, mean_iou, precision
from samlight_hf.export.graphs import export_encoder
from tests.conftest import tiny_config
from tests.conversion.test_student import sam_teacher

from .conftest import small_model


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    SyntheticScenes(1, image_size=64)[0].image.crop((0, 0, 64, 48)).save(path)
    return path


def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")


def test_names_inputs_and_outputs_are_those_of_transformers_js(exported):
    folder, _, _ = exported
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json", "onnx/prompt_encoder_mask_decoder.onnx", "onnx/vision_encoder.onnx", "preprocessor_config.json",
    ]  # fmt: skip
    encoder, decoder = session(folder, "vision_encoder"), session(folder, "prompt_encoder_mask_decoder")
    assert {i.name: i.shape for i in encoder.get_inputs()} == {"pixel_values": ["batch_size", 3, 32, 32]}
    assert [o.name for o in encoder.get_outputs()] == ["image_embeddings", "image_positional_embeddings"]
    assert {i.name: (i.shape, i.type) for i in decoder.get_inputs()} == {
        "input_points": (["batch_size", "point_batch_size", "nb_points_per_image", 2], "tensor(float)"),
        "input_labels": (["batch_size", "point_batch_size", "nb_points_per_image"], "tensor(int64)"),
        "image_embeddings": (["batch_size", 32, 8, 8], "tensor(float)"),
        "image_positional_embeddings": (["batch_size", 32, 8, 8], "tensor(float)"),
    }
    assert [i.name for i in decoder.get_overridable_initializers()] == ["input_masks", "has_input_masks"]
    assert [o.name for o in decoder.get_outputs()] == ["iou_scores", "pred_masks"]

    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "sam" and config["architectures"] == ["SamModel"] and "auto_map" not in config
    assert config["vision_config"]["image_size"] == 32
    assert config["onnx_export"]["opset"] == 18 and config["onnx_export"]["exported_from"] == "sam_lightening"
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] == "SamImageProcessor"
    assert preprocessor["processor_class"] == "SamProcessor"
    assert preprocessor["size"] == {"longest_edge": 32} and preprocessor["pad_size"] == {"height": 32, "width": 32}


def test_opset_is_what_was_asked_for_and_no_path_of_this_machine_is_in_the_files(exported):
    for path in (exported[0] / "onnx").iterdir():
        graph = onnx.load(path)
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
        assert b"site-packages" not in path.read_bytes() and str(ROOT).encode() not in path.read_bytes()


@pytest.mark.parametrize(("batch_size", "num_prompts", "num_points"), [(1, 1, 1), (1, 5, 2), (2, 1, 3), (3, 2, 1)])
@pytest.mark.parametrize("kind", ["points", "boxes", "both", "masks"])
def test_equals_torch_for_any_number_of_images_prompts_and_points(exported, kind, batch_size, num_prompts, num_points):
    folder, model, _ = exported
    random = np.random.default_rng(0)
    pixel_values = random.normal(size=(batch_size, 3, 32, 32)).astype(np.float32)
    prompts = {}
    if kind != "boxes":
        prompts["points"] = random.uniform(0, 32, (batch_size, num_prompts, num_points, 2)).astype(np.float32)
        prompts["labels"] = random.integers(-1, 2, (batch_size, num_prompts, num_points))
    if kind in ("boxes", "both"):
        prompts["boxes"] = random.uniform(0, 32, (batch_size, num_prompts, 4)).astype(np.float32)
    if kind == "masks":
        prompts["masks"] = random.normal(size=(batch_size, 1, 32, 32)).astype(np.float32)
    results = []
    for runner in (TorchRunner(model), OnnxRunner(folder)):
        results.append(runner.decode(runner.encode(pixel_values), **prompts))
    for expected, actual in zip(*results):
        assert expected.shape == actual.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_one_mask_for_several_images_is_broadcast(exported):
    folder, _, _ = exported
    random = np.random.default_rng(0)
    runner = OnnxRunner(folder)
    embeddings = runner.encode(random.normal(size=(2, 3, 32, 32)).astype(np.float32))
    mask = random.normal(size=(1, 1, 32, 32)).astype(np.float32)
    prompt = {"points": np.full((2, 1, 1, 2), 9, np.float32), "labels": np.ones((2, 1, 1), np.int64)}
    one, two = (runner.decode(embeddings, **prompt, masks=masks)[1] for masks in (mask, mask.repeat(2, 0)))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one - runner.decode(embeddings, **prompt)[1]).max() > 1e-3


def test_check_passes_and_finds_a_wrong_weight(exported, photograph, tmp_path):
    folder, model, processor = exported
    result = check_folder(folder, model, processor, photograph)
    assert result.failure is None and result.max_difference < 1e-3 and result.min_iou >= 0.999 and result.prompts == 5

    other = SamLighteningModel(tiny_config()).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.mask_decoder.upscale_conv2.bias.add_(0.5)
    assert "logits differ" in check_folder(folder, other, processor, photograph).failure


@pytest.mark.slow
def test_other_precisions(exported, photograph, tmp_path):
    _, model, processor = exported
    dynamic, static = tmp_path / "dynamic", tmp_path / "static"
    export_onnx(model, processor, dynamic, ("fp16", "int8", "uint8"))
    export_onnx(model, processor, static, ("int8",), calibration=[photograph])
    scenes = SyntheticScenes(2, image_size=64)
    reference, _ = mean_iou(TorchRunner(model), processor, scenes)
    for folder, dtype in ((dynamic, "fp16"), (dynamic, "int8"), (dynamic, "uint8"), (static, "int8")):
        result = check_folder(folder, model, processor, photograph, dtype)
        assert result.max_difference > 0 and result.failure is None
        score, num_instances = mean_iou(OnnxRunner(folder, dtype), processor, scenes)
        assert abs(score - reference) < 0.1 and num_instances == sum(len(scene.instances) for scene in scenes)

    def operators(folder, dtype):
        return {node.op_type for node in onnx.load(folder / "onnx" / f"vision_encoder_{dtype}.onnx").graph.node}

    assert "DynamicQuantizeLinear" in operators(dynamic, "int8") and "QuantizeLinear" not in operators(dynamic, "int8")
    assert "QuantizeLinear" in operators(static, "int8") and "DynamicQuantizeLinear" not in operators(static, "int8")
    graph = onnx.load(dynamic / "onnx" / "vision_encoder_int8.onnx").graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [weights[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 13 and set(products) == {onnx.TensorProto.INT8}  # patches, and four in each layer
    config = json.loads((dynamic / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp16"}


@pytest.mark.slow
def test_coordinates_are_not_rounded_to_float16(exported, tmp_path):
    _, model, processor = exported
    export_onnx(model, processor, tmp_path / "half", ("fp16",))
    nodes = onnx.load(tmp_path / "half" / "onnx" / "prompt_encoder_mask_decoder_fp16.onnx").graph.node
    producers = {output: node for node in nodes for output in node.output}
    waiting = [node for node in nodes if node.op_type in ("Sin", "Cos")]
    assert waiting
    while waiting:
        node = waiting.pop()
        assert not (
            node.op_type == "Cast" and any(attribute.i == onnx.TensorProto.FLOAT16 for attribute in node.attribute)
        )
        waiting += [producers[name] for name in node.input if name in producers]


@pytest.mark.slow
def test_a_sam_of_transformers_exports_at_another_opset(photograph, tmp_path):
    model = sam_teacher()
    processor = make_processor(model.config.vision_config)
    export_onnx(model, processor, tmp_path / "sam", opset=20)
    assert check_folder(tmp_path / "sam", model, processor, photograph).failure is None
    assert onnx.load(tmp_path / "sam" / "onnx" / "vision_encoder.onnx").opset_import[0].version == 20


@pytest.mark.slow
def test_weights_too_large_for_one_file_stand_beside_it(exported, photograph, tmp_path, monkeypatch):
    _, model, processor = exported
    monkeypatch.setattr(precision, "LARGEST_FILE", 10_000)
    export_onnx(model, processor, tmp_path / "large", ("fp32", "int8"))
    names = {path.name for path in (tmp_path / "large" / "onnx").iterdir()}
    assert {"vision_encoder.onnx_data", "prompt_encoder_mask_decoder_int8.onnx_data"} <= names and len(names) == 8
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"]["vision_encoder.onnx"] == 1
    assert check_folder(tmp_path / "large", model, processor, photograph).failure is None


def packages_without_torch(folder: Path) -> Path:
    """Link the packages that the example needs, and what they need, into a folder."""
    folder.mkdir()
    for distribution in ("numpy", "pillow", "onnxruntime", "protobuf", "flatbuffers", "packaging"):
        for file in files(distribution) or ():
            top = file.parts[0]
            if top not in ("..", "bin", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(
                    Path(file.locate()).parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
                )
    return folder


def test_example_runs_where_there_is_no_torch(exported, photograph, tmp_path):
    folder, model, processor = exported
    script = ROOT / "examples" / "onnx_segment.py"
    assert len(script.read_text().splitlines()) <= 40
    packages = packages_without_torch(tmp_path / "packages")
    # -I and -S leave out all installed packages.
    code = (
        f"import sys; sys.path.append({str(packages)!r}); import importlib.util as u; "
        "assert not u.find_spec('torch') and not u.find_spec('transformers') and not u.find_spec('samlight_hf'); "
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    prompts = ["20,20,1", "50,40,0", "5,6,2", "40,44,3"]
    image = Image.open(photograph).convert("RGB")
    image.paste("white", (32, 0, 64, 48))
    clear = image.copy()  # what its right half hides is black
    clear.paste("black", (32, 0, 64, 48))
    clear.putalpha(Image.fromarray(np.uint8(255 * (np.indices((48, 64))[1] < 32))))
    clear.save(tmp_path / "clear.png")
    command = [sys.executable, "-I", "-S", "-c", code, str(script), str(folder), "clear.png", "mask.png", *prompts]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    mask = np.asarray(Image.open(tmp_path / "mask.png")) > 0

    inputs = processor(
        image, input_points=[[[[20.0, 20.0], [50.0, 40.0]]]], input_labels=[[[1, 0]]],
        input_boxes=[[[5.0, 6.0, 40.0, 44.0]]], return_tensors="pt",
    )  # fmt: skip
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        outputs = model(
            **{name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        )
    expected = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0, outputs.iou_scores[0, 0].argmax()].numpy()
    assert mask.shape == expected.shape == (48, 64)
    assert 0 < expected.mean() < 1 and (mask & expected).sum() / (mask | expected).sum() > 0.95


def test_images_that_cannot_be_used_are_counted(exported, tmp_path):
    _, model, processor = exported
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{name}.png")
        mask = Image.new("L", (40, 30))
        mask.paste(255, (5, 5, 20, 20))
        mask.save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    lines = []
    _, num_instances = mean_iou(TorchRunner(model), processor, load_dataset(str(tmp_path)), lines.append)
    assert num_instances == 1 and "Skipped 1 of 2 images" in lines[-1]


def test_bad_input_is_named(exported, tmp_path):
    _, model, processor = exported
    with pytest.raises(ValueError, match="opset=11 must be from 18 to 23"):
        export_onnx(model, processor, tmp_path / "out", opset=11)
    with pytest.raises(ValueError, match="opset=99 must be"):
        export_onnx(model, processor, tmp_path / "out", opset=99)
    with pytest.raises(ValueError, match="dtype='q4' is not known"):
        export_onnx(model, processor, tmp_path / "out", ["q4"])
    with torch.device("meta"):
        empty = SamLighteningModel(tiny_config())
    with pytest.raises(ValueError, match="meta tensors, which hold no values, first "):
        export_onnx(empty, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="Linear is no SAM"):
        export_onnx(torch.nn.Linear(2, 2), processor, tmp_path / "out")
    large = copy.deepcopy(model)
    large.mask_decoder.iou_token.weight.data[0, 0] = -1e5
    with pytest.raises(ValueError, match=r"mask_decoder\.iou_token\.weight has values that are too large for float16"):
        export_onnx(large, processor, tmp_path / "out", ["fp32", "fp16"])
    with pytest.raises(ValueError, match="export the model that it was made from"):
        export_onnx(optimize(copy.deepcopy(model)), processor, tmp_path / "out")
    with pytest.raises(ValueError, match=r"size\.longest_edge=64 must equal the model's image_size=32"):
        export_onnx(model, resize_processor(processor, 64, 4), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        export_onnx(model, processor, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file\. Choose another folder"):
        export_onnx(model, processor, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="calibration has no images"):
        export_onnx(model, processor, tmp_path / "out", ["int8"], calibration=[])
    assert not (tmp_path / "out").exists() and (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("onnx/mine.onnx", None, r"holds onnx/mine\.onnx, which no export has written"),
        ("config.json", "{}", r"its config\.json is of no export"),  # a SAM of transformers.js that somebody downloaded
        ("config.json", None, r"its config\.json is of no export"),
        ("config.json", '{"onnx_export": {', "not JSON"),
    ],
)
def test_a_folder_with_files_of_others_is_left_alone(exported, tmp_path, name, content, words):
    folder, model, processor = exported
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / name
    if name.endswith(".onnx"):
        path.write_text("mine")
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        export_onnx(model, processor, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("inside", [".", "onnx"])
def test_the_working_directory_is_not_replaced(exported, tmp_path, monkeypatch, inside):
    """A shell would stand in a folder that is gone."""
    folder, model, processor = exported
    shutil.copytree(folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / inside)
    for out in (tmp_path / "out", os.path.relpath(tmp_path / "out")):
        with pytest.raises(ValueError, match="working directory"):
            export_onnx(model, processor, out)


@pytest.mark.slow
def test_an_earlier_export_is_replaced_and_the_model_stays_as_it_is(exported, tmp_path):
    folder, _, processor = exported
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "onnx" / "vision_encoder_int8.onnx").touch()
    model = small_model().to(torch.bfloat16).train()
    files = export_onnx(model, processor, tmp_path / "out")
    assert tmp_path / "out" / "onnx" / "vision_encoder_int8.onnx" not in files and len(files) == 4
    assert model.training and {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_value_that_is_no_number_fails_the_check_whatever_prompt_gives_it(exported, photograph, monkeypatch):
    folder, model, processor = exported
    decode, calls = OnnxRunner.decode, []

    def decode_with_nan(self, *arguments, **prompts):
        scores, logits = decode(self, *arguments, **prompts)
        calls.append(prompts)
        if len(calls) == 3:
            logits[0, 0, 0, 0, 0] = np.nan
        return scores, logits

    monkeypatch.setattr(OnnxRunner, "decode", decode_with_nan)
    assert check_folder(folder, model, processor, photograph).failure == "logits are not finite."
    assert len(calls) == 5


def test_image_of_another_size_is_refused_by_the_graph(exported):
    with pytest.raises(Exception, match=r"(?s)Got: 64 Expected: 32"):
        OnnxRunner(exported[0]).encode(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(ValueError, match=r"vision_encoder_int8\.onnx: no such file\. Export with --dtype int8"):
        OnnxRunner(exported[0], "int8")


@pytest.mark.slow
def test_encoder_with_windows_of_a_square_exports(photograph):
    """SAM's square windows, which the dilated patterns are mixed with, need padding inside the graph."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(window_size=3, segment_length=None, dilation_rate=1)).eval()
    graph = export_encoder(model)
    pixel_values = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    (embeddings, _) = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"pixel_values": pixel_values})
    np.testing.assert_allclose(embeddings, TorchRunner(model).encode(pixel_values)[0], atol=1e-4)
