"""Prompts in pixels of the images give the masks that the model gives for each prompt alone, in any batches."""

import copy
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import EncodedImage, ImageError, MaskGenerator, Predictor, SamLighteningModel, optimize
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.engine.plain_decoder import PlainMaskDecoder
from samlight_hf.inference import prompts as prompts_module
from samlight_hf.inference.mask_prompts import MASK_LOGIT, logits_of_prompt
from samlight_hf.inference.prompts import (
    ObjectPrompt,
    PromptArrays,
    clip_prompts,
    parse_prompts,
    prompt_batches,
    regular_prompts,
)
from samlight_hf.inference.single_calls import predict_objects, predict_prompts, segment_prompts
from samlight_hf.kernels import upscaled_masks
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=DEVICES)
def tiny(request, folder):
    return load_model(folder, request.param)


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def image():
    return random_image(50, 30)


def by_the_model(model, processor, image, multimask_output=True, logits=None, **prompts):
    """Run one prompt through processor and model, as in the documentation of SamModel."""
    inputs = processor(images=image, return_tensors="pt", **{k: [[v]] for k, v in prompts.items()}).to(model.device)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        outputs = model(**inputs, input_masks=logits, multimask_output=multimask_output)
    masks = processor.post_process_masks(outputs.pred_masks.float().cpu(), *sizes)[0][0].numpy()
    return masks, outputs.iou_scores[0, 0].float().cpu().numpy(), outputs.pred_masks[0, 0].float().cpu().numpy()


def assert_same(prediction, place, expected):
    masks, scores, logits = expected
    assert np.allclose(prediction.scores[place], scores, atol=1e-4)
    assert np.allclose(prediction.logits[place], logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())
    assert (prediction.masks[place] != masks).mean() < 0.002


@pytest.mark.parametrize("multimask_output", [True, False])
def test_every_kind_of_prompt_is_what_the_model_gives(tiny, image, multimask_output):
    predictor = Predictor(*tiny).set_image(image)
    boxes, points, labels = (
        [(1, 2, 40, 20), (0, 0, 50, 30)],
        [[(3, 4), (30.5, 20)], [(49.9, 0), (7, 7)]],
        [[1, 0], [0, 1]],
    )
    plain = {"multimask_output": multimask_output}
    by_box = predictor.predict(boxes_xyxy=boxes, **plain)
    by_points = predictor.predict(points, labels, **plain)
    by_both = predictor.predict(points, labels, boxes, **plain)
    refined = predictor.predict(points, labels, logits=by_points.logits[:, 0], **plain)
    for place in range(2):
        box, point = (
            {"input_boxes": [*map(float, boxes[place])]},
            {"input_points": points[place], "input_labels": labels[place]},
        )
        assert_same(by_box, place, by_the_model(*tiny, image, **box, **plain))
        assert_same(by_points, place, by_the_model(*tiny, image, **point, **plain))
        assert_same(by_both, place, by_the_model(*tiny, image, **box, **point, **plain))
        logits = torch.as_tensor(by_points.logits[place, 0], device=tiny[0].device)[None, None]
        assert_same(refined, place, by_the_model(*tiny, image, logits=logits, **point, **plain))
    assert by_box.masks.shape == (2, 3 if multimask_output else 1, 30, 50)
    assert (by_box.masks.dtype, by_box.scores.dtype, by_box.logits.dtype) == (bool, np.float32, np.float32)
    assert by_box.logits.shape[2:] == (32, 32)


def test_ragged_prompts_on_several_images_equal_each_alone(tiny):
    images = [random_image(*size, seed) for seed, size in enumerate([(50, 30), (20, 64), (50, 30), (33, 33)])]
    random = np.random.default_rng(0)

    def points_on(image, *counts):
        return [[(x * image.width, y * image.height) for x, y in random.random((count, 2))] for count in counts]

    points = [points_on(images[0], 1, 3, 1), points_on(images[1], *[2] * 9, 1), None, points_on(images[3])]
    labels = [None if p is None else [random.integers(0, 2, len(prompt)).tolist() for prompt in p] for p in points]
    together = Predictor(*tiny).set_images(images).predict(points, labels)
    assert [len(prediction) for prediction in together] == [3, 10, 0, 0]
    assert together[2].masks.shape == (0, 3, 30, 50)
    for image, prompts, own_labels, prediction in zip(images, points, labels, together):
        alone = Predictor(*tiny).set_image(image)
        for place in range(len(prediction)):
            one = alone.predict([prompts[place]], [own_labels[place]])
            assert_same(prediction, place, (one.masks[0], one.scores[0], one.logits[0]))


def test_numpy_and_torch_in_and_out(tiny, image):
    boxes, points = np.array([[1, 2, 40, 20.0]]), torch.tensor([[[3, 4.0]]])
    as_numpy = Predictor(*tiny).set_image(np.asarray(image)).predict(points, boxes_xyxy=boxes)
    as_torch = (
        Predictor(*tiny, output="torch").set_image(image).predict([[(3, 4)]], np.array([[1]]), torch.from_numpy(boxes))
    )
    for name in ("masks", "scores", "logits"):
        array, tensor = getattr(as_numpy, name), getattr(as_torch, name)
        assert isinstance(array, np.ndarray)
        assert tensor.device.type == tiny[0].device.type
        assert np.allclose(array, tensor.cpu().numpy(), atol=1e-5)
    assert as_torch.masks.dtype == torch.bool
    refined = [
        Predictor(*tiny).set_image(image).predict(points, logits=logits)
        for logits in (as_numpy.logits[:, 0], as_torch.logits[:, 0], as_torch.logits[:, 0].clone().requires_grad_())
    ]
    for prediction in refined[1:]:
        assert np.allclose(prediction.logits, refined[0].logits, atol=1e-5)


