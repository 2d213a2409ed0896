"""The data of a run: its training sources, its evaluation images, and the examples of a stage."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import (
    Augmentation,
    Cutouts,
    ImageDataset,
    PromptSampling,
    SkipReport,
    SyntheticScenes,
    TrainingExamples,
    load_dataset,
)
from ..data.dataset import FileDataset
from ..data.image_cache import ImageCache
from ..data.label_maps import MaskReading
from ..data.sa1b import find_tars
from .arguments import DistillationArguments, RunArguments
from .embedding_cache import CachedExamples, EmbeddingCache, fill_cache
from .teacher import Teacher


if TYPE_CHECKING:
    from ..data import StreamedExamples


# Images of a dataset that are read at most before anything is trained, to find one that can be used.
NUM_TRIED = 64


def open_sources(
    paths: Sequence[str],
    annotations: str | None,
    images: str | None,
    limit: int | None = None,
    reading: MaskReading | None = None,
    num_scenes: int = 100_000,
) -> list[ImageDataset]:
    """Open datasets: one for each path, then one for the annotation file.

    Args:
        paths: SA-1B tars, folders or patterns, or "synthetic" and "synthetic:SEED" for generated scenes of shapes.
        annotations: a JSON file in COCO's format.
        images: the folder of its images.
        limit: use only the first images of each dataset.
        reading: how mask files are read.
        num_scenes: number of generated scenes where there is no `limit`.

    Raises:
        ValueError: for a path that is not a dataset.
    """
    reading = reading or MaskReading()
    options: dict[str, Any] = {
        "limit": limit,
        "require_masks": False,  # only some stages need masks
        "ignore_label": reading.ignore_label,
        "binary_masks": reading.binary,
    }
    scenes = num_scenes if limit is None else limit
    sources = [
        _synthetic(path, scenes) if path.split(":")[0] == "synthetic" else load_dataset(path, **options)
        for path in paths
    ]
    if annotations or images:
        if not (annotations and images):
            raise ValueError(f"annotations={annotations} and images={images} go together: give both.")
        sources.append(load_dataset(annotations, images=images, limit=limit))
    return sources


def open_train_sources(run: RunArguments) -> list[ImageDataset]:
    """Open the training data, with the cache of decoded images where `image_cache_dir` is set.

    Raises:
        ValueError: for a path that is not a dataset, and for a dataset of which nothing can be used.
    """
    sources = open_sources(run.train_data, run.train_annotations, run.train_images, reading=run.mask_reading())
    needs_masks = set(run.stages) != {"encoder"} and not run.cutouts
    for path, source in zip([*run.train_data, run.train_annotations], sources):
        check_usable(f"train_data={path}", source, needs_masks and source.has_masks)
    if run.image_cache_dir:
        cache = ImageCache(run.image_cache_dir)
        for source in sources:
            if isinstance(source, FileDataset):
                source.image_cache = cache
    return sources


def _synthetic(name: str, num_scenes: int) -> SyntheticScenes:
    seed = name.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ValueError(f"{name}: must be synthetic:SEED with a number, such as synthetic:1.")
    return SyntheticScenes(num_scenes, seed=int(seed))


def open_eval_images(run: RunArguments, train_sources: Sequence[ImageDataset]) -> ImageDataset | None:
    """Open the evaluation data; None where the run has none.

    Args:
        run: the settings of the run.
        train_sources: the training data, which must share no image with the evaluation.

    Raises:
        ValueError: for more than one dataset, a dataset without masks or usable images, and one that is trained on too.
    """
    sources = open_sources(
        run.eval_data, run.eval_annotations, run.eval_images, run.eval_limit, run.mask_reading(), num_scenes=100
    )
    if len(sources) > 1:
        raise ValueError(
            f"eval_data={run.eval_data} names {len(sources)} datasets. Give one: scores are means over one dataset."
        )
    name = f"eval_annotations={run.eval_annotations}" if run.eval_annotations else f"eval_data={run.eval_data}"
    streamed = {tar.resolve() for path in run.stream_data if "://" not in path for tar in find_tars(path)}
    for source in sources:
        if not source.has_masks:
            raise ValueError(f"{name} has no masks to compare with. Give images with masks.")
        if source.files() & streamed.union(*(other.files() for other in train_sources)):
            raise ValueError(
                f"{name} is trained on too: scores would say nothing. Leave its images out of what is trained on "
                "(patterns count)."
            )
        check_usable(name, source, needs_masks=True)
    return sources[0] if sources else None


def check_usable(name: str, source: ImageDataset, needs_masks: bool):
    """Raise ValueError where no image of a dataset can be used: before hours of training, not after them.

    It reads images in random order, which no period of the dataset can hide from, until one can be used. If masks are
    needed, images that have none according to the index are left out.

    Args:
        name: the setting that names the dataset, for the message.
        source: the dataset.
        needs_masks: whether an image needs an object that is no crowd.
    """
    candidates = (source.annotated_indices() if needs_masks else []) or range(len(source))
    tried = random.Random(0).sample(candidates, min(NUM_TRIED, len(candidates)))
    for sample in source.samples(report := SkipReport(), tried):
        if not needs_masks or any(not instance.is_crowd for instance in sample.instances):
            return
    lacking = "has a mask that can be used" if needs_masks else "can be used"
    raise ValueError(f"{name}: none of the {len(tried)} images that were tried {lacking}. {report.summary()}")


def prompt_sampling(run: RunArguments, args: DistillationArguments) -> PromptSampling:
    """Return the settings of prompts. Raises ValueError for values out of range."""
    return PromptSampling(
        args.num_prompts,
        max(1, args.num_refinements),
        run.box_noise,
        deepest_share=run.deepest_share,
        area_power=run.area_power,
    )


def make_examples(
    student: PreTrainedModel, args: DistillationArguments, run: RunArguments, sources: Sequence[ImageDataset]
) -> "TrainingExamples | StreamedExamples":
    """Return all examples of a stage, in their order.

    Args:
        student: the student, whose image size and patch size define the frame and the masks.
        args: the stage's settings.
        run: the run's settings.
        sources: the opened training data; streamed data are opened here.

    Raises:
        ValueError: for a source without masks, where the stage needs masks.
    """
    config = student.config.vision_config
    settings: dict[str, Any] = {
        "image_size": config.image_size,
        "mask_size": 4 * (config.image_size // config.patch_size),
        "augmentation": Augmentation(
            scale=(run.min_scale, run.max_scale),
            stretch=run.stretch,
            flip=run.flip,
            brightness=run.color_jitter,
            contrast=run.color_jitter,
            saturation=run.color_jitter,
        ),
        "prompts": None if args.stage == "encoder" else prompt_sampling(run, args),
        "cutouts": Cutouts(run.cutouts) if run.cutouts else None,
        "num_views": run.num_views if args.stage == "encoder" else None,
        "seed": args.seed,
        "max_skipped": run.max_skipped,
    }
    if run.stream_data:
        from ..data import StreamedExamples  # needs the package datasets

        return StreamedExamples(run.stream_data, **settings, rank=args.process_index, world_size=args.world_size)
    num_examples = args.max_steps * args.global_batch_size
    return TrainingExamples(sources, num_examples, source_weights=run.source_weights or None, **settings)


def with_cache(examples: Dataset, args: DistillationArguments, run: RunArguments, teacher: Teacher | None) -> Dataset:
    """Add the teacher's cached targets to the examples where `cache_dir` is set; compute missing ones first."""
    if teacher is None or args.cache_dir is None:
        return examples
    counted = cast(TrainingExamples, examples)  # not a stream, for which no cache is possible
    cache = EmbeddingCache(args.cache_dir, teacher, counted.num_ids, counted.preprocessing())
    views, batch_size = counted.views(), args.per_device_train_batch_size
    fill_cache(cache, views, teacher, args.device, batch_size, args.dataloader_num_workers)
    return CachedExamples(examples, cache)
