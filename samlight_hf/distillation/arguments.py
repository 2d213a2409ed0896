"""Settings of a distillation: a YAML file, and options of the command line that override it.

    teacher: facebook/sam-vit-huge
    student: tiny
    train_data: [sa1b/*.tar]
    output_dir: outputs/vit_h
    stages: [encoder, decoder]
    encoder: {max_steps: 100000, learning_rate: 5.0e-4}   # of this stage alone
    decoder: {max_steps: 20000, learning_rate: 1.0e-4}

An option of the command line overrides the stage's section, which overrides the rest of the file.
"""

import argparse
import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..data.dataset import check_limit
from ..data.label_maps import MaskReading, parse_ignore_label
from ..publishing.card import CardFacts
from ..publishing.upload import check_target
from ..utils.atomic_files import read_yaml
from .layer_weights import LayerWeightSchedule, layer_weight_schedule
from .stages import POINT_TARGETS, STAGES


@dataclass
class DistillationArguments(TrainingArguments):
    """transformers' TrainingArguments, extended by the settings of one stage of distillation.

    The number of steps is `max_steps`. There are no epochs, because every example is drawn anew.
    """

    stage: str = field(default="encoder", metadata={"help": f"one of {', '.join(STAGES)}"})

    num_focus_layers: int = field(
        default=3,
        metadata={"help": "encoder: number of the student's last layers that are compared, besides its output"},
    )
    layer_weights: str = field(default="dynamic", metadata={"help": "encoder: dynamic, uniform or output_only"})
    ramp_fraction: float = field(
        default=0.5, metadata={"help": "encoder: share of the steps over which dynamic layer weights rise"}
    )
    teacher_dtype: str = field(
        default="bfloat16", metadata={"help": "dtype of the teachers: bfloat16, float16 or float32"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "encoder: folder of the teacher's targets, computed once; needs num_views"}
    )

    muon: bool = field(
        default=False,
        metadata={"help": "Muon for the matrices of the layers, optim for the rest; faster from scratch"},
    )

    num_prompts: int = field(
        default=16, metadata={"help": "decoder, end_to_end: number of prompted objects in an image"}
    )
    box_share: float = field(default=0.5, metadata={"help": "decoder, end_to_end: share of prompts that are boxes"})
    num_refinements: int = field(
        default=1, metadata={"help": "decoder, end_to_end: number of clicks that are added one by one"}
    )
    point_targets: str = field(
        default="own",
        metadata={"help": "decoder, end_to_end: own, or all: a point trains on every object that contains it"},
    )
    focal_weight: float = field(default=20.0, metadata={"help": "decoder, end_to_end: weight of the focal loss"})
    bce_weight: float = field(
        default=0.0,
        metadata={"help": "decoder, end_to_end: weight of cross-entropy; from scratch use 5 and focal_weight 0"},
    )
    dice_weight: float = field(default=1.0, metadata={"help": "decoder, end_to_end: weight of the dice loss"})
    iou_weight: float = field(default=1.0, metadata={"help": "decoder, end_to_end: weight of the IoU head's loss"})

    feature_teacher: str | None = field(
        default=None,
        metadata={
            "help": "end_to_end: a model of timm (a name or a folder) whose features the image encoder learns too"
        },
    )
    feature_weight: float = field(default=1.0, metadata={"help": "end_to_end: weight of the loss of these features"})

    eval_max_instances: int = field(
        default=16, metadata={"help": "largest number of objects of an image that are evaluated"}
    )

    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "number of checkpoints that are kept"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hides a NaN in the loss: leave it off"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave it off"})

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is not known. Use one of {', '.join(STAGES)}.")
        self.layer_weight_schedule()
        for name in (
            "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "num_prompts",
            "eval_max_instances",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "seed",
            "num_refinements",
            "num_focus_layers",
            *(f"{loss}_weight" for loss in ("focal", "bce", "dice", "iou", "feature")),
        ):
            if not 0 <= getattr(self, name) < math.inf:  # nor NaN
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative.")
        for name, why in (
            ("auto_find_batch_size", "the examples of a step follow from the batch size"),
            ("remove_unused_columns", "examples are no table"),
            ("do_predict", "samlight evaluate does it"),
            ("resume_from_checkpoint", "use --resume"),
        ):
            if value := getattr(self, name):
                raise ValueError(f"{name}={'true' if value is True else value} is not possible here: {why}.")
        if self.muon and self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"muon=true goes with optim=adamw_torch, not with optim={self.optim}.")
        if not 0 <= self.box_share <= 1:
            raise ValueError(f"box_share={self.box_share} must be from 0 to 1.")
        if self.point_targets not in POINT_TARGETS:
            raise ValueError(f"point_targets={self.point_targets!r} must be one of {', '.join(POINT_TARGETS)}.")
        if self.stage != "encoder" and not self.focal_weight + self.bce_weight + self.dice_weight:
            raise ValueError("focal_weight, bce_weight and dice_weight are all 0: no loss would train the masks.")
        if self.push_to_hub:
            if self.hub_model_id is None:
                raise ValueError("push_to_hub=true needs hub_model_id, such as org/name.")
            check_target(self.hub_model_id, self.hub_revision, tag=None, create_pr=False)
        if self.num_train_epochs != 3:  # Trainer's default, which max_steps overrides
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} is not possible here: there are no epochs. Use max_steps."
            )
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "box_miou"  # Trainer's own is a loss, which no evaluation here returns
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.accelerator_config is None and self.dataloader_pin_memory and on_gpu:
            # Else each batch waits until the GPU is done with the step before, and the GPU for the next one's launches.
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()

    def layer_weight_schedule(self) -> LayerWeightSchedule:
        return layer_weight_schedule(self.layer_weights, self.ramp_fraction)

    def loss_weights(self) -> dict[str, float]:
        return {name: getattr(self, f"{name}_weight") for name in ("focal", "bce", "dice", "iou")}

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of one process: never more than one. Several GPUs need as many processes.

        transformers would use DataParallel in a single process that sees several GPUs: the batch size would be
        multiplied, and each logged number would be a list with an entry for each GPU.
        """
        return min(super().n_gpu, 1)

    @property
    def trains_every_parameter(self) -> bool:
        """Whether each trained parameter gets a gradient in each step, because boxes, clicks and masks all occur."""
        num_boxes = round(self.box_share * self.num_prompts)
        return self.stage != "end_to_end" or (num_boxes > 0 and self.num_refinements > 0)

    @property
    def global_batch_size(self) -> int:
        """The number of images in one optimizer step, over all devices."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