def test_logits_alone_and_their_masks_later(tiny, image):
    predictor = Predictor(*tiny).set_image(image)
    prediction = predictor.predict([[(3, 4)], [(9, 9)]], full_size=False)
    assert prediction.masks is None
    later = predictor.to_masks(prediction.logits[:, 1]).cpu().numpy()
    assert np.array_equal(later, predictor.predict([[(3, 4)], [(9, 9)]]).masks[:, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_autocast_the_result_is_the_same(folder, image, dtype):
    predictor = Predictor(*load_model(folder, "cpu", dtype))
    expected = predictor.set_image(image).predict([[(9, 9), (20, 11)]])
    with torch.autocast("cpu", torch.bfloat16):
        actual = predictor.set_image(image).predict([[(9, 9), (20, 11)]])
    assert np.array_equal(actual.logits, expected.logits)


@pytest.mark.filterwarnings("ignore:The image encoder runs as in the model")
def test_an_image_is_encoded_once(tiny, image):
    encoded = []
    hook = tiny[0].vision_encoder.register_forward_hook(lambda *arguments: encoded.append(1))
    predictor = Predictor(*tiny, cuda_graphs=False)
    predictor.set_image(image)
    for x in range(3):
        predictor.predict([[(x, 0)]])
    hook.remove()
    assert len(encoded) == 1


def test_one_mask_for_each_prompt(tiny, image):
    boxes, points = [(0, 0, 50, 30), (3.5, 4, 20, 25)], [(0, 0), (49.9, 29), (10, 10)]
    result = segment_prompts(*tiny, image, boxes, points)
    assert (result.masks.shape, result.masks.dtype) == ((5, 30, 50), bool)
    assert (result.scores.shape, result.boxes_xyxy.shape) == ((5,), (5, 4))
    predictor = Predictor(*tiny).set_image(image)
    by_box = predictor.predict(boxes_xyxy=boxes, multimask_output=False)
    assert np.array_equal(result.masks[:2], by_box.masks[:, 0])
    by_point = predictor.predict([[point] for point in points])
    best = by_point.scores.argmax(axis=1)
    assert np.array_equal(result.masks[2:], by_point.masks[np.arange(3), best])
    assert len(segment_prompts(*tiny, image)) == 0
    images = Predictor(*tiny).set_images([random_image(20, 20), image])
    assert np.array_equal(predict_prompts(images, boxes, points, index=1).masks, result.masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (63, 1), (3, 3)])
def test_very_small_images(tiny, size, capfd):
    prediction = (
        Predictor(*tiny).set_image(Image.new("RGB", size, "orange")).predict([[(0, 0)]], boxes_xyxy=[(0, 0, *size)])
    )
    assert prediction.masks.shape == (1, 3, *size[::-1])
    assert capfd.readouterr() == ("", "")


def logits_of(*shape, value=0.0):
    return np.full(shape, value, dtype=np.float32)


def test_an_encoded_image_is_prompted_whatever_was_set_or_encoded_since(tiny, image):
    predictor, other = Predictor(*tiny), random_image(20, 64, seed=1)
    expected = [predictor.set_image(each).predict([[(3, 4)]]) for each in (image, other)]
    encoded = predictor.encode([image, other])
    assert [type(each) for each in encoded] == [EncodedImage] * 2
    assert [each.size for each in encoded] == [(30, 50), (64, 20)]
    for each, own in zip(encoded, expected):
        actual = predictor.predict([[(3, 4)]], image=each)
        assert np.allclose(actual.logits, own.logits, rtol=1e-3, atol=1e-3 * np.abs(own.logits).max())
        assert actual.masks.shape[2:] == each.size
        later = predictor.to_masks(actual.logits[:, 0], image=each).cpu().numpy()
        assert (later != actual.masks[:, 0]).mean() < 0.002
    assert predictor.images[0].size == (64, 20)  # the one that was set
    assert len(predictor.predict([[(3, 4)]]).masks[0, 0]) == 64
    of_list = predictor.predict([[[(3, 4)]], None, [[(3, 4)]]], image=[encoded[0], encoded[1], encoded[0]])
    assert [len(each) for each in of_list] == [1, 0, 1]
    assert np.allclose(of_list[0].logits, of_list[2].logits, atol=1e-4)
    predictor.reset()
    assert predictor.predict([[(3, 4)]], image=encoded[1]).masks.shape[2:] == (64, 20)


def test_images_that_cannot_be(tiny, image, tmp_path):
    predictor = Predictor(*tiny)
    for encoded, words in (
        (image, "image is a Image, and must be what encode returned"),
        ([], "image is an empty list"),
        ([predictor.encode(image), None], "image is a NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            predictor.predict([[(1, 1)]], image=encoded)
    other = SamLighteningModel(tiny_config(image_size=64)).to(tiny[0].device)
    with pytest.raises(ValueError, match="encoded by another model"):
        predictor.predict([[(1, 1)]], image=Predictor(other, make_processor(other.config.vision_config)).encode(image))
    hooked = copy.deepcopy(tiny[0])
    hooked.mask_decoder.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="The mask decoder runs as in the model"):
        plain = Predictor(hooked, tiny[1])  # whose embeddings are in another layout
    for own, others in ((plain, predictor), (predictor, plain)):
        with pytest.raises(ValueError, match="encoded by another model"):
            own.predict([[(1, 1)]], image=others.encode(image))
    with pytest.raises(ValueError, match="encode takes an image, or a list of at least one"):
        predictor.encode([])
    with pytest.raises(ValueError, match="set_image takes one image"):
        predictor.set_image([image])
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    for images, words in (
        ([image, tmp_path / "half.png"], "image 1: .*half.png: not an image"),
        ([image, image, Image.new("RGB", (20_000, 100))], "image 2: .*too thin"),
        ([None, image], "image 0: .*NoneType"),
    ):
        for call in (predictor.encode, predictor.set_images):
            with pytest.raises(ValueError, match=words):
                call(images)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"boxes_xyxy": [(60, 0, 99, 9)]}, "image 1: box 60,0,99,9 lies outside the image of 50x30"),
        ({"points_xy": [[(3, 99)]]}, "image 1: point 3,99 lies outside"),
        ({"boxes_xyxy": [(0, 0, 9, 9)], "logits": logits_of(1, 32, 32, value=np.nan)}, "image 1: logits hold NaN"),
        ({"points_xy": [[(3, 4)]], "masks": np.full((1, 30, 50), 7)}, "image 1: masks hold whole numbers from 7 to 7"),
        ({"points_xy": 3}, "image 1: points_xy=3"),
    ],
    ids=["box", "point", "logits", "mask", "no list"],
)
def test_a_bad_prompt_names_its_image_and_does_not_void_the_others(tiny, image, bad, words):
    predictor = Predictor(*tiny).set_images([image, image, random_image(20, 64, seed=1)])
    good = {"boxes_xyxy": [(0, 0, 9, 9)]}
    arguments = {
        name: [good.get(name), bad.get(name), good.get(name)] for name in ("points_xy", "boxes_xyxy", "logits", "masks")
    }
    arguments = {name: value if any(each is not None for each in value) else None for name, value in arguments.items()}
    with pytest.warns(UserWarning, match=words):
        actual = predictor.predict(**arguments)
    assert isinstance(actual[1], ImageError) and str(actual[1]).startswith("image 1: ")
    expected = predictor.predict(boxes_xyxy=[good["boxes_xyxy"], None, good["boxes_xyxy"]])
    for place in (0, 2):
        assert np.array_equal(actual[place].logits, expected[place].logits)
        assert np.array_equal(actual[place].masks, expected[place].masks)
    with pytest.raises(ImageError, match=words):
        predictor.predict(**arguments, errors="raise")


