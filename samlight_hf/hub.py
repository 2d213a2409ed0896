"""Checkpoints to the Hub: what `samlight_hf.publishing` offers to scripts."""

from .publishing.build import build_folder
from .publishing.checks import FolderError, check_folder
from .publishing.upload import PublishedRevision, PublishError, check_target, publish
from .publishing.verify import VerificationReport, verify_folder


__all__ = [
    "FolderError",
    "PublishError",
    "PublishedRevision",
    "VerificationReport",
    "build_folder",
    "check_folder",
    "check_target",
    "publish",
    "verify_folder",
]
