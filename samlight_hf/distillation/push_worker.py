"""One push of a training, carried out in its own process (see publishing.py)."""

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
    """Carry out the push that stdin describes, and print the fields of its `PushResult` as JSON in the last line."""
    if hasattr(os, "nice"):
        os.nice(10)  # the training and its data loading come first
    push, settings = json.load(sys.stdin)
    print(json.dumps(carry_out(Push(**push), **settings)))


def carry_out(push: Push, retries: int, retry_wait: float) -> dict[str, str | None]:
    """Build, check and upload the folder in one commit; return the commit or the error.

    A finished student is also verified: it is run in a process without the package.
    """
    try:
        facts = CardFacts.of(push.facts, "the card's facts")
        target = {"repo_id": push.repo_id, "revision": push.revision}
        card = render_card(push.folder, training=push.training, facts=facts, step=push.step, **target)
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
    """Return the files of the whole checkpoint by their paths in the repository: enough to resume from."""
    folder = Path(push.folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(TRAINING_ARGS_NAME, None)  # a pickle with the token in it, which resuming does not read
    files: dict[str, str | bytes] = {name: str(path) for name, path in paths.items()}
    files[TRAINER_STATE_NAME] = _portable_state(paths[TRAINER_STATE_NAME])
    return {f"{push.path_in_repo}/{name}": content for name, content in files.items()}


def _portable_state(path: Path) -> bytes:
    """Return the trainer's state without the path of the best checkpoint, which is valid on this machine only."""
    state = read_json(path, dict)
    state |= dict.fromkeys(("best_model_checkpoint", "best_metric", "best_global_step") & state.keys())
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
