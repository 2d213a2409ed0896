r"""Throughput and memory of the stages of distillation, through DistillationTrainer itself, data loading included.

    python benchmarks/distillation.py --data train-000000.tar --out benchmarks/results/distillation_h100.json

The student is SAM-Lightening tiny at 1024 px, in bfloat16, compiled. Rows: the encoder stage with cached embeddings;
the same with SAM ViT-H (random weights) as a live teacher, beside that teacher's forward pass alone; the decoder stage
with 16 prompts an image. Images a second are medians over windows of several steps, without the first ones, which
include compilation. Without a GPU everything is small, to test the script.

With --config, the first stage of a config of distill.py is measured instead, on its own data and student, in as many
processes as the launcher starts: the loader alone, one batch repeated, and both together. Options of distill.py may
follow after --.

    accelerate launch --multi_gpu --num_processes 2 benchmarks/distillation.py \
        --config examples/configs/bsds_seeds.yaml --steps 60 --out benchmarks/results/loader_mixed_512_2_gpus.json \
        -- --dataloader-num-workers 14
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object, send_to_device
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import SamConfig, SamModel, SamVisionConfig

from samlight_hf import SamLighteningConfig, SamLighteningModel
from samlight_hf.benchmark.peers import SAM_SHAPES
from samlight_hf.conversion import create_student
from samlight_hf.data import PromptSampling, SyntheticScenes, TrainingExamples, load_dataset
from samlight_hf.distillation import (
    CachedExamples,
    DistillationArguments,
    DistillationTrainer,
    EmbeddingCache,
    Teacher,
    fill_cache,
)
from samlight_hf.distillation import parse_arguments as parse_distillation
from samlight_hf.distillation.open_data import make_examples, open_train_sources
from samlight_hf.distillation.run import make_student as student_of
from samlight_hf.distillation.trainer import focus_layers
from samlight_hf.utils.messages import make_console_safe
from samlight_hf.utils.processes import is_main_process, leave_process_group


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "global_attn_indexes": (1, 3),
    "image_size": 128,
}
IMAGE_SIZE = 1024 if CUDA else 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="SA-1B tar; by default scenes of shapes")
    parser.add_argument(
        "--rows", nargs="+", default=["cached", "live", "decoder"], choices=["cached", "live", "decoder", "end_to_end"]
    )
    parser.add_argument("--batch-size", type=int, default=16 if CUDA else 2)
    parser.add_argument("--live-batch-size", type=int, default=24 if CUDA else 2)
    parser.add_argument("--steps", type=int, default=60 if CUDA else 4)
    parser.add_argument("--workers", type=int, default=16 if CUDA else 1)
    parser.add_argument("--num-refinements", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--config", help="a config of distill.py, whose first stage is measured; no other row is")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("overrides", nargs="*", help="with --config, behind --: options of distill.py")
    return parser.parse_args()


def make_teacher() -> SamModel:
    vision = SamVisionConfig(**(SAM_SHAPES["SAM ViT-H"] if CUDA else SMALL), initializer_range=0.02)
    with torch.device(DEVICE):
        return SamModel(SamConfig(vision_config=vision, prompt_encoder_config={"image_size": IMAGE_SIZE})).eval()


def make_student() -> SamLighteningModel:
    return SamLighteningModel(
        SamLighteningConfig.from_preset("tiny", image_size=IMAGE_SIZE, **({} if CUDA else {"segment_length": None}))
    )


def measure(name: str, student, options, teacher=None, wrap=None, **settings) -> dict:
    """Train for `options.steps` steps, and return the row."""
    batch_size = settings.pop("batch_size", options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=options.steps, logging_steps=5 if CUDA else 1,
            save_strategy="no", bf16=CUDA, torch_compile=not options.no_compile, dataloader_num_workers=options.workers,
            dataloader_prefetch_factor=4 if options.workers else None, disable_tqdm=True, use_cpu=not CUDA,
            tf32=True if CUDA else None, **settings,
        )  # fmt: skip
        images = load_dataset(options.data) if options.data else SyntheticScenes(1000)
        prompts = PromptSampling(args.num_prompts, max(1, args.num_refinements)) if args.stage != "encoder" else None
        num_examples = args.max_steps * args.global_batch_size
        examples = TrainingExamples(images, num_examples, IMAGE_SIZE, prompts=prompts, num_views=1 if wrap else None)
        if wrap:
            examples = wrap(examples)
        trainer = DistillationTrainer(student, args, examples, make_processor(student.config.vision_config), teacher)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    rates = [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]
    row = {
        "row": name, "images_per_second": statistics.median(rates[len(rates) // 2 :]),
        "windows": [round(rate, 1) for rate in rates],
        "batch_size": batch_size, "steps": options.steps, "compiled": not options.no_compile, **settings,
    }  # fmt: skip
    if CUDA:
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


class RepeatedBatch(DistillationTrainer):
    """A trainer that repeats its first batch, which is on the device: nothing is loaded."""

    def get_train_dataloader(self) -> list[dict]:
        size = self.args.per_device_train_batch_size
        first = self.args.process_index * size
        batch = torch.utils.data.default_collate([self.train_dataset[first + i] for i in range(size)])
        return [send_to_device(batch, self.args.device)] * (self.args.max_steps * self.args.gradient_accumulation_steps)


def config_rows(options):
    """Measure the first stage of `options.config`: the loader alone, one batch repeated, and both together."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "--output_dir",
            folder,
            "--max_steps",
            str(options.steps),
            "--save_strategy",
            "no",
            "--eval_strategy",
            "no",
        ]
        overrides += ["--logging_steps", "5" if CUDA else "1", "--disable_tqdm", "true"]
        run, (args, *_) = parse_distillation(["--config", options.config, *overrides, *options.overrides])
        if args.stage == "encoder":
            raise SystemExit(
                f"{options.config}: begins with the encoder, which needs a teacher: the rows cached and live."
            )
        sources = open_train_sources(run)
        settings = {
            "stage": args.stage, "processes": args.world_size,
            "batch_size_per_process": args.per_device_train_batch_size,
            "workers_per_process": args.dataloader_num_workers, "compiled": args.torch_compile, "steps": args.max_steps,
        }  # fmt: skip
        rates = {}
        for name, trainer_class in (
            ("loader alone", None),
            ("one batch repeated", RepeatedBatch),
            ("loader included", DistillationTrainer),
        ):
            student = student_of(run, None)
            examples = make_examples(student, args, run, sources)
            processor = make_processor(student.config.vision_config)
            trainer = (trainer_class or DistillationTrainer)(student, args, examples, processor)
            windows = loader_windows(trainer, options.steps) if trainer_class is None else train_windows(trainer)
            rates[name] = statistics.median(windows[len(windows) // 2 :])
            row = {
                "row": name,
                "images_per_second": rates[name],
                "windows": [round(rate, 1) for rate in windows],
                **settings,
            }
            row |= {"image_size": student.config.vision_config.image_size}
            if CUDA and trainer_class is not None:
                row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
            if name == "loader included":
                row["share_of_one_batch_repeated"] = rates[name] / rates["one batch repeated"]
                row["skipped"] = examples.skip_report().to_dict()["pictures"]
            trainer.accelerator.free_memory()
            yield row


def train_windows(trainer: DistillationTrainer) -> list[float]:
    """Return the images a second over all processes, in windows of `logging_steps`."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]


def loader_windows(trainer: DistillationTrainer, num_steps: int) -> list[float]:
    """Return the images a second that reach all processes' devices, in windows of a quarter of the steps."""
    windows, start, since = [], None, 0
    for step, _ in zip(range(num_steps), trainer.get_train_dataloader()):
        if CUDA:
            torch.cuda.synchronize()
        if start is not None and (step - since) == max(1, num_steps // 4):
            now = time.perf_counter()
            windows.append((step - since) * trainer.args.per_device_train_batch_size / (now - start))
            start, since = now, step
        elif start is None:
            start, since = time.perf_counter(), step
    return [sum(rates) for rates in zip(*gather_object([windows]))]


def forward_row(teacher: Teacher, batch_size: int) -> dict:
    """Measure the teacher alone, as the trainer calls it."""
    pixel_values = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE)
    times = []
    for _ in range(25 if CUDA else 3):
        start = time.perf_counter()
        teacher.targets(pixel_values)
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "row": "teacher's forward alone",
        "images_per_second": batch_size / statistics.median(times[5:] or times),
        "batch_size": batch_size,
    }


def rows(options):
    compiles = not options.no_compile
    if "cached" in options.rows:
        student = make_student()
        # Only the embedding: each layer of a large teacher would take 10 MB for an image.
        teacher = Teacher(make_student().to(DEVICE), (), compile=compiles)
        with tempfile.TemporaryDirectory() as folder:

            def with_cache(examples):
                cache = EmbeddingCache(folder, teacher, examples.num_ids, examples.preprocessing())
                fill_cache(cache, examples.views(), teacher, DEVICE, options.batch_size, options.workers)
                return CachedExamples(examples, cache)

            yield measure(
                "encoder, cached embeddings", student, options, teacher, with_cache, stage="encoder", num_focus_layers=0
            )
    if "live" in options.rows:
        model = make_teacher()
        student = create_student(model, "tiny")
        layers = [layer for _, layer in focus_layers(student, model.config.vision_config, 3)]
        teacher = Teacher(model, layers, compile=compiles)
        name = f"encoder, live {'SAM ViT-H' if CUDA else 'small SAM'}"
        alone = forward_row(teacher, options.live_batch_size)
        yield alone
        row = measure(name, student, options, teacher, stage="encoder", batch_size=options.live_batch_size)
        yield {**row, "share_of_teachers_forward": row["images_per_second"] / alone["images_per_second"]}
        del model, teacher
    for stage in ("decoder", "end_to_end"):
        for num_refinements in options.num_refinements if stage in options.rows else ():
            yield measure(
                f"{stage}, 16 prompts, {num_refinements} refinement clicks", make_student(), options, stage=stage,
                num_prompts=16, num_refinements=num_refinements,
            )  # fmt: skip


def main():
    make_console_safe()
    options = parse_arguments()
    packages = ("torch", "transformers", "accelerate", "flash-attn-4")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    report = {
        "command": shlex.join(["python", *sys.argv]), "date": datetime.date.today().isoformat(), "versions": versions,
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or "CPU", "image_size": IMAGE_SIZE,
        "dtype": "bfloat16 autocast" if CUDA else "float32", "rows": [],
    }  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    for row in config_rows(options) if options.config else rows(options):
        report["rows"].append(row)
        if not is_main_process():
            continue
        print({name: value for name, value in row.items() if name != "windows"}, flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    leave_process_group()


if __name__ == "__main__":
    main()