def disc(image, radius=9.0) -> np.ndarray:
    """Make a mask of a disc, bool (1, H, W)."""
    y, x = np.mgrid[: image.height, : image.width]
    return ((x - image.width / 2) ** 2 + (y - image.height / 3) ** 2 < radius**2)[None]


@pytest.mark.parametrize("size", [(50, 30), (20, 64), (32, 32), (300, 200)])
def test_a_mask_of_any_kind_is_a_mask_whatever_it_is_called(tiny, size):
    image = random_image(*size)
    predictor = Predictor(*tiny).set_image(image)
    mask, box = disc(image, min(size) / 3), {"boxes_xyxy": [(2, 3, 18, 19)]}
    small = predictor.predict(**box, masks=mask, multimask_output=False).logits[:, 0] > 0
    small[:, 0, 0], small[:, 1, 1] = True, False
    for each in (mask, small):
        kinds = [each, each.astype(np.uint8), each.astype(np.int64), each.astype(np.float32), each * np.uint8(255)]
        kinds += [each * 255.0, torch.from_numpy(each), torch.from_numpy(each).half().to(tiny[0].device)]
        refined = [predictor.predict(**box, **{name: kind}).logits for kind in kinds for name in ("logits", "masks")]
        assert all(np.array_equal(logits, refined[0]) for logits in refined[1:])
        assert not np.array_equal(refined[0], predictor.predict(**box).logits)
    as_logits = np.where(small, np.float32(10), np.float32(-10))
    assert np.array_equal(predictor.predict(**box, logits=as_logits).logits, refined[0])


@pytest.mark.parametrize("size", [(50, 30), (20, 64), (300, 200), (1, 1)])
def test_masks_become_logits_and_logits_masks(tiny, size):
    """`to_masks` is the inverse, up to less than a cell of the decoder's size along the outline."""
    image = random_image(*size)
    predictor = Predictor(*tiny)
    encoded, mask = predictor.encode(image), disc(image, max(1.0, min(size) / 3))
    logits = logits_of_prompt(mask, encoded, predictor.logits_size, tiny[0].device)
    assert logits.shape == (1, 32, 32) and logits.abs().max().item() == pytest.approx(MASK_LOGIT)
    height, width = encoded.resized
    assert (logits[:, height + 1 :] == -MASK_LOGIT).all() and (logits[:, :, width + 1 :] == -MASK_LOGIT).all()
    back = predictor.to_masks(logits, image=encoded).cpu().numpy()
    assert (back & mask).sum() / (back | mask).sum() > 0.9
    everywhere = logits_of_prompt(np.ones_like(mask), encoded, predictor.logits_size, tiny[0].device)
    assert predictor.to_masks(everywhere, image=encoded).all()
    assert (logits_of_prompt(~np.ones_like(mask), encoded, (32, 32), tiny[0].device) == -MASK_LOGIT).all()


def test_zeros_in_fractions_are_logits_and_in_whole_numbers_a_mask(tiny, image):
    predictor = Predictor(*tiny).set_image(image)
    box = {"boxes_xyxy": [(2, 3, 18, 19)]}
    actual = {dtype: predictor.predict(**box, logits=np.zeros((1, 32, 32), dtype)).logits for dtype in ("f4", "u1")}
    empty = predictor.predict(**box, logits=np.full((1, 32, 32), -MASK_LOGIT, "f4")).logits
    assert np.array_equal(actual["u1"], empty) and not np.array_equal(actual["f4"], empty)
    assert np.array_equal(predictor.predict(**box, masks=np.zeros((1, 30, 50), "f4")).logits, empty)


