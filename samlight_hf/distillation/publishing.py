"""Pushes of a training to the Hub, in the background: a failed upload does not stop the training.

A push is built, checked and uploaded by its own process, so that it shares neither random numbers, nor torch's global
settings, nor Python's lock with the training. It reads a snapshot of the checkpoint, which may be deleted meanwhile.
Pushes are carried out one after another; a newer one replaces one that still waits.
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
TIMEOUT = 3600.0  # seconds for one push: huggingface_hub itself waits forever for a dead connection
_OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Push:
    """A push of a student to the Hub.

    Attributes:
        folder: the folder of the student.
        repo_id: the Hub repository.
        step: the optimizer step that the card names; None for a finished student.
        stage: the stage of the training.
        training: the history of the training, as `render_card` takes it.
        facts: the facts of a card.yaml, as `render_card` takes them.
        revision: the branch.
        private: whether a new repository is private.
        path_in_repo: folder that the whole checkpoint is uploaded to too, for resuming elsewhere.
        is_kept: whether no newer push replaces this one while it waits.
        message: the commit's message, by default the stage and the step.
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
        """Return whether this push would overwrite everything in a waiting one, which need not be made then."""
        same_place = (self.repo_id, self.revision) == (waiting.repo_id, waiting.revision)
        return same_place and not waiting.is_kept and waiting.path_in_repo in (None, self.path_in_repo)

    @property
    def name(self) -> str:
        return (f"{self.stage}, " if self.stage else "") + ("finished" if self.step is None else f"step {self.step}")


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    `commit` is the full hash. Where the push failed or a newer one replaced it, it is None, and `error` has one line.
    """

    name: str
    repo_id: str
    step: int | None
    commit: str | None = None
    error: str | None = None
    was_replaced: bool = False
    seconds: float = 0.0


def make_push(args: TrainingArguments, folder: Path, step: int | None, training: dict, facts: dict, **options) -> Push:
    """Create a push to the repository in the training arguments."""
    target = {"revision": args.hub_revision, "private": args.hub_private_repo}
    return Push(str(folder), args.hub_model_id, step, args.stage, training, facts, **target, **options)


class HubPublisher:
    """A queue of pushes that are carried out one after another, in the background.

    Its methods do not raise for a failed push, and only `wait` waits. At the end of its context it waits for the queued
    pushes; after a KeyboardInterrupt it drops them. The result of each push is in `results`, and in pushes.json beside
    the folder that was pushed.

    Args:
        teacher: the Hub name of the teacher, for the card.
        facts: facts for the card that no file contains, as in a card.yaml.
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
        """Return the history of the training for the card: the finished stages, and the current one."""
        return {"teacher": self.teacher, "stages": [*self.finished_stages, *([stage] if stage else [])]}

    def check_access(self, repo_id: str, private: bool | None, token: str | None):
        """Create the repository if there is none, in the background. A warning is logged early if pushes will fail."""

        def ask():
            try:
                HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
            except Exception as error:  # of the network, the token or the name: a warning in any case
                logger.warning("%s: pushes are likely to fail: %s", repo_id, one_line(error, 300))

        if repo_id not in self._asked:
            self._asked.add(repo_id)
            threading.Thread(target=ask, daemon=True, name="hub-access").start()

    def push_finished(self, args: TrainingArguments, folder: Path, result: dict, message: str | None = None):
        """Queue the exported student of a stage. `result` has the stage's settings and results, for the card."""
        options = {"is_kept": True, "message": message}
        self.submit(make_push(args, folder, None, self.training(result), self.facts, **options), args.hub_token)

    def submit(self, push: Push, token: str | None = None):
        """Take a snapshot of `push.folder`, which may change or vanish from then on, and queue the push."""
        folder, place = Path(push.folder), None
        snapshots = folder.parent / SNAPSHOTS_NAME
        try:
            with self._changed:  # otherwise `_remove` could delete the folder while it is still empty
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
        """Wait until every submitted push is done or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def cancel(self):
        """Drop the waiting pushes and end the current one; the repository keeps its revision."""
        with self._changed:
            dropped, self._waiting, self._is_cancelled = self._waiting, deque(), True
            if (process := self._process) is not None:
                process.terminate()
        for _, _, place in dropped:
            self._remove(place)
        self.wait()

    def logs(self) -> dict[str, int]:
        """Return the last pushed step and the number of failed pushes, for a training's logs, where there are any."""
        done = [result.step for result in self.results if result.commit and result.step is not None]
        failed = len(self.failures())
        return {**({"hub/pushed_step": done[-1]} if done else {}), **({"hub/failed_pushes": failed} if failed else {})}

    def failures(self) -> list[PushResult]:
        return [result for result in self.results if result.error and not result.was_replaced]

    def report(self) -> str:
        """Return a line for each repository that was pushed to, and for each failed push."""
        lines: list[str] = []
        done: dict[str, list[PushResult]] = {}
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
            except Exception as error:  # one push must not end this thread
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
        pipe = subprocess.PIPE
        with self._changed:
            if self._is_cancelled:
                return {"error": "stopped before it was done."}
            self._process = subprocess.Popen(
                command, env=_environment(token), stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
            )
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
        """Remove a snapshot, and with the last one the folder of all snapshots."""
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
    """Return the results of a stage's pushes, with the fields of `PushResult`, including those before a restart."""
    try:
        return read_json(Path(output_dir) / RECORD_NAME, list)
    except ValueError:
        return []


