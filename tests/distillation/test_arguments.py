import pytest
from transformers.training_args import ParallelMode

from samlight_hf.distillation import DistillationArguments, DynamicLayerWeights, parse_arguments


CONFIG = """
teacher: facebook/sam-vit-huge
train_data: [sa1b/*.tar]
output_dir: outputs/x
use_cpu: true
stages: [encoder, decoder]
learning_rate: 1e-4
per_device_train_batch_size: 2
encoder: {max_steps: 300, learning_rate: 5e-4, layer_weights: uniform}
decoder:
  max_steps: 20
  num_prompts: 6
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_stages_section_wins_over_the_file(config):
    run, (encoder, decoder) = parse_arguments(["--config", config])
    assert (run.teacher, run.train_data, run.stages) == (
        "facebook/sam-vit-huge",
        ["sa1b/*.tar"],
        ["encoder", "decoder"],
    )
    assert (encoder.stage, encoder.max_steps, encoder.learning_rate, encoder.output_dir) == (
        "encoder",
        300,
        5e-4,
        "outputs/x/encoder",
    )
    assert (decoder.stage, decoder.max_steps, decoder.learning_rate, decoder.num_prompts) == ("decoder", 20, 1e-4, 6)
    assert (encoder.layer_weights, decoder.layer_weights) == ("uniform", "dynamic")
    assert encoder.global_batch_size == 2


def test_one_process_trains_on_one_gpu_however_many_there_are(tmp_path):
    args = DistillationArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2  # transformers' count in a single process that sees two GPUs
    assert (args.n_gpu, args.train_batch_size, args.global_batch_size) == (1, 2, 2)
    assert args.parallel_mode == ParallelMode.NOT_PARALLEL


def test_an_option_wins_over_the_file(config):
    run, stages = parse_arguments([f"--config={config}", "--max_steps", "7", "--stages", "decoder", "--resume"])
    assert run.resume
    assert [(args.stage, args.max_steps) for args in stages] == [("decoder", 7)]


def test_one_value_is_a_list_of_one(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train_data: synthetic:1\nstages: decoder\nlearning_rate: 1")
    run, (args,) = parse_arguments(["--config", str(path), "--use_cpu"])
    assert run.train_data == ["synthetic:1"]
    assert run.stages == ["decoder"]
    assert args.learning_rate == 1.0


def test_an_option_that_is_given_twice():
    """argparse would forget the first values."""
    options = ["--stages", "end_to_end", "--train_data", "a.tar", "--use_cpu"]
    with pytest.raises(ValueError, match="--train-data is given twice. Give all its values after one"):
        parse_arguments([*options, "--train-data", "b.tar"])


def test_without_a_file():
    run, (args,) = parse_arguments(["--stages", "end_to_end", "--train_data", "a.tar", "b.tar", "--use_cpu"])
    assert run.train_data == ["a.tar", "b.tar"]
    assert args.stage == "end_to_end"
    assert args.report_to == []
    assert not args.remove_unused_columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teachr: x", r"the config's 'teachr' is not known. Did you mean teacher\?"),
        ("encoder: {min_scale: 0.5}", "the config's encoder: 'min_scale' holds for all stages: move it to the top"),
        ("num_train_epochs: 2", "num_train_epochs=2.0 is not possible here: there are no epochs. Use max_steps"),
        ("encoder: {max_step: 3}", r"the config's encoder: 'max_step' is not known. Did you mean max_steps\?"),
        ("max_steps: 3.5", "max_steps=3.5 must be an integer"),
        ("stage: decoder", "stage is set by stages"),
        ("auto_find_batch_size: true", "auto_find_batch_size=true is not possible here"),
        ("resume_from_checkpoint: Last", "resume_from_checkpoint=Last is not possible here: use --resume"),
        ("muon: true\noptim: sgd", "muon=true goes with optim=adamw_torch, not with optim=sgd"),
        ("push_to_hub: true", "push_to_hub=true needs hub_model_id, such as org/name"),
        ("push_to_hub: true\nhub_model_id: name", "must name user or organization too"),
        ("push_to: a/b/c", "repo_id='a/b/c'"),
        ("card: nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("- a\n- b", "must hold keys and values"),
        ("a: [", "not YAML"),
        ("max_steps: 9\nencoder: {}\nmax_steps: 5", "config.yaml: cannot be read .the key max_steps is there twice"),
        ("encoder: {max_steps: 9, max_steps: 5}", "the key max_steps is there twice"),
        ("stages: [encode]", r"stages=\['encode'\] must be some of encoder, decoder, end_to_end"),
        ("stages: [encoder, encoder]", "names a stage twice"),
        ("layer_weights: linear", "layer_weights='linear' is not known"),
        ("num_prompts: 0", "num_prompts=0 must be at least 1"),
        ("box_share: 1.5", "box_share=1.5 must be from 0 to 1"),
        ("dice_weight: -1", "dice_weight=-1.0 must be finite and not negative"),
        ("iou_weight: .nan", "iou_weight=nan must be finite and not negative"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(path), "--use_cpu"])


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"nowhere.yaml: cannot be read"):
        parse_arguments(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse_arguments(["--config"])
    with pytest.raises(ValueError, match="given 2 times"):
        parse_arguments(["--config", "a.yaml", "--config=b.yaml"])


def test_an_option_that_is_not_known():
    with pytest.raises(ValueError, match="--nonsense"):
        parse_arguments(["--nonsense", "3"])
    with pytest.raises(ValueError, match="use --stages encoder"):
        parse_arguments(["--stage", "decoder"])
    with pytest.raises(ValueError, match="max-steps.*invalid int value: 'many'"):
        parse_arguments(["--max_steps", "many"])


def test_no_loss_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="are all 0"):
        DistillationArguments(str(tmp_path), stage="decoder", focal_weight=0, dice_weight=0, use_cpu=True)


def test_settings_make_the_schedule_and_the_weights(tmp_path):
    args = DistillationArguments(str(tmp_path), ramp_fraction=0.25, bce_weight=5.0, use_cpu=True)
    assert args.layer_weight_schedule() == DynamicLayerWeights(0.25)
    assert args.loss_weights() == {"focal": 20.0, "bce": 5.0, "dice": 1.0, "iou": 1.0}
