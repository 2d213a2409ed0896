"""Public functions of `samlight_hf.publishing`: build, describe, verify and upload a checkpoint's folder.

build_folder("outputs/x/student", "outputs/x/published")   # safetensors, config, processor, code, card, licence
verify_folder("outputs/x/published")                       # in a process that has only transformers
publish("outputs/x/published", "org/name", tag="v1.0")     # one commit, or nothing
"""

from .publishing.build import build_folder
from .publishing.card import CardFacts, render_card
from .publishing.checks import FolderError, check_folder
from .publishing.upload import PublishedRevision, PublishError, check_target, publish
from .publishing.verify import VerificationReport, verify_folder


__all__ = [
    "CardFacts",
    "FolderError",
    "PublishError",
    "PublishedRevision",
    "VerificationReport",
    "build_folder",
    "check_folder",
    "check_target",
    "publish",
    "render_card",
    "verify_folder",
]
