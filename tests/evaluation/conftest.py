import numpy as np
import pytest

from samlight_hf.data import load_dataset
from samlight_hf.evaluation.models import PromptableModel
from tests.data.files import annotation, box_mask, jpeg, sa1b_json, write_tar


@pytest.fixture
def promptable(model, tmp_path):
    """A tiny SAM-Lightening with random weights, saved and loaded as a user would."""
    from samlight_hf.loading import load_model

    model.save_pretrained(tmp_path / "model")
    return PromptableModel(*load_model(tmp_path / "model", "cpu"))


@pytest.fixture
def tar(tmp_path):
    """Five images of different sizes with two to four instances each, one of them a crowd."""
    generator = np.random.default_rng(0)
    members = {}
    for number in range(5):
        width, height = 40 + 3 * number, 30 + 2 * number
        annotations = []
        for k in range(2 + number % 3):
            x, y = generator.integers(0, 20), generator.integers(0, 15)
            mask = box_mask(x, y, 12 + k, 9 + k, (height, width))
            annotations.append(
                annotation(100 * number + k, mask, bbox=[int(x), int(y), 12 + k, 9 + k], area=int(mask.sum()))
            )
        annotations[-1]["iscrowd"] = int(number == 2)
        members[f"sa_{number}.jpg"] = jpeg(width, height, seed=number)
        members[f"sa_{number}.json"] = sa1b_json(*annotations, width=width, height=height)
    return write_tar(tmp_path / "images.tar", members)


@pytest.fixture
def dataset(tar):
    return load_dataset(tar)
