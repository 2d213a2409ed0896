"""Pushes during a training: the files that arrive on the Hub, and failures that must not affect the training."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, snapshot_download

from samlight_hf.data import SyntheticScenes
from samlight_hf.distillation import distill, parse_arguments, publishing, push_worker
from samlight_hf.distillation.publishing import HubPublisher, make_push, read_record
from samlight_hf.loading import load_model
from samlight_hf.publishing import upload
from samlight_hf.publishing.checks import CODE, check_folder
from samlight_hf.publishing.upload import PublishError
from tests.conftest import tiny_config
from tests.distillation.conftest import assert_equal, logged, make_arguments, make_trainer, weights

from .client import ROOT, environment, run_without_package


REPO = "org/student"
STUDENT_FILES = {*CODE, "model.safetensors", "config.json", "processor_config.json", "README.md", "LICENSE"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(publishing, "RETRIES", 1)
    monkeypatch.setattr(publishing, "RETRY_WAIT", 0.05)


def arguments(folder, **options):
    settings = {
        "push_to_hub": True,
        "hub_model_id": REPO,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
    }
    return make_arguments(folder, **{**settings, **options})


def files(server, revision="main") -> dict[str, bytes]:
    return {name: data for name, data in server.repository(REPO).files(revision).items() if name != ".gitattributes"}


def run(folder, *options):
    folder.mkdir(exist_ok=True)
    (folder / "student.json").write_text(tiny_config().to_json_string(use_diff=False))
    return distill(
        *parse_arguments(
            [
                "--stages", "end_to_end", "--student", str(folder / "student.json"), "--train_data", "synthetic:1",
                "--output_dir", str(folder / "out"), "--use_cpu", "--max_steps", "2", "--save_steps", "2",
                "--per_device_train_batch_size", "2", "--num_prompts", "2", "--disable_tqdm", "true", "--push_to_hub",
                "--hub_model_id", REPO, *options,
            ]
        )
    )  # fmt: skip


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SEGMENT = """
import torch
from PIL import Image
from transformers import AutoModel, pipeline

repo_id, revision, photo = {arguments!r}
model = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
generator = pipeline("mask-generation", model=repo_id, revision=revision, trust_remote_code=True, device="cpu")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), generator.model.parameters(), strict=True))
image = Image.open(photo)
settings = {{"pred_iou_thresh": -1.0, "stability_score_thresh": -1.0, "crops_nms_thresh": 1.0}}
masks = generator(image, points_per_crop=2, **settings)["masks"]
assert all(tuple(mask.shape) == image.size[::-1] for mask in masks)
print(type(model).__module__.split(".")[0], len(masks))
"""


@pytest.fixture
def in_this_process(monkeypatch):
    """Push in the publisher's thread and without the verification, which is faster."""

    def run(publisher, push, token, snapshots):
        push = dataclasses.replace(push, folder=str(snapshots / publishing.SNAPSHOT_NAME))
        with monkeypatch.context() as patch:
            if token:
                patch.setenv("HF_TOKEN", token)
            return push_worker.carry_out(push, publishing.RETRIES, publishing.RETRY_WAIT)

    monkeypatch.setattr(HubPublisher, "_run", run)
    monkeypatch.setattr(upload, "verify_folder", check_folder)


