"""Threads that share a predictor, generator, pipeline or optimized model get the same bits as each would alone."""

import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from samlight_hf import MaskGenerator, Predictor, optimize
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.loading import load_model
from samlight_hf.utils.turns import turn


NUM_THREADS, NUM_ROUNDS = 8, 6
KEEP_ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_crop": 4}


@pytest.fixture(
    scope="module",
    params=["cpu", *(pytest.param(dtype, marks=pytest.mark.gpu) for dtype in ("float32", "bfloat16"))],
)
def loaded(request, folder):
    """A tiny model on a CPU; on a GPU the bundled one, whose encoder and decoder are CUDA graphs."""
    return (
        load_model(folder, "cpu") if request.param == "cpu" else load_model(BUNDLED_CHECKPOINT, "cuda", request.param)
    )


@pytest.fixture
def often():
    """Let the interpreter switch threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def image(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    width, height = random.integers(20, 60, 2)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


def assert_each_as_alone(work, on_cuda: bool):
    """Check that `work(number)` returns the same arrays in many threads as in one; half have their own stream."""
    alone = [work(number) for number in range(NUM_THREADS)]
    barrier, wrong = threading.Barrier(NUM_THREADS), []

    def run(number: int):
        on_stream = torch.cuda.stream(torch.cuda.Stream()) if on_cuda and number % 2 else nullcontext()
        barrier.wait()
        try:
            with on_stream:
                for _ in range(NUM_ROUNDS):
                    actual = work(number)
                    if not all(np.array_equal(*pair) for pair in zip(actual, alone[number], strict=True)):
                        wrong.append(number)
        except Exception as error:
            wrong.append((number, error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert any(not np.array_equal(alone[0][0], other[0]) for other in alone[1:])  # else a mix-up would not show


def test_a_predictor(loaded, often):
    model, _ = loaded
    predictor = Predictor(*loaded)

    def work(number: int) -> list[np.ndarray]:
        encoded = predictor.encode(image(number))
        height, width = encoded.size
        point, box = [(width / 3, height / 4)], (1, 2, width - 3, height - 1)
        one = predictor.predict([point], image=encoded)
        refined = predictor.predict([point], logits=one.logits[:, 0], image=encoded)
        several = predictor.predict(boxes_xyxy=[box, (0, 0, 9, 9), box], multimask_output=False, image=encoded)
        many = predictor.predict([[point] * 2, [point] * 3], image=[encoded, predictor.encode(image(number + 1))])
        return [part for each in (one, refined, several, *many) for part in (each.logits, each.scores, each.masks)]

    assert_each_as_alone(work, model.device.type == "cuda")
    if model.device.type == "cuda":
        ran = [function.last_ran for function in (predictor.encoder.encode, predictor.decoder.all_masks[True, False])]
        assert ran == ["graph", "graph"]


def test_images_of_one_thread_are_prompted_by_others(loaded, often):
    model, _ = loaded
    predictor = Predictor(*loaded)
    encoded = predictor.encode([image(number) for number in range(NUM_THREADS)])

    def work(number: int) -> list[np.ndarray]:
        predictions = [predictor.predict([[(3, 4)]], image=each) for each in (encoded[number], encoded[number - 1])]
        return [part for each in predictions for part in (each.logits, each.masks)]

    assert_each_as_alone(work, model.device.type == "cuda")


def test_a_generator(loaded, often):
    model, _ = loaded
    generator = MaskGenerator(*loaded)

    def work(number: int) -> list:
        actual = generator(image(number), **KEEP_ALL, crops_n_layers=number % 2)
        return [actual.scores, actual.boxes_xyxy, actual.stability_scores, actual.masks.to_masks()]

    assert_each_as_alone(work, model.device.type == "cuda")
    if model.device.type == "cuda":
        decoder = generator.decoder
        assert (decoder.ahead if decoder.use_head_kernel else decoder.transform).last_ran == "graph"


def test_a_pipeline_whose_calls_decode_batches_of_several_sizes(loaded, often):
    model, processor = loaded
    task = pipeline("fast-mask-generation", model=model, image_processor=processor.image_processor)

    def work(number: int) -> list:
        actual = task(image(number), **KEEP_ALL, points_per_batch=3 + number % 2, output_bboxes_mask=True)
        return [actual["scores"].numpy(), actual["bounding_boxes"].numpy(), np.stack(actual["masks"])]

    assert_each_as_alone(work, model.device.type == "cuda")


def test_an_optimized_model(loaded, often):
    model, _ = loaded
    optimized, size = optimize(model, prompt_counts=(1,)), model.config.vision_config.image_size

    def work(number: int) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(number)
        pixel_values = torch.randn(1, 3, size, size, generator=generator).to(model.device)
        outputs = optimized(pixel_values=pixel_values, input_points=torch.full((1, 1, 1, 2), 9.0, device=model.device))
        return [outputs.pred_masks.float().cpu().numpy(), outputs.iou_scores.float().cpu().numpy()]

    assert_each_as_alone(work, model.device.type == "cuda")


def test_on_a_cpu_threads_run_side_by_side():
    both = threading.Barrier(2, timeout=60)

    def run():
        with turn(torch.device("cpu")):
            both.wait()

    thread = threading.Thread(target=run)
    thread.start()
    run()
    thread.join()
    assert not both.broken


@pytest.mark.gpu
def test_a_turn_begins_on_the_device_when_the_one_before_has_ended_on_its_stream():
    value, (first, second) = torch.zeros(1, device="cuda"), (torch.cuda.Stream(), torch.cuda.Stream())
    for number in range(1, 9):
        with torch.cuda.stream(first), turn(value.device):
            torch.cuda._sleep(20_000_000)
            value.fill_(number)
        with torch.cuda.stream(second), turn(value.device), turn(value.device):  # a turn may be nested
            actual = value.clone()
        second.synchronize()
        assert actual.item() == number
