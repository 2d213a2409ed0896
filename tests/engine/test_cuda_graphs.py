"""Inputs in a graph's own memory, and which calls get a graph and when."""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch import nn
from torch.utils._pytree import tree_leaves

from samlight_hf.engine import cuda_graphs, image_encoder, optimized_model
from samlight_hf.engine.build import make_decoder
from samlight_hf.engine.cuda_graphs import GraphedFunction, GraphMemory, StaticInputs, part_size, parts_of
from samlight_hf.engine.image_encoder import FastVisionEncoder, ImageEncoder
from samlight_hf.engine.mask_decoder import graph_size, largest_batch
from samlight_hf.engine.optimized_model import FastPaths, shown
from samlight_hf.kernels.support import only_compiles


class Recorded(GraphedFunction):
    """A function that "captures" on a CPU: a replay calls the function. When it captures is what the class decides."""

    def _may_capture(self, device, kinds):
        assert device.type in ("cpu", "meta")
        return super()._may_capture(torch.device("cuda"), kinds)

    def _capture(self, tensors, lent):
        inputs = StaticInputs(tensors, lent, self.memory)
        inputs.fill(tensors)
        outputs = self.function(*inputs.tensors)

        class Graph:
            @torch.inference_mode()
            def replay(graph):
                for own, new in zip(tree_leaves(outputs), tree_leaves(self.function(*inputs.tensors))):
                    own.copy_(new)

        return Graph(), inputs, outputs


def test_a_frozen_function_captures_what_was_announced_and_only_when_it_is_called():
    function = Recorded(lambda x: 2 * x)
    function(torch.ones(2))
    assert function.last_ran == "graph" and len(function) == 1
    function.freeze()
    function.capture_when_called(torch.zeros(5, device="meta"))
    assert len(function) == 1  # not yet
    assert function(torch.ones(3)).tolist() == [2, 2, 2] and function.last_ran == "eager"
    assert function(torch.ones(5, dtype=torch.float64)).sum() == 10 and function.last_ran == "eager"
    for number in (1, 3):
        assert function(torch.full((5,), float(number))).tolist() == 5 * [2 * number] and function.last_ran == "graph"
    assert len(function) == 2
    assert function(torch.ones(2)).tolist() == [2, 2] and function.last_ran == "graph"


def test_a_replay_takes_inputs_of_any_mode():
    function = Recorded(lambda x, y: x + y)
    inputs = torch.ones(2), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        inferred = torch.ones(2)
    for _ in range(2):
        for one in inputs:
            result = function(inferred, one)
            assert function.last_ran == "graph" and result.tolist() == [2, 2] and not result.requires_grad
        with torch.inference_mode(), torch.no_grad():
            assert function(2 * inferred, inputs[1]).tolist() == [3, 3]
    assert not any(tensor.requires_grad for _, inputs, _ in function._graphs.values() for tensor in inputs.tensors)


def test_what_has_a_graph_is_replayed_and_nothing_else_is_run():
    function = Recorded(lambda x: 2 * x)
    assert function.replay(torch.ones(2)) is None and function.last_ran is None and len(function) == 0
    function(torch.ones(2))
    for _ in range(2):
        function.last_ran = None
        assert function.replay(torch.full((2,), 3.0)).tolist() == [6, 6] and function.last_ran == "graph"
    assert function.replay(torch.ones(3)) is None and len(function) == 1
    function(torch.ones(3))
    function.replay(torch.ones(2))
    assert [kinds[0] for _, *kinds in function._graphs] == [((3,), torch.float32), ((2,), torch.float32)]  # the oldest


def test_a_function_without_graphs_captures_nothing_that_was_announced():
    function = Recorded(lambda x: 2 * x, enabled=False)
    function.capture_when_called(torch.zeros(5))
    assert function(torch.ones(5)).tolist() == 5 * [2] and function.last_ran == "eager" and len(function) == 0


@pytest.fixture
def paths(model) -> FastPaths:
    return FastPaths(model, make_decoder(model), (1, 3), (1, 4))


