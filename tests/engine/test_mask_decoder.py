"""The decoder in fewer operations gives the model's masks for every kind of prompt, and says which path ran."""

import gc
from contextlib import contextmanager

import pytest
import torch
from transformers import SamConfig, SamModel

from samlight_hf import SamLighteningModel
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.engine import mask_decoder
from samlight_hf.engine.build import make_decoder
from samlight_hf.engine.cuda_graphs import GraphedFunction, StaticInputs
from samlight_hf.engine.decoded import Decoded, places_above, slots_above
from samlight_hf.engine.image_encoder import ImageEncoder
from samlight_hf.engine.mask_decoder import FastMaskDecoder, why_not_fast
from samlight_hf.engine.plain_decoder import PlainMaskDecoder
from samlight_hf.kernels import mask_head
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


POINTS, LABELS, BOXES, MASKS = "points", "labels", "boxes", "mask_logits"
PROMPTS = [(POINTS, LABELS), (BOXES,), (POINTS, LABELS, BOXES), (POINTS, LABELS, MASKS), (BOXES, MASKS), (MASKS,)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """By default cuDNN rounds float32 to TF32, for example in the plain decoder's transposed convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def loud(device):
    """A model whose image tokens differ from prompt to prompt, and whose biases are not zero, unlike a fresh one's."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(device)


def test_a_decoder_on_another_stream_waits_for_its_weights(loud, monkeypatch):
    turns = []

    @contextmanager
    def turn(device):
        turns.append(device)
        yield

    monkeypatch.setattr(mask_decoder, "turn", turn)
    monkeypatch.setattr(FastMaskDecoder, "try_kernels", lambda self: turns.append(self.head))  # all weights are made
    decoder = FastMaskDecoder(loud)
    assert turns == [loud.device, decoder.head]


@pytest.mark.parametrize(("heads", "expected"), [(1, True), (8, False), (16, False)])
def test_a_decoder_is_lean_if_all_of_its_attention_is_in_kernels(loud, heads, expected):
    """Heads of 2 features have no kernel in the first layer, and 16 heads have none in the others."""
    decoder = FastMaskDecoder(loud)
    decoder.use_head_kernel = decoder.use_attention_kernels = True
    decoder.num_heads = heads
    assert decoder.is_lean == expected


def prompts_of(count, device, num_points=1):
    generator = torch.Generator().manual_seed(count)
    points = 32 * torch.rand(count, num_points, 2, generator=generator)
    corners = (32 * torch.rand(count, 2, 2, generator=generator)).sort(dim=1).values
    prompts = {
        POINTS: points,
        LABELS: torch.randint(0, 2, (count, num_points), generator=generator),
        BOXES: corners.reshape(count, 4),
        MASKS: 5 * torch.randn(count, 32, 32, generator=generator),
    }
    return {name: prompt.to(device) for name, prompt in prompts.items()}


def embeddings(model, count=1, dtype=torch.float32):
    pixel_values = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model.get_image_embeddings(pixel_values.to(model.device, dtype))


def assert_same(fast, plain):
    assert torch.equal(fast.kept, plain.kept)
    assert torch.allclose(fast.iou, plain.iou, rtol=1e-4, atol=1e-5)
    assert fast.logits.shape == plain.logits.shape
    largest = plain.logits.abs().max().item() if len(plain.logits) else 0.0
    assert torch.allclose(fast.logits, plain.logits, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("names", PROMPTS, ids="+".join)
@pytest.mark.parametrize("num_points", [1, 3])
def test_the_fast_decoder_equals_the_plain_one(loud, device, names, multimask_output, num_points):
    prompts = prompts_of(5, device, num_points)
    prompts = {name: prompts[name] for name in names}
    image = embeddings(loud)
    fast, plain = FastMaskDecoder(loud), PlainMaskDecoder(loud)
    assert_same(
        fast.decode(fast.prepare(image), **prompts, multimask_output=multimask_output, prompts_per_upscaling=2),
        plain.decode(plain.prepare(image), **prompts, multimask_output=multimask_output),
    )


@pytest.mark.parametrize("names", PROMPTS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_prompt_of_many_calls_gives_all_masks_in_float32(loud, device, names, dtype):
    prompts = {name: prompt for name, prompt in prompts_of(1, device).items() if name in names}
    fast, image = FastMaskDecoder(loud.to(dtype)), embeddings(loud, dtype=dtype)
    once, often = (fast.decode(fast.prepare(image), **prompts, repeated=repeated) for repeated in (False, True))
    assert often.kept.tolist() == once.kept.tolist() == [0, 1, 2]
    assert often.iou.dtype == often.logits.dtype == torch.float32
    assert torch.equal(often.iou, once.iou)
    assert torch.equal(often.logits, once.logits.float())


def test_an_image_for_each_prompt(loud, device):
    prompts = prompts_of(3, device)
    prompts = {name: prompts[name] for name in (POINTS, LABELS)}
    images = embeddings(loud, 3)
    fast, plain = FastMaskDecoder(loud), PlainMaskDecoder(loud)
    together = fast.decode(fast.prepare(images), **prompts)
    assert_same(together, plain.decode(images, **prompts))
    for place in range(3):
        own = {name: prompt[place : place + 1] for name, prompt in prompts.items()}
        alone = fast.decode(fast.prepare(images[place : place + 1]), **own)
        assert torch.allclose(alone.iou[0], together.iou[place], rtol=1e-4, atol=1e-5)


def test_no_prompt_and_images_that_are_not_one_for_each_prompt(loud):
    fast = FastMaskDecoder(loud)
    with pytest.raises(ValueError, match="2 images for 3 prompts: give one image, or one for each"):
        fast.decode(fast.prepare(embeddings(loud, 2)), boxes=prompts_of(3, loud.device)[BOXES])
    with pytest.raises(ValueError, match="no prompt: give points, boxes or mask_logits"):
        fast.decode(fast.prepare(embeddings(loud)))


def test_masks_below_the_least_iou_are_left_out(loud, device):
    prompts = prompts_of(9, device)
    prompts = {name: prompts[name] for name in (POINTS, LABELS)}
    fast, plain = FastMaskDecoder(loud), PlainMaskDecoder(loud)
    image = embeddings(loud)
    everything = plain.decode(image, **prompts)
    for share in (0.2, 0.7, 0.95):
        least = everything.iou.flatten().quantile(share).item()
        decoded = fast.decode(fast.prepare(image), **prompts, min_iou=least, prompts_per_upscaling=2)
        assert 0 < len(decoded.kept) < 27
        assert_same(decoded, plain.decode(image, **prompts, min_iou=least))
    nothing = fast.decode(fast.prepare(image), **prompts, min_iou=1e9)
    assert nothing.logits.shape == (0, 32, 32)


def test_the_work_of_prompts_that_are_left_out_is_not_done(loud, device, monkeypatch):
    upscaled = []
    upscale = FastMaskDecoder._upscale
    monkeypatch.setattr(
        FastMaskDecoder,
        "_upscale",
        lambda self, image, hyper, *part: (upscaled.append(len(hyper)), upscale(self, image, hyper, *part))[1],
    )
    prompts = prompts_of(9, device)
    fast = FastMaskDecoder(loud)
    image, prompts = fast.prepare(embeddings(loud)), {name: prompts[name] for name in (POINTS, LABELS)}
    best = fast.decode(image, **prompts).iou.amax(dim=1)
    upscaled.clear()
    fast.decode(image, **prompts, min_iou=best.median().item())
    assert sum(upscaled) == (best > best.median()).sum()


@pytest.mark.parametrize("names", [(POINTS, LABELS), (BOXES,), (POINTS, LABELS, BOXES)], ids="+".join)
def test_points_of_every_label_and_boxes_are_embedded_as_the_model_does(loud, device, names):
    """-10 and -1 pad points and prompts; for other labels than 0 and 1 the model embeds the position alone."""
    prompts = prompts_of(7, device, num_points=5)
    prompts[LABELS] = torch.tensor([-10, -1, 0, 1, 2], device=device).expand(7, -1)
    prompts = {name: prompts[name] for name in names}
    points, labels, boxes = (prompts[name][None] if name in names else None for name in (POINTS, LABELS, BOXES))
    with torch.no_grad():
        expected = loud.prompt_encoder(points, labels, boxes, None)[0][0]
        embedded = torch.cat(FastMaskDecoder(loud).embed(*prompts.values()), dim=1)
    assert torch.allclose(embedded, expected, rtol=0, atol=2e-5)


def test_prompts_are_embedded_in_float32_whatever_the_models_dtype(loud):
    """In bfloat16 a coordinate has 8 bits: neighbouring pixels would be equal."""
    fast = FastMaskDecoder(loud.to(torch.bfloat16))
    points = torch.tensor([[[20.0, 9.0]], [[20.01, 9.0]]], device=loud.device)
    labels = torch.ones(2, 1, dtype=torch.int64, device=loud.device)
    embedded, plain = fast.embed(points, labels)[0], loud.prompt_encoder(points[None], labels[None], None, None)[0][0]
    assert (embedded.dtype, plain.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(embedded[0], embedded[1])
    assert torch.equal(plain[0], plain[1])


def test_which_way_is_taken():
    model = SamLighteningModel(tiny_config()).eval()
    assert isinstance(make_decoder(model), FastMaskDecoder)
    with pytest.raises(ValueError, match=r"cuda_graphs=True needs a model on a CUDA device, and this one is on cpu"):
        make_decoder(model, cuda_graphs=True)

    class OwnDecoder(type(model.mask_decoder)):
        pass

    model.mask_decoder.__class__ = OwnDecoder
    assert "no mask decoder of SAM's own architecture" in why_not_fast(model)
    assert isinstance(make_decoder(model), PlainMaskDecoder)
    with pytest.raises(ValueError, match="no mask decoder of SAM's own"):
        FastMaskDecoder(model)
    model.config.model_type = "sam2"
    with pytest.raises(ValueError, match="model_type='sam2' cannot be used here"):
        make_decoder(model)


def test_the_original_sam_too():
    small = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
    }
    small |= {"num_pos_feats": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [0]}
    parts = {"hidden_size": 32, "image_size": 64, "image_embedding_size": 4}
    torch.manual_seed(0)
    model = SamModel(
        SamConfig(
            vision_config=small,
            prompt_encoder_config=parts,
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
        )
    ).eval()
    fast, plain = make_decoder(model), PlainMaskDecoder(model)
    assert isinstance(fast, FastMaskDecoder)
    image = torch.randn(1, 32, 4, 4)
    prompts = {POINTS: torch.rand(3, 1, 2) * 64, LABELS: torch.ones(3, 1, dtype=torch.int64)}
    assert_same(fast.decode(fast.prepare(image), **prompts), plain.decode(image, **prompts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_plain_decoder(loud, device, dtype):
    prompts = {name: prompt for name, prompt in prompts_of(8, device).items() if name in (POINTS, LABELS)}
    image = embeddings(loud)
    expected = PlainMaskDecoder(loud).decode(image, **prompts)
    half = loud.to(dtype)
    fast, plain = FastMaskDecoder(half), PlainMaskDecoder(half)
    errors = [
        (decoded.logits.float() - expected.logits).pow(2).mean()
        for decoded in (fast.decode(fast.prepare(image.to(dtype)), **prompts), plain.decode(image.to(dtype), **prompts))
    ]
    assert errors[0] < 4 * errors[1]


@pytest.mark.parametrize("min_iou", [None, -9.0, 0.5, 9.0])
def test_slots_are_the_inverse_of_places(min_iou):
    iou = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    slots, places = slots_above(iou, min_iou), places_above(iou, min_iou)
    assert (slots.shape, slots.dtype) == (iou.shape, torch.int32)
    assert slots.flatten()[places].tolist() == list(range(len(places)))
    assert int((slots >= 0).sum()) == len(places)


def test_a_function_on_the_cpu_is_called():
    function = GraphedFunction(lambda x: x + 1)
    assert function(torch.ones(2)).tolist() == [2, 2]
    assert function.last_ran == "eager"


@pytest.mark.gpu
def test_a_graph_is_replayed_with_new_inputs_and_dropped_when_it_is_the_oldest():
    calls = []
    function = GraphedFunction(lambda x: (calls.append(len(x)), 2 * x)[1], max_graphs=2)
    with torch.inference_mode():
        for length in (3, 3, 4, 3, 5, 3, 4):
            value = torch.rand(length, device="cuda")
            assert torch.equal(function(value), 2 * value)
            assert function.last_ran == "graph"
    # Once to warm up and once to capture: 3 is used again and stays, 4 is the oldest when 5 comes.
    assert calls == [3, 3, 4, 4, 5, 5, 4, 4]


@pytest.mark.gpu
def test_no_garbage_is_collected_in_the_middle_of_a_capture():
    """Freeing the graph of an unreferenced model would make the capture fail."""
    collects = []
    GraphedFunction(lambda x: (collects.append(gc.isenabled()), x + 1)[1])(torch.ones(2, device="cuda"))
    assert collects == [True, False]  # once to warm up, once to capture
    assert gc.isenabled()


@pytest.mark.gpu
def test_a_graph_takes_later_tensors_from_the_cpu():
    function = GraphedFunction(lambda x, y, z: x * y + z)
    first = torch.tensor([2.0, 3.0], device="cuda")
    for number in range(3):
        result = function(first, torch.tensor([1.0, number]), torch.tensor([number]))
        assert result.tolist() == [2 + number, 4 * number]
    assert function.last_ran == "graph"
    later = [torch.tensor(values, device="cuda") for values in ([1.0, 5.0], [7])]
    assert function(first, *later).tolist() == [9, 22]
    assert function(first, later[0].cpu(), later[1]).tolist() == [9, 22]
    assert len(function) == 1


@pytest.mark.gpu
def test_calls_that_are_not_waited_for_keep_their_own_inputs():
    """Inputs from the CPU are read before the next call overwrites them."""
    function = GraphedFunction(lambda x, y, z: (x @ x).sum() * 0 + y + z)
    first = torch.rand(2048, 2048, device="cuda")
    results = [function(first, torch.tensor([n]), torch.tensor([0.5])).clone() for n in range(200)]
    assert torch.cat(results).tolist() == [n + 0.5 for n in range(200)]


def test_static_inputs_stay_where_they_are_and_take_values_of_any_layout(device):
    def values(seed):
        torch.manual_seed(seed)
        return (
            torch.rand(2, 3).to(device), torch.rand(3, 5, dtype=torch.float64).T, torch.randint(9, (1,)),
            torch.rand(4).to(device), torch.tensor(True), torch.rand(0, 2), torch.rand(7).half(),
        )  # fmt: skip

    inputs = StaticInputs(values(0))
    places = [tensor.data_ptr() for tensor in inputs.tensors]
    for seed in range(3):
        inputs.fill(values(seed))
        assert all(torch.equal(tensor.cpu(), value.cpu()) for tensor, value in zip(inputs.tensors, values(seed)))
        assert {tensor.device.type for tensor in inputs.tensors} == {device}
    assert [tensor.data_ptr() for tensor in inputs.tensors] == places


@pytest.mark.gpu
@pytest.mark.parametrize("names", PROMPTS, ids="+".join)
@pytest.mark.parametrize("count", [1, 6])
def test_graphs_give_what_eager_gives(names, count):
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config()).eval().cuda()
    eager, graphed = FastMaskDecoder(model), make_decoder(model)
    assert graphed.cuda_graphs
    image = eager.prepare(embeddings(model))
    for seed in range(3):
        prompts = {name: prompt + seed for name, prompt in prompts_of(count, "cuda").items() if name in names}
        if LABELS in prompts:
            prompts[LABELS] %= 2
        decoded = graphed.decode(image, **prompts, repeated=True)
        assert_same(decoded, eager.decode(image, **prompts))
    ran = graphed.all_masks[True, MASKS in names] if count == 1 else graphed.transform
    assert ran.last_ran == "graph"
    assert eager.transform.last_ran is None


@pytest.mark.gpu
def test_the_encoder_is_replayed_from_a_graph_too():
    from transformers import SamImageProcessor

    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config()).eval().cuda()
    processor = SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    graphed = ImageEncoder(model, processor, make_decoder(model))
    eager = ImageEncoder(model, processor, make_decoder(model, cuda_graphs=False))
    images = [torch.randint(0, 256, (3, 20, 32), dtype=torch.uint8) for _ in range(3)]
    kept = [graphed([image])[0] for image in images]  # copies, which the next call does not overwrite
    for image, encoded in zip(images, kept):
        assert torch.allclose(encoded, eager([image])[0], atol=1e-5)
    assert (graphed.encode.last_ran, eager.encode.last_ran) == ("graph", "eager")


def rows_of(points, min_iou, num_used):
    """Return the prompts of `decode_ahead`, with their number as what is returned with each mask."""
    least = torch.full((len(points), 1), -torch.inf if min_iou is None else min_iou, device=points.device)
    least[num_used:] = torch.inf
    numbers = torch.arange(float(len(points)), device=points.device)[:, None]
    return torch.cat([points[:, 0], least, numbers], dim=1)


@pytest.mark.parametrize("min_iou", [None, -1e9, 0.0, 1e9])
def test_masks_are_decoded_ahead_and_without_those_of_prompts_that_fill_up(loud, device, min_iou):
    points = prompts_of(7, device)[POINTS]
    decoder, plain, image = FastMaskDecoder(loud), PlainMaskDecoder(loud), embeddings(loud)
    with torch.no_grad():
        expected = plain.decode(image, points[:5], torch.ones(5, 1, device=device).long(), min_iou=min_iou)
        for each, prepared in ((decoder, decoder.prepare(image)), (plain, image)):
            done = []
            wait = each.decode_ahead(
                prepared, rows_of(points, min_iou, 5), 5, min_iou=min_iou, meanwhile=lambda done=done: done.append(1),
                prompts_per_upscaling=2,
            )  # fmt: skip
            table, logits, have_numbers = wait()
            assert done == [1] and have_numbers and torch.equal(table[:, 1].long(), expected.kept // 3)
            assert_same(Decoded(expected.iou.flatten().scatter(0, expected.kept, table[:, 0]).view(5, 3),
                                expected.kept, logits), expected)  # fmt: skip


@pytest.mark.parametrize("min_iou", [None, 0.0, 1e9])
def test_what_is_replayed_ahead_is_what_decode_computes_step_by_step(loud, min_iou):
    """The part of the kernel's way that runs on a CPU, too."""
    points = prompts_of(7, loud.device)[POINTS]
    decoder = FastMaskDecoder(loud)
    image, rows = decoder.prepare(embeddings(loud)), rows_of(points, min_iou, 5)
    expected = decoder.decode(
        image, points, torch.ones(7, 1, device=loud.device).long(), min_iou=min_iou, repeated=True, num_used=5
    )
    decoder.use_head_kernel = True  # `_transform` then computes the hypernetworks
    with torch.no_grad():
        tokens, hyper, slots, table, state = decoder._ahead(image, rows)
        num_kept, num_nan = state.tolist()
        logits = mask_head.masks_reference(tokens, hyper, slots, num_kept, decoder.grid_size, decoder.head)
        bad = decoder._ahead(image * torch.nan, rows)[-1].tolist()
    assert num_nan == 0 and bad == [0, 21]
    assert torch.equal(table[:num_kept, 1].long(), expected.kept // 3)
    assert torch.equal(table[:num_kept, 0], expected.iou.flatten()[expected.kept])
    assert torch.allclose(logits, expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("min_iou", [None, 0.0, 0.4, 1e9])
def test_on_a_gpu_decoding_ahead_waits_for_nothing(min_iou, monkeypatch):
    model, _ = load_model(BUNDLED_CHECKPOINT, "cuda", torch.bfloat16)
    decoder = make_decoder(model, cuda_graphs=True)
    assert decoder.use_head_kernel
    pixel_values = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        image = decoder.prepare(model.get_image_embeddings(pixel_values))
        points, labels = 1000 * torch.rand(40, 1, 2, device="cuda"), torch.ones(40, 1, dtype=torch.int64, device="cuda")
        expected = decoder.decode(image, points, labels, min_iou=min_iou, repeated=True, num_used=33)
        rows = rows_of(points, min_iou, 33)
        decoder.decode_ahead(image, rows, 33, min_iou)()
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen = []
            compute = mask_head.masks_of  # which launches the logits
            monkeypatch.setattr(mask_head, "masks_of", lambda *args: (seen.append("logits"), compute(*args))[1])
            wait = decoder.decode_ahead(image, rows, 33, min_iou, lambda: seen.append(decoder.ahead.last_ran))
            table, logits, have_numbers = wait()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seen == ["graph", "logits"] and decoder.ahead.last_ran == "graph" and have_numbers
    assert torch.equal(table[:, 1].long(), expected.kept // 3)
    assert torch.equal(table[:, 0], expected.iou.flatten()[expected.kept])
    assert torch.equal(logits, expected.logits)
