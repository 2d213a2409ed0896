"""A distillation from settings to a student's folder: the stages in order, each from the last one's student."""

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
from transformers import AutoConfig, AutoModelForMaskGeneration, PreTrainedModel, TrainerCallback, set_seed

from ..conversion import create_student, initialize_decoder, initialize_positions, load_teacher, resize_model
from ..data import ImageDataset, MaskFolderDataset, SkipReport, TrainingExamples
from ..data.label_maps import MaskReading
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
from .feature_teacher import FeatureTeacher
from .open_data import make_examples, open_eval_images, open_train_sources, prompt_sampling, with_cache
from .plots import plot_learning_curves
from .publishing import HubPublisher, Push, has_arrived
from .stages import focus_layers
from .teacher import Teacher
from .trainer import DistillationTrainer


if TYPE_CHECKING:
    from ..data import StreamedExamples


RESULT_NAME = "result.json"


def distill(run: RunArguments, stages: Sequence[DistillationArguments]) -> Path:
    """Run the stages, and return the folder of the student, which is complete and loadable anywhere.

    Each stage has a folder of its own with checkpoints, `student/`, `result.json`, learning curves and images. With
    `run.resume` a finished stage is kept, and an interrupted one resumes from its last checkpoint.

    Args:
        run: the teacher, the student and the data.
        stages: the settings of each stage, in order.

    Returns:
        The folder of the last stage's student.

    Raises:
        ValueError: for settings that do not fit together, before anything is trained.
        PublishError: where the push of the finished student failed. Its folder is complete.
    """
    check_run(run, stages)
    with _make_publisher(run, stages) as publisher:
        student = _run_stages(run, stages, publisher)
    if publisher is not None:
        _report_pushes(publisher, student)
    return student


def _make_publisher(run: RunArguments, stages: Sequence[DistillationArguments]):
    """Return a publisher on the main process of a run that pushes, elsewhere a context of None."""
    if PartialState().is_main_process and (run.push_to or any(args.push_to_hub for args in stages)):
        return HubPublisher(run.teacher, run.card_facts())
    return contextlib.nullcontext()


def _report_pushes(publisher: HubPublisher, student: Path):
    """Print what was pushed. Raises PublishError where the push of the finished student failed."""
    if report := publisher.report():
        print(report)
    last = {result.repo_id: result for result in publisher.results}
    if missing := [repo_id for repo_id, result in last.items() if result.commit is None]:
        raise PublishError(
            f"{student} is finished, and not in {', '.join(missing)}: {last[missing[0]].error} To try again: the same "
            "command with --resume."
        )


def _open_data(run: RunArguments) -> tuple[list[ImageDataset], ImageDataset | None]:
    """Open the training and evaluation data. Raises ValueError for settings of mask files where there are none."""
    sources = open_train_sources(run)
    eval_images = open_eval_images(run, sources)
    datasets = [*sources, *([] if eval_images is None else [eval_images])]
    if run.mask_reading() != MaskReading() and not any(isinstance(dataset, MaskFolderDataset) for dataset in datasets):
        raise ValueError(
            f"ignore_label={run.ignore_label} and binary_masks={run.binary_masks} say how mask files are read, and no "
            "folder with images/ and masks/ is among the data. Leave them out."
        )
    return sources, eval_images


def _run_stages(run: RunArguments, stages: Sequence[DistillationArguments], publisher: HubPublisher | None) -> Path:
    set_seed(stages[0].seed)
    teacher = load_teacher(run.teacher, device="cpu")[0] if run.teacher else None
    sources, eval_images = _open_data(run)
    student, folder = make_student(run, teacher), Path()
    needs = [_open_needs(student, args, run, sources, teacher) for args in stages]  # of all, before any is trained
    for args, (examples, feature_teacher) in zip(stages, needs):
        folder = Path(args.output_dir) / "student"
        was_finished = (Path(args.output_dir) / RESULT_NAME).is_file()
        result = train_stage(student, args, run, examples, eval_images, teacher, publisher, feature_teacher)
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
    """Check the settings without reading a model or an image. Raises ValueError where they do not fit together."""
    if not (run.train_data or run.train_annotations or run.stream_data):
        raise ValueError("train_data is missing: give SA-1B tars, a folder, or train_annotations and train_images.")
    if run.stream_data and (run.train_data or run.train_annotations):
        raise ValueError("stream_data and train_data are both given. Stream everything, or nothing.")
    for name in ("source_weights", "image_cache_dir"):
        if run.stream_data and getattr(run, name):
            raise ValueError(
                f"{name}={getattr(run, name)} is for train_data, and stream_data would ignore it: leave it out."
            )
    if "encoder" in run.stages and run.teacher is None:
        raise ValueError('stages has "encoder", which needs a teacher: a folder, a Hub name or an original .pth file.')
    is_fresh = run.student in PRESETS or run.student.endswith(".json")
    if run.stages[0] == "decoder" and is_fresh and not (Path(stages[0].output_dir) / RESULT_NAME).is_file():
        raise ValueError(
            f"stages begins with the decoder, on a fresh image encoder (student={run.student}), which is untrained. "
            "Put encoder before it, or give the encoder stage's folder as student, such as outputs/x/encoder/student."
        )
    for args in stages:
        _check_stage(run, args)


