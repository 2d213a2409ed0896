import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf.data import SyntheticScenes
from samlight_hf.distillation import Teacher
from samlight_hf.distillation.teacher import normalize_pixels

from .conftest import IMAGE_SIZE, make_examples, make_student, make_teacher


def test_pixels_are_normalized_as_by_the_processor(student):
    processor = make_processor(student.config.vision_config)
    scenes = SyntheticScenes(4, 32)
    images = [scenes[0].image, scenes[1].image.crop((0, 0, 32, 20)), scenes[2].image.crop((0, 0, 11, 32))]
    frames = torch.zeros(3, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    sizes = torch.tensor([[image.height, image.width] for image in images])
    for frame, image in zip(frames, images):
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        frame[:, : image.height, : image.width] = pixels.permute(2, 0, 1)
    expected = processor.image_processor(images, return_tensors="pt")
    assert expected["reshaped_input_sizes"].tolist() == sizes.tolist()
    torch.testing.assert_close(normalize_pixels(frames, sizes), expected["pixel_values"], atol=1e-5, rtol=0)


def test_examples_have_the_pixels_of_the_processor():
    examples = make_examples(4, with_prompts=False)
    example = examples[0]
    index = int(example["example_id"]) % 20
    image = SyntheticScenes(20, IMAGE_SIZE)[index].image
    expected = make_processor(make_student().config.vision_config).image_processor(image, return_tensors="pt")
    pixels = normalize_pixels(example["pixel_values"][None], example["reshaped_input_sizes"][None])
    torch.testing.assert_close(pixels, expected["pixel_values"], atol=1e-5, rtol=0)


def test_targets_are_the_teachers_and_may_be_kept_by_autograd(teacher):
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    outputs = make_teacher().vision_encoder(pixel_values, output_hidden_states=True)
    targets = Teacher(teacher, (1, 4), torch.float32).targets(pixel_values)
    assert [tuple(target.shape) for target in targets] == [(2, 8, 8, 48), (2, 8, 8, 48), (2, 32, 8, 8)]
    for target, index in zip(targets, (1, 4)):
        torch.testing.assert_close(target, torch.nn.functional.layer_norm(outputs.hidden_states[index + 1], (48,)))
    torch.testing.assert_close(targets[-1], outputs.last_hidden_state)
    assert not any(target.is_inference() or target.requires_grad for target in targets)


def test_half_precision_is_close(teacher):
    pixel_values = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    exact = Teacher(make_teacher(), (4,), torch.float32).targets(pixel_values)
    with torch.autocast("cpu", torch.bfloat16):  # does not change the teacher
        half = Teacher(teacher, (4,), torch.bfloat16).targets(pixel_values)
    for mine, theirs in zip(half, exact):
        assert mine.dtype == torch.bfloat16
        assert torch.cosine_similarity(mine.float().flatten(), theirs.flatten(), dim=0) > 0.999


def test_a_teacher_without_a_vit_is_refused():
    with pytest.raises(
        ValueError, match=r"type Linear cannot be used: its image encoder has no patch_embed, pos_embed"
    ):
        Teacher(torch.nn.Linear(1, 1), ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_with_nan_is_refused(teacher, value):
    teacher.vision_encoder.layers[1].mlp.lin1.bias.data[0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in vision_encoder.layers.1.mlp.lin1.bias"):
        Teacher(teacher, ())