@pytest.mark.parametrize("decoder", ["fast", "plain"])
@pytest.mark.parametrize("multimask_output", [True, False])
def test_a_mask_alone_is_what_the_model_gives(tiny, image, multimask_output, decoder):
    predictor = Predictor(*tiny).set_image(image)
    if decoder == "plain":
        predictor.decoder = predictor.encoder.decoder = PlainMaskDecoder(tiny[0])
        predictor.set_image(image)
    logits = predictor.predict(boxes_xyxy=[(2, 3, 18, 19), (5, 5, 30, 20)], multimask_output=False).logits[:, 0]
    actual = predictor.predict(logits=logits, multimask_output=multimask_output)
    assert actual.masks.shape == (2, 3 if multimask_output else 1, 30, 50)
    for place, each in enumerate(torch.from_numpy(logits).to(tiny[0].device)):
        expected = by_the_model(*tiny, image, multimask_output, logits=each[None, None])
        assert_same(actual, place, expected)
        one = predictor.predict(logits=each[None], multimask_output=multimask_output)
        assert_same(one, 0, expected)
    both = Predictor(*tiny).set_images([image, image]).predict(masks=[disc(image), None])
    assert [len(each) for each in both] == [1, 0]


def test_a_mask_refines_as_its_logits_do():
    """Refine boxes on the bundled photographs: a mask that is read as logits loses far more."""
    predictor = Predictor(*load_model(BUNDLED_CHECKPOINT, "cpu"))
    prompts = json.loads((EXAMPLE_IMAGES.parent / "prompts.json").read_text())
    overlaps = {name: [] for name in ("logits", "mask", "small mask", "0 and 1 as logits")}
    for name, own_prompts in prompts.items():
        encoded = predictor.encode(EXAMPLE_IMAGES / name)
        arguments = {"boxes_xyxy": own_prompts["boxes_xyxy"], "multimask_output": False, "image": encoded}
        first = predictor.predict(**arguments)
        logits, masks = first.logits[:, 0], first.masks[:, 0]
        almost = np.where(logits > 0, np.float32(1), np.float32(1e-6))  # logits, as 1e-6 is neither 0 nor 1
        for kind, refined in (
            ("logits", {"logits": logits}), ("mask", {"masks": masks}), ("small mask", {"masks": logits > 0}),
            ("0 and 1 as logits", {"logits": almost}),
        ):  # fmt: skip
            again = predictor.predict(**arguments, **refined).masks[:, 0]
            overlaps[kind] += [(a & b).sum() / (a | b).sum() for a, b in zip(again, masks)]
    means = {kind: np.mean(values) for kind, values in overlaps.items()}
    print(", ".join(f"{kind}: IoU {mean:.3f}" for kind, mean in means.items()))
    assert min(means["mask"], means["small mask"]) > means["logits"] - 0.02
    assert min(means["mask"], means["small mask"]) > means["0 and 1 as logits"] + 0.01


def test_in_a_process_that_is_spawned(folder, image):
    predictor = Predictor(*load_model(folder, "cpu"), max_memory_mb=1400).set_image(image)
    expected = predictor.predict([[(3, 4)]])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        actual = pool.submit(predictor.predict, [[(3, 4)]], image=predictor.encode(image)).result(timeout=300)
        of_the_image_that_was_set = pool.submit(predictor.predict, [[(3, 4)]]).result(timeout=300)
    for each in (actual, of_the_image_that_was_set):
        assert np.allclose(each.logits, expected.logits, atol=1e-5)
        assert np.array_equal(each.masks, expected.masks)


def test_pickled_it_keeps_its_settings_and_images(tiny, image):
    predictor = Predictor(*tiny, output="torch", max_memory_mb=1400, cuda_graphs=False).set_images([image, image])
    again = pickle.loads(pickle.dumps(predictor))
    assert (again.output, again.decoder.cuda_graphs, again._settings) == ("torch", False, predictor._settings)
    assert again.model is not predictor.model and again.model.device == predictor.model.device
    boxes = [[(0, 0, 9, 9)], None]
    actual, expected = (each.predict(boxes_xyxy=boxes)[0] for each in (again, predictor))
    assert torch.equal(actual.logits, expected.logits)
    with pytest.raises(TypeError, match="optimize that"):
        pickle.dumps(Predictor(optimize(tiny[0], image_batch_sizes=(), prompt_counts=()), tiny[1]))