def has_arrived(output_dir: str | os.PathLike, repo_id: str) -> bool:
    """Return whether the last push of a stage was that of its finished student, to this repository, and succeeded."""
    last = (read_record(output_dir) or [{"commit": None}])[-1]
    return last["commit"] is not None and (last["repo_id"], last["step"]) == (repo_id, None)


def _link_or_copy(source: str, destination: str):
    """Link or copy a file. A hard link costs no time and no disk, and finished checkpoints are never written to."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _environment(token: str | None) -> dict[str, str]:
    """Return the environment of the push's process: without GPUs and the training's process group."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_THE_LAUNCHER and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**inherited, **quiet, **({"HF_TOKEN": token} if token else {})}


class PushingTrainer(Trainer):
    """transformers' Trainer with complete pushes (code, processor, card) that the training never waits for.

    `hub_strategy` has Trainer's meaning. "end" pushes only the finished student; "every_save" also the student of each
    checkpoint; "checkpoint" and "all_checkpoints" also the whole checkpoint, as last-checkpoint/ or under its own name.
    Only these two push pickles, since optimizers, schedulers and random states are saved as such. Trainer resumes from
    them with torch's `weights_only`, and loading the model reads none of them. A subclass saves complete folders, and
    has `run_settings` and `export`.

    `publisher` may be shared by trainers, one after another. Only process 0 has one.
    """

    publisher: HubPublisher | None = None
    _owns_publisher = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Prepare pushing like Trainer's method, but without waiting for the Hub, and without failing with it."""
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
        """Wait for the pushes at the end of `train`. A shared publisher's owner waits for it after all trainings."""
        if self.publisher is not None and self._owns_publisher:
            self.publisher.wait()
            if report := self.publisher.report():
                print(report)

    def push_checkpoint(self, folder: Path):
        """Queue a complete checkpoint, according to `hub_strategy`."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        step = int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        is_kept = self.args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS
        assert self.publisher is not None  # see init_hf_repo
        training = self.publisher.training(self.run_settings)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"path_in_repo": names.get(strategy), "is_kept": is_kept}
        self.publisher.submit(
            make_push(self.args, folder, step, training, self.publisher.facts, **options), self.args.hub_token
        )

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs) -> PushResult | None:
        """Export the student to `output_dir`/student, verify and push it.

        Repository, revision, token and visibility are those of the training arguments.

        Args:
            commit_message: the commit's message.
            blocking: whether to wait for the push.

        Returns:
            The result of the push where `blocking`, on process 0.

        Raises:
            PublishError: where the push failed.
            ValueError: for an option that belongs into the training arguments.
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
        assert self.publisher is not None  # see init_hf_repo
        self.publisher.push_finished(self.args, folder, self.run_settings, commit_message)
        if not blocking:
            return None
        self.publisher.wait()
        result = self.publisher.results[-1]
        if result.error:
            raise PublishError(f"{result.repo_id}: {result.error}")
        return result