@dataclass
class RunArguments:
    """Settings of a whole run: teacher, student, data and stages."""

    stages: list[str] = field(
        default_factory=lambda: ["encoder", "decoder"], metadata={"help": "the stages, in this order"}
    )
    teacher: str | None = field(default=None, metadata={"help": "a folder, a Hub name, or an original .pth file"})
    student: str = field(
        default="tiny",
        metadata={
            "help": "a preset (tiny, small, base), a config.json (fresh weights), or a checkpoint's folder or Hub name"
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "image size of the student, changed before the training"}
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "SA-1B tars, folders of images, folders with images/ and masks/; patterns allowed"},
    )
    train_annotations: str | None = field(default=None, metadata={"help": "a JSON in COCO's format; with train_images"})
    train_images: str | None = field(default=None, metadata={"help": "the folder of train_annotations' images"})
    stream_data: list[str] = field(
        default_factory=list,
        metadata={"help": "instead of train_data: tars to read over the network (https://, hf://)"},
    )
    cutouts: list[str] = field(
        default_factory=list, metadata={"help": "RGBA objects to paste on the images: tars or folders"}
    )
    source_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "how often each of train_data is drawn, relative to the others; by default by size"},
    )
    ignore_label: str = field(
        default="auto",
        metadata={"help": "masks/NAME.png: the label of void; auto: 255 if all others are at most 126; none: no label"},
    )
    binary_masks: bool = field(
        default=False, metadata={"help": "masks/NAME.png: one object where brightness is half or more, not labels"}
    )
    max_skipped: float = field(default=0.05, metadata={"help": "share of unusable images above which the run stops"})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "like train_data, for the evaluation"})
    eval_annotations: str | None = field(default=None, metadata={"help": "like train_annotations, for the evaluation"})
    eval_images: str | None = field(default=None, metadata={"help": "like train_images, for the evaluation"})
    eval_limit: int | None = field(
        default=None, metadata={"help": "number of images that are evaluated, from the first on"}
    )
    min_scale: float = field(default=1.0, metadata={"help": "augmentation: smallest size of the image in its frame"})
    max_scale: float = field(default=1.0, metadata={"help": "augmentation: largest size; above 1 is a crop"})
    stretch: float = field(
        default=1.0, metadata={"help": "augmentation: largest ratio between the scales of the two sides"}
    )
    flip: bool = field(default=True, metadata={"help": "augmentation: mirror every other image"})
    color_jitter: float = field(
        default=0.0, metadata={"help": "augmentation: strength for brightness, contrast and saturation"}
    )
    box_noise: float = field(
        default=0.1, metadata={"help": "noise of a prompt's box: deviation of each side, as a share of width or height"}
    )
    deepest_share: float = field(
        default=0.5,
        metadata={"help": "share of point prompts that are deepest inside their object; the others are anywhere in it"},
    )
    area_power: float = field(
        default=0.0,
        metadata={
            "help": "objects are drawn in proportion to their area to this power; above 0, large ones more often"
        },
    )
    image_cache_dir: str | None = field(
        default=None, metadata={"help": "folder of decoded images of train_data: 1 MB for each of 640 x 480"}
    )
    num_views: int | None = field(
        default=None, metadata={"help": "number of augmented views of an image, used repeatedly; needed by cache_dir"}
    )
    initialize_from_teacher_layers: bool = field(
        default=False,
        metadata={
            "help": "initialize a fresh student's encoder with evenly spaced layers of the teacher of equal width"
        },
    )
    push_to: str | None = field(
        default=None, metadata={"help": "Hub repository that the finished student is pushed to"}
    )
    card: str | None = field(
        default=None, metadata={"help": "a card.yaml: licence, data and terms, for the model cards of what is pushed"}
    )
    resume: bool = field(default=False, metadata={"help": "resume the run in output_dir"})

    def __post_init__(self):
        if not self.stages or set(self.stages) - set(STAGES):
            raise ValueError(f"stages={self.stages} must be some of {', '.join(STAGES)}.")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages={self.stages} names a stage twice.")
        check_limit(self.eval_limit, "eval_limit")
        if self.push_to is not None:
            check_target(self.push_to, revision=None, tag=None, create_pr=False)
        self.card_facts()
        self.mask_reading()

    def mask_reading(self) -> MaskReading:
        """Return how mask files are read. Raises ValueError for an invalid `ignore_label`."""
        return MaskReading(parse_ignore_label(self.ignore_label), self.binary_masks)

    def card_facts(self) -> dict:
        """Return the content of the file `card`.

        Raises:
            ValueError: for a file that cannot be read, or has unknown keys.
        """
        content = (read_yaml(self.card) if self.card else None) or {}
        CardFacts.of(content, self.card or "card")
        return content


