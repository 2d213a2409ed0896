"""One push of a training, carried out in a process of its own: see publishing.py."""

import json
import os
import sys
from pathlib import Path

from huggingface_hub.errors import HTTPError
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..publishing.build import build_folder
from ..publishing.card import CardFacts, render_card
from ..publishing.upload import publish
from ..utils.json_files import read_json
from ..utils.messages import one_line
from .publishing import Push


def main():
    """Carries out the push that stdin describes; the last line of stdout is what `PushResult` needs of it, as JSON."""
    if hasattr(os, "nice"):
        os.nice(10)  # the training, and what loads its images, come first
    push, settings = json.load(sys.stdin)
    print(json.dumps(carry_out(Push(**push), **settings)))


def carry_out(push: Push, retries: int, retry_wait: float) -> dict[str, str]:
    """Builds, checks and uploads, in one commit; returns the commit, or the error.

    A finished student is verified too: run, in a process without the package.
    """
    try:
        facts = CardFacts.of(push.facts, "the card's facts")
        card = render_card(
            push.folder, training=push.training, facts=facts, step=push.step, repo_id=push.repo_id, revision=push.revision
        )  # fmt: skip
        built = Path(push.folder).with_name("published")
        build_folder(push.folder, built, card=card)
        published = publish(
            built, push.repo_id, private=push.private, revision=push.revision, verify=push.step is None,
            commit_message=push.message or f"Training, {push.name}", retries=retries, retry_wait=retry_wait,
            extra_files=_checkpoint_files(push) if push.path_in_repo else None,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError, HTTPError) as error:
        return {"error": one_line(error, 500)}
    return {"commit": published.commit}


def _checkpoint_files(push: Push) -> dict[str, str | bytes]:
    """The whole checkpoint, by its paths in the repository: enough to resume from."""
    folder = Path(push.folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(TRAINING_ARGS_NAME, None)  # a pickle with the token in it, which resuming does not read
    files[TRAINER_STATE_NAME] = _portable_state(files[TRAINER_STATE_NAME])
    return {f"{push.path_in_repo}/{name}": content for name, content in files.items()}


def _portable_state(path: Path) -> bytes:
    """The trainer's state without the best checkpoint, which is a place on this machine, and stays here."""
    state = read_json(path, dict)
    state |= dict.fromkeys(("best_model_checkpoint", "best_metric", "best_global_step") & state.keys())
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