def _check_stage(run: RunArguments, args: DistillationArguments):
    if args.feature_teacher and args.stage != "end_to_end":
        raise ValueError(
            f"feature_teacher={args.feature_teacher} is not possible in the stage {args.stage}: its features are "
            "learned beside masks, by the image encoder. Set it in the section end_to_end."
        )
    if args.stage != "encoder":
        prompt_sampling(run, args)  # raises for values out of range
    if args.stage == "encoder" and args.cache_dir and run.stream_data:
        raise ValueError(
            f"cache_dir={args.cache_dir} needs images that can be enumerated: use train_data, not stream_data."
        )
    if args.stage == "encoder" and args.cache_dir and run.num_views is None:
        raise ValueError(
            f"cache_dir={args.cache_dir} needs num_views: a finite number of views of each image can be cached, such "
            "as num_views=1."
        )
    if args.eval_strategy != "no" and not (run.eval_data or run.eval_annotations):
        raise ValueError(f"eval_strategy={args.eval_strategy} needs eval_data.")
    if args.process_index == 0:  # in one process only: the others would find its temporary files
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


def _open_needs(
    student: PreTrainedModel,
    args: DistillationArguments,
    run: RunArguments,
    sources: Sequence[ImageDataset],
    teacher: PreTrainedModel | None,
) -> "tuple[TrainingExamples | StreamedExamples, FeatureTeacher | None]":
    """Return the examples and the teacher of features of a stage. Raises ValueError where it could not be trained."""
    if args.stage == "encoder":
        assert teacher is not None  # see check_run
        focus_layers(student, teacher.config.vision_config, args.num_focus_layers)
    examples = make_examples(student, args, run, sources)
    if not args.feature_teacher:
        return examples, None
    return examples, FeatureTeacher(args.feature_teacher, find_dtype(args.teacher_dtype))


def train_stage(
    student: PreTrainedModel,
    args: DistillationArguments,
    run: RunArguments,
    examples: "TrainingExamples | StreamedExamples",
    eval_images: ImageDataset | None,
    teacher_model: PreTrainedModel | None,
    publisher: HubPublisher | None = None,
    feature_teacher: FeatureTeacher | None = None,
) -> dict:
    """Train `student` in place; write the stage's result to `result.json`, and return it.

    A finished stage is not trained again, and `student` stays unchanged. It must have the same settings, and have begun
    with the same student.

    Args:
        student: a SamLighteningModel or a SamModel.
        args: the stage's settings.
        run: the run's settings.
        examples: the stage's examples, as `make_examples` returns them.
        eval_images: the evaluation data.
        teacher_model: the teacher, needed by the stage "encoder".
        publisher: carries out the pushes.
        feature_teacher: the teacher of features beside the masks.

    Returns:
        The settings, the time, the losses and scores, and the report of skipped images.

    Raises:
        CheckpointChangedError: where a finished stage or a checkpoint was made with other settings.
    """
    start = time.time()
    output_dir = Path(args.output_dir)
    teacher = _make_teacher(teacher_model, student, args)
    if (output_dir / RESULT_NAME).is_file():
        saved = read_json(output_dir / RESULT_NAME, dict)
        settings = run_settings(args, examples, teacher, student, feature_teacher)
        check_same_run(output_dir, saved["settings"], settings, bool(run.stream_data), is_finished=True)
        tell(f"{output_dir}: finished before, and kept, with the scores of that run.")
        return saved
    callbacks = _mask_images(eval_images)
    processor = make_processor(student.config.vision_config)
    train_dataset = with_cache(examples, args, run, teacher)
    trainer = DistillationTrainer(
        student, args, train_dataset, processor, teacher, eval_images, callbacks, publisher, feature_teacher
    )
    checkpoint = last_checkpoint(args.output_dir) if run.resume else None
    output = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_images is not None and not trainer.is_fsdp_enabled else {}
    trainer.export(output_dir / "student")
    skipped = SkipReport()
    for part in gather_object([examples.skip_report(with_index=trainer.is_world_process_zero()).to_dict()]):
        skipped.merge(SkipReport.from_dict(part))
    # Trainer's own figure counts only the time since the training was resumed.
    seconds = None if checkpoint else time.time() - start
    result = _make_result(trainer, output.training_loss, seconds, metrics, skipped)
    if trainer.is_world_process_zero():
        _write_result(trainer, result, output_dir)
        if skipped:
            print(skipped.summary())
    if teacher is not None:
        teacher.encoder.cpu()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return result