def parse_arguments(arguments: list[str], prog: str | None = None) -> tuple[RunArguments, list[DistillationArguments]]:
    """Parse the settings of a run and of each of its stages from `--config FILE` and further options.

    The files of a stage go to `output_dir`/STAGE.

    Args:
        arguments: the command line without the program's name.
        prog: the program's name in the help.

    Raises:
        ValueError: for a file that is missing or is not YAML, and for an unknown key.
    """
    config, options = _read_config(arguments)
    sections = {
        name: config.pop(name) or {} for name in STAGES if isinstance(config.get(name), dict | None) and name in config
    }
    _check_keys({"": config, **sections})
    if "stage" in config or any(option.split("=")[0] == "--stage" for option in options):
        raise ValueError("stage is set by stages: use --stages encoder, for one of them.")
    run, _ = _parse(config, options, prog)
    stages = []
    for stage in run.stages:
        _, settings = _parse({**config, **sections.get(stage, {}), "stage": stage}, options, prog)
        settings.output_dir = str(Path(settings.output_dir) / stage)
        stages.append(settings)
    return run, stages


def _read_config(arguments: list[str]) -> tuple[dict, list[str]]:
    """Return the content of the YAML file, and the options without `--config FILE`."""
    options = list(arguments)
    paths = []
    while "--config" in options or any(option.startswith("--config=") for option in options):
        place = next(i for i, option in enumerate(options) if option.split("=")[0] == "--config")
        option = options.pop(place)
        if "=" in option:
            paths.append(option.partition("=")[2])
        elif place < len(options):
            paths.append(options.pop(place))
        else:
            raise ValueError("--config needs a file.")
    if len(paths) > 1:
        raise ValueError(f"--config was given {len(paths)} times. Give one file.")
    if not paths:
        return {}, options
    config = read_yaml(paths[0])
    if not isinstance(config, dict):
        raise ValueError(f"{paths[0]}: must hold keys and values, such as teacher: facebook/sam-vit-huge.")
    return config, options