def test_the_plan_has_a_graph_for_each_shape(model):
    """2 numbers of images, and for each number of prompts points and boxes with three masks and with one."""
    decoder = make_decoder(model)
    paths = FastPaths(model, decoder, (1, 3), (1, 4))
    paths.encode.enabled = True  # as on CUDA
    planned = paths.graphs((1, 3), (1, 4))
    assert [graph.name for graph in planned[:4]] == [
        "1 images",
        "3 images",
        "1 points, three masks",
        "1 boxes, three masks",
    ]
    assert len(planned) == len({graph.name for graph in planned}) == 2 + 8
    for graph in planned:
        real, meta = (graph.make_inputs(torch.device(name)) for name in ("cpu", "meta"))
        assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in meta]
        assert all(t.is_meta for t in meta)
        with torch.inference_mode():
            graph.function.function(*real)  # inputs that the function takes


def test_each_call_of_a_user_finds_the_graph_that_was_announced(paths, model):
    """The shapes and dtypes of the plan are those of calls by `masks`, as an optimized model makes them."""
    functions = {}
    for graph in paths.graphs((1, 3), (1, 4)):
        own = functions.setdefault(id(graph.function), Recorded(graph.function.function))
        own.capture_when_called(*graph.make_inputs(torch.device("meta")))
    for function in functions.values():
        function.freeze()
    assert paths.decoder is not None
    all_masks = paths.decoder.all_masks
    for key, function in all_masks.items():
        if id(function) in functions:
            all_masks[key] = functions[id(function)]
    side, channels = paths.decoder.grid_size[0], model.config.vision_config.output_channels
    image = torch.randn(1, channels, side, side)
    boxes, points = torch.tensor([[[1.0, 2.0, 9.0, 12.0]]]), torch.tensor([[[[3.0, 4.0]]]])
    labels = torch.ones(1, 1, 1, dtype=torch.int32)
    for count, expected in ((1, "graph"), (4, "graph"), (2, "eager")):
        for prompts in ([boxes], [points, labels]):
            for multimask_output in (True, False):
                many = [prompt.expand(1, count, *prompt.shape[2:]).contiguous() for prompt in prompts]
                with torch.inference_mode():
                    paths.masks(image, many, None, multimask_output)
                assert all_masks[multimask_output, False].last_ran == expected


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(optimized_model, "MOST_IMAGES", 4)
    monkeypatch.setattr(optimized_model, "MOST_PROMPTS", 4)


def test_large_batches_get_graphs_of_their_parts(model, small_parts):
    paths = FastPaths(model, make_decoder(model), (), ())
    paths.encode.enabled = True  # as on CUDA
    names = [graph.name for graph in paths.graphs((1, 3, 8, 7, 9), (2, 4, 16, 5))]
    assert [name for name in names if "images" in name] == ["1 images", "3 images", "4 images"]
    assert [name for name in names if "points, one" in name] == [f"{count} points, one mask" for count in (2, 4, 3)]


def recorded(function: GraphedFunction, *shapes: tuple[torch.Tensor, ...]) -> tuple[Recorded, list[int]]:
    """Return a function that is replayed for these examples alone, and the numbers of rows of its calls."""
    rows: list[int] = []
    own = Recorded(lambda *tensors: (rows.append(len(tensors[-1])), function.function(*tensors))[1])
    for examples in shapes:
        own.capture_when_called(*examples)
    own.freeze()
    return own, rows