@pytest.mark.parametrize(
    "prompts, words",
    [
        ({}, "no prompt: give points_xy"),
        ({"logits": logits_of(1, 32, 32), "masks": logits_of(1, 32, 32)}, "logits and masks are given"),
        ({"logits": np.full((1, 32, 32), 7)}, "logits hold whole numbers from 7 to 7: a mask is bool"),
        ({"masks": logits_of(1, 30, 50, value=0.5)}, "masks hold values from 0.5 to 0.5"),
        ({"masks": logits_of(1, 32, 32, value=np.nan)}, "masks hold values from nan to nan"),
        ({"masks": np.zeros((1, 31, 50), bool)}, r"\(prompts, 32, 32\), .*\(prompts, 30, 50\), as large as the image"),
        ({"masks": np.zeros((30, 50), bool)}, r"masks have the shape \(30, 50\)"),
        ({"masks": np.zeros((2, 30, 50), bool), "boxes_xyxy": [(0, 0, 5, 5)]}, "boxes_xyxy has 1, masks has 2"),
        ({"logits": logits_of(1, 32, 32), "labels": [[1]]}, "labels are given without points_xy"),
        ({"labels": [[1]]}, "no prompt"),
        ({"points_xy": [(3, 4)]}, r"a list of points is expected.*\[\[point\]\]"),
        ({"points_xy": np.zeros((2, 2))}, "a list of points is expected"),
        ({"points_xy": [[]]}, "a prompt without points"),
        ({"points_xy": 3}, "points_xy=3 must have one entry for each prompt"),
        ({"points_xy": [[(3, 4, 5)]]}, "point 3,4,5 must be two finite numbers"),
        ({"points_xy": [[("a", 4)]]}, "must be numbers"),
        ({"points_xy": [[(51, 3)]]}, "point 51,3 lies outside the image of 50x30"),
        ({"points_xy": [[(3, -1)]]}, "lies outside"),
        ({"points_xy": [[(float("nan"), 1)]]}, "point nan,1 must be two finite numbers"),
        ({"points_xy": [[(3, 4)]], "labels": [[1, 0]]}, r"labels are \[2\] for each prompt, and its points \[1\]"),
        ({"points_xy": [[(3, 4)]], "labels": [[2]]}, "label 2 must be 1, on the object, or 0"),
        ({"points_xy": [[(3, 4)]], "labels": [[0.9]]}, "label 0.9 must be 1"),
        ({"points_xy": [[(3, 4)]], "labels": [1]}, "must have one entry"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "labels": [[1]]}, "labels are given without points_xy"),
        ({"boxes_xyxy": [(5, 0, 0, 5)]}, "box 5,0,0,5 is reversed"),
        ({"boxes_xyxy": [(5, 0, 5, 5)]}, "has no area"),
        ({"boxes_xyxy": [(50, 0, 51, 5)]}, "box 50,0,51,5 lies outside the image of 50x30"),
        ({"boxes_xyxy": [(0, 0, float("inf"), 5)]}, "four finite numbers"),
        ({"boxes_xyxy": [[(0, 0, 5, 5)]]}, r"it is \(prompts, 4\), without a dimension of images"),
        ({"boxes_xyxy": (0, 0, 5, 5)}, r"Write \[box\] for one box"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "points_xy": [[(1, 1)], [(2, 2)]]}, "points_xy has 2, boxes_xyxy has 1"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "logits": logits_of(1, 16, 16)}, r"\(1, 16, 16\), and must be \(prompts, 32"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "logits": logits_of(1, 3, 32, 32)}, r"logits\[:, i\]"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "logits": logits_of(2, 32, 32)}, "boxes_xyxy has 1, logits has 2"),
        ({"boxes_xyxy": [(0, 0, 5, 5)], "logits": logits_of(1, 32, 32, value=np.nan)}, "NaN or infinite"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_prompts_that_cannot_be(tiny, image, prompts, words):
    with pytest.raises(ValueError, match=words):
        Predictor(*tiny).set_image(image).predict(**prompts)


def test_uses_that_cannot_be(tiny, image):
    predictor = Predictor(*tiny)
    for kind in (Predictor, MaskGenerator):
        for processor, name in ((None, "NoneType"), ("model", "str"), (tiny[0], "SamLighteningModel")):
            with pytest.raises(ValueError, match=f"image_processor is a {name}, and must be the model's SamImageP"):
                kind(tiny[0], processor)
        for step in ("do_resize", "do_pad"):
            other = make_processor(tiny[0].config.vision_config).image_processor
            setattr(other, step, False)
            with pytest.raises(ValueError, match=f"the image processor's {step} must be true"):
                kind(tiny[0], other)
    with pytest.raises(ValueError, match="no image yet: call set_image"):
        predictor.predict([[(1, 1)]])
    for images in ([], "x.jpg", image):
        with pytest.raises(ValueError, match="set_images takes a list"):
            predictor.set_images(images)
    predictor.set_images([image, image])
    for boxes, words in (
        ([None], "a list of 2, one entry for each image, not 1"),
        (np.zeros((2, 1, 4)), "not a ndarray"),
    ):
        with pytest.raises(ValueError, match=words):
            predictor.predict(boxes_xyxy=boxes)
    with pytest.raises(ValueError, match="errors='ignore' must be"):
        predictor.predict(boxes_xyxy=[None, None], errors="ignore")
    predictor.reset()
    with pytest.raises(ValueError, match="no image yet"):
        predictor.predict([[(1, 1)]])
    with pytest.raises(ValueError, match="output='jax'"):
        Predictor(*tiny, output="jax")
    predictor.set_image(image)
    with pytest.raises(ValueError, match="too thin"):
        predictor.set_image(Image.new("RGB", (20_000, 100)))
    with pytest.raises(ValueError, match="no image yet"):  # instead of masks of the previous image
        predictor.predict([[(1, 1)]])


def test_logits_of_any_array(tiny, image):
    predictor = Predictor(*tiny).set_image(image)
    logits = predictor.predict([[(3, 4)]], multimask_output=False).logits[:, 0]
    flipped = logits[:, :, ::-1]
    expected = predictor.predict([[(3, 4)]], logits=flipped.copy()).logits
    assert np.array_equal(predictor.predict([[(3, 4)]], logits=flipped).logits, expected)
    assert torch.equal(predictor.to_masks(flipped), predictor.to_masks(torch.from_numpy(flipped.copy())))
    with pytest.raises(ValueError, match=r"must be \(n, h, w\): logits\[:, i\]"):
        predictor.to_masks(expected)


def test_empty_prompts_give_empty_results(tiny, image):
    predictor = Predictor(*tiny).set_image(image)
    for prompts in ({"points_xy": []}, {"boxes_xyxy": np.zeros((0, 4))}, {"points_xy": [], "labels": []}):
        prediction = predictor.predict(**prompts)
        assert prediction.masks.shape == (0, 3, 30, 50)
        assert (prediction.scores.shape, prediction.logits.shape) == ((0, 3), (0, 3, 32, 32))


@pytest.mark.parametrize(
    "box, words",
    [
        ((50, 10, 60, 20), "50,10,60,20 lies outside the image of 50x30"),
        ((-9, 10, 0, 20), "-9,10,0,20 lies outside"),
        ((10, 30, 20, 31), "lies outside"),
        ((20, 10, 10, 20), "20,10,10,20 is reversed"),
        ((10, 20, 20, 10), "is reversed"),
        ((10, 10, 10, 20), "has no area"),
        ((10, 10, float("nan"), 20), "four finite numbers"),
        ((10, 10, float("inf"), 20), "four finite numbers"),
        ((10, 10, 20), "four finite numbers"),
    ],
)
def test_boxes_that_cannot_be(box, words):
    with pytest.raises(ValueError, match=words):
        clip_prompts((50, 30), boxes_xyxy=[(0, 0, 50, 30), box])


@pytest.mark.parametrize("point", [(51, 3), (3, 31), (-1, 3), (float("inf"), 0), (float("nan"), 0), (1, 2, 3)])
def test_points_that_cannot_be(point):
    with pytest.raises(ValueError, match="point "):
        clip_prompts((50, 30), points_xy=[(0, 0), point])


def test_what_sticks_out_of_the_image_is_cut_off():
    boxes, points = clip_prompts(
        (50, 30),
        [(-0.31, 2, 50.004, 30), (-40, -1, 1, 99), (1, 2, 3.5, 4)],
        [(50, 3), (50.9, 30.5), (-0.31, -0.9), (49.9, 0.2)],
    )
    assert boxes == [[0, 2, 50, 30], [0, 0, 1, 30], [1, 2, 3.5, 4]]
    assert points == [[49, 3], [49, 29], [0, 0], [49.9, 0.2]]


def test_prompts_that_stick_out_are_those_at_the_border(tiny, image):
    predictor = Predictor(*tiny).set_image(image)
    for actual, expected in (
        ({"boxes_xyxy": [(-0.31, 2, 50.004, 31)]}, {"boxes_xyxy": [(0, 2, 50, 30)]}),
        ({"points_xy": [[(50, 30), (-0.5, 4)]]}, {"points_xy": [[(49, 29), (0, 4)]]}),
    ):
        assert np.array_equal(predictor.predict(**actual).logits, predictor.predict(**expected).logits)
    result = predict_prompts(predictor, [(-3, 2, 50.4, 31)], [(50, 3)])
    assert np.array_equal(result.masks, predict_prompts(predictor, [(0, 2, 50, 30)], [(49, 3)]).masks)


def regular_cases():
    """Prompts as arrays: right ones, some of which stick out, and wrong ones, of every kind."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(-20, 80, (40, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes = boxes[(boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < (50, 30)).all(axis=1)]
    points = generator.uniform(-0.99, (50.99, 30.99), (9, 3, 2))
    labels = generator.integers(0, 2, (9, 3))
    for kind in (boxes, boxes.astype(np.float32), torch.tensor(boxes), torch.tensor(boxes).half()):
        yield {"boxes_xyxy": kind}, True
    for dtype in (np.int64, np.int16, np.uint8):
        yield {"boxes_xyxy": np.array([[0, 0, 50, 30], [1, 2, 99, 99]]).astype(dtype)}, True
    yield {"points_xy": points}, True
    yield {"points_xy": points, "labels": labels}, True
    yield {"points_xy": torch.tensor(points).float(), "labels": torch.tensor(labels), "boxes_xyxy": boxes[:9]}, True
    yield {"points_xy": np.array([[[49.5, 29.2]], [[50.0, 30.0]]])}, True
    # Left to `parse_prompts`, which accepts them or says what is wrong.
    yield {"boxes_xyxy": boxes.tolist()}, False
    yield {"boxes_xyxy": torch.tensor([[0, 0, 9, 9]]).bfloat16()}, False
    yield {"points_xy": points, "labels": labels > 0}, False
    yield {"points_xy": [[(1, 1)], [(1, 1), (2, 2)]]}, False
    for bad in ((3, 3, 3, 9), (9, 0, 3, 9), (60, 0, 70, 9), (-9, 0, 0, 9), (0, 0, np.inf, 9), (np.nan, 0, 9, 9)):
        yield {"boxes_xyxy": np.array([(0, 0, 9, 9), bad])}, False
    for bad in ((51, 3), (-1, 3), (3, 31), (3, np.nan), (np.inf, 3)):
        yield {"points_xy": np.array([[(1, 1)], [bad]])}, False
    yield {"points_xy": points, "labels": labels + 1}, False
    yield {"points_xy": points, "labels": labels[:, :2]}, False
    yield {"points_xy": points, "labels": labels[:4]}, False
    yield {"points_xy": points, "boxes_xyxy": boxes[:4]}, False
    yield {"boxes_xyxy": boxes[:4], "labels": labels[:4]}, False
    yield {"boxes_xyxy": boxes[:0]}, False
    yield {"boxes_xyxy": boxes[0]}, False
    yield {"points_xy": boxes}, False


@pytest.mark.parametrize("few_numbers", [0, 1000], ids=["by NumPy", "in a loop"])
@pytest.mark.parametrize(("prompts", "is_regular"), list(regular_cases()))
def test_prompts_that_are_arrays_are_those_that_are_parsed(prompts, is_regular, few_numbers, monkeypatch):
    monkeypatch.setattr(prompts_module, "_FEW_NUMBERS", few_numbers)
    fast = regular_prompts((30, 50), **prompts)
    assert (fast is not None) is is_regular
    if is_regular:
        slow = PromptArrays.of(parse_prompts(0, (30, 50), **prompts))
        for one, other in zip(fast, slow, strict=True):
            assert (one is None) is (other is None)
            assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))


def test_arrays_are_predicted_without_a_loop_and_as_lists_are(tiny, image, monkeypatch):
    predictor = Predictor(*tiny, output="torch").set_image(image)
    predictor._short_at_once = predictor.budget.points_per_batch = 4  # several batches, the last one not full
    boxes = np.random.default_rng(0).uniform(0, 15, (9, 4)) + np.array([0, 0, 15, 15])
    points, labels = boxes.reshape(9, 2, 2), np.arange(18).reshape(9, 2) % 2
    for names in (("boxes_xyxy",), ("points_xy", "labels"), ("points_xy", "labels", "boxes_xyxy")):
        arrays = {"boxes_xyxy": boxes, "points_xy": points, "labels": labels}
        listed = predictor.predict(**{name: arrays[name].tolist() for name in names})
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "_parse", None)
            regular = predictor.predict(**{name: arrays[name] for name in names})
        for part in ("masks", "scores", "logits"):
            assert torch.equal(getattr(regular, part), getattr(listed, part))


def test_batches_are_of_one_kind_and_lose_no_prompt():
    size = (100, 100)
    many = parse_prompts(0, size, points_xy=[[(1, 1)]] * 9 + [[(1, 1), (2, 2)]])
    few = parse_prompts(1, size, points_xy=[[(1, 1)]] * 2, boxes_xyxy=[(0, 0, 9, 9)] * 2)
    others = parse_prompts(2, size, points_xy=[[(1, 1), (2, 2)]])
    prompts = many + few + others
    batches = list(prompt_batches(prompts, most=4))
    assert sorted(place for batch in batches for place in batch) == list(range(len(prompts)))
    assert all(len({prompts[place].kind() for place in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert [9, 12] in batches  # of two images


def test_the_bundled_checkpoint_finds_the_eye_of_the_cat():
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu")
    image = Image.open(EXAMPLE_IMAGES / "cat.jpg")
    result = segment_prompts(model, processor, image, [(125, 80, 208, 147)], [(165, 115)])
    assert (result.masks[0] & result.masks[1]).sum() / (result.masks[0] | result.masks[1]).sum() > 0.7
    assert result.masks[:, 115, 165].all()
    assert not result.masks[:, 240, 250].any()


@pytest.mark.gpu
def test_a_single_prompt_is_replayed_from_a_graph(folder, image):
    model, processor = load_model(folder, "cuda")
    graphed, eager = (Predictor(model, processor, cuda_graphs=on).set_image(image) for on in (None, False))
    for prompts in ({"points_xy": [[(3, 4)]]}, {"points_xy": [[(9, 20)]]}, {"boxes_xyxy": [(1, 2, 40, 20)]}):
        for multimask_output in (True, False):
            one, other = (p.predict(**prompts, multimask_output=multimask_output) for p in (graphed, eager))
            assert np.allclose(one.logits, other.logits, rtol=1e-3, atol=1e-3)
            assert graphed.decoder.all_masks[multimask_output, False].last_ran == "graph"
    assert graphed.encoder.encode.last_ran == "graph"
    assert eager.encoder.encode.last_ran == "eager"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["points", "boxes", "points and boxes", "boxes and logits"])
def test_batches_of_prompts_are_replayed_from_graphs_from_the_second_one_on(kind):
    """The first batch of a size is not; results are the same to the bit, and those of each prompt alone nearly so."""
    model, processor = load_model(BUNDLED_CHECKPOINT, "cuda", torch.bfloat16)
    predictor, eager = (Predictor(model, processor, "torch", cuda_graphs=on) for on in (True, False))
    graphs = predictor.decoder.all_masks
    corners = np.random.default_rng(0).uniform(0, 300, (130, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
    encoded = predictor.encode(random_image(320, 310))
    for count in (3, 5, 64, 70, 130, 3, 7, 5):  # the first 5 is filled up to 8, and so is 7
        prompts = {}
        if "boxes" in kind:
            prompts["boxes_xyxy"] = boxes[:count]
        if "points" in kind:
            prompts["points_xy"] = corners[:count, :1]
        if "logits" in kind:
            prompts["logits"] = predictor.predict(boxes_xyxy=boxes[:count], image=encoded).logits[:, 0]
        for multimask_output in (True, False):
            options = {"multimask_output": multimask_output, "image": encoded}
            first, second = (predictor.predict(**prompts, **options) for _ in range(2))
            assert graphs[multimask_output, "logits" in kind].last_ran == "graph"
            expected = eager.predict(**prompts, **options)
            assert len(first.masks) == count
            for part in ("masks", "scores", "logits"):
                assert torch.equal(getattr(first, part), getattr(second, part))
            assert torch.allclose(second.scores, expected.scores, atol=2e-2)
            assert (second.masks != expected.masks).float().mean() < 2e-2
    assert {function.last_ran for function in eager.decoder.all_masks.values()} == {None}


@pytest.mark.gpu
def test_prompts_on_one_image_do_not_change_an_earlier_prediction_of_more():
    """All graphs write their logits to the same memory, and a prediction belongs to the caller."""
    predictor = Predictor(*load_model(BUNDLED_CHECKPOINT, "cuda", torch.bfloat16), output="torch")
    predictor.set_image(random_image(64, 48))
    boxes = np.array([[1, 2, 40, 30]]) + np.arange(20)[:, None]
    for _ in range(2):
        first = predictor.predict(boxes_xyxy=boxes[:4])
        many = predictor.predict(boxes_xyxy=boxes)
    before = first.logits.clone(), many.logits.clone()
    predictor.predict(points_xy=boxes.reshape(20, 2, 2)[:8, :1])
    predictor.predict(boxes_xyxy=boxes[::-1].copy())
    assert torch.equal(first.logits, before[0])
    assert torch.equal(many.logits, before[1])


def events_on_device(run) -> list[str]:
    """Return the names of kernels and copies of a second run, in order."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.gpu
def test_pixel_values_are_written_where_the_encoders_graph_reads_them(folder, monkeypatch):
    model, processor = load_model(folder, "cuda")
    encoder, eager = (Predictor(model, processor, cuda_graphs=on).encoder for on in (True, False))
    one, other = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8, device="cuda")
    for images in ([one], [other], [one, other], [other, one, one], [other, one], [one]):
        for actual, expected in zip(encoder(images), eager(images), strict=True):
            assert torch.allclose(actual, expected, atol=1e-5)
    written = events_on_device(lambda: encoder([one]))
    monkeypatch.setattr(encoder.encode, "empty", torch.empty)
    copied = events_on_device(lambda: encoder([one]))
    assert written[0] == copied[0] == "_resize_kernel"
    assert "Memcpy" in copied[1] and copied[2:] == written[1:]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(50, 30), (20, 64), (1100, 700)])
