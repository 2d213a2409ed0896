"""Pushes of a training to the Hub, in the background: whatever happens to an upload, the training goes on.

A push is built, checked and uploaded by a process of its own, so that it shares neither random numbers nor torch's global settings
with the training, nor Python's lock. It reads a snapshot of the checkpoint, which may be deleted meanwhile. Pushes go
one after another; where one has to wait, a newer one takes its place.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..publishing.upload import PublishError
from ..utils.atomic_files import atomic_write
from ..utils.json_files import read_json
from ..utils.messages import one_line


logger = logging.getLogger(__name__)

RECORD_NAME = "pushes.json"
SNAPSHOTS_NAME, SNAPSHOT_NAME = ".pushing", "snapshot"
RETRIES, RETRY_WAIT = 6, 5.0  # about three minutes
TIMEOUT = 3600.0  # seconds for one push: huggingface_hub itself waits forever for a connection that is dead
_OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Push:
    """What goes to the Hub: the student in `folder`, with a card for `step`, or for a finished student where that is None.

    `training` and `facts` are what `render_card` takes. With `path_in_repo` the whole checkpoint goes there too, for resuming
    elsewhere. `is_kept` pushes are not replaced by newer ones while they wait. `message` is the commit's, by default the stage
    and the step.
    """

    folder: str
    repo_id: str
    step: int | None
    stage: str = ""
    training: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    revision: str | None = None
    private: bool | None = None
    path_in_repo: str | None = None
    is_kept: bool = False
    message: str | None = None

    def replaces(self, waiting: "Push") -> bool:
        """Whether another push need not be made before this one: there, it would be overwritten with all that it has."""
        same_place = (self.repo_id, self.revision) == (waiting.repo_id, waiting.revision)
        return same_place and not waiting.is_kept and waiting.path_in_repo in (None, self.path_in_repo)

    @property
    def name(self) -> str:
        return (f"{self.stage}, " if self.stage else "") + ("finished" if self.step is None else f"step {self.step}")


@dataclass(frozen=True)
class PushResult:
    """`commit` is the full hash; None, with an `error` of one line, where the push failed or a newer one took its place."""

    name: str
    repo_id: str
    step: int | None
    commit: str | None = None
    error: str | None = None
    was_replaced: bool = False
    seconds: float = 0.0


def make_push(args: TrainingArguments, folder: Path, step: int | None, training: dict, facts: dict, **options) -> Push:
    """To where the arguments say."""
    target = {"revision": args.hub_revision, "private": args.hub_private_repo}
    return Push(str(folder), args.hub_model_id, step, args.stage, training, facts, **target, **options)


class HubPublisher:
    """Carries out pushes one after another, in the background. Its methods neither raise for what fails nor wait, except `wait`.

    A context manager: at its end it waits for what is under way, or, after a KeyboardInterrupt, drops it. What became of each push
    is in `results`, and in pushes.json beside the folder that was pushed.

    Args:
        teacher: what the card says the student learned from: a Hub name.
        facts: what the card says and no file tells, as in a card.yaml.
    """

    def __init__(self, teacher: str | None = None, facts: dict | None = None):
        self.teacher, self.facts = teacher, dict(facts or {})
        self.finished_stages: list[dict] = []  # the result.json of each, for the card
        self.results: list[PushResult] = []
        self._waiting: deque[tuple[Push, str | None, Path]] = deque()
        self._changed = threading.Condition()
        self._is_busy = self._is_cancelled = False
        self._process: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None
        self._asked: set[str] = set()

    def __enter__(self) -> "HubPublisher":
        return self

    def __exit__(self, kind, *exception):
        if kind is None or issubclass(kind, Exception):
            self.wait()
        else:
            self.cancel()

    def training(self, stage: dict | None = None) -> dict:
        """What the card says of the training: the finished stages, and one that is under way."""
        return {"teacher": self.teacher, "stages": [*self.finished_stages, *([stage] if stage else [])]}

    def check_access(self, repo_id: str, private: bool | None, token: str | None):
        """Makes the repository where there is none; a warning tells early that pushes will fail."""

        def ask():
            try:
                HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
            except Exception as error:  # of the network, the token, the name: a warning all the same
                logger.warning("%s: pushes are likely to fail: %s", repo_id, one_line(error, 300))

        if repo_id not in self._asked:
            self._asked.add(repo_id)
            threading.Thread(target=ask, daemon=True, name="hub-access").start()

    def push_finished(self, args: TrainingArguments, folder: Path, result: dict, message: str | None = None):
        """Queues the exported student of a stage. `result` are the stage's settings and what came of them, for the card."""
        options = {"is_kept": True, "message": message}
        self.submit(make_push(args, folder, None, self.training(result), self.facts, **options), args.hub_token)

    def submit(self, push: Push, token: str | None = None):
        """Takes a snapshot of `push.folder`, which may change or vanish from here on, and queues the push."""
        folder, place = Path(push.folder), None
        snapshots = folder.parent / SNAPSHOTS_NAME
        try:
            with self._changed:  # or the folder is removed as empty before there is something in it
                snapshots.mkdir(exist_ok=True)
                place = Path(tempfile.mkdtemp(prefix=f"{folder.name[:40]}-", dir=snapshots))
            shutil.copytree(folder, place / SNAPSHOT_NAME, copy_function=_link_or_copy)
        except OSError as error:
            if place is not None:
                self._remove(place)
            self._finish(push, folder.parent, error=f"no snapshot of {folder} could be made ({one_line(error, 200)}).")
            return
        with self._changed:
            replaced = [job for job in self._waiting if push.replaces(job[0])]
            self._waiting = deque(job for job in self._waiting if job not in replaced)
            self._waiting.append((push, token, place))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="hub-publisher")
                self._thread.start()
            self._changed.notify_all()
        for old, _, old_place in replaced:
            self._remove(old_place)
            self._finish(old, old_place.parents[1], error=f"replaced by {push.name} while it waited", was_replaced=True)

    def wait(self):
        """Until everything that was submitted is done, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def cancel(self):
        """Drops what waits and ends what is under way; the repository keeps the revision that it has."""
        with self._changed:
            dropped, self._waiting, self._is_cancelled = self._waiting, deque(), True
            if (process := self._process) is not None:
                process.terminate()
        for _, _, place in dropped:
            self._remove(place)
        self.wait()

    def logs(self) -> dict[str, int]:
        """For a training's logs: the last step that arrived, and how many pushes failed; nothing before the first of either."""
        done = [result.step for result in self.results if result.commit and result.step is not None]
        failed = len(self.failures())
        return {**({"hub/pushed_step": done[-1]} if done else {}), **({"hub/failed_pushes": failed} if failed else {})}

    def failures(self) -> list[PushResult]:
        return [result for result in self.results if result.error and not result.was_replaced]

    def report(self) -> str:
        """What arrived and what failed, a line each; nothing where nothing was pushed."""
        lines, done = [], {}
        for result in self.results:
            if result.commit:
                done.setdefault(result.repo_id, []).append(result)
        for repo_id, results in done.items():
            lines.append(f"{repo_id}: {len(results)} pushed, the last one {results[-1].name} as {results[-1].commit}.")
        lines += [f"{result.repo_id}: {result.name} was not pushed: {result.error}" for result in self.failures()]
        return "\n".join(lines)

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                push, token, place = self._waiting.popleft()
                self._is_busy = True
            start = time.monotonic()
            try:
                outcome = self._run(push, token, place)
            except Exception as error:  # this thread outlives whatever one push may do
                outcome = {"error": f"{type(error).__name__}: {one_line(error, 300)}"}
            self._remove(place)
            self._finish(push, place.parents[1], seconds=time.monotonic() - start, **outcome)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _run(self, push: Push, token: str | None, place: Path) -> dict:
        settings = {"retries": RETRIES, "retry_wait": RETRY_WAIT}
        job = json.dumps([{**asdict(push), "folder": str(place / SNAPSHOT_NAME)}, settings], default=str)
        command = [sys.executable, "-c", f"from {__package__}.push_worker import main; main()"]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "errors": "replace",
        }
        with self._changed:
            if self._is_cancelled:
                return {"error": "stopped before it was done."}
            self._process = subprocess.Popen(command, env=_environment(token), **pipes)
        try:
            output, errors = self._process.communicate(job, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"not done after {TIMEOUT:.0f} s. Is the connection alive?"}
        finally:
            process, self._process = self._process, None
        if self._is_cancelled:
            return {"error": "stopped before it was done."}
        if process.returncode != 0:
            last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            return {"error": f"its process ended: {last}."}
        return json.loads(output.strip().splitlines()[-1])

    def _remove(self, place: Path):
        """A snapshot, and the folder of all snapshots with the last of them."""
        shutil.rmtree(place, ignore_errors=True)
        with self._changed, contextlib.suppress(OSError):
            place.parent.rmdir()  # where it is empty

    def _finish(self, push: Push, place: Path, **outcome):
        result = PushResult(push.name, push.repo_id, push.step, **outcome)
        with self._changed:
            self.results.append(result)
            if result.error and not result.was_replaced:
                logger.warning("%s: %s was not pushed: %s", push.repo_id, push.name, result.error)
            with contextlib.suppress(OSError):  # such as a full disk
                text = json.dumps([*read_record(place), asdict(result)], indent=1)
                atomic_write(place / RECORD_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def read_record(output_dir: str | os.PathLike) -> list[dict]:
    """What became of the pushes of a stage, each as `PushResult`; also after a restart."""
    try:
        return read_json(Path(output_dir) / RECORD_NAME, list)
    except ValueError:
        return []


def has_arrived(output_dir: str | os.PathLike, repo_id: str) -> bool:
    """Whether the last push of a stage was that of its finished student, to this repository, and succeeded."""
    last = (read_record(output_dir) or [{"commit": None}])[-1]
    return last["commit"] is not None and (last["repo_id"], last["step"]) == (repo_id, None)


def _link_or_copy(source: str, destination: str):
    """A second name of the same file, which costs no time and no disk; nothing writes into a checkpoint that is whole."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _environment(token: str | None) -> dict[str, str]:
    """No GPU, and no part in the training's process group."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_THE_LAUNCHER and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **quiet, **({"HF_TOKEN": token} if token else {})}


class PushingTrainer(Trainer):
    """transformers' Trainer with pushes that are complete (code, processor, card), and that training never waits for.

    `hub_strategy` means what it does there. "end" pushes the finished student alone; "every_save" also the student of each
    checkpoint; "checkpoint" and "all_checkpoints" also the whole checkpoint, as last-checkpoint/ or under its own name. These
    two alone push pickles, since optimizers, schedulers and random states are saved as such; Trainer resumes from them with
    torch's `weights_only`, and whoever loads the model reads none of them. A subclass saves complete folders, and has
    `run_settings` and `export`.

    `publisher` may be shared by trainers, one after another; it is process 0's.
    """

    publisher: HubPublisher | None = None
    _owns_publisher = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """As Trainer's, which waits for the Hub, and fails with it."""
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None
        if self.hub_model_id is None:
            raise ValueError("pushing needs hub_model_id, such as org/name.")
        if self.is_world_process_zero():
            if self.publisher is None:
                self.publisher, self._owns_publisher = HubPublisher(), True
            private = self.args.hub_private_repo if private is None else private
            self.publisher.check_access(self.hub_model_id, private, token or self.args.hub_token)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        pass  # Trainer calls it before the checkpoint is whole: `push_checkpoint` is called after that

    def _finish_current_push(self):
        """At the end of `train`. Who shares a publisher waits for it himself, when all of its trainings are done."""
        if self.publisher is not None and self._owns_publisher:
            self.publisher.wait()
            if report := self.publisher.report():
                print(report)

    def push_checkpoint(self, folder: Path):
        """Queues a checkpoint that is whole, as `hub_strategy` says."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        step = int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        is_kept = self.args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS
        training = self.publisher.training(self.run_settings)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"path_in_repo": names.get(strategy), "is_kept": is_kept}
        self.publisher.submit(
            make_push(self.args, folder, step, training, self.publisher.facts, **options), self.args.hub_token
        )

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs) -> PushResult | None:
        """Exports the student to `output_dir`/student, verifies and pushes it. Where `blocking`, waits, and returns what became of it.

        Repository, revision, token and visibility are those of the arguments. Raises PublishError where it failed.
        """
        if kwargs := {
            name: value
            for name, value in kwargs.items()
            if value not in (None, getattr(self.args, f"hub_{name}", None))
        }:
            raise ValueError(f"{', '.join(kwargs)}: set hub_revision, hub_token and hub_private_repo in the arguments.")
        if self.hub_model_id is None:
            self.init_hf_repo()
        folder = Path(self.args.output_dir) / "student"
        self.export(folder)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.publisher.push_finished(self.args, folder, self.run_settings, commit_message)
        if not blocking:
            return None
        self.publisher.wait()
        result = self.publisher.results[-1]
        if result.error:
            raise PublishError(f"{result.repo_id}: {result.error}")
        return result
