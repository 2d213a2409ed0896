"""transformers' Trainer for the three stages of distillation."""

import contextlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate
from transformers import PreTrainedModel, ProcessorMixin, ProgressCallback, TrainerCallback, TrainerControl
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from ..data import ImageDataset, Sample
from ..evaluation.models import PromptableModel
from ..loading import quiet_transformers
from ..utils.atomic_files import beside, move_folder
from ..utils.messages import one_line
from .arguments import DistillationArguments
from .callbacks import FiniteLossCallback, MaskImageCallback, ThroughputCallback, diverged
from .checkpoints import (
    SETTINGS_NAME,
    STAGING_NAME,
    CheckpointChangedError,
    CheckpointNotSavedError,
    check_same_run,
    checkpoint_step,
    find_best_again,
    last_checkpoint,
    read_settings,
    run_settings,
)
from .feature_teacher import FeatureTeacher
from .layer_weights import LayerWeightCallback
from .muon import MuonWithAdamW
from .publishing import SNAPSHOTS_NAME, HubPublisher, PushingTrainer
from .stages import EncoderStage, MaskStage, check_trained_parameters, encode, focus_layers
from .teacher import Teacher, normalize_pixels
from .validation import evaluate_images, mask_records, mean_records


EXTRA_STATE_NAME = "projections.safetensors"