@pytest.mark.parametrize(("count", "ran"), [(4, [4]), (8, [4, 4]), (7, [4, 4]), (9, [9]), (2, [2])])
def test_batches_of_images_run_in_parts_where_these_have_a_graph(model, small_parts, count, ran):
    paths = FastPaths(model, make_decoder(model), (), ())
    images = torch.randn(count, *paths.image_shape)
    expected = model.get_image_embeddings(images)
    paths.encode, rows = recorded(paths.encode, (images[:0].new_empty(4, *paths.image_shape),))
    embeddings = paths.embeddings(images)
    replayed = 1 if ran[0] == 4 else 0  # the first replay is also recorded when it is "captured"
    assert rows == [*ran[:replayed], *ran] and not embeddings.is_inference()
    assert paths.encode.last_ran == ("graph" if replayed else "eager")
    assert torch.allclose(embeddings, expected, atol=1e-5)
    kept = embeddings.clone()
    paths.embeddings(images + 1)
    assert torch.equal(embeddings, kept)  # it belongs to the caller


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("count", "ran"), [(4, [4]), (8, [4, 4]), (7, [4, 4]), (9, [9]), (2, [2])])
def test_prompts_run_in_parts_where_these_have_a_graph(paths, model, small_parts, count, ran, with_mask):
    assert paths.decoder is not None
    generator = torch.Generator().manual_seed(0)
    side, channels = paths.decoder.grid_size[0], model.config.vision_config.output_channels
    images, boxes = (
        torch.randn(2, channels, side, side),
        32 * torch.rand(2, count, 4, generator=generator).sort().values,
    )
    masks = torch.randn(2, 1, 4 * side, 4 * side) if with_mask else None
    with torch.inference_mode():
        expected = paths.masks(images, [boxes], masks, True)
        image_tokens = torch.zeros(1, side * side, channels)
        examples = [
            image_tokens,
            *([torch.zeros(4, 4 * side, 4 * side)] if with_mask else []),
            boxes[0, :1].expand(4, 4),
        ]
        own, rows = recorded(paths.decoder.all_masks[True, with_mask], tuple(examples))
        paths.decoder.all_masks[True, with_mask] = own
        actual = paths.masks(images, [boxes], masks, True)
    replayed = 1 if ran[0] == 4 else 0
    assert rows == [*ran[:replayed], *ran, *ran]
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_an_image_encoder_runs_large_batches_in_parts(model, monkeypatch):
    monkeypatch.setattr(image_encoder, "MOST_IMAGES", 2)
    processor = make_processor(model.config.vision_config).image_processor
    images = [torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(5)]
    encoder = ImageEncoder(model, processor, make_decoder(model))
    expected = encoder(images)
    encoder.encode, rows = recorded(encoder.encode)
    encoder.encode.enabled = False
    assert len(encoder(images)) == 5 and rows == [5]  # without graphs all at once
    encoder.encode = Recorded(encoder.encode.function)
    rows.clear()
    actual = encoder(images)
    assert set(rows) == {2} and len(encoder.encode) == 1
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("names", [("boxes",), ("points", "labels"), ("points", "labels", "boxes")], ids="+".join)
def test_few_prompts_on_an_image_are_filled_up_and_replayed_from_their_second_batch_on(model, names, monkeypatch):
    """The kernels that this is for run on CUDA alone: here with the decoder's other operations, which they equal."""
    decoder = make_decoder(model)
    image, sizes = torch.randn(1, len(decoder.positions), decoder.positions.shape[1]), []
    generator = torch.Generator().manual_seed(0)
    corners = 32 * torch.rand(64, 4, generator=generator).sort(dim=1).values
    prompts = {"boxes": corners, "points": corners[:, None, :2], "labels": (corners[:, :1] > 9).int()}
    compute = decoder._all_masks

    def run(count: int, images: torch.Tensor = image, **options):
        return decoder.decode(images, **{name: prompts[name][:count] for name in names}, **options)

    expected = {count: run(count) for count in (3, 4, 5, 6, 64)}
    monkeypatch.setattr(decoder, "cuda_graphs", True)
    monkeypatch.setattr(decoder, "_decodes_in_few_kernels", lambda prompts: True)
    monkeypatch.setattr(
        decoder, "_all_masks", lambda *args, **out: (sizes.append(len(args[-1])), compute(*args, **out))[1]
    )
    monkeypatch.setattr(
        decoder,
        "all_masks",
        {
            key: Recorded(function.function, max_graphs=function.max_graphs)
            for key, function in decoder.all_masks.items()
        },
    )
    graphs = decoder.all_masks[True, False]
    ran = []
    for count in (3, 4, 3, 6, 64, 5, 64):
        graphs.last_ran = None
        decoded = run(count)
        ran.append(graphs.last_ran)
        assert decoded.iou.shape == expected[count].iou.shape and decoded.kept.tolist() == list(range(3 * count))
        assert torch.allclose(decoded.iou, expected[count].iou, rtol=1e-4, atol=1e-5)
        assert torch.allclose(decoded.logits, expected[count].logits, rtol=1e-3, atol=1e-4)
    assert ran == [None, "graph", "graph", None, None, "graph", "graph"]
    assert set(sizes) == {4, 8, 64} and len(graphs) == 3
    before = decoded.logits.clone()
    run(64, image + 1)
    assert torch.equal(decoded.logits, before)  # outputs belong to the caller
    sizes.clear()
    run(3, image.expand(3, -1, -1))  # an image for each prompt
    assert sizes == [3] and len(graphs) == 3
    run(4, multimask_output=False)
    assert decoder.all_masks[False, False].last_ran is None  # the first batch of this kind


