"""An optimized model gives the outputs of the model for every kind of call."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import SamConfig, SamModel, pipeline

from samlight_hf import SamLighteningModel
from samlight_hf.benchmark.masks import image_to_mask
from samlight_hf.engine.build import decoder_dtype_of
from samlight_hf.engine.cuda_graphs import GraphedFunction
from samlight_hf.engine.optimize import optimize
from samlight_hf.images.preprocessing import image_tensor, preprocess
from samlight_hf.inference.predictor import Predictor
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


def make_inputs(model, batch_size: int = 1, num_prompts: int = 3) -> dict:
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(batch_size, num_prompts, 2, generator=generator) * size / 2
    inputs = {
        "pixel_values": torch.randn(batch_size, 3, size, size, generator=generator),
        "input_points": torch.rand(batch_size, num_prompts, 2, 2, generator=generator) * size,
        "input_labels": torch.randint(0, 2, (batch_size, num_prompts, 2), generator=generator),
        "input_boxes": torch.cat([corner, corner + size / 3], dim=-1),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def assert_equal(actual, expected, tolerance: float = 1e-4):
    for name in ("iou_scores", "pred_masks"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert one.shape == other.shape and one.dtype == other.dtype
        assert ((one - other).float().norm() / other.float().norm()).item() < tolerance


KINDS = {
    "points": ("input_points",),
    "labels": ("input_points", "input_labels"),
    "boxes": ("input_boxes",),
    "points and boxes": ("input_points", "input_labels", "input_boxes"),
}


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_prompts_of_every_kind(model, kind, batch_size, multimask_output):
    optimized, inputs = optimize(model), make_inputs(model, batch_size)
    inputs = {name: inputs[name] for name in ("pixel_values", *kind)}
    with torch.no_grad():
        expected = model(**inputs, multimask_output=multimask_output)
    actual = optimized(**inputs, multimask_output=multimask_output)
    assert_equal(actual, expected)
    assert not actual.pred_masks.requires_grad and not actual.pred_masks.is_inference()


def test_embeddings_in_and_out_and_an_earlier_mask(model):
    optimized, inputs = optimize(model), make_inputs(model)
    embeddings = optimized.get_image_embeddings(inputs["pixel_values"])
    assert torch.allclose(embeddings, model.get_image_embeddings(inputs["pixel_values"]), atol=1e-5)
    first = optimized(image_embeddings=embeddings, input_boxes=inputs["input_boxes"][:, :1], multimask_output=False)
    arguments = {
        "input_boxes": inputs["input_boxes"],
        "input_masks": first.pred_masks[:, 0],
        "image_embeddings": embeddings,
    }
    with torch.no_grad():
        assert_equal(optimized(**arguments), model(**arguments))


def test_what_the_fast_paths_do_not_know_runs_as_in_the_model(model):
    optimized, inputs = optimize(model), make_inputs(model)
    points = {"input_points": inputs["input_points"]}
    outputs = optimized(pixel_values=inputs["pixel_values"], **points, output_hidden_states=True)
    assert len(outputs.vision_hidden_states) == model.config.vision_config.num_hidden_layers + 1
    pixel_values = inputs["pixel_values"].clone().requires_grad_()
    optimized(pixel_values=pixel_values, **points).pred_masks.sum().backward()
    assert pixel_values.grad.abs().sum() > 0
    for wrong, message in (
        ({"pixel_values": inputs["pixel_values"][..., 1:], **points}, "size"),
        ({"pixel_values": (inputs["pixel_values"] * 9).byte(), **points}, "uint8"),
        (points, "pixel_values"),
        ({"pixel_values": inputs["pixel_values"], "input_points": inputs["input_points"][0]}, "4D"),
        ({"pixel_values": inputs["pixel_values"], **points, "input_boxes": inputs["input_boxes"][:, :1]}, "boxes"),
    ):
        with pytest.raises(ValueError, match=message):
            optimized(**wrong)


# Arguments of a processor for two images, or for one: it pads ragged points, and numbers become float64.
PROCESSOR_ARGUMENTS = {
    "a box": {"input_boxes": [[[2.0, 3.0, 20.0, 25.0]]]},
    "boxes": {"input_boxes": [[[2.0, 3.0, 20.0, 25.0], [5.5, 1.0, 30.0, 9.0]]]},
    "a point": {"input_points": [[[9, 8]]]},
    "points of several objects": {"input_points": [[[[9.5, 8]], [[20, 12]]]], "input_labels": [[[1], [1]]]},
    "points and labels": {"input_points": [[[[9, 8], [3, 3]]]], "input_labels": [[[1, 0]]]},
    "points and boxes": {
        "input_points": [[[[9, 8]]]], "input_labels": [[[1]]], "input_boxes": [[[2.0, 3.0, 20.0, 25.0]]],
    },
    "ragged points of two images": {"input_points": [[[9, 8]], [[3, 3], [12, 20]]], "input_labels": [[1], [1, 0]]},
    "boxes of two images": {"input_boxes": [[[2.0, 3.0, 20.0, 25.0]], [[5.5, 1.0, 30.0, 9.0]]]},
}  # fmt: skip


def model_card_call(model, optimized, prompts, **arguments):
    """Call both models as the model card does: return the outputs of both, and which paths ran."""
    processor = make_processor(model.config.vision_config)
    number = len(next(iter(prompts.values())))
    images = [np.random.default_rng(place).integers(0, 255, (40 + place, 50, 3), np.uint8) for place in range(number)]
    inputs = processor(images if number > 1 else images[0], **prompts, return_tensors="pt").to(model.device)
    assert {"original_sizes", "reshaped_input_sizes"} < inputs.keys()
    with torch.no_grad():
        expected = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}, **arguments)
    paths = optimized._paths
    functions = [paths.encode, *paths.decoder.all_masks.values()]
    for function in functions:
        function.last_ran = None
    actual = optimized(**inputs, **arguments)
    return actual, expected, [function.last_ran for function in functions if function.last_ran]


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompts", PROCESSOR_ARGUMENTS.values(), ids=PROCESSOR_ARGUMENTS)
def test_what_a_processor_gives_takes_the_fast_path(model, prompts, multimask_output, recwarn):
    actual, expected, ran = model_card_call(model, optimize(model), prompts, multimask_output=multimask_output)
    assert_equal(actual, expected)
    assert ran == ["eager", "eager"]  # encoder and decoder; on a GPU they are replayed
    assert not [warning for warning in recwarn if "runs as in the model" in str(warning.message)]


def test_one_mask_of_a_model_that_is_asked_for_none(model):
    """None is False to the model itself."""
    actual, expected, ran = model_card_call(model, optimize(model), PROCESSOR_ARGUMENTS["a box"], multimask_output=None)
    assert_equal(actual, expected)
    assert ran == ["eager", "eager"] and actual.iou_scores.shape[-1] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_attentions": False, "output_hidden_states": None, "return_dict": True, "num_items_in_batch": 3},
        {"attention_similarity": None, "target_embedding": None, "anything": "that SamModel passes over"},
    ],
)
def test_keywords_that_change_nothing_take_the_fast_path(model, arguments, recwarn):
    actual, expected, ran = model_card_call(model, optimize(model), PROCESSOR_ARGUMENTS["a box"], **arguments)
    assert_equal(actual, expected)
    assert ran == ["eager", "eager"]
    assert not [warning for warning in recwarn if "runs as in the model" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_hidden_states": True}, "it is called with output_hidden_states"),
        ({"return_dict": False}, "it is called with return_dict"),
        ({"target_embedding": torch.ones(1, 1, 1, 32)}, "it is called with target_embedding"),
        ({"input_points": torch.ones(1, 1, 1, 2, requires_grad=True)}, "an input requires a gradient"),
        ({"input_boxes": None}, "there are not as many points"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_a_fall_back_is_told_once(model, arguments, reason):
    optimized, inputs = optimize(model), make_inputs(model, 1, 1)
    inputs = {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"], **arguments}
    with pytest.warns(UserWarning, match=f"The mask decoder of this optimized model runs as in the model.*{reason}"):
        optimized(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(**inputs)


@pytest.mark.parametrize("part", ["vision_config", None])
def test_what_the_config_asks_of_every_call(model, part):
    optimized, inputs = optimize(model), make_inputs(model)
    for each in (model, optimized):
        (each.config.vision_config if part else each.config).output_hidden_states = True
    inputs = {name: inputs[name] for name in ("pixel_values", "input_boxes")}
    with torch.no_grad():
        outputs = [each(**inputs) for each in (model, optimized)]
        assert outputs[0].keys() == outputs[1].keys()
        embeddings = {
            "image_embeddings": outputs[0].pred_masks.new_zeros(1, 32, 8, 8),
            "input_boxes": inputs["input_boxes"],
        }
        assert model(**embeddings).keys() == optimized(**embeddings).keys()
        assert (optimized.vision_encoder(inputs["pixel_values"]).hidden_states is not None) == bool(part)
        for each in (model, optimized):
            (each.config.vision_config if part else each.config).output_hidden_states = False
            each.config.return_dict = False
        assert [type(each(**inputs)) for each in (model, optimized)] == [tuple, tuple]


def test_under_autocast_it_computes_in_its_own_dtype(model):
    optimized, inputs = optimize(model), make_inputs(model)
    prompts = {name: inputs[name] for name in ("input_points", "input_labels")}
    expected = optimized(pixel_values=inputs["pixel_values"], **prompts)
    embeddings = optimized.get_image_embeddings(inputs["pixel_values"])
    with torch.autocast("cpu", torch.bfloat16):
        again = optimized(image_embeddings=embeddings, **prompts)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(again.pred_masks, expected.pred_masks)


def test_the_model_itself_stays_as_it_is(model):
    optimized = optimize(model)
    assert type(model) is SamLighteningModel and isinstance(optimized, SamLighteningModel)
    assert type(optimized).__name__ == "SamLighteningModel"
    own, others = ({tensor.data_ptr() for tensor in each.state_dict().values()} for each in (model, optimized))
    assert not own & others
    assert optimized.state_dict().keys() == model.state_dict().keys()
    assert optimized.report.encoder.startswith("plain: ") and optimized.report.num_graphs == 0
    assert optimized.to("cpu") is optimized and optimized.eval() is optimized
    with pytest.raises(RuntimeError, match="optimize it again"):
        optimized.to(torch.float64)
    assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {(torch.float32, True)}


def test_it_is_not_to_be_saved_nor_optimized_again(model, tmp_path):
    optimized = optimize(model)
    with pytest.raises(ValueError, match="save the model"):
        optimized.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already"):
        optimize(optimized)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="optimize that"):
            duplicate(optimized)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_batch_sizes": (0,)}, r"image_batch_sizes=\(0,\)"),
        ({"prompt_counts": (1, True)}, "prompt_counts"),
        ({"dtype": torch.uint8}, "dtype=torch.uint8"),
        ({"decoder_dtype": "float16"}, "decoder_dtype='float16' must be a floating point type"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimize(model, **arguments)


def test_other_models():
    with pytest.raises(ValueError, match="mask decoder"):
        optimize(torch.nn.Linear(1, 1))
    vision = {
        "hidden_size": 32,
        "num_pos_feats": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "output_channels": 32,
    }
    config = SamConfig(
        vision_config={**vision, "global_attn_indexes": (0,), "mlp_dim": 32},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    sam = SamModel(config).eval()
    inputs = make_inputs(sam)
    with torch.no_grad():
        assert_equal(optimize(sam)(**inputs), sam(**inputs))


def test_a_decoder_in_another_dtype(model):
    inputs = make_inputs(model)
    optimized = optimize(model, decoder_dtype=torch.float16)
    assert optimized._paths.decoder.dtype == torch.float16
    assert optimized.mask_decoder.iou_token.weight.dtype == torch.float32
    with torch.no_grad():
        actual, expected = optimized(**inputs), model(**inputs)
    assert_equal(actual, expected, 1e-2)
    assert not torch.equal(actual.pred_masks, expected.pred_masks)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(-6e4, torch.float16), (7e4, torch.bfloat16), (-7e4, torch.bfloat16), (float("nan"), torch.bfloat16)],
)
def test_the_decoder_of_bfloat16_computes_in_float16_if_its_weights_are_in_range(model, monkeypatch, weight, dtype):
    with torch.no_grad():
        model.mask_decoder.iou_token.weight[0, 0] = weight
    assert decoder_dtype_of(model, torch.bfloat16) == torch.bfloat16  # on a CPU
    monkeypatch.setattr(type(model), "device", type("Device", (), {"type": "cuda"})(), raising=False)
    assert decoder_dtype_of(model, torch.bfloat16, checked=True) == dtype
    assert decoder_dtype_of(model, torch.float32, checked=True) == torch.float32


def test_the_stock_pipeline_takes_it():
    model, processor = load_model("checkpoints/sam-lightening-tiny")
    settings = {"points_per_crop": 2, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.6}
    masks = [
        pipeline("mask-generation", model=each, image_processor=processor.image_processor)(
            "examples/images/coffee.jpg", **settings
        )["masks"]
        for each in (model, optimize(model))
    ]
    assert len(masks[0]) == len(masks[1]) > 0
    assert all((one != other).float().mean() < 1e-3 for one, other in zip(*masks))


def test_the_predictor_takes_it():
    model, processor = load_model("checkpoints/sam-lightening-tiny")
    plain, optimized = (
        Predictor(each, processor).set_image("examples/images/coffee.jpg").predict(boxes_xyxy=[(310, 215, 400, 330)])
        for each in (model, optimize(model))
    )
    np.testing.assert_allclose(optimized.scores, plain.scores, atol=1e-5)
    np.testing.assert_allclose(optimized.logits, plain.logits, atol=1e-3)


@pytest.fixture
def on_gpu():
    return load_model("checkpoints/sam-lightening-tiny", "cuda", torch.bfloat16)[0]


@pytest.mark.gpu
def test_on_a_gpu_listed_shapes_run_from_graphs_and_others_run_too(on_gpu):
    optimized = optimize(on_gpu, image_batch_sizes=(1, 2), prompt_counts=(1, 3))
    assert optimized.report.encoder == "fused" and optimized.report.num_graphs == 2 + 8
    assert optimized.report.graph_memory_mb > 0
    paths = optimized._paths
    for batch_size, num_prompts, ran in ((1, 3, "graph"), (2, 1, "graph"), (3, 2, "eager")):
        inputs = make_inputs(on_gpu, batch_size, num_prompts)
        inputs = {name: inputs[name] for name in ("pixel_values", "input_points", "input_labels")}
        # Labels as processors give them.
        inputs |= {name: inputs[name][:, :, :1] for name in ("input_points", "input_labels")}
        with torch.no_grad():
            expected = on_gpu(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
        assert_equal(optimized(**inputs), expected, 5e-2)
        assert paths.encode.last_ran == paths.decoder.all_masks[True, False].last_ran == ran
    assert len(paths.encode) == 2


@pytest.mark.gpu
def test_on_a_gpu_graphs_that_are_captured_when_needed_are_those_captured_at_once(on_gpu):
    shapes = {"image_batch_sizes": (1, 2), "prompt_counts": (1, 3)}
    at_once, later = optimize(on_gpu, **shapes), optimize(on_gpu, **shapes, graphs_when_needed=True, progress=True)
    assert later.report.num_graphs == 0 and later.report.num_graphs_when_needed == at_once.report.num_graphs == 10
    paths = later._paths
    assert len(paths.encode) == 0
    for batch_size, num_prompts, ran in ((1, 3, "graph"), (3, 2, "eager"), (2, 1, "graph"), (1, 3, "graph")):
        inputs = make_inputs(on_gpu, batch_size, num_prompts)
        inputs = {name: inputs[name] for name in ("pixel_values", "input_points", "input_labels")}
        inputs |= {name: inputs[name][:, :, :1] for name in ("input_points", "input_labels")}
        expected, actual = at_once(**inputs), later(**inputs)
        assert torch.equal(actual.pred_masks, expected.pred_masks)
        assert torch.equal(actual.iou_scores, expected.iou_scores)
        assert paths.encode.last_ran == paths.decoder.all_masks[True, False].last_ran == ran
    assert len(paths.encode) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_report_counts_no_memory_of_others(on_gpu, monkeypatch, dtype):
    """Memory that something else gives back, or takes, while graphs are captured."""
    shapes = {"dtype": dtype, "image_batch_sizes": (1, 2), "prompt_counts": (1,)}
    alone, others = optimize(on_gpu, **shapes), [torch.empty(2**29, dtype=torch.uint8, device="cuda")]
    capture = GraphedFunction._capture

    def with_others(self, *arguments):
        others.clear()
        captured = capture(self, *arguments)
        kept.append(torch.empty(2**20 * 30, dtype=torch.uint8, device="cuda"))
        return captured

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(GraphedFunction, "_capture", with_others)
    optimized = optimize(on_gpu, **shapes)
    assert len(kept) == optimized.report.num_graphs == alone.report.num_graphs > 0
    assert alone.report.graph_memory_mb > 10
    assert optimized.report.graph_memory_mb == pytest.approx(alone.report.graph_memory_mb, abs=4)


@pytest.mark.gpu
def test_on_a_gpu_a_graph_takes_one_segment_of_memory(on_gpu):
    """Of 16 MB for one image. Each tensor by itself, of 3 and of 12 MB, would take a segment of 20 and one of 12."""
    report = optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(1,)).report
    assert report.num_graphs == 5 and report.graph_memory_mb < 32


@pytest.mark.gpu
def test_on_a_gpu_graphs_share_their_memory_and_do_not_disturb_each_other(on_gpu):
    """Inputs, results and what lies between are in memory that the next graph overwrites."""
    optimized = optimize(on_gpu, image_batch_sizes=(1, 8, 32), prompt_counts=(1, 16, 64))
    print(optimized.report)
    assert optimized.report.num_graphs == 3 + 12 and optimized.report.graph_memory_mb < 450
    alone = {
        (8, 16): optimize(on_gpu, image_batch_sizes=(8,), prompt_counts=(16,)),
        (1, 64): optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(64,)),
        (32, 1): optimize(on_gpu, image_batch_sizes=(32,), prompt_counts=(1,)),
    }
    kept = []
    for batch_size, num_prompts in (*alone, *alone):
        inputs = make_inputs(on_gpu, batch_size, num_prompts)
        inputs = {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"]}
        actual, expected = (model(**inputs) for model in (optimized, alone[batch_size, num_prompts]))
        assert optimized._paths.encode.last_ran == optimized._paths.decoder.all_masks[True, False].last_ran == "graph"
        kept.append((actual.pred_masks, expected.pred_masks, actual.iou_scores, expected.iou_scores))
    for masks, expected_masks, scores, expected_scores in kept:
        assert torch.equal(masks, expected_masks) and torch.equal(scores, expected_scores)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch_size", "num_prompts"), [(32, 256), (31, 100)])
def test_on_a_gpu_large_batches_run_in_parts_and_equal_those_that_run_at_once(on_gpu, batch_size, num_prompts):
    optimized = optimize(on_gpu, image_batch_sizes=(1, 32), prompt_counts=(1, 256, 100))
    at_once = optimize(on_gpu, image_batch_sizes=(), prompt_counts=())
    paths = optimized._paths
    graphs = paths.encode._graphs, paths.decoder.all_masks[True, False]._graphs  # by device, then shapes and dtypes
    assert [{kinds[-1][0][0] for _, *kinds in some} for some in graphs] == [{1, 16}, {1, 50, 64}]
    assert optimized.report.graph_memory_mb < 450
    pixel_values = make_inputs(on_gpu, batch_size, 1)["pixel_values"]
    with torch.no_grad():
        embeddings, expected = (each.get_image_embeddings(pixel_values) for each in (optimized, at_once))
    assert paths.encode.last_ran == "graph" and at_once._paths.encode.last_ran == "eager"
    assert embeddings.stride() == expected.stride()
    assert (embeddings - expected).float().norm() < 0.01 * expected.float().norm()
    boxes = {"input_boxes": make_inputs(on_gpu, 2, num_prompts)["input_boxes"]}
    for multimask_output in (True, False):
        arguments = {"image_embeddings": embeddings[:2], **boxes, "multimask_output": multimask_output}
        assert_equal(optimized(**arguments), at_once(**arguments), 3e-2)
        assert paths.decoder.all_masks[multimask_output, False].last_ran == "graph"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a box", "a point", "points of several objects"])
def test_on_a_gpu_the_model_cards_call_is_replayed(on_gpu, name):
    optimized = optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(1, 2))
    actual, expected, ran = model_card_call(on_gpu, optimized, PROCESSOR_ARGUMENTS[name])
    assert_equal(actual, expected, 5e-2)
    assert ran == ["graph", "graph"]


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_is_decoded_in_float16_which_is_nearer_to_float32():
    model, processor = load_model("checkpoints/sam-lightening-tiny", "cuda")
    image = image_tensor("examples/images/rocket.jpg")
    pixel_values = preprocess(processor.image_processor, [image], torch.device("cuda"))
    inputs = {"pixel_values": pixel_values, "input_points": torch.tensor([[[[500.0, 400.0]]]], device="cuda")}
    with torch.no_grad():
        expected, errors = model(**inputs).pred_masks, {}
        for decoder_dtype in (None, torch.bfloat16):
            optimized = optimize(model, image_batch_sizes=(1,), prompt_counts=(1,), decoder_dtype=decoder_dtype)
            actual = optimized(**inputs).pred_masks
            errors[optimized._paths.decoder.dtype] = ((actual.float() - expected).norm() / expected.norm()).item()
    assert errors[torch.float16] < errors[torch.bfloat16] < 0.1


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device(on_gpu):
    """torch raises for each operation that waits, from an image on the device to a mask there."""
    optimized = optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(1,))
    image_processor = make_processor(on_gpu.config.vision_config).image_processor
    image = torch.randint(0, 256, (3, 300, 500), dtype=torch.uint8, device="cuda")
    image_to_mask(optimized, image_processor, image, (30, 40))
    torch.cuda.set_sync_debug_mode("error")
    try:
        image_to_mask(optimized, image_processor, image, (50, 40))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_outputs_belong_to_the_caller(on_gpu):
    optimized = optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(1,))
    inputs = [make_inputs(on_gpu, 1, 1)["pixel_values"] * factor for factor in (1, 2)]
    first = optimized.get_image_embeddings(inputs[0])
    kept = first.clone()
    optimized.get_image_embeddings(inputs[1])
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_on_a_gpu_threads_streams_and_several_models(on_gpu):
    models = [optimize(on_gpu, image_batch_sizes=(1,), prompt_counts=(1,)) for _ in range(2)]
    images = [make_inputs(on_gpu, 1, 1)["pixel_values"] * factor for factor in (0.5, 1, 1.5, 2)]
    expected = [models[0].get_image_embeddings(image) for image in images]
    torch.cuda.synchronize()
    wrong = []

    def work(place: int):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                actual = models[place % 2].get_image_embeddings(images[place])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(actual, expected[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_on_a_gpu_float32_is_exact(on_gpu):
    model = load_model("checkpoints/sam-lightening-tiny", "cuda")[0]
    optimized, inputs = optimize(model, dtype=torch.float32, prompt_counts=(3,)), make_inputs(model)
    assert optimized.report.encoder.startswith("plain: ")
    with torch.no_grad():
        assert_equal(optimized(**inputs), model(**inputs), 1e-3)


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": "bfloat16"}, {"dtype": torch.int8}, {"image_batch_sizes": 4}, {"prompt_counts": (0,)}],
    ids=str,
)
def test_arguments_that_cannot_be(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        optimize(SamLighteningModel(tiny_config()), **arguments)