@pytest.mark.slow
def test_what_is_trained_and_pushed_segments_a_photograph_elsewhere(hub, tmp_path, capsys, monkeypatch):
    """The training neither waits for the Hub nor is changed by it."""
    card = tmp_path / "card.yaml"
    card.write_text("license: apache-2.0\ntraining_data: [{name: drawn scenes, terms: made by a program}]\n")
    is_trained, submit, push_finished = threading.Event(), HubPublisher.submit, HubPublisher.push_finished

    def begin(publisher, *arguments):
        submit(publisher, *arguments)
        wait_until(lambda: publisher._is_busy)

    def finish(*arguments):
        push_finished(*arguments)
        is_trained.set()

    monkeypatch.setattr(HubPublisher, "submit", begin)
    monkeypatch.setattr(HubPublisher, "push_finished", finish)
    hub.fail("POST", "/preupload/", until=is_trained)  # no file arrives before
    student = run(tmp_path / "pushed", "--card", str(card), "--save_steps", "1")
    alone = run(tmp_path / "alone", "--push_to_hub", "false", "--save_steps", "1")
    assert (alone / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()

    record = read_record(tmp_path / "pushed/out/end_to_end")
    assert [(r["step"], r["was_replaced"]) for r in record] == [(2, True), (1, False), (None, False)]
    commits = [commit.title for commit in hub.repository(REPO).history()]
    assert commits == ["Training, end_to_end, finished", "Training, end_to_end, step 1", "initial commit"]
    head = hub.repository(REPO).find("main").sha
    assert f"the last one end_to_end, finished as {head}" in capsys.readouterr().out
    for revision, is_on_the_way in ((record[1]["commit"], True), ("main", False)):
        pushed = files(hub, revision)
        assert set(pushed) == STUDENT_FILES
        text = pushed["README.md"].decode()
        assert ("Step 1 of 2** of a training (stage `end_to_end`)" in " ".join(text.split())) == is_on_the_way
        assert ModelCard(text).data.license == "apache-2.0"
        assert "drawn scenes" in text
        assert str(tmp_path) not in text
    assert pushed["model.safetensors"] == (student / "model.safetensors").read_bytes()
    HfApi().create_tag(REPO, tag="v1.0", revision=head)
    script = SEGMENT.format(arguments=[REPO, "v1.0", str(ROOT / "examples/images/coffee.jpg")])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = run_without_package(script, elsewhere, environment(hub, elsewhere, token=None))
    assert printed.split() == ["transformers_modules", "12"]


def test_all_checkpoints_go_there_and_a_training_resumes_bit_exactly_from_one(hub, tmp_path, in_this_process):
    options = {"hub_strategy": "all_checkpoints", "save_total_limit": 1, "max_steps": 4}
    is_trained = threading.Event()
    hub.fail("POST", "/preupload/", until=is_trained, times=1)
    hub.fail("POST", "/commit/", 500, times=1)  # is retried
    with HubPublisher() as publisher:
        whole = make_trainer(arguments(tmp_path / "whole", **options), publisher=publisher)
        whole.train()
        assert not (tmp_path / "whole/checkpoint-2").exists()  # deleted, but a snapshot is waiting to be pushed
        is_trained.set()
    assert [result.error for result in whole.publisher.results] == [None, None]
    pushed = files(hub)
    assert {name for name in pushed if "/" not in name} == STUDENT_FILES
    assert "Step 4 of 4" in pushed["README.md"].decode()
    assert {name.split("/")[0] for name in pushed if "/" in name} == {"checkpoint-2", "checkpoint-4"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= {
        name.removeprefix("checkpoint-2/") for name in pushed
    }
    assert not any(str(tmp_path).encode() in data for data in pushed.values())
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["checkpoint-4", "pushes.json"]

    copy = snapshot_download(REPO, allow_patterns="checkpoint-2/*", local_dir=tmp_path / "copy")
    resumed = make_trainer(arguments(tmp_path / "resumed", push_to_hub=False, max_steps=4))
    resumed.train(resume_from_checkpoint=f"{copy}/checkpoint-2")
    assert_equal(weights(whole), weights(resumed))
    assert logged(whole, "loss") == logged(resumed, "loss")
    whole.log({"loss": 1.0})
    assert whole.state.log_history[-1]["hub/pushed_step"] == 4


def test_the_last_checkpoint_takes_the_place_of_the_one_before(hub, tmp_path, in_this_process):
    HfApi().create_repo(REPO)
    stale = [CommitOperationAdd("last-checkpoint/rng_state_1.pth", b"1"), CommitOperationAdd("notes.txt", b"mine")]
    HfApi().create_commit(REPO, stale, commit_message="of a run on two processes")
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "box_miou", "eval_max_instances": 1}
    args = arguments(tmp_path, hub_strategy="checkpoint", max_steps=1, save_steps=1, **options)
    trainer = make_trainer(args, eval_images=SyntheticScenes(1, 32))
    save = trainer._save

    def save_as_trainer_does(folder, state_dict=None):
        save(folder, state_dict)
        torch.save(trainer.args, Path(folder) / "training_args.bin")  # holds the token

    trainer._save = save_as_trainer_does
    trainer.train()
    pushed = files(hub)
    assert {name for name in pushed if "/" not in name} == STUDENT_FILES | {"notes.txt"}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = json.loads(pushed["last-checkpoint/trainer_state.json"])
    assert (state["global_step"], state["best_model_checkpoint"]) == (1, None)
    assert not {"last-checkpoint/rng_state_1.pth", "last-checkpoint/training_args.bin"} & pushed.keys()
    assert pushed["last-checkpoint/model.safetensors"] == pushed["model.safetensors"]
    titles = [commit.title for commit in hub.repository(REPO).history()]
    assert titles == ["Training, end_to_end, step 1", "of a run on two processes", "initial commit"]


def test_a_checkpoint_that_waits_is_replaced_by_what_has_all_of_it():
    args = make_arguments("out", hub_model_id=REPO)

    def push(step, path_in_repo=None, **options):
        return make_push(args, Path(f"checkpoint-{step}"), step, {}, {}, path_in_repo=path_in_repo, **options)

    assert push(2).replaces(push(1))
    assert push(2, "last-checkpoint").replaces(push(1, "last-checkpoint"))
    assert push(2, "last-checkpoint").replaces(push(1))
    assert not push(None).replaces(push(1, "last-checkpoint"))  # a finished student has no optimizer to resume with
    assert not push(2).replaces(push(1, is_kept=True))
    assert not dataclasses.replace(push(2), repo_id="org/other").replaces(push(1))


def test_the_strategy_end_pushes_nothing_before_the_end(hub, tmp_path, in_this_process):
    trainer = make_trainer(
        arguments(tmp_path, hub_strategy="end", max_steps=2, hub_revision="try", hub_private_repo=True)
    )
    trainer.train()
    assert hub.count("POST", "/commit/") == 0
    result = trainer.push_to_hub("The first one")
    assert hub.repository(REPO).find("try").title == "The first one"
    assert hub.repository(REPO).private
    assert result.commit == hub.repository(REPO).find("try").sha
    assert set(files(hub, "try")) == STUDENT_FILES
    assert files(hub, "main") == {}
    loaded, _ = load_model(snapshot_download(REPO, revision="try", local_dir=tmp_path / "copy"), "cpu")
    assert_equal(loaded.state_dict(), trainer.student.state_dict())
    hub.fail("POST", "/commit/", 500)
    trainer.student.mask_decoder.iou_token.weight.data += 1
    with pytest.raises(PublishError, match="the Hub answered 500"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="token: set hub_revision, hub_token and hub_private_repo in the arguments"):
        trainer.push_to_hub(token="hf_other")


def test_a_push_that_fails_is_reported_and_the_same_command_tries_again(hub, tmp_path, caplog, capsys, in_this_process):
    with pytest.raises(
        PublishError, match="out/student is finished, and not in org/student: .*hf auth login.* --resume"
    ):
        run(tmp_path, "--hub_strategy", "end", "--hub_token", "hf_wrong")
    assert "org/student: pushes are likely to fail" in caplog.text
    assert "org/student: end_to_end, finished was not pushed: org/student: the Hub answered 401" in caplog.text
    assert capsys.readouterr().out.count("was not pushed") == 1
    assert [entry["commit"] for entry in read_record(tmp_path / "out/end_to_end")] == [None]
    assert hub.repositories == {}
    student = run(tmp_path, "--hub_strategy", "end", "--resume")
    assert files(hub)["model.safetensors"] == (student / "model.safetensors").read_bytes()
    num_requests = len(hub.requests)
    run(tmp_path, "--hub_strategy", "end", "--resume")
    assert hub.count("POST", "/commit/") == 1, hub.requests[num_requests:]  # nothing new to push
    run(tmp_path, "--hub_strategy", "end", "--resume", "--hub_model_id", "org/other")
    assert hub.repository("org/other").files()["model.safetensors"] == files(hub)["model.safetensors"]


@pytest.fixture
def checkpoint(tmp_path):
    """A trainer's arguments, and the folder of its checkpoint."""
    args = arguments(tmp_path, max_steps=1, save_steps=1, push_to_hub=False)
    make_trainer(args).train()
    return args, tmp_path / "checkpoint-1"


def test_an_upload_that_hangs_or_whose_process_dies_is_given_up(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(publishing, "TIMEOUT", 1)
    with HubPublisher() as publisher:
        publisher.push_finished(*checkpoint, {})
    monkeypatch.setattr(publishing.sys, "executable", "/bin/false")
    with publisher:
        publisher.push_finished(*checkpoint, {})
    monkeypatch.setattr(publishing.sys, "executable", "/nowhere/python")
    with publisher:
        publisher.push_finished(*checkpoint, {})
    errors = [result.error for result in publisher.results]
    assert errors[:2] == ["not done after 1 s. Is the connection alive?", "its process ended: exit status 1."]
    assert "/nowhere/python" in errors[2]
    assert publisher.logs() == {"hub/failed_pushes": 3}
    assert not (checkpoint[1].parent / ".pushing").exists()


def test_a_snapshot_that_cannot_be_made_is_reported(hub, checkpoint):
    args, folder = checkpoint
    with HubPublisher() as publisher:
        publisher.push_finished(args, folder.with_name("checkpoint-9"), {})  # deleted meanwhile
        assert not (folder.parent / ".pushing").exists()
        (folder.parent / ".pushing").touch()  # where a folder should be
        publisher.push_finished(args, folder, {})
    assert ["no snapshot of" in result.error for result in publisher.results] == [True, True]


def test_stopping_by_hand_drops_what_waits_and_ends_what_is_under_way(hub, checkpoint):
    never = threading.Event()
    hub.fail("POST", "/preupload/", until=never)
    with pytest.raises(KeyboardInterrupt), HubPublisher() as publisher:
        args, folder = checkpoint
        publisher.submit(make_push(args, folder, 1, {}, {}))  # a finished student would be verified first
        wait_until(lambda: REPO in hub.repositories)
        publisher.push_finished(args, folder, {})
        raise KeyboardInterrupt
    never.set()
    assert [(result.step, result.error) for result in publisher.results] == [(1, "stopped before it was done.")]
    assert files(hub) == {}
    assert not (folder.parent / ".pushing").exists()