@pytest.fixture
def few(model, monkeypatch):
    """A decoder that takes few prompts to graphs that are recorded on a CPU."""
    decoder = make_decoder(model)
    monkeypatch.setattr(decoder, "cuda_graphs", True)
    monkeypatch.setattr(decoder, "_decodes_in_few_kernels", lambda prompts: True)
    recorded = {key: Recorded(function.function, max_graphs=3) for key, function in decoder.all_masks.items()}
    monkeypatch.setattr(decoder, "all_masks", recorded)
    image = torch.randn(1, len(decoder.positions), decoder.positions.shape[1])
    boxes = torch.tensor([[2.0, 3.0, 20.0, 30.0]]).expand(64, -1)
    return decoder, lambda count, **options: decoder.decode(image, boxes=boxes[:count], **options)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_batch_without_memory_for_its_graph_runs_without_one(few, monkeypatch, hidden):
    decoder, run = few
    expected, tries = run(4), []

    def fail(self, tensors, lent):
        tries.append(len(tensors[-1]))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if hidden:
                raise RuntimeError("capture ended")  # what the end of a capture says after an error in it

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "_capture", fail)
        for _ in range(3):
            assert torch.equal(run(4).logits, expected.logits)
        assert tries == [4]
    run(2)
    run(2)  # others still get theirs
    assert decoder.all_masks[True, False].last_ran == "graph" and len(decoder.all_masks[True, False]) == 1

    def broken(self, tensors, lent):
        raise RuntimeError("broken")

    monkeypatch.setattr(Recorded, "_capture", broken)
    run(8)
    with pytest.raises(RuntimeError, match="broken"):
        run(8)


class Streams:
    """Stands for those of `torch.cuda`, whose graphs leave their own one current where the end of a capture fails."""

    def __init__(self, monkeypatch):
        self.current, self.captured_on = self.Stream("the caller's device"), []
        self.fails = False
        streams = self

        class Graph:
            def __init__(self, graph, pool=None, stream=None, capture_error_mode=None):
                self.stream = stream or streams.Stream("the device of the first capture")

            def __enter__(self):
                streams.captured_on.append(self.stream.device)
                self.before, streams.current = streams.current, self.stream

            def __exit__(self, *_):
                if streams.fails:
                    raise RuntimeError("capture ended")
                streams.current = self.before

        names = {"Stream": self.Stream, "stream": self.on, "current_stream": lambda: self.current, "graph": Graph}
        names |= {"device": lambda _: nullcontext(), "empty_cache": lambda: None, "CUDAGraph": object}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for function in (cuda_graphs._warm_up_stream, cuda_graphs._capture_stream):
            monkeypatch.setattr(cuda_graphs, function.__name__, function.__wrapped__)
        monkeypatch.setattr(cuda_graphs, "_forget_workspaces", lambda: None)

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            assert other is not self

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def test_a_capture_is_on_a_stream_of_its_device(monkeypatch):
    streams = Streams(monkeypatch)
    caller = streams.current
    GraphedFunction(lambda x: x + 1)._capture((torch.zeros(2),), None)
    assert streams.captured_on == [torch.device("cpu")] and streams.current is caller


def test_after_a_capture_that_failed_work_goes_on_on_the_stream_before(monkeypatch):
    streams = Streams(monkeypatch)
    caller, streams.fails = streams.current, True
    with pytest.raises(RuntimeError, match="capture ended"):
        GraphedFunction(lambda x: x + 1)._capture((torch.zeros(2),), None)
    assert len(streams.captured_on) == 1 and streams.current is caller


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_of_two_gpus_are_replayed_on_their_own():
    for index in (0, 1):
        function, device = GraphedFunction(lambda x: 2 * x), torch.device("cuda", index)
        for number in (1.0, 3.0):
            assert function(torch.full((3,), number, device=device)).tolist() == 3 * [2 * number]
        assert function.last_ran == "graph" and torch.cuda.current_device() == 0


