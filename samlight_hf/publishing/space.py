"""Spaces: folders with the page of `samlight app` for one model, which run on the Hub without anything else."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from ..utils.atomic_files import check_replaceable, replace_folder
from .build import license_text
from .checks import CODE_FOLDER, LICENSE_NAME
from .upload import PublishError, check_target, reason_of, retried


THRESHOLDS = (0.88, 0.95)  # of predicted IoU and stability, SAM's own
GRADIO_VERSION = "6.31.0"
PACKAGE = "samlight_hf"
PACKAGE_FOLDER = Path(__file__).parents[1]
_SPACE_FILES = ("app.py", "requirements.txt", "README.md")
_NEW_SPACE = {".gitattributes", "README.md"}  # what a Space holds that was just made on the Hub's page
_CODE_SUFFIXES = (".css", ".cu", ".cuh", ".html", ".js", ".md", ".py", ".typed")

# What the package and its extra "app" require; gradio comes with the Space's SDK.
REQUIREMENTS = """\
huggingface-hub>=1.0
numpy
opencv-python-headless>=4.10
pillow>=10.1
pyyaml
safetensors
torch>=2.11
torchvision
tqdm
transformers>=5.17
"""

_APP = '''\
"""A page on which clicks become masks: the Space of {model_id}, written by `samlight publish --space`.

`python app.py` runs it on any machine, for this machine alone. SAMLIGHT_MODEL names another model or a folder.
"""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from samlight_hf.app.segmenter import Segmenter
from samlight_hf.app.server import serve
from samlight_hf.loading import load_model


MODEL = os.environ.get("SAMLIGHT_MODEL", "{model_id}")
REVISION = {revision!r}  # a commit, or None: the newest
THRESHOLDS = {thresholds!r}  # of predicted IoU and stability, to begin with
IS_SPACE = "SPACE_ID" in os.environ

if __name__ == "__main__":
    if Path(MODEL).is_dir():
        folder = MODEL
    else:  # weights and settings alone: no code is downloaded
        folder = snapshot_download(MODEL, revision=REVISION, allow_patterns=["*.json", "*.safetensors"])
    model, processor = load_model(folder)
    serve(
        Segmenter(model, processor),
        MODEL,
        host="0.0.0.0" if IS_SPACE else "127.0.0.1",
        port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
        thresholds=THRESHOLDS,
        examples=sorted(Path(__file__).parent.glob("images/*.jpg")),
        points_per_side=8 if model.device.type == "cpu" else 32,
    )
'''

_README = """\
---
title: "{title}"
emoji: ✂️
colorFrom: green
colorTo: indigo
sdk: gradio
sdk_version: {gradio_version}
python_version: "3.12"
app_file: app.py
pinned: false
license: apache-2.0
short_description: Click on an object to segment it
models:
- {model_id}
---

# {title}

Click on an object in an image: [{model_id}](https://huggingface.co/{model_id}) gives its mask. Keep objects in a
list and download them as PNG masks, label map, COCO, YOLO, labelme or cut-out. Images stay in the memory of this
Space, apart for each visitor, and are dropped when the tab is closed.

`samlight_hf/` is the code of the package samlight-hf, as it was when `samlight publish --space` wrote this folder.
Its licence is Apache-2.0; the weights have the licence of their own repository.

The page has an API: `gradio_client.Client("{space_id}").view_api()`.
"""


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space shows.

    Attributes:
        model_id: Name of the model's repository ("org/name").
        space_id: Name of the Space ("org/name").
        revision: Commit of the model; None is the newest.
        thresholds: Of predicted IoU and stability in everything mode, to begin with.
    """

    model_id: str
    space_id: str
    revision: str | None = None
    thresholds: tuple[float, float] = THRESHOLDS


def space_files(settings: SpaceSettings) -> dict[str, str]:
    """Return the text of app.py, requirements.txt and README.md.

    Raises:
        ValueError: For names that are no names of repositories.
    """
    for name in (settings.model_id, settings.space_id):
        check_target(name, settings.revision, None, False)
    app = _APP.format(
        model_id=settings.model_id, revision=settings.revision, thresholds=tuple(map(float, settings.thresholds))
    )
    readme = _README.format(
        title=settings.space_id.split("/")[1], model_id=settings.model_id, space_id=settings.space_id,
        gradio_version=GRADIO_VERSION,
    )  # fmt: skip
    return dict(zip(_SPACE_FILES, (app, REQUIREMENTS, readme), strict=True))


def build_space(
    destination: str | os.PathLike, settings: SpaceSettings, images: Sequence[str | os.PathLike] = ()
) -> list[Path]:
    """Write the folder of a Space, with this package's code: it needs no release of the package.

    The folder is written under another name and moved into place; a Space written earlier is replaced.

    Args:
        destination: Folder to create, or one written earlier.
        settings: What it shows.
        images: JPEG files to try.

    Returns:
        The paths of the files, sorted.

    Raises:
        ValueError: For a destination that holds other files, and for names that are none.
    """
    destination, texts = Path(destination), space_files(settings)
    check_space_folder(destination)

    def write(folder: Path):
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / LICENSE_NAME).write_text(license_text(), encoding="utf-8")
        for source, name in ((PACKAGE_FOLDER, PACKAGE), (CODE_FOLDER, f"{PACKAGE}/modeling")):
            for path in sorted(source.rglob("*")):
                if path.is_file() and path.suffix in _CODE_SUFFIXES and "__pycache__" not in path.parts:
                    target = folder / name / path.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
        for image in map(Path, images):
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(image, folder / "images" / image.name)

    replace_folder(destination, write)
    return sorted(path for path in destination.rglob("*") if path.is_file())


