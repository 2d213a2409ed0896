"""`samlight distill`: its options, its errors, and how `accelerate launch` starts it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from samlight_hf import distillation
from samlight_hf.commands import cli
from samlight_hf.commands import distill as distill_command
from samlight_hf.distillation import parse_arguments
from samlight_hf.loading import load_model
from tests.conftest import tiny_config
from tests.data.files import annotation, jpeg, sa1b_json, write_tar
from tests.launcher import ROOT


@pytest.fixture
def options(tmp_path) -> list[str]:
    """A training of two steps, without a teacher and without data on disk."""
    student = tmp_path / "student.json"
    student.write_text(tiny_config().to_json_string(use_diff=False))
    return [
        "--stages", "end_to_end", "--student", str(student), "--train-data", "synthetic:1", "--eval-data",
        "synthetic:2",
        "--eval-limit", "2", "--use-cpu", "--max-steps", "2", "--num-prompts", "2", "--per-device-train-batch-size",
        "2",
        "--disable-tqdm", "true", "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_student_is_trained_and_its_metrics_are_printed(options, tmp_path, capsys):
    assert cli.main(["distill", *options]) == 0
    stdout, stderr = capsys.readouterr()
    metrics = json.loads((tmp_path / "out/end_to_end/result.json").read_text())["metrics"]
    assert f"end_to_end {json.dumps(metrics)}\nThe student: {tmp_path / 'out/student'}\n" in stdout
    assert "error" not in stderr
    load_model(tmp_path / "out/student", "cpu")
    assert cli.main(["distill", *options]) == 1  # whose folder is no longer empty
    assert "Use --resume to go on with it" in capsys.readouterr()[1]
    assert cli.main(["distill", *options, "--resume"]) == 0
    assert "finished before, and kept" in capsys.readouterr()[0]


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_help_shows_hyphens_alone(command, capsys):
    assert cli.main([command, "--help"]) == 0
    stdout, _ = capsys.readouterr()
    assert stdout.startswith(f"usage: samlight {command} ")
    shown = re.findall(r"--[\w-]+", stdout)
    assert shown and not [option for option in shown if "_" in option]
    if command == "distill":
        assert {"--max-steps", "--per-device-train-batch-size", "--no-flip", "--config"} <= set(shown)


def test_options_with_underscores_go_on_to_work(options):
    """The spelling of a YAML file's keys."""
    more = ["--no-flip", "--learning-rate=3e-4", "--push-to", "org/name", "--gradient-accumulation-steps", "3"]
    run, (stage,) = parse_arguments([*options, *more])
    assert (stage.max_steps, stage.per_device_train_batch_size, stage.gradient_accumulation_steps) == (2, 2, 3)
    assert not run.flip and run.push_to == "org/name" and stage.learning_rate == 3e-4
    old = [re.sub(r"(?<=\w)-", "_", option) if option.startswith("--") else option for option in [*options, *more]]
    old[old.index("--learning_rate=3e_4")] = "--learning_rate=3e-4"
    assert {"--max_steps", "--per_device_train_batch_size", "--no_flip", "--use_cpu"} <= set(old)
    old_run, (old_stage,) = parse_arguments(old)
    assert old_run == run
    assert old_stage.to_dict() == stage.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3. `samlight distill --help`"),
        (["--max_steps", "many"], "argument --max-steps: invalid int value: 'many'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        pytest.param(
            ["--bf16", "true"],
            "bf16=True needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--num-prompts", "0", "--use-cpu"], "num_prompts=0 must be at least 1"),
    ],
    ids=str,
)
def test_wrong_usage(arguments, message, capsys):
    assert cli.main(["distill", *arguments]) == 2
    stdout, stderr = capsys.readouterr()
    (line,) = stderr.splitlines()
    assert line.startswith("samlight: error: ") and message in line and not stdout


def test_data_that_are_not_there(options, capsys):
    options[options.index("--train-data") + 1] = "nowhere.tar"
    assert cli.main(["distill", *options]) == 1
    assert capsys.readouterr()[1].splitlines()[-1].startswith("samlight: error: nowhere.tar: no such file")


@pytest.mark.parametrize("package", ["accelerate", "datasets", "matplotlib"])
def test_without_the_extra_it_says_how_to_install_it(options, tmp_path, package):
    """In a process of its own, in which a package of the extra cannot be imported."""
    if package == "datasets":  # which streams need
        place = options.index("--train-data")
        tar = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), "a.json": sa1b_json(annotation(1))})
        options[place : place + 2] = ["--stream-data", str(tar)]
    script = (
        f"import sys\nsys.modules[{package!r}] = None\nfrom samlight_hf.commands.cli import main\n"
        f"sys.exit(main({['distill', *options]!r}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("samlight: error: ") and package in last
    assert last.endswith("Install what training needs: pip install 'samlight-hf[train]'")
    assert "Traceback" not in result.stderr


def test_without_a_clone_the_demonstration_asks_for_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill_command, "CONFIGS", tmp_path)
    assert cli.main(["distill"]) == 2
    assert f"the demonstration's settings are not here ({tmp_path})" in capsys.readouterr()[1]


def test_ctrl_c_says_how_to_go_on(options, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "distill", interrupt)
    monkeypatch.setattr(distillation, "demonstrate", interrupt)
    assert cli.main(["distill", *options]) == 130
    assert "stopped: the same command with --resume goes on from the last checkpoint" in capsys.readouterr()[1]
    assert cli.main(["distill"]) == 130  # the demonstration, which resumes by itself
    assert "stopped: the same command goes on from the last checkpoint" in capsys.readouterr()[1]


ADVICE = "No checkpoint had been saved."
NOT_SAVED = "the checkpoint of step 4 could not be saved"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left", "out/checkpoint-10/model.safetensors"),
            f"checkpoint-10/model.safetensors: No space left. {ADVICE}",
        ),
        (RuntimeError("CUDA error: the checkpoint is lost."), f"the checkpoint is lost. {ADVICE}"),
        (distillation.CheckpointNotSavedError(NOT_SAVED), NOT_SAVED),
        (distillation.TrainingDivergedError("loss=nan"), "loss=nan"),
        (RuntimeError("not in org/a. Try again with --resume."), "not in org/a. Try again with --resume."),
    ],
    ids=str,
)
def test_an_error_says_from_which_checkpoint_the_run_goes_on(options, monkeypatch, capsys, error, said):
    """Whatever paths it names, unless it says so itself."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(distillation, "distill", fail)
    assert cli.main(["distill", *options]) == 1
    (line,) = capsys.readouterr()[1].splitlines()
    assert line.startswith("samlight: error: ") and line.endswith(said) and (ADVICE in line) == (ADVICE in said)


def test_other_commands_do_not_import_the_trainer():
    script = (
        "import sys\nfrom samlight_hf.commands.cli import main\nassert main(['--help']) == 0\n"
        "assert main(['segment', '--help']) == 0\nassert 'samlight_hf.distillation' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "distill " in result.stdout


ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "started", "num_processes"),
    [(ACCELERATE, ["examples/distill.py"], 1), (TORCHRUN, ["-m", "samlight_hf.cli", "distill"], 2)],
    ids=["accelerate-script", "torchrun-module"],
)
def test_launchers_start_it(options, tmp_path, launcher, started, num_processes):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, *started, *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("The student: ") == 1
    settings = json.loads((tmp_path / "out/end_to_end/result.json").read_text())["settings"]
    assert settings["world_size"] == num_processes