class DistillationTrainer(PushingTrainer):
    """A Trainer of a student in one stage of distillation, on any number of devices that accelerate can use.

    A checkpoint is a complete folder of the student, with the state for resuming beside it. It is moved into place when
    it is finished, so that a process killed at any moment leaves the last one complete. Evaluation prompts the student
    with the boxes and with single points of the objects in `eval_images`, at the images' own size.

    Args:
        student: a SamLighteningModel or a SamModel, trained in place.
        args: the settings.
        train_dataset: items as `TrainingExamples` makes them, trained in their order.
        processor: the student's processor, saved with it.
        teacher: the teacher of the stage "encoder", with the layers that `focus_layers` returns.
        eval_images: images with masks.
        callbacks: further callbacks. A `LayerWeightCallback` among them replaces the one that `layer_weights` names.
        publisher: carries out the pushes of `push_to_hub`; by default one of its own.
        feature_teacher: the teacher of features beside the masks, in the stage "end_to_end".

    Raises:
        ValueError: where the student, the teacher and the stage do not fit together.
    """

    control: TrainerControl
    model_accepts_loss_kwargs = False  # the loss is a mean over images: Trainer divides it by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        student: PreTrainedModel,
        args: DistillationArguments,
        train_dataset: Dataset,
        processor: ProcessorMixin,
        teacher: Teacher | None = None,
        eval_images: ImageDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        publisher: HubPublisher | None = None,
        feature_teacher: FeatureTeacher | None = None,
    ):
        self.student, self.teacher, self.processor = student, teacher, processor
        self.eval_images, self.publisher, self.feature_teacher = eval_images, publisher, feature_teacher
        self._sums: dict[
            str, torch.Tensor
        ] = {}  # of the values that a stage returns beside the loss, since the last log
        self._num_summed = 0
        self._staging: str | None = None
        # Computed before the training changes the student.
        examples = getattr(train_dataset, "examples", train_dataset)
        self.run_settings = run_settings(args, examples, teacher, student, feature_teacher)
        if args.ddp_find_unused_parameters is None:  # otherwise DDP searches for unused parameters at every step
            args.ddp_find_unused_parameters = not args.trains_every_parameter
        if args.torch_compile and args.world_size > 1:
            # One graph: split at DDP's buckets it fuses less, and there is little communication (70 MB for tiny).
            torch._dynamo.config.optimize_ddp = False
        callbacks = [FiniteLossCallback(), ThroughputCallback(), *(callbacks or [])]
        if args.stage == "encoder" and not any(isinstance(callback, LayerWeightCallback) for callback in callbacks):
            callbacks.append(LayerWeightCallback(args.layer_weight_schedule()))
        super().__init__(
            model=self._make_stage(args),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_images,
            data_collator=default_collate,
            callbacks=callbacks,
        )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MaskImageCallback):
                callback.trainer = self
        if feature_teacher is not None:
            feature_teacher.to(self.args.device)

    def _make_stage(self, args: DistillationArguments) -> torch.nn.Module:
        if args.stage != "encoder":
            settings = args.loss_weights(), args.box_share, args.num_refinements, args.point_targets
            if self.feature_teacher is None:
                return MaskStage(self.student, args.stage, *settings)
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)  # of the projections
                widths = self.feature_teacher.widths
                return MaskStage(self.student, args.stage, *settings, widths, args.feature_weight)
        if self.teacher is None:
            raise ValueError('stage="encoder" needs a teacher.')
        pairs = focus_layers(self.student, self.teacher.config, args.num_focus_layers)
        if self.teacher.layers != tuple(teacher_layer for _, teacher_layer in pairs):
            raise ValueError(
                f"the teacher's layers={self.teacher.layers} must be those that focus_layers gives: {pairs}."
            )
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # of the projections
            return EncoderStage(self.student, [layer for layer, _ in pairs], self.teacher.config.hidden_size)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train as Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one in `output_dir`.
            kwargs: further arguments of `Trainer.train`.

        Raises:
            CheckpointChangedError: where a setting that defines the run differs from the checkpoint's.
            ValueError: where there is no checkpoint to resume from.
        """
        if self.args.should_save:
            for name in (STAGING_NAME, SNAPSHOTS_NAME):  # of a process that was killed
                shutil.rmtree(Path(self.args.output_dir) / name, ignore_errors=True)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: holds no whole checkpoint to resume from.")
        if resume_from_checkpoint:
            self._check_resumable(resume_from_checkpoint)
            if self.args.should_save:
                find_best_again(resume_from_checkpoint, self.args.output_dir)
            self.accelerator.wait_for_everyone()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except BaseException:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()  # otherwise the error would be printed on the bar's line
            raise

    def _check_resumable(self, checkpoint: str):
        streams = isinstance(self.train_dataset, IterableDataset)
        notice = check_same_run(checkpoint, read_settings(checkpoint), self.run_settings, streams)
        if not self.is_fsdp_enabled and not os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise CheckpointChangedError(
                f"{checkpoint}: has no {OPTIMIZER_NAME} (save_only_model=true), without which the schedule would begin "
                "again. Start a new output_dir whose student it is."
            )
        if notice and self.args.should_save:
            print(notice)
        if streams:  # a stream skips examples without decoding them
            self.args.ignore_data_skip = True
            num_batches = checkpoint_step(checkpoint) * self.args.gradient_accumulation_steps
            self.train_dataset.skip_batches(num_batches, self.args.per_device_train_batch_size)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: DistillationArguments, model=None) -> tuple[type, dict]:
        if args.muon:
            adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            return MuonWithAdamW, {"lr": args.learning_rate, **adamw}
        return PushingTrainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.args.muon and self.is_fsdp_enabled:
            raise ValueError(
                "muon=true is not possible with FSDP, whose shards are no matrices. Use muon=false, or DDP."
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        stage = self.accelerator.unwrap_model(self.model)
        check_trained_parameters(stage, optimizer, self.is_fsdp_enabled)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, without accelerate for a stream, which is already split by rank."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _get_train_sampler(self, *args, **kwargs) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # the dataset itself is in random order

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        pixel_values = normalize_pixels(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        if self.args.stage == "encoder":
            outputs = model(pixel_values=pixel_values, targets=self._targets(inputs, pixel_values))
        else:
            prompts = {name: inputs[name] for name in ("masks", "boxes", "points", "uniforms")}
            if self.feature_teacher is not None:
                config = self.student.config.vision_config
                grid = config.image_size // config.patch_size
                prompts["features"] = self.feature_teacher.targets(pixel_values, grid)
            outputs = model(pixel_values=pixel_values, **prompts)
        for name, value in outputs.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._num_summed += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _targets(self, inputs: dict, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        if "targets" in inputs:
            return inputs["targets"]
        return self._teacher_targets(pixel_values)

    def _teacher_targets(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        assert self.teacher is not None  # see _make_stage
        self.teacher.encoder.to(pixel_values.device)
        return self.teacher.targets(pixel_values)

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            if self._num_summed:
                means = torch.stack([total / self._num_summed for total in self._sums.values()])
                means = self.accelerator.reduce(means.to(self.args.device), "mean").tolist()
                logs.update(zip(self._sums, means, strict=True))
                self._sums, self._num_summed = {}, 0
            if self.args.stage == "encoder":
                weights = self.accelerator.unwrap_model(self.model).layer_weights.tolist()
                logs.update({f"layer_weight/{n}": weight for n, weight in enumerate(weights, start=1)})
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ThroughputCallback):
                    logs.update(callback.logs(self.state, self.args))
            if self.publisher is not None:
                logs.update(self.publisher.logs())
        super().log(logs, *args, **kwargs)

    # Evaluation

    def promptable(self) -> PromptableModel:
        """Return the student in its current state, for evaluation."""
        return PromptableModel(self.student, self.processor)

    def evaluate(
        self, eval_dataset: ImageDataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict:
        """Evaluate the student on images with masks, at the images' own size.

        Args:
            eval_dataset: the images; by default `eval_images`.
            ignore_keys: not used; part of Trainer's signature.
            metric_key_prefix: prefix of the names.

        Returns:
            Means over objects of the IoU: for boxes, for single points with the mask of the highest predicted IoU, and
            with the best of the three masks. In the stage "encoder" also the mean cosine similarity of the student's
            and the teacher's embeddings.

        Raises:
            ValueError: where there are no images, or the weights are in shards.
        """
        images = self.eval_images if eval_dataset is None else eval_dataset
        if images is None:
            raise ValueError("evaluation needs eval_images.")
        if self.is_fsdp_enabled:
            raise ValueError(
                "weights in shards cannot be evaluated in training. Use eval_strategy=no, and `samlight evaluate` "
                "afterwards."
            )
        indices = range(self.args.process_index, len(images), self.args.world_size)
        evaluate = partial(self._evaluate_sample, self.promptable())
        records, num_skipped = evaluate_images(images, indices, evaluate)
        self.student.train()
        metrics = mean_records(gather_object(records))
        if num_skipped := sum(gather_object([num_skipped])):
            metrics["skipped_pictures"] = num_skipped
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_sample(self, promptable: PromptableModel, sample: Sample) -> list[dict[str, float]]:
        with self._autocast():
            records = mask_records(promptable, sample, self.args.eval_max_instances)
            if self.args.stage == "encoder":
                records.append({"embedding_cosine": self._cosine(promptable, sample)})
        return records

    def _cosine(self, promptable: PromptableModel, sample: Sample) -> float:
        pixel_values = promptable.preprocess([sample.image])["pixel_values"].to(self.args.device)
        target = self._teacher_targets(pixel_values)[-1]
        with torch.inference_mode():
            _, embedding = encode(self.student.vision_encoder, pixel_values)
        return torch.cosine_similarity(embedding.float(), target.float(), dim=1).mean().item()

    def _autocast(self):
        if self.args.bf16 or self.args.fp16:
            return torch.autocast(self.args.device.type, torch.bfloat16 if self.args.bf16 else torch.float16)
        return contextlib.nullcontext()

    # Checkpoints

    def export(self, folder: str | os.PathLike):
        """Write the student's folder, complete and loadable anywhere. It is written to a temporary folder and moved.

        Raises:
            TrainingDivergedError: for weights that are not finite. Nothing is written then.
        """
        self._check_finite()
        folder = Path(folder)
        aside = beside(folder, ".part")  # one name in all processes
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(aside), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for name in (EXTRA_STATE_NAME, SETTINGS_NAME):
                (aside / name).unlink(missing_ok=True)
            move_folder(aside, folder, fsync=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Save the student's folder with the files that resuming needs."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        stage = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        extra = stage.extra_state()
        if state_dict is not None:  # gathered by FSDP
            extra = {k.removeprefix("projections."): v for k, v in state_dict.items() if k.startswith("projections.")}
            state_dict = {k.removeprefix("student."): v for k, v in state_dict.items() if k.startswith("student.")}
        self.processor.save_pretrained(output_dir)
        with quiet_transformers():
            stage.student.save_pretrained(output_dir, state_dict=state_dict)
        if extra:
            save_file(
                {name: tensor.contiguous() for name, tensor in extra.items()},
                os.path.join(output_dir, EXTRA_STATE_NAME),
            )
        text = json.dumps(self.run_settings, indent=1)
        Path(output_dir, SETTINGS_NAME).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        stage = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        load_model(stage.student, os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME))  # strict
        extra = os.path.join(resume_from_checkpoint, EXTRA_STATE_NAME)
        stage.load_extra_state(load_file(extra) if os.path.isfile(extra) else {})
        return None

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        output_dir, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / STAGING_NAME
        self._check_finite()
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, best_before = str(staging), self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint != best_before:  # this one, under its final path
                self.state.best_model_checkpoint = str(output_dir / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                move_folder(staging / name, output_dir / name, fsync=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_checkpoint(output_dir)
            how = f"The last whole one is {last}: make room, and resume from it." if last else "It is the first one."
            raise CheckpointNotSavedError(
                f"the checkpoint of step {self.state.global_step} could not be saved in {output_dir} "
                f"({one_line(error)}). {how}"
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            staging.rmdir()
            self.push_checkpoint(output_dir / name)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, best)

    def _check_finite(self):
        """Raise TrainingDivergedError for weights that are not finite, so that these are never written."""
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP's are in shards
            if parameter.requires_grad and not torch.isfinite(local).all():
                raise diverged(f"NaN or infinite weights in {name}", self.args.output_dir, self.state.global_step)
