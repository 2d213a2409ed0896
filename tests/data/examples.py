"""Training examples for the tests, by default of varied synthetic scenes."""

from samlight_hf.data import Augmentation, PromptSampling, SyntheticScenes, TrainingExamples


VARIED = Augmentation(scale=(0.5, 2.0), flip=True, brightness=0.3, contrast=0.3, saturation=0.3)


def examples(sources=None, num_examples=40, image_size=64, **settings) -> TrainingExamples:
    settings = {"prompts": PromptSampling(4), "augmentation": VARIED, **settings}
    return TrainingExamples(sources or SyntheticScenes(10, 64), num_examples, image_size, **settings)


def id_of(example) -> int:
    return int(example["example_id"])