def _make_teacher(
    model: PreTrainedModel | None, student: PreTrainedModel, args: DistillationArguments
) -> Teacher | None:
    """Return the teacher of the stage "encoder"; the other stages learn from masks."""
    if args.stage != "encoder":
        return None
    assert model is not None  # see check_run
    pairs = focus_layers(student, model.config.vision_config, args.num_focus_layers)
    layers = [layer for _, layer in pairs]
    return Teacher(model, layers, find_dtype(args.teacher_dtype), compile=args.torch_compile)


def _mask_images(eval_images: ImageDataset | None) -> list[TrainerCallback]:
    """Return the callback that draws masks of the first images that can be used."""
    if eval_images is None:
        return []
    samples = (eval_images.load(index)[0] for index in range(min(6, len(eval_images))))
    return [MaskImageCallback([sample for sample in samples if sample is not None])]


def _make_result(
    trainer: DistillationTrainer, training_loss: float, seconds: float | None, metrics: dict, skipped: SkipReport
) -> dict:
    losses, speeds = (_logged(trainer, name) for name in ("loss", "images_per_second"))
    return {
        "stage": trainer.args.stage,
        "settings": trainer.run_settings,
        "seconds": seconds,
        "train_loss": statistics.mean(losses or [training_loss]),
        "images_per_second": statistics.median(speeds) if speeds else None,
        "metrics": metrics,
        "skipped": skipped.to_dict(),
    }


def _write_result(trainer: DistillationTrainer, result: dict, output_dir: Path):
    """Verify the exported student and write the stage's files, last the result, which marks the stage as finished."""
    verify_export(output_dir / "student", None if trainer.is_fsdp_enabled else trainer.student)
    trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    plot_learning_curves(trainer.state.log_history, output_dir / "curves.png", result["stage"])
    text = json.dumps(result, indent=1)
    atomic_write(output_dir / RESULT_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _logged(trainer: DistillationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def make_student(run: RunArguments, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """Create or load the student of a run, on the CPU.

    Args:
        run: the settings `student`, `image_size` and `initialize_from_teacher_layers`.
        teacher: the teacher, whose prompt encoder and mask decoder a fresh student takes over.

    Raises:
        ValueError: for an unknown preset, and a file or folder that cannot be loaded.
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
        student = resize_model(student, run.image_size)
    return student


def _from_config(path: str, teacher: PreTrainedModel | None, run: RunArguments) -> PreTrainedModel:
    if not os.path.isfile(path):
        raise ValueError(f"student={path}: no such file.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"student={path}: no model's config ({one_line(error, 200)}).") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"student={path}: model_type={config.model_type!r} must be one of {', '.join(MODEL_TYPES)}.")
    if teacher is not None and isinstance(config, SamLighteningConfig):
        return create_student(teacher, config=config, initialize_from_teacher_layers=run.initialize_from_teacher_layers)
    config.vision_config.scale = 1.0  # with SamVisionConfig's default box prompts are noise, which is never learned
    return _initialized(AutoModelForMaskGeneration.from_config(config))


def _initialized(model: PreTrainedModel) -> PreTrainedModel:
    """Initialize a model without a teacher, including the parameters that transformers leaves at or near zero."""
    initialize_decoder(model)
    initialize_positions(model)
    return model


@torch.no_grad()
def verify_export(folder: Path, student: PreTrainedModel | None):
    """Load an exported folder strictly, run it once, and compare it with the trained student.

    The weights must be equal. The masks may differ by rounding: on some CPUs a product depends on the memory addresses
    of its weights.

    Args:
        folder: the exported student.
        student: the trained student; None for one whose weights are in shards, which cannot be run here.

    Raises:
        RuntimeError: where they differ.
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
        expected, actual = (model.eval()(pixel_values, input_boxes=boxes).pred_masks for model in (student, loaded))
        same = (actual - expected).norm() <= 1e-3 * expected.norm()
    if not same:
        raise RuntimeError(f"{folder} is not the student that was trained. It is not to be used.")
