import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import SamModel

from samlight_hf import SamLighteningModel
from samlight_hf.data import SkipReason, SyntheticScenes
from samlight_hf.data.label_maps import MaskReading
from samlight_hf.distillation import TrainingDivergedError, distill, parse_arguments
from samlight_hf.distillation.run import verify_export
from samlight_hf.loading import load_model
from tests.conftest import tiny_config
from tests.data.files import HEIGHT, WIDTH, annotation, box_mask, jpeg, png, rle, sa1b_json, write_coco, write_tar
from tests.examples.in_process import run_example
from tests.launcher import ROOT, torchrun


def run(folder, out, *options, stages=("encoder", "decoder", "end_to_end"), data=("--train_data", "synthetic:1")):
    data = () if "--train_data" in options else data
    eval_data = () if "--eval_data" in options else ("--eval_data", "synthetic:2")
    arguments = [
        "--teacher", str(folder / "teacher"), "--student", str(folder / "student.json"), "--output_dir", str(out),
        "--use_cpu", *data, *eval_data, "--eval_limit", "2", "--max_steps", "4",
        "--per_device_train_batch_size", "2", "--num_prompts", "2", "--num_focus_layers", "2",
        "--teacher_dtype", "float32", "--disable_tqdm", "true", "--save_steps", "2", "--logging_steps", "1",
        "--eval_max_instances", "2", "--stages", *stages,
    ]  # fmt: skip
    return distill(*parse_arguments([*arguments, *options]))


def test_three_stages_make_a_student_that_loads_anywhere(folder, tmp_path):
    result = run(folder, tmp_path)
    student, _ = load_model(result, "cpu")
    assert isinstance(student, SamLighteningModel)
    previous = None
    for stage in ("encoder", "decoder", "end_to_end"):
        files = {path.name for path in (tmp_path / stage).iterdir()}
        assert {"student", "result.json", "curves.png", "trainer_state.json", "checkpoint-4"} <= files
        assert Image.open(tmp_path / stage / "curves.png").width > 300
        content = json.loads((tmp_path / stage / "result.json").read_text())
        assert content["stage"] == stage
        assert content["metrics"]["eval_box_miou"] >= 0
        state = load_model(tmp_path / stage / "student", "cpu")[0].state_dict()
        if previous:  # the decoder's stage begins with the encoder's student, and so on
            same = {name.split(".")[0] for name in state if torch.equal(state[name], previous[name])}
            assert ("vision_encoder" in same) == (stage == "decoder")
        previous = state
    assert all(torch.equal(tensor, previous[name]) for name, tensor in student.state_dict().items())


def test_a_checkpoint_is_trained_at_another_image_size(tmp_path):
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(tmp_path / "small")
    arguments = [
        "--student", str(tmp_path / "small"), "--image_size", "48", "--output_dir", str(tmp_path / "out"), "--use_cpu",
        "--train_data", "synthetic:1", "--max_steps", "1", "--per_device_train_batch_size", "2", "--num_prompts", "2",
        "--disable_tqdm", "true", "--stages", "end_to_end", "--dataloader_pin_memory", "false",
    ]  # fmt: skip
    student, processor = load_model(distill(*parse_arguments(arguments)), "cpu")
    assert student.config.vision_config.image_size == processor.image_processor.size["longest_edge"] == 48
    assert student.config.vision_config.segment_length == (None, 36, None)  # 3 of 12 rows
    with pytest.raises(ValueError, match="patch_size=4 must divide image_size=50: use 48 or 52"):
        distill(*parse_arguments([*arguments, "--image_size", "50", "--output_dir", str(tmp_path / "other")]))