class _StoreOnce(argparse._StoreAction):
    """Store the values of an option; given twice, argparse would forget the first ones."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser.given:
            raise ValueError(f"{option_string} is given twice. Give all its values after one of them.")
        parser.given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class _Parser(HfArgumentParser):
    """A parser that takes --max-steps and --max_steps, and shows the first in its help and errors."""

    def __init__(self, prog: str | None = None):
        description = (
            "--config FILE names a YAML file of settings. Each option below may be a key of it, with _ for -, and an "
            "option wins over the file. On several GPUs: accelerate launch -m samlight_hf.cli distill ..."
        )
        super().__init__((RunArguments, DistillationArguments), prog=prog, description=description)
        self.given: set[str] = set()
        for action in self._actions:
            action.option_strings = [option for option in action.option_strings if "_" not in option]
            if action.dest in ("train_data", "eval_data", "stream_data", "cutouts", "source_weights"):
                action.__class__ = _StoreOnce

    def error(self, message: str):
        raise ValueError(message)  # instead of two pages of usage and an exit


def _make_parser(prog: str | None = None) -> tuple[_Parser, dict[str, argparse.Action]]:
    """Return the parser, and its actions by the names of the options."""
    parser = _Parser(prog)
    return parser, {action.dest: action for action in parser._actions}


def _check_keys(sections: dict[str, dict]):
    """Raise ValueError for a key that no option has. The file itself is the section ""."""
    _, actions = _make_parser()
    of_the_run = {field.name for field in fields(RunArguments)}
    for name, section in sections.items():
        for key in section:
            if name and key in of_the_run:
                raise ValueError(f"the config's {name}: {key!r} holds for all stages: move it to the top of the file.")
            if key not in actions:
                near = difflib.get_close_matches(str(key), actions, n=1)
                where = f"{name}: " if name else ""
                raise ValueError(
                    f"the config's {where}{key!r} is not known.{f' Did you mean {near[0]}?' if near else ''}"
                )


def _parse(config: dict, options: list[str], prog: str | None = None) -> tuple[RunArguments, DistillationArguments]:
    parser, actions = _make_parser(prog)
    parser.set_defaults(**{key: _plain(key, value, actions[key]) for key, value in config.items() if value is not None})
    try:
        run, settings, unknown = parser.parse_args_into_dataclasses(args=options, return_remaining_strings=True)
    except ValueError as error:
        if "bf16/gpu" not in str(error):
            raise
        raise ValueError(
            "bf16=True needs a GPU that has bfloat16, and there is none here. On the CPU: --use-cpu --bf16 false."
        ) from error
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}. `{parser.prog} --help` lists what it takes.")
    return run, settings


def _plain(key: str, value, action: argparse.Action):
    """Convert a value of YAML to what the option takes. Text is converted by argparse: YAML 1.1 reads 5e-4 as text."""
    if action.nargs == "+" and not isinstance(value, list):
        return [value]
    if action.type is int and isinstance(value, float):
        raise ValueError(f"the config's {key}={value} must be an integer.")
    return float(value) if action.type is float and isinstance(value, int) else value