def publish_space(
    folder: str | os.PathLike,
    space_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Publish the Space",
    retries: int = 4,
    retry_wait: float = 1.0,
) -> str:
    """Upload a folder that `build_space` wrote in one commit, and return the Space's address.

    The Space is created where it does not exist. Code of an earlier commit that is not in the folder is deleted.

    Args:
        folder: Of `build_space`.
        space_id: Name of the Space ("org/name").
        private: Create a private Space, and refuse an existing public one.
        token: Hub token. Default: that of the environment.
        commit_message: Of the commit.
        retries: Number of retries, each from the start, after a failure that may be temporary.
        retry_wait: Seconds before the first retry; doubled for each further one, to at most 60.

    Raises:
        PublishError: As in `check_space`.
    """
    api = HfApi(token=token)

    def run():
        _check(api, space_id, private)
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=space_id, repo_type="space", commit_message=commit_message,
            delete_patterns=[f"{PACKAGE}/**", "images/**"],
        )  # fmt: skip

    retried(run, retries, retry_wait, lambda error: _error(space_id, error))
    return f"{constants.ENDPOINT}/spaces/{space_id}"


def check_space(
    space_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    retries: int = 4,
    retry_wait: float = 1.0,
):
    """Raise PublishError for a Space of the Hub that must not be written to: a public one where a private one was asked
    for, and one that `publish_space` has not written, whose app would be lost. One that is not there passes.

    Args:
        space_id: Name of the Space ("org/name").
        private: As in `publish_space`.
        token: As in `publish_space`.
        retries: As in `publish_space`.
        retry_wait: As in `publish_space`.
    """
    api = HfApi(token=token)
    retried(lambda: _check(api, space_id, private), retries, retry_wait, lambda error: _error(space_id, error))


def _check(api: HfApi, space_id: str, private: bool | None):
    try:
        info = api.space_info(space_id)
        names = {sibling.rfilename for sibling in info.siblings} - _NEW_SPACE
        app = (
            api.hf_hub_download(space_id, "app.py", repo_type="space", revision=info.sha) if "app.py" in names else None
        )
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise PublishError(
            f"the Space {space_id} is public, and private was asked for. Make it private on the Hub, or name another "
            "one: --space org/name."
        )
    if names and not (app and _is_ours(Path(app))):
        raise PublishError(
            f"the Space {space_id} holds {min(names)}, and no app that `samlight publish` wrote and may replace. Name "
            "another one: --space org/name."
        )


def _error(space_id: str, error: Exception) -> PublishError:
    return PublishError(f"the Space {space_id}: {reason_of(error)} It was not published.")


def thresholds_of(facts: Mapping) -> tuple[float, float]:
    """Return the thresholds of predicted IoU and stability that a Space begins with, within the range of its sliders.

    Args:
        facts: `CardFacts.thresholds`, which may have neither.

    Raises:
        ValueError: For a threshold that is no number.
    """
    thresholds = []
    for name, default in zip(("pred_iou_thresh", "stability_score_thresh"), THRESHOLDS):
        value = facts.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"card.yaml: {name}={value!r} of thresholds is no number.")
        thresholds.append(min(max(float(value), 0.0), 1.0))
    return thresholds[0], thresholds[1]


def check_space_folder(destination: Path):
    """Raise ValueError for a destination that cannot be written, or is neither new, empty, nor a Space as written."""
    if destination.exists() and not (
        destination.is_dir() and (_is_space(destination) or not any(destination.iterdir()))
    ):
        raise ValueError(f"{destination} is there, and is no Space as it was written. Choose another folder.")
    check_replaceable(destination)


def _is_ours(app: Path) -> bool:
    return "`samlight publish --space`" in app.read_text(encoding="utf-8", errors="replace")


def _is_space(folder: Path) -> bool:
    app, ours = folder / "app.py", {*_SPACE_FILES, LICENSE_NAME, PACKAGE, "images"}
    return app.is_file() and _is_ours(app) and {path.name for path in folder.iterdir()} <= ours
