"""A distillation from settings to a student's folder: the stages one after another, each from where the last one ended."""

import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForMaskGeneration, PreTrainedModel, set_seed

from ..conversion import (
    change_image_size,
    create_student,
    initialize_decoder,
    initialize_positions,
    load_teacher,
)
from ..data import (
    Augmentation,
    Cutouts,
    ImageDataset,
    MaskFolderDataset,
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
from ..loading import LOADING_ERRORS, MODEL_TYPES, find_dtype, load_model
from ..modeling.configuration_sam_lightening import PRESETS, SamLighteningConfig
from ..modeling.modeling_sam_lightening import SamLighteningModel, make_processor
from ..publishing.upload import PublishError
from ..utils.atomic_files import atomic_write, replace_folder
from ..utils.json_files import read_json
from ..utils.messages import one_line
from ..utils.processes import tell
from .arguments import DistillationArguments, RunArguments
from .callbacks import MaskImageCallback
from .checkpoints import check_same_run, last_checkpoint, run_settings
from .embedding_cache import CachedExamples, EmbeddingCache, fill_cache
from .plots import plot_learning_curves
from .publishing import HubPublisher, Push, has_arrived
from .teacher import Teacher
from .trainer import DistillationTrainer, focus_layers


if TYPE_CHECKING:
    from ..data import StreamedExamples


RESULT_NAME = "result.json"

# Images of the evaluation that are tried before anything is trained.
NUM_TRIED = 16


def distill(run: RunArguments, stages: Sequence[DistillationArguments]) -> Path:
    """Runs the stages and returns the folder of the student, complete and loadable anywhere.

    Each stage has a folder of its own with checkpoints, `student/`, `result.json`, learning curves and images. With
    `run.resume` a finished stage is kept, and an interrupted one goes on from its last checkpoint.

    Raises:
        ValueError: for settings that do not fit together, before anything is trained.
        PublishError: where the finished student did not reach the Hub; it is in its folder, and everything else is done.
    """
    check_run(run, stages)
    with _make_publisher(run, stages) as publisher:
        student = _run_stages(run, stages, publisher)
    if publisher is not None:
        _report_pushes(publisher, student)
    return student


def _make_publisher(run: RunArguments, stages: Sequence[DistillationArguments]):
    """On the main process of a run that pushes; elsewhere a context of None."""
    if PartialState().is_main_process and (run.push_to or any(args.push_to_hub for args in stages)):
        return HubPublisher(run.teacher, run.card_facts())
    return contextlib.nullcontext()


def _report_pushes(publisher: HubPublisher, student: Path):
    """Raises PublishError where the finished student did not arrive: everything else is done by then."""
    if report := publisher.report():
        print(report)
    last = {result.repo_id: result for result in publisher.results}
    if missing := [repo_id for repo_id, result in last.items() if result.commit is None]:
        raise PublishError(
            f"{student} is finished, and not in {', '.join(missing)}: {last[missing[0]].error} To try again: the same command with --resume."
        )


def _run_stages(run: RunArguments, stages: Sequence[DistillationArguments], publisher: HubPublisher | None) -> Path:
    set_seed(stages[0].seed)
    teacher = load_teacher(run.teacher, device="cpu")[0] if run.teacher else None
    sources = open_train_sources(run)
    eval_images = open_eval_images(run, sources)
    opened = [*sources, *([] if eval_images is None else [eval_images])]
    if run.mask_reading() != MaskReading() and not any(isinstance(source, MaskFolderDataset) for source in opened):
        raise ValueError(
            f"ignore_label={run.ignore_label} and binary_masks={run.binary_masks} say how mask files are read, and no "
            "folder with images/ and masks/ is among the data. Leave them out."
        )
    student, folder = make_student(run, teacher), None
    for args in stages:
        folder = Path(args.output_dir) / "student"
        was_finished = (Path(args.output_dir) / RESULT_NAME).is_file()
        result = train_stage(student, args, run, sources, eval_images, teacher, publisher)
        if was_finished:
            student = load_model(folder, device="cpu")[0]
        if publisher is not None:
            is_last = args is stages[-1]
            if args.push_to_hub and (
                not was_finished or (is_last and not has_arrived(args.output_dir, args.hub_model_id))
            ):
                publisher.push_finished(args, folder, result)
            publisher.finished_stages.append(result)
    final = Path(stages[-1].output_dir).parent / "student"
    state = PartialState()
    if state.is_main_process:
        replace_folder(final, lambda aside: shutil.copytree(folder, aside), fsync=True)
        if publisher is not None and run.push_to:
            options = {"private": stages[-1].hub_private_repo, "is_kept": True}
            push = Push(str(final), run.push_to, None, "", publisher.training(), publisher.facts, **options)
            publisher.submit(push, stages[-1].hub_token)
    state.wait_for_everyone()
    return final


def check_run(run: RunArguments, stages: Sequence[DistillationArguments]):
    """Raises ValueError for what can be seen without reading a model or an image."""
    if not (run.train_data or run.train_annotations or run.stream_data):
        raise ValueError("train_data is missing: give SA-1B tars, a folder, or train_annotations and train_images.")
    if run.stream_data and (run.train_data or run.train_annotations):
        raise ValueError("stream_data and train_data are both given. Stream everything, or nothing.")
    if "encoder" in run.stages and run.teacher is None:
        raise ValueError('stages has "encoder", which needs a teacher: a folder, a Hub name or an original .pth file.')
    is_fresh = run.student in PRESETS or run.student.endswith(".json")
    if run.stages[0] == "decoder" and is_fresh and not (Path(stages[0].output_dir) / RESULT_NAME).is_file():
        raise ValueError(
            f"stages begins with the decoder, on a fresh image encoder (student={run.student}), which knows nothing yet. Put encoder "
            "before it, or give the encoder stage's folder as student, such as outputs/x/encoder/student."
        )
    for args in stages:
        if args.stage != "encoder":
            _prompt_sampling(run, args)  # which raises for what is out of range
        if args.stage == "encoder" and args.cache_dir and run.stream_data:
            raise ValueError(
                f"cache_dir={args.cache_dir} needs images that can be enumerated: use train_data, not stream_data."
            )
        if args.stage == "encoder" and args.cache_dir and run.num_views is None:
            raise ValueError(
                f"cache_dir={args.cache_dir} needs num_views: a finite number of views of each image can be cached, such as "
                "num_views=1."
            )
        if args.eval_strategy != "no" and not (run.eval_data or run.eval_annotations):
            raise ValueError(f"eval_strategy={args.eval_strategy} needs eval_data.")
        if args.process_index == 0:  # one process alone: what it tries, the others would find there
            _check_folders(run, args)


def _check_folders(run: RunArguments, args: DistillationArguments):
    output_dir = Path(args.output_dir)
    if not run.resume and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty. Use --resume to go on with it, or another output_dir.")
    folders = {"output_dir": output_dir, "cache_dir": args.cache_dir, "image_cache_dir": run.image_cache_dir}
    for name, folder in folders.items():
        if folder is not None:
            _check_writable(name, Path(folder))


def _check_writable(name: str, folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / f".{os.getpid()}.probe").touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{name}={folder} cannot be written ({error.strerror}). Choose another one.") from error


def train_stage(
    student: PreTrainedModel,
    args: DistillationArguments,
    run: RunArguments,
    sources: Sequence[ImageDataset],
    eval_images: ImageDataset | None,
    teacher_model: PreTrainedModel | None,
    publisher: HubPublisher | None = None,
) -> dict:
    """Trains `student` in place; writes the stage's result, and returns it.

    A finished stage is kept, and `student` as it is, if it was made with these settings and of this student.
    """
    start = time.time()
    output_dir = Path(args.output_dir)
    teacher = None
    if args.stage == "encoder":
        pairs = focus_layers(student, teacher_model.config.vision_config, args.num_focus_layers)
        layers = [layer for _, layer in pairs]
        teacher = Teacher(teacher_model, layers, find_dtype(args.teacher_dtype), compile=args.torch_compile)
    examples = make_examples(student, args, run, sources)
    if (output_dir / RESULT_NAME).is_file():
        saved = read_json(output_dir / RESULT_NAME, dict)
        settings = run_settings(args, examples, teacher, student)
        check_same_run(output_dir, saved["settings"], settings, bool(run.stream_data), is_finished=True)
        tell(f"{output_dir}: finished before, and kept.")
        return saved
    callbacks = []
    if eval_images is not None:
        drawn = (eval_images.load(index)[0] for index in range(min(6, len(eval_images))))
        callbacks.append(MaskImageCallback([sample for sample in drawn if sample is not None]))
    processor = make_processor(student.config.vision_config)
    train_dataset = with_cache(examples, args, run, teacher)
    trainer = DistillationTrainer(student, args, train_dataset, processor, teacher, eval_images, callbacks, publisher)
    checkpoint = last_checkpoint(args.output_dir) if run.resume else None
    output = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_images is not None and not trainer.is_fsdp_enabled else {}
    folder = output_dir / "student"
    trainer.export(folder)
    skipped = SkipReport()
    for part in gather_object([examples.skip_report().to_dict()]):
        skipped.merge(SkipReport.from_dict(part))
    result = {
        "stage": args.stage,
        "settings": trainer.run_settings,
        # What Trainer itself reports is of the time since it was resumed.
        "seconds": None if checkpoint else time.time() - start,
        "train_loss": statistics.mean(_logged(trainer, "loss") or [output.training_loss]),
        "images_per_second": statistics.median(_logged(trainer, "images_per_second") or [None]),
        "metrics": metrics,
        "skipped": skipped.to_dict(),
    }
    if trainer.is_world_process_zero():
        verify_export(folder, None if trainer.is_fsdp_enabled else trainer.student)
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        plot_learning_curves(trainer.state.log_history, output_dir / "curves.png", args.stage)
        text = json.dumps(result, indent=1)
        atomic_write(output_dir / RESULT_NAME, lambda path: path.write_text(text, encoding="utf-8"))
        if skipped:
            print(skipped.summary())
    if teacher is not None:
        teacher.encoder.cpu()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return result


def _logged(trainer: DistillationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def make_student(run: RunArguments, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """The student as `run` describes it.

    Raises ValueError for a preset that is not known, and for what cannot be loaded.
    """
    name = run.student
    if name in PRESETS and teacher is not None:
        student = create_student(teacher, name, initialize_from_teacher_layers=run.initialize_from_teacher_layers)
    elif name in PRESETS:
        student = _initialized(SamLighteningModel(SamLighteningConfig.from_preset(name)))
    elif name.endswith(".json"):
        student = _from_config(name, teacher, run)
    else:
        student = load_model(name, device="cpu")[0]
    if run.image_size not in (None, student.config.vision_config.image_size):
        student = change_image_size(student, run.image_size)
    return student


def _from_config(path: str, teacher: PreTrainedModel | None, run: RunArguments) -> PreTrainedModel:
    if not os.path.isfile(path):
        raise ValueError(f"student={path}: no such file.")
    try:
        config = AutoConfig.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise ValueError(f"student={path}: no model's config ({one_line(error, 200)}).") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"student={path}: model_type={config.model_type!r} must be one of {', '.join(MODEL_TYPES)}.")
    if teacher is not None and isinstance(config, SamLighteningConfig):
        return create_student(teacher, config=config, initialize_from_teacher_layers=run.initialize_from_teacher_layers)
    config.vision_config.scale = 1.0  # SamVisionConfig's own value makes box prompts noise that is never learned
    return _initialized(AutoModelForMaskGeneration.from_config(config))


def _initialized(model: PreTrainedModel) -> PreTrainedModel:
    """A model without a teacher, with what transformers leaves at zero or next to it drawn so that it can be trained."""
    initialize_decoder(model)
    initialize_positions(model)
    return model


def open_sources(
    paths: Sequence[str],
    annotations: str | None,
    images: str | None,
    limit: int | None = None,
    reading: MaskReading | None = None,
) -> list[ImageDataset]:
    """Each path by itself, then the JSON with its folder. "synthetic" and "synthetic:SEED" are scenes made of shapes.

    Raises ValueError for what is no dataset.
    """
    reading = reading or MaskReading()
    sources = [
        # Whether there must be masks is up to the stage.
        _synthetic(path, limit)
        if path.split(":")[0] == "synthetic"
        else load_dataset(
            path,
            limit=limit,
            require_masks=False,
            ignore_label=reading.ignore_label,
            binary_masks=reading.binary,
        )
        for path in paths
    ]
    if annotations or images:
        if not (annotations and images):
            raise ValueError(f"annotations={annotations} and images={images} go together: give both.")
        sources.append(load_dataset(annotations, images=images, limit=limit))
    return sources


def open_train_sources(run: RunArguments) -> list[ImageDataset]:
    """What is trained on, with decoded images kept where `image_cache_dir` says so. Raises ValueError for what is no dataset."""
    sources = open_sources(run.train_data, run.train_annotations, run.train_images, reading=run.mask_reading())
    if run.image_cache_dir:
        cache = ImageCache(run.image_cache_dir)
        for source in sources:
            if isinstance(source, FileDataset):
                source.image_cache = cache
    return sources


def _synthetic(name: str, limit: int | None) -> SyntheticScenes:
    seed = name.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ValueError(f"{name}: must be synthetic:SEED with a number, such as synthetic:1.")
    return SyntheticScenes(limit or 100_000, seed=int(seed))


def open_eval_images(run: RunArguments, train_sources: Sequence[ImageDataset]) -> ImageDataset | None:
    """Raises ValueError for more than one dataset, one without masks or none that can be used, and one that is trained on too."""
    sources = open_sources(run.eval_data, run.eval_annotations, run.eval_images, run.eval_limit, run.mask_reading())
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
                f"{name} is trained on too: scores would say nothing. Leave its images out of what is trained on (patterns count)."
            )
        _check_usable(name, source)
    return sources[0] if sources else None


def _check_usable(name: str, source: ImageDataset):
    """Raises ValueError where none of the first images can be used: before hours of training, not after them."""
    first = range(min(NUM_TRIED, len(source)))
    if next(source.samples(report := SkipReport(), first), None) is None:
        raise ValueError(f"{name}: none of the first {len(first)} images can be used. {report.summary()}")


def _prompt_sampling(run: RunArguments, args: DistillationArguments) -> PromptSampling:
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
    """All examples of the stage, in their order. Raises ValueError for a source without masks where the stage needs them."""
    config = student.config.vision_config
    settings = {
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
        "prompts": None if args.stage == "encoder" else _prompt_sampling(run, args),
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
    """The examples with the teacher's targets from disk, where `cache_dir` says so; computed first where they are missing."""
    if teacher is None or args.cache_dir is None:
        return examples
    cache = EmbeddingCache(args.cache_dir, teacher, examples.num_ids, examples.preprocessing())
    fill_cache(
        cache, examples.views(), teacher, args.device, args.per_device_train_batch_size, args.dataloader_num_workers
    )
    return CachedExamples(examples, cache)


@torch.no_grad()
def verify_export(folder: Path, student: PreTrainedModel | None):
    """Loads the folder again, strictly, and runs it once. Raises RuntimeError where it is not the student that was trained.

    The weights must be equal, and the masks up to rounding: on some CPUs a product depends on where its weights lie in memory.
    None for a student whose weights are in shards, which cannot be run beside it.
    """
    loaded, _ = load_model(folder, device="cpu" if student is None else str(student.device))
    if student is None:
        return
    trained, saved = student.state_dict(), loaded.state_dict()
    same = trained.keys() == saved.keys() and all(torch.equal(trained[name], saved[name]) for name in trained)
    if same:
        size = student.config.vision_config.image_size
        pixel_values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(student.device)
        boxes = torch.tensor([[[size / 4, size / 4, size / 2, size / 2]]], device=student.device)
        expected, found = (model.eval()(pixel_values, input_boxes=boxes).pred_masks for model in (student, loaded))
        same = (found - expected).norm() <= 1e-3 * expected.norm()
    if not same:
        raise RuntimeError(f"{folder} is not the student that was trained. It is not to be used.")
