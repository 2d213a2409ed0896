"""Publishing checkpoints on the Hub: the functions of `samlight_hf.publishing` for scripts."""

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