def test_masks_are_all_that_is_written_at_the_images_size(folder, size, monkeypatch):
    predictor = Predictor(*load_model(folder, "cuda"), output="torch").set_image(random_image(*size))
    logits = predictor.predict([[(3, 4)], [(9, 9)]], full_size=False).logits.flatten(0, 1)
    assert events_on_device(lambda: predictor.to_masks(logits)) == ["masks_kernel"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masks = predictor.to_masks(logits)
    assert torch.cuda.max_memory_allocated() - before <= masks.nbytes + 2**20  # what torch may round up
    assert masks.shape == (6, *size[::-1])
    assert not predictor.to_masks(logits.cpu()).is_cuda
    assert predictor.to_masks(logits[:0]).is_cuda
    monkeypatch.setattr(upscaled_masks, "why_not_triton", lambda logits, frame: "not asked for")
    expected = predictor.to_masks(logits)
    assert (masks != expected).float().mean() < 1e-4


@pytest.mark.gpu
def test_a_later_image_does_not_change_an_earlier_prediction(folder):
    model, processor = load_model(folder, "cuda")
    predictor = Predictor(model, processor, output="torch")
    first = predictor.set_image(random_image(50, 30, 0)).predict([[(3, 4)]])
    before = first.logits.clone(), first.scores.clone()
    predictor.set_image(random_image(50, 30, 1)).predict([[(30, 4)]])
    assert torch.equal(first.logits, before[0])
    assert torch.equal(first.scores, before[1])


@pytest.mark.gpu
def test_nothing_waits_for_the_device(folder):
    """torch raises for each operation that waits, from an image on the device to a mask there."""
    predictor = Predictor(*load_model(folder, "cuda"), output="torch")
    image = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8, device="cuda")

    def run():
        predictor.set_image(image)
        for prompts in ({"points_xy": [[(3, 4)]]}, {"boxes_xyxy": [(1, 2, 40, 20)]}):
            prediction = predictor.predict(**prompts, full_size=False)
            predictor.to_masks(prediction.logits[0].index_select(0, prediction.scores[0].argmax(0, keepdim=True)))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_objects_of_several_points_and_boxes_are_what_predict_gives(tiny, image):
    predictor = Predictor(*tiny)
    encoded = predictor.encode(image)
    prompts = [
        ObjectPrompt(((9, 9), (30, 20)), (1, 0)),
        ObjectPrompt(box_xyxy=(1, 2, 30, 20)),
        ObjectPrompt(((20, 5),), (1,)),
        ObjectPrompt(((4, 4),), (0,), (1, 2, 30, 20)),
        ObjectPrompt(((10, 9), (31, 20)), (1, 0)),
    ]
    result = predict_objects(predictor, prompts, encoded)
    one = {"multimask_output": False, "image": encoded}
    expected = [
        predictor.predict([[(9, 9), (30, 20)]], [[1, 0]], **one),
        predictor.predict(boxes_xyxy=[(1, 2, 30, 20)], **one),
        predictor.predict([[(20, 5)]], image=encoded),
        predictor.predict([[(4, 4)]], [[0]], [(1, 2, 30, 20)], **one),
        predictor.predict([[(10, 9), (31, 20)]], [[1, 0]], **one),
    ]
    for mask, score, prediction in zip(result.masks, result.scores, expected):
        assert np.isclose(score, prediction.scores[0].max(), atol=1e-4)
        assert (mask == prediction.masks[0, prediction.scores[0].argmax()]).mean() > 0.99
    assert result.masks.shape == (5, 30, 50) and result.boxes_xyxy.shape == (5, 4)
    assert predict_objects(predictor, [], encoded).masks.shape == (0, 30, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "needs a box or a point on it"),
        ((((1, 2),), (0,)), "all of its points are beside it"),
        ((((1, 2),), ()), "0 labels and 1 points"),
        ((((1, 2),), (2,)), "label 2 must be 1"),
    ],
)
def test_what_points_at_no_object_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectPrompt(*arguments)