def test_batches_beyond_the_most_graphs_run_without_one_and_drop_none(few, monkeypatch):
    decoder, run = few
    captured, capture = [], Recorded._capture
    monkeypatch.setattr(Recorded, "_capture", lambda self, *args: (captured.append(1), capture(self, *args))[1])
    for _ in range(4):
        for count in (1, 2, 4, 8, 12):
            run(count)
    assert len(captured) == len(decoder.all_masks[True, False]) == 3


def test_no_prompts_and_filled_up_ones(few):
    _, run = few
    none = run(0)
    assert none.iou.shape == (0, 3) and len(none.logits) == 0
    decoded = run(5)  # the first batch: not from a graph
    assert decoded.logits.untyped_storage().nbytes() == decoded.logits.nbytes  # not those of 8


@pytest.mark.parametrize("most", [1, 3, 16, 35, 51, 63, 64, 100])
def test_filled_up_batches_stay_within_the_budget(most):
    size = largest_batch(most)
    assert 1 <= size <= most and (size >= 64 or graph_size(size) == size)


def test_a_progress_bar_names_each_step(capsys):
    steps = ["compiling kernels", "capturing 4 boxes"]
    assert list(shown(steps, False)) == steps and capsys.readouterr().err == ""
    assert list(shown(steps, True)) == steps
    printed = capsys.readouterr().err
    assert "2/2" in printed and all(step in printed for step in steps)


COLD_START = """
import torch, triton
from samlight_hf import SamLighteningConfig, SamLighteningModel, optimize
from samlight_hf.engine.cuda_graphs import GraphedFunction
from samlight_hf.kernels.hopper import runtime

late, compile_source, do_compile = [], runtime.compile_source, triton.runtime.jit.JITFunction._do_compile
capture, compiled, capturing = GraphedFunction._capture, [], []

def in_triton(self, *arguments, **options):
    (late if capturing else compiled).append(self.__name__)
    return do_compile(self, *arguments, **options)

def in_nvrtc(source):
    late.append("CUDA")
    return compile_source(source)

def counted(self, *arguments):
    capturing.append(1)
    return capture(self, *arguments)

triton.runtime.jit.JITFunction._do_compile = in_triton
runtime.compile_source, GraphedFunction._capture = in_nvrtc, counted
model = SamLighteningModel(SamLighteningConfig()).cuda().eval()
optimized = optimize(model, image_batch_sizes=(1, 2), prompt_counts=(1, 16))
assert optimized.report.num_graphs == 10, optimized.report
print(len(set(compiled)), late)
"""


ATTEMPTS = """
from samlight_hf import SamLighteningConfig, SamLighteningModel, optimize
from samlight_hf.kernels import support

attempts, failure = [], support.failure
support.failure = lambda name, *arguments: (attempts.append(name), failure(name, *arguments))[1]
model = SamLighteningModel(SamLighteningConfig()).cuda().eval()
optimized = optimize(model, image_batch_sizes=(1, 8), prompt_counts=(1, 16))
assert optimized.report.encoder == optimized.report.decoder == "fused", optimized.report
print(len(attempts))
"""


@pytest.mark.gpu
def test_a_second_process_tries_no_kernel_again(tmp_path):
    environment, attempts = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, []
    for _ in range(2):
        child = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, env=environment)
        assert child.returncode == 0, child.stderr
        attempts.append(int(child.stdout.strip().splitlines()[-1]))
    assert attempts[0] >= 5 and attempts[1] == 0