def test_a_finished_stage_is_kept_and_an_interrupted_one_goes_on(folder, tmp_path):
    whole = load_model(run(folder, tmp_path / "whole", stages=("encoder", "decoder")), "cpu")[0].state_dict()
    run(folder, tmp_path / "parts", stages=("encoder", "decoder"))
    for path in ("student", "decoder/student", "decoder/checkpoint-4"):
        shutil.rmtree(tmp_path / "parts" / path)
    (tmp_path / "parts/decoder/result.json").unlink()
    finished = (tmp_path / "parts/encoder/result.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"encoder is not empty. Use --resume to go on with it, or another output_dir"):
        run(folder, tmp_path / "parts", stages=("encoder", "decoder"))
    resumed = load_model(run(folder, tmp_path / "parts", "--resume", stages=("encoder", "decoder")), "cpu")[
        0
    ].state_dict()
    assert (tmp_path / "parts/encoder/result.json").stat().st_mtime_ns == finished
    with pytest.raises(ValueError, match=r"encoder was made with other settings: max_steps=5 \(was 4\)"):
        run(folder, tmp_path / "parts", "--resume", "--max_steps", "5", stages=("encoder", "decoder"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_stage_of_another_student_is_not_kept(folder, tmp_path):
    run(folder, tmp_path, stages=("encoder", "decoder"))
    shutil.rmtree(tmp_path / "encoder")
    run(folder, tmp_path, "--resume", "--learning_rate", "1e-2", stages=("encoder",))
    with pytest.raises(ValueError, match=r"decoder was made with other settings: .*student=\w+ \(was \w+\)"):
        run(folder, tmp_path, "--resume", "--learning_rate", "1e-2", stages=("encoder", "decoder"))


def test_images_that_are_trained_on_are_known_by_their_files(folder, tmp_path):
    images = {f"{number}.png": png(box_mask().astype("uint8") * 255) for number in range(4)}

    def coco(name: str, numbers, first_id: int) -> str:
        entries = [
            {"id": first_id + n, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
            for n, number in enumerate(numbers)
        ]
        annotations = [
            {"id": entry["id"], "image_id": entry["id"], "category_id": 1, "iscrowd": 0, "bbox": [2, 2, 20, 20],
             "area": 400, "segmentation": rle(box_mask(2, 2, 20, 20))}
            for entry in entries
        ]  # fmt: skip
        path, _ = write_coco(tmp_path, entries, annotations, images)
        return str(path.rename(tmp_path / name))

    image_folder = str(tmp_path / "pictures")
    train, other, same = coco("train.json", (0, 1), 1), coco("other.json", (2, 3), 1), coco("same.json", (1, 2), 900)
    data = ("--train_annotations", train, "--train_images", image_folder)

    def with_eval(*options):
        arguments = [
            "--teacher", str(folder / "teacher"), "--student", str(folder / "student.json"), "--use_cpu",
            "--max_steps", "1", "--per_device_train_batch_size", "2", "--num_focus_layers", "1",
            "--teacher_dtype", "float32", "--disable_tqdm", "true", "--stages", "encoder", *options,
        ]  # fmt: skip
        distill(*parse_arguments(arguments))

    with_eval(*data, "--eval_annotations", other, "--eval_images", image_folder, "--output_dir", str(tmp_path / "a"))
    with pytest.raises(ValueError, match="eval_annotations=.*same.json is trained on too"):
        with_eval(*data, "--eval_annotations", same, "--eval_images", image_folder, "--output_dir", str(tmp_path / "b"))
    with pytest.raises(ValueError, match="eval_annotations=.*same.json is trained on too"):
        with_eval(
            "--train_data",
            image_folder,
            "--eval_annotations",
            same,
            "--eval_images",
            image_folder,
            "--output_dir",
            str(tmp_path / "c"),
        )


def test_cached_targets_from_the_command_line(folder, tmp_path):
    options = ("--num_views", "1", "--cache_dir", str(tmp_path / "cache"), "--train_data", str(folder / "pictures"))
    images = folder / "pictures"
    images.mkdir(exist_ok=True)
    for index, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (40 + index, 30), (90 * index, 20, 200)).save(images / name)
    run(folder, tmp_path / "out", *options, stages=("encoder",))
    assert len(list((tmp_path / "cache").glob("*/00000.safetensors"))) == 1
    with pytest.raises(ValueError, match="cache_dir=.* needs num_views"):
        run(folder, tmp_path / "other", "--cache_dir", "cache", stages=("encoder",))


def test_a_teacher_from_scratch(folder, tmp_path):
    result = run(folder, tmp_path, "--student", str(folder / "sam.json"), stages=("end_to_end",))
    model, _ = load_model(result, "cpu")
    assert type(model) is SamModel
    # SamVisionConfig would scale the coordinate features by hidden_size // 2 = 24
    assert model.shared_image_embedding.positional_embedding.std() < 2


def test_an_export_is_the_student_that_was_trained(tmp_path):
    student = SamLighteningModel(tiny_config())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student.save_pretrained(tmp_path)
    make_processor(student.config.vision_config).save_pretrained(tmp_path)
    verify_export(tmp_path, student)
    with torch.no_grad():
        for parameter in student.parameters():  # at other memory addresses, products may be rounded differently
            parameter.data = torch.cat([parameter.flatten()[:1], parameter.flatten()])[1:].view_as(parameter)
    verify_export(tmp_path, student)
    config = json.loads((tmp_path / "config.json").read_text())
    rates = config["vision_config"]["dilation_rate"]
    config["vision_config"]["dilation_rate"] = [1] * len(rates)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="is not the student that was trained"):
        verify_export(tmp_path, student)
    config["vision_config"]["dilation_rate"] = rates
    (tmp_path / "config.json").write_text(json.dumps(config))
    student.mask_decoder.iou_prediction_head.proj_out.bias.data += 1e-6
    with pytest.raises(RuntimeError, match="is not the student that was trained"):
        verify_export(tmp_path, student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train_data", "nowhere.tar"), "nowhere.tar: no such file"),
        (("--train_data", "synthetic:x"), "must be synthetic:SEED"),
        (("--teacher", "nowhere"), "nowhere: no such folder"),
        (("--student", "enormous"), "enormous: no such folder"),
        (("--student", "config.json"), "student=config.json: no such file"),
        (("--eval_data", "synthetic:1"), "is trained on too"),
        (("--eval_data", "synthetic", "synthetic:1"), "names 2 datasets"),
        (("--train_annotations", "a.json"), "go together"),
        (("--num_focus_layers", "4"), "num_focus_layers=4 must be from 0 to the student's num_hidden_layers=3"),
        (("--max_scale", "0.5"), "scale=.* must be the lowest and the highest zoom"),
        (("--teacher_dtype", "int8"), "dtype='int8' is not known"),
        (("--per_device_train_batch_size", "0"), "per_device_train_batch_size=0 must be at least 1"),
        (("--gradient_accumulation_steps", "0"), "gradient_accumulation_steps=0 must be at least 1"),
        (("--seed", "-1"), "seed=-1 must be finite and not negative"),
        (("--eval_limit", "0"), "eval_limit=0 must be None or an integer of at least 1"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, *options, stages=("encoder",))


def test_what_a_stage_needs_is_said(folder, tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    Image.new("RGB", (40, 30)).save(images / "a.png")
    with pytest.raises(ValueError, match=r"pictures: images without masks"):
        run(folder, tmp_path / "out", "--train_data", str(images), stages=("end_to_end",))
    with pytest.raises(ValueError, match="eval_data=.* has no masks to compare with"):
        run(folder, tmp_path / "out", "--eval_data", str(images), stages=("encoder",))
    with pytest.raises(ValueError, match="begins with the decoder, on a fresh image encoder"):
        run(folder, tmp_path / "out", stages=("decoder",))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir=.*file/encoder cannot be written .Not a directory"):
        run(folder, tmp_path / "file", stages=("encoder",))
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert' must be one of"):
        run(folder, tmp_path / "out", "--student", str(tmp_path / "bert.json"), stages=("encoder",))
    arguments = ["--use_cpu", "--output_dir", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="train_data is missing"):
        distill(*parse_arguments([*arguments, "--stages", "end_to_end"]))
    with pytest.raises(ValueError, match='stages has "encoder", which needs a teacher'):
        distill(*parse_arguments([*arguments, "--train_data", "synthetic"]))
    with pytest.raises(ValueError, match="eval_strategy=.* needs eval_data"):
        distill(
            *parse_arguments(
                [*arguments, "--train_data", "synthetic", "--stages", "end_to_end", "--eval_strategy", "steps"]
            )
        )
    with pytest.raises(ValueError, match="deepest_share=1.5 must be from 0 to 1"):  # before the encoder stage
        distill(
            *parse_arguments(
                [*arguments, "--train_data", "synthetic", "--teacher", "nowhere", "--deepest_share", "1.5"]
            )
        )


def test_all_stages_are_checked_before_the_first_is_trained(folder, tmp_path):
    """An hour of the encoder stage is not spent on a run whose decoder stage cannot begin."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 30)).save(images / "a.png")
    with pytest.raises(ValueError, match="images: images without masks"):
        run(folder, tmp_path / "a", data=("--train_data", "synthetic:1", str(images)))
    (tmp_path / "config.yaml").write_text("end_to_end: {feature_teacher: nowhere}\n")
    with pytest.raises((ValueError, ImportError), match="feature_teacher=nowhere (cannot be loaded|needs timm)"):
        run(folder, tmp_path / "b", "--config", str(tmp_path / "config.yaml"), stages=("encoder", "end_to_end"))
    options = ("--image_size", "64", "--cache_dir", str(tmp_path / "cache"), "--num_views", "1")
    with pytest.raises(ValueError, match="the student's image_size=64 must equal the teacher's 32"):
        run(folder, tmp_path / "c", *options, stages=("encoder",))
    assert not list(tmp_path.glob("*/*/student")) and not list(tmp_path.glob("cache/*"))


def test_a_last_step_that_makes_the_weights_nan_is_not_exported(folder, tmp_path):
    with pytest.raises(TrainingDivergedError, match="NaN or infinite weights in .* at step 1: .*diverged"):
        options = ("--learning_rate", "inf", "--max_steps", "1", "--save_strategy", "no", "--logging_steps", "9")
        run(folder, tmp_path, *options, stages=("end_to_end",))
    assert not (tmp_path / "end_to_end/student").exists()


@pytest.mark.slow
def test_the_script_on_two_processes(folder, tmp_path):
    arguments = [
        "--teacher", folder / "teacher", "--student", folder / "student.json", "--train_data", "synthetic:1",
        "--eval_data", "synthetic:2", "--eval_limit", "2", "--output_dir", tmp_path / "out", "--use_cpu",
        "--max_steps", "2", "--num_prompts", "2", "--per_device_train_batch_size", "2", "--num_focus_layers", "2",
        "--stages", "encoder", "decoder",
    ]  # fmt: skip
    assert_said_once(torchrun(ROOT / "examples/distill.py", 2, *arguments), 'encoder {"', 'decoder {"', "The student:")
    assert json.loads((tmp_path / "out/decoder/result.json").read_text())["settings"]["world_size"] == 2
    load_model(tmp_path / "out/student", "cpu")
    printed = torchrun(ROOT / "examples/distill.py", 2, *arguments, "--resume")
    assert_said_once(printed, "out/encoder: finished before", "out/decoder: finished before", "The student:")
    assert torchrun(ROOT / "examples/distill.py", 2, "--help").count("usage: ") == 1


@pytest.mark.slow
def test_two_processes_report_once_what_both_left_out_of_the_index(folder, tmp_path):
    members = {"a.jpg": jpeg(), "a.json": sa1b_json(annotation()), "without_json.jpg": jpeg()}
    arguments = [
        "--student", folder / "student.json", "--train_data", write_tar(tmp_path / "a.tar", members),
        "--max_skipped", "0.5", "--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", "1",
        "--num_prompts", "2", "--per_device_train_batch_size", "1", "--stages", "end_to_end",
    ]  # fmt: skip
    assert "Skipped 1 image " in torchrun(ROOT / "examples/distill.py", 2, *arguments)
    result = json.loads((tmp_path / "out/end_to_end/result.json").read_text())
    assert result["settings"]["world_size"] == 2
    assert {reason: skipped["count"] for reason, skipped in result["skipped"]["pictures"].items()} == {
        SkipReason.MISSING_JSON: 1
    }


def assert_said_once(printed: str, *said: str):
    """In a run of several processes each sentence and each line is printed once."""
    for sentence in said:
        assert printed.count(sentence) == 1, printed
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(set(lines)) == len(lines), printed


def test_the_script_reports_errors_on_one_line(tmp_path):
    command = [
        sys.executable,
        ROOT / "examples/distill.py",
        "--use_cpu",
        "--stages",
        "end_to_end",
        "--train_data",
        "nowhere.tar",
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("samlight: error: nowhere.tar: no such file")
    assert "Traceback" not in process.stderr


def write_masks(folder, mask: bytes, count: int = 3) -> Path:
    for number in range(count):
        for path, content in ((f"images/{number}.jpg", jpeg(seed=number)), (f"masks/{number}.png", mask)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    return folder


def grey_mask() -> bytes:
    ramp = np.clip(8 * np.abs(np.arange(WIDTH) - 20) - 20, 0, 255)  # a soft edge on either side
    return png(np.tile(ramp, (HEIGHT, 1)).astype(np.uint8))


def test_bad_data_that_workers_meet_are_one_line(folder, tmp_path):
    """The error is not the traceback of a worker, which torch passes on as the message of an error."""
    data = write_masks(write_masks(tmp_path / "mine", grey_mask(), 10), png(box_mask().astype("uint8")), 5)
    command = [
        sys.executable, ROOT / "examples/distill.py", "--student", folder / "student.json", "--stages", "end_to_end",
        "--train_data", data, "--output_dir", tmp_path / "out", "--use_cpu",
        "--max_steps", "200", "--per_device_train_batch_size", "2", "--num_prompts", "2",
        "--dataloader_num_workers", "1",
    ]  # fmt: skip
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr and "Caught" not in process.stderr and "DataLoader" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert re.match(
        r"samlight: error: \d+ of the \d+ images read so far cannot be used, more than max_skipped=5%", last
    )
    assert str(SkipReason.GREY_MASK) in last and ".jpg" in last


def test_how_mask_files_are_read_is_a_setting(folder, tmp_path):
    data = ("--train_data", str(write_masks(tmp_path / "mine", grey_mask())))
    held_out = str(write_masks(tmp_path / "other", grey_mask()))
    options = ("--max_steps", "1", "--eval_data", held_out)
    unusable = r"_data=.*: none of the {} images that were tried has a mask that can be used(.|\n)*threshold it"
    with pytest.raises(ValueError, match="train" + unusable.format(3)):
        run(folder, tmp_path / "a", *options, stages=("end_to_end",), data=data)
    with pytest.raises(ValueError, match="eval" + unusable.format(2)):
        run(folder, tmp_path / "a", *options, stages=("end_to_end",))
    run(folder, tmp_path / "b", *options, "--binary_masks", "true", stages=("end_to_end",), data=data)
    result = json.loads((tmp_path / "b/end_to_end/result.json").read_text())
    assert not result["skipped"]["pictures"] and "eval_skipped_pictures" not in result["metrics"]
    with pytest.raises(ValueError, match="no folder with images/ and masks/ is among the data"):
        run(folder, tmp_path / "c", "--ignore_label", "255", stages=("end_to_end",))
    with pytest.raises(ValueError, match="ignore_label=void must be a label's number, auto or none"):
        run(folder, tmp_path / "d", "--ignore_label", "void", stages=("end_to_end",), data=data)
    (tmp_path / "config.yaml").write_text("ignore_label: 255\n")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")])[0].mask_reading() == MaskReading(255)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_demonstration_goes_through_everything(tmp_path, num_processes):
    """Few steps are enough here: `python examples/distill.py`, which takes three minutes, shows that it learns."""
    for name in ("demo_teacher", "demo"):
        text = (ROOT / f"examples/configs/{name}.yaml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("max_steps", "eval_limit", "save_steps"))]
        text = "\n".join(
            [*lines, "eval_limit: 6", "save_steps: 3", *(["max_steps: 4"] if name == "demo_teacher" else [])]
        )
        text = re.sub(r"max_steps: \d+,", "max_steps: 4,", text)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "demonstrate.py").write_text(
        "import os, pathlib\n"
        "from samlight_hf.commands import cli, distill\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "distill.CONFIGS = pathlib.Path()\n"
        "assert cli.main(['distill']) == 0\n"
    )
    printed = torchrun(tmp_path / "demonstrate.py", num_processes)
    assert_said_once(printed, "1. A small SAM", "2. A student", "3. On scenes", "Masks: ")
    for row in ("teacher ", "student before ", "student after "):
        assert any(line.startswith(row) for line in printed.splitlines())
    assert 'pipeline("mask-generation", model="outputs/distill/student") finds' in printed
    assert Image.open(tmp_path / "outputs/distill/masks.png").width > 500


def write_scenes(path, num_images):
    """Write SyntheticScenes as a tar of SA-1B's layout."""
    members = {}
    for index, sample in enumerate(SyntheticScenes(num_images, 32)[i] for i in range(num_images)):
        file = io.BytesIO()
        sample.image.save(file, "JPEG")
        annotations = [
            {"id": instance.id, "segmentation": {"size": [32, 32], "counts": instance.rle["counts"].decode()}}
            for instance in sample.instances
        ]
        members[f"sa_{index}.jpg"] = file.getvalue()
        members[f"sa_{index}.json"] = sa1b_json(*annotations, width=32, height=32)
    return write_tar(path, members)


def test_streamed_tars_train_and_resume_bit_exactly(folder, tmp_path):
    data = ("--stream_data", str(write_scenes(tmp_path / "a.tar", 12)), str(write_scenes(tmp_path / "b.tar", 7)))
    options = ["--dataloader_num_workers", "2", "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "3"]
    whole = load_model(run(folder, tmp_path / "whole", *options, stages=("end_to_end",), data=data), "cpu")[
        0
    ].state_dict()
    run(folder, tmp_path / "parts", *options, stages=("end_to_end",), data=data)
    for path in ("student", "end_to_end/student", "end_to_end/checkpoint-6", "end_to_end/checkpoint-4"):
        shutil.rmtree(tmp_path / "parts" / path)
    (tmp_path / "parts/end_to_end/result.json").unlink()
    resumed = load_model(
        run(folder, tmp_path / "parts", *options, "--resume", stages=("end_to_end",), data=data), "cpu"
    )[0].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    shutil.rmtree(tmp_path / "parts/student")
    (tmp_path / "parts/end_to_end/result.json").unlink()
    with pytest.raises(ValueError, match="was made with other settings: data=.* dataloader_num_workers=1 .was 2."):
        changed = [*options, "--resume", "--dataloader_num_workers", "1"]
        run(folder, tmp_path / "parts", *changed, stages=("end_to_end",), data=data[:2])
    with pytest.raises(ValueError, match="both given"):
        run(folder, tmp_path / "other", "--stream_data", str(tmp_path / "a.tar"), stages=("end_to_end",))
    with pytest.raises(ValueError, match="source_weights=.* is for train_data, and stream_data would ignore it"):
        run(folder, tmp_path / "other", "--source_weights", "1", "2", stages=("end_to_end",), data=data)


@pytest.mark.parametrize("content", ["", "- a", "one: {layer_weights: uniform}"])
def test_variants_of_another_form_are_refused(tmp_path, content):
    (tmp_path / "variants.yaml").write_text(content)
    process = run_example("ablation.py", "--variants", tmp_path / "variants.yaml", "--out", tmp_path)
    assert process.returncode == 1 and "variants.yaml: must hold a name and options of each variant" in process.stderr


@pytest.mark.slow
def test_the_ablation_on_two_processes(folder, tmp_path):
    (tmp_path / "variants.yaml").write_text("one:\nother: --max_steps 1\n")
    arguments = [
        "--teacher", folder / "teacher", "--student", folder / "student.json", "--train_data", "synthetic:1",
        "--eval_data", "synthetic:2", "--eval_limit", "2", "--use_cpu", "--max_steps", "2",
        "--per_device_train_batch_size", "2",
        "--num_focus_layers", "2", "--stages", "encoder", "--seeds", "0", "--variants", tmp_path / "variants.yaml",
        "--out", tmp_path / "out",
    ]  # fmt: skip
    printed = torchrun(ROOT / "examples/ablation.py", 2, *arguments)
    assert printed.count("encoder: embedding_cosine") == 1
    assert printed.count("  one ") == printed.count("  other ") > 0
    results = json.loads((tmp_path / "out/ablation.json").read_text())["results"]
    assert [len(runs) for runs in results.values()] == [1, 1]


@pytest.mark.slow
def test_the_ablation_prints_mean_and_spread(folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"teacher: {folder / 'teacher'}\nstudent: {folder / 'student.json'}\n"
        "train_data: synthetic:1\neval_data: synthetic:2\neval_limit: 2\nuse_cpu: true\nmax_steps: 2\n"
        "per_device_train_batch_size: 2\nnum_prompts: 2\nnum_focus_layers: 2\n"
    )
    command = [
        sys.executable,
        ROOT / "examples/ablation.py",
        "--config",
        config,
        "--seeds",
        "0",
        "1",
        "--out",
        tmp_path / "out",
    ]
    process = subprocess.run(
        [*command, "--stages", "encoder"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "encoder: embedding_cosine" in process.stdout
    assert process.stdout.count(" ± ") == 3 * 4
    results = json.loads((tmp_path / "out/ablation.json").read_text())["results"]
    assert [len(runs) for runs in results.values()] == [2, 2, 2]
    cosines = {name: runs[0]["stages"]["encoder"]["eval_embedding_cosine"] for name, runs in results.items()}
    assert len(set(cosines.values())) == 3  # the schedules are different trainings
    variants = tmp_path / "variants.yaml"
    variants.write_text("one: --stages encoder\nother: --stages end_to_end\n")
    command = [*command[:4], "--variants", variants, "--seeds", "0", "--out", tmp_path / "variants"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "end_to_end: box_miou\n  other " in process.stdout and "end_to_end: box_miou\n  one" not in process.stdout
    assert (tmp_path / "variants/other-0/student/config.json").is_file()