@pytest.mark.gpu
def test_with_an_empty_cache_kernels_are_compiled_before_graphs_are_captured(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", COLD_START], capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    number, late = child.stdout.strip().splitlines()[-1].split(" ", 1)
    print(child.stdout)
    assert int(number) >= 10 and late == "[]"


@pytest.fixture
def captured(model, monkeypatch) -> dict[str, list]:
    """A model whose CPU says to `FastPaths` alone that it is CUDA, and what is captured, compiled and announced."""
    calls: dict[str, list] = {"captured": [], "compiled": [], "announced": []}
    for owner, name, called in (
        (FastPaths, "_capture", lambda self, graphs, steps: calls["captured"].append((len(graphs), *steps))),
        (GraphedFunction, "compile", lambda self, *_: calls["compiled"].append(only_compiles())),
        (GraphedFunction, "capture_when_called", lambda self, *examples: calls["announced"].append(examples)),
    ):
        monkeypatch.setattr(owner, name, called)
    plan = FastPaths.graphs

    def on_meta(self, *sizes):
        return [graph._replace(make_inputs=lambda _: [torch.zeros(1, device="meta")]) for graph in plan(self, *sizes)]

    monkeypatch.setattr(FastPaths, "graphs", on_meta)
    on_cuda = type("Device", (), {"type": "cuda"})()
    monkeypatch.setattr(optimized_model, "make_encoder", lambda *_: (GraphedFunction(nn.Identity()), None))
    monkeypatch.setattr(type(model), "device", on_cuda, raising=False)
    return calls


@pytest.mark.parametrize("when_needed", [False, True])
def test_graphs_are_captured_now_or_announced(model, captured, when_needed):
    paths = FastPaths(model, None, (1, 3), (1, 4), when_needed, progress=not when_needed)
    assert paths.report.num_graphs_when_needed == (2 if when_needed else 0)
    assert ("2 more when needed" in str(paths.report)) == when_needed
    assert len(captured["announced"]) == (2 if when_needed else 0)
    steps = "capturing 3 images", "capturing 1 images"  # "compiling kernels" is done
    assert captured["captured"] == ([] if when_needed else [(2, *steps)])
    assert captured["compiled"] == ([] if when_needed else [True, True])


def test_an_encoder_whose_kernels_were_taken_to_run_and_do_not_is_made_again(model, captured, monkeypatch):
    class Fused(FastVisionEncoder):
        def __init__(self):
            pass

    makings = []

    def make(*_):
        makings.append(only_compiles())
        return GraphedFunction(nn.Identity()), Fused() if makings[-1] else None

    monkeypatch.setattr(optimized_model, "make_encoder", make)
    for reason, expected in ((None, "fused"), ("too many registers.", "plain: too many registers.")):
        monkeypatch.setattr(optimized_model, "why_not_kernels", lambda model, reason=reason: reason)
        for when_needed in (True, False):
            makings.clear()
            paths = FastPaths(model, None, (1, 3), (1, 4), when_needed)
            assert paths.report.encoder == expected and isinstance(paths.copied, Fused) == (reason is None)
            assert makings == ([True] if reason is None else [True, False])
    assert [number for number, *_ in captured["captured"]] == [2, 2]


def test_inputs_of_graphs_that_share_memory_are_in_one_buffer():
    memory, cpu = GraphMemory(), torch.device("cpu")
    large = memory.inputs(4096, cpu)
    values = [
        torch.rand(2, 3, device="meta"),
        torch.randint(9, (4,), device="meta"),
        torch.tensor([True], device="meta"),
    ]
    first, later = memory.inputs(100, cpu), memory.inputs(5000, cpu)
    assert first.data_ptr() == large.data_ptr() != later.data_ptr()
    assert memory.inputs(4096, cpu).data_ptr() == later.data_ptr()
    assert memory.inputs(4096, torch.device("meta")).is_meta  # not the buffer of another device
    inputs = [StaticInputs(some, memory=GraphMemory()) for some in (values, values[:1])]
    starts = [tensor.storage_offset() * tensor.itemsize for tensor in inputs[0].tensors]
    assert starts == [0, 256, 512]  # aligned, and none in the memory of another
    for own, examples in zip(inputs, (values, values[:1])):
        assert [(t.shape, t.dtype) for t in own.tensors] == [(t.shape, t.dtype) for t in examples]


def test_results_are_behind_the_inputs_of_their_graph_in_memory_that_is_made_before_a_capture():
    memory, cpu = GraphMemory(), torch.device("cpu")
    assert memory.result(10, cpu) is None  # nobody would share it
    with memory.capturing():
        inputs = memory.inputs(300, cpu)
        grown = memory.result(4096, cpu, most=9000)
        again, inputs = memory.result(100, cpu), memory.inputs(300, cpu)
        other = (memory.inputs(600, cpu), memory.result(8000, cpu))
        assert grown.data_ptr() == again.data_ptr() == inputs.data_ptr() + 512  # aligned
        assert other[0].data_ptr() == inputs.data_ptr() and other[1].data_ptr() == inputs.data_ptr() + 768
        assert (len(inputs), len(grown), len(again), len(other[1])) == (300, 4096, 100, 8000)
    assert memory.num_bytes() == 512 + 9000
    with pytest.raises(ValueError), memory.capturing():
        raise ValueError
    assert memory.result(10, cpu) is None


def test_what_was_reserved_is_the_one_buffer_of_all():
    memory, cpu = GraphMemory(), torch.device("cpu")
    memory.reserve(5000, cpu)
    with memory.capturing():
        starts = {memory.inputs(number, cpu).data_ptr() for number in (5000, 100, 2560)}
        memory.result(2440, cpu, most=2**30)
    assert len(starts) == 1 and memory.num_bytes() == 5000


@pytest.mark.parametrize("count", range(70))
@pytest.mark.parametrize("most", [1, 2, 16, 64])
def test_parts_are_few_equal_and_cover_every_row(count, most):
    parts = parts_of(count, most)
    assert {part.stop - part.start for part in parts} == {part_size(count, most)}
    assert len(parts) == max(1, -(-count // most)) and part_size(count, most) <= most
    assert [row for row in range(count) if any(part.start <= row < part.stop for part in parts)] == list(range(count))


def test_the_memory_of_graphs_is_that_of_their_pool_and_buffers(monkeypatch):
    """The snapshot is torch's of a device, which the CPU has not; what else is in it belongs to others."""
    memory, cpu = GraphMemory(), torch.device("cpu")
    pools = [(0, 0), list(memory.pool), tuple(memory.pool), tuple(GraphMemory().pool)]
    segments = [{"segment_pool_id": pool, "total_size": 10**place} for place, pool in enumerate(pools)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert memory.num_bytes() == 110
    memory.inputs(5000, cpu)
    assert memory.num_bytes() == 5110


def test_functions_that_share_memory_overwrite_each_others_inputs_and_not_their_results():
    memory = GraphMemory()
    double, add = Recorded(lambda x: 2 * x, memory=memory), Recorded(lambda x, y: x + y, memory=memory)
    for number in range(3):
        for length in (5, 3):
            x, y = torch.full((length,), 1.0 + number), torch.arange(length).double()
            assert torch.equal(double(x), 2 * x) and torch.equal(add(x, y), x + y)
    assert len(double) == len(add) == 2 and double.last_ran == add.last_ran == "graph"


def test_without_a_graph_there_is_a_new_tensor_each_time():
    function, kind = GraphedFunction(lambda x: x + 1), {"dtype": torch.float64, "device": torch.device("cpu")}
    one, other = function.empty(2, 3, **kind), function.empty(2, 3, **kind)
    assert (one.shape, one.dtype) == ((2, 3), torch.float64)
    assert one.data_ptr() != other.data_ptr()
    assert torch.equal(function(one.fill_(1)), one + 1)


@pytest.mark.gpu
def test_with_a_graph_it_is_what_the_graph_reads():
    function, kind = GraphedFunction(lambda x: 2 * x), {"dtype": torch.float32, "device": torch.device("cuda", 0)}
    own = torch.ones(3, **kind)
    assert function(own).tolist() == [2, 2, 2]
    place = function.empty(3, **kind)
    assert place is function.empty(3, **kind)
    with torch.inference_mode():
        place.fill_(5)
    assert function(place).tolist() == [10, 10, 10]
    assert function.last_ran == "graph" and len(function) == 1
    assert own.tolist() == [1, 1, 1]
    assert function(own).tolist() == [2, 2, 2]
    for other in (function.empty(4, **kind), function.empty(3, **{**kind, "dtype": torch.float16})):
        assert other.data_ptr() != place.data_ptr()


@pytest.mark.gpu
def test_a_graph_reads_what_was_lent_before_it_was_made():
    function = GraphedFunction(lambda x: 2 * x)
    place = function.empty(3, dtype=torch.float32, device=torch.device("cuda", 0))
    assert function(place.fill_(4)).tolist() == [8, 8, 8]
    assert function.empty(3, dtype=torch.float32, device=torch.device("cuda", 0)) is place
