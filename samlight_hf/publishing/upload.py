"""Publishing: a folder that loads anywhere is built, verified, and uploaded to the Hub in one commit.

build_folder("outputs/x/student", "outputs/x/published")   # safetensors, config, processor, code, model card, LICENSE
verify_folder("outputs/x/published")                       # in a process that has only transformers
publish("outputs/x/published", "org/name", tag="v1.0")     # one commit, or nothing
"""

import io
import itertools
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..utils.messages import one_line
from .checks import FolderError, check_folder
from .verify import VerificationReport, verify_folder


__all__ = [
    "FolderError",
    "PublishError",
    "PublishedRevision",
    "VerificationReport",
    "check_folder",
    "check_target",
    "publish",
    "verify_folder",
]

# Files of an earlier commit that would be loaded in place of, or together with, the new ones.
_REPLACED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|pytorch_model.*\.(bin|bin\.index\.json)"
    r"|[^/]+\.py|(pre)?processor_config\.json"
)
_LONGEST_WAIT = 60.0  # seconds
_TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
_HTTP_FIXES = {
    401: "The Hub does not accept the token, or there is none: run `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there: use one with write access to that user or organization.",
    404: "There is no such repository or revision, or the token may not see it.",
    409: "Another commit was made at the same time. Try again.",
    412: "Another commit was made at the same time. Try again.",
    413: "A file is too large for the Hub. Use smaller shards: --max-shard-size 2GB.",
    429: "Too many requests. Try again later.",
}
_REF = re.compile(r"[A-Za-z0-9_]([\w.\-/]*[\w\-])?")


class PublishError(RuntimeError):
    """An upload that failed; the repository is as it was, unless the message says what was done. One line."""


@dataclass(frozen=True)
class PublishedRevision:
    """What the Hub has now. `commit` is the full hash, None after a dry run; `pr_url` and `pr_revision` of a pull request."""

    repo_id: str
    commit: str | None
    url: str
    revision: str
    tag: str | None = None
    pr_url: str | None = None
    pr_revision: str | None = None


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    commit_message: str | None = None,
    retries: int = 4,
    retry_wait: float = 1.0,
    verify: bool = True,
    extra_files: Mapping[str, str | os.PathLike | bytes] | None = None,
) -> PublishedRevision:
    """Uploads a folder made by `build_folder` to a model repository, in one commit: all of it, or nothing.

    The folder is verified first (`verify_folder`; with `verify=False` only `check_folder`). The repository is made where
    there is none. Weights, code and processor of an earlier commit that the folder has not are removed in the same commit,
    other files stay. `revision` is a branch, made where there is none; `tag` names the new commit; with `create_pr` the commit
    is a pull request. `token` is by default that of the environment. `dry_run` asks nothing of the network.

    `extra_files`, by their paths in sub-folders of the repository, are added unchecked, in place of all that those sub-folders
    had: what a training needs to go on, which is no part of the model.

    Failures that may pass are tried `retries` more times, each from the start, after `retry_wait` seconds at first and twice as
    many each time. Publishing the same again makes no second commit; only a pull request whose answer is lost is not tried again.

    Raises:
        FolderError: for a folder that must not be published.
        ValueError: for a repo id, branch or tag that cannot be, and options that exclude each other.
        PublishError: where the Hub refuses, cannot be reached, or has a public repository for `private=True`.
    """
    check_target(repo_id, revision, tag, create_pr)
    if retries < 0:
        raise ValueError(f"retries={retries} must not be negative.")
    folder = Path(folder).expanduser()
    verify_folder(folder) if verify else check_folder(folder)
    branch = revision or constants.DEFAULT_REVISION
    if dry_run:
        return PublishedRevision(repo_id, None, f"{constants.ENDPOINT}/{repo_id}", branch, tag)
    api = HfApi(token=token)
    message = commit_message or f"Publish {repo_id.split('/')[-1]}"
    files = {path.name: path for path in sorted(folder.iterdir())} | dict(extra_files or {})
    return _Upload(api, files, repo_id, private, branch, tag, create_pr, message).run(retries, retry_wait)


class _Upload:
    """One publication, which may be run several times."""

    def __init__(self, api, files, repo_id, private, branch, tag, create_pr, message):
        self.api, self.files, self.repo_id, self.private = api, files, repo_id, private
        self.branch, self.tag, self.create_pr, self.message = branch, tag, create_pr, message
        self.published: str | None = None
        self.is_uncertain = False  # a pull request may have been made, and no answer came

    def run(self, retries: int, retry_wait: float) -> PublishedRevision:
        for attempt in itertools.count():
            try:
                return self._run_once()
            except PublishError:
                raise
            # HTTPError is httpx's or httpx2's, whichever huggingface_hub has; RuntimeError is what hf_xet raises.
            except (HTTPError, ConnectionError, TimeoutError, LocalTokenNotFoundError, RuntimeError) as raised:
                error = _cause(raised)
                if 400 <= (_status(error) or 0) < 500:
                    self.is_uncertain = False  # refused, and nothing done
                if attempt >= retries or not _may_pass(error) or self.is_uncertain:
                    raise _publish_error(error, self) from raised
                time.sleep(min(retry_wait * 2**attempt, _LONGEST_WAIT))

    def _run_once(self) -> PublishedRevision:
        self.is_uncertain = False
        head = self._prepare_repository()
        if self.tag:
            self._check_tag(head)
        operations = self._operations()
        if self.create_pr:
            self.api.preupload_lfs_files(
                self.repo_id, [o for o in operations if isinstance(o, CommitOperationAdd)], revision=self.branch, create_pr=True
            )  # fmt: skip
            self.is_uncertain = True
        commit = self.api.create_commit(
            self.repo_id, operations, commit_message=self.message, revision=self.branch, create_pr=self.create_pr,
            parent_commit=None if self.create_pr else head,
        )  # fmt: skip
        self.published, self.is_uncertain = commit.oid, False
        if self.tag:
            self._tag(commit.oid)
        url = f"{self.api.endpoint}/{self.repo_id}/tree/{commit.oid}"
        return PublishedRevision(
            self.repo_id, commit.oid, url, self.branch, self.tag, commit.pr_url, commit.pr_revision
        )  # fmt: skip

    def _prepare_repository(self) -> str:
        """Makes repository and branch where they are missing; the commit at the branch's head. Raises PublishError for a public one."""
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError as error:
            if self.create_pr:
                raise PublishError(
                    f"{self.repo_id}: no such repository, and a pull request needs one. Publish without --pr."
                ) from error
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            info = self.api.model_info(self.repo_id)
        if self.private and not info.private:
            raise PublishError(
                f"{self.repo_id} is public, and private was asked for. Make it private on the Hub, or choose another name."
            )
        if self.branch == constants.DEFAULT_REVISION:
            return info.sha
        if not self.branch.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return self.api.model_info(self.repo_id, revision=self.branch).sha

    def _operations(self) -> list[CommitOperation]:
        """Made anew for each attempt: huggingface_hub then leaves out what an earlier one has brought there."""
        there = self.api.list_repo_files(self.repo_id, revision=self.branch)
        folders = {name.split("/")[0] for name in self.files if "/" in name}
        replaced = [name for name in there if _REPLACED.fullmatch(name) or name.split("/")[0] in folders]
        stale = [name for name in replaced if name not in self.files]
        return [
            *(CommitOperationAdd(name, content) for name, content in self.files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]

    def _tagged(self) -> str | None:
        tags = self.api.list_repo_refs(self.repo_id).tags
        return next((each.target_commit for each in tags if each.name == self.tag), None)

    def _check_tag(self, head: str):
        """Raises PublishError where the tag names something else than these files, published before."""
        tagged = self._tagged()
        if tagged is not None and not (tagged == head and self._are_there(head)):
            raise PublishError(f"{self.repo_id}: the tag {self.tag} is there, on {tagged}. Choose another one.")

    def _are_there(self, commit: str) -> bool:
        siblings = self.api.model_info(self.repo_id, revision=commit, files_metadata=True).siblings
        there = {each.rfilename: each for each in siblings}
        return all(name in there and _is_same(there[name], content) for name, content in self.files.items())

    def _tag(self, commit: str):
        tagged = self._tagged()
        if tagged is None:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=commit)
        elif tagged != commit:
            raise PublishError(
                f"{self.repo_id}: published as {commit}, but the tag {self.tag} stays on {tagged}. Choose another tag."
            )


def _is_same(sibling: RepoSibling, content: str | os.PathLike | bytes) -> bool:
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        if sibling.lfs:
            return sha_fileobj(file).hex() == sibling.lfs.sha256
        return git_hash(file.read()) == sibling.blob_id


def check_target(repo_id: str, revision: str | None, tag: str | None, create_pr: bool):
    """Raises ValueError where a publication cannot go there, as far as can be told without asking the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r}: {one_line(error)}") from error
    if not isinstance(repo_id, str) or "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} must name user or organization too, such as org/name.")
    for what, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not _REF.fullmatch(name) or ".." in name):
            raise ValueError(
                f"{what}={name!r} is no name that git takes. Use letters, digits, dots and dashes, such as v1.0."
            )
    if tag and create_pr:
        raise ValueError("tag and pr exclude each other: tag the commit when the pull request is merged.")


def _cause(error: Exception) -> Exception:
    """What an error of an upload comes from: huggingface_hub raises RuntimeError from what the server answered."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """Of the answer, where there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether a failure may be over when it is tried again: the network, a busy server, or a commit of somebody else's."""
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    if (status := _status(error)) is not None:
        return status in _TRANSIENT
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError)


def _publish_error(error: Exception, upload: _Upload) -> PublishError:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set. Unset it to publish."
    elif isinstance(error, LocalTokenNotFoundError):
        text = _HTTP_FIXES[401]
    elif status is not None:
        text = f"the Hub answered {status}. " + _HTTP_FIXES.get(status, one_line(error, 300))
    else:
        text = f"the Hub could not be reached ({one_line(error, 300)})."
    if upload.published:
        state = f" Published as {upload.published}, but the tag was not made."
    elif upload.is_uncertain:
        state = " A pull request may have been opened: look before you try again."
    else:
        state = " Nothing was published."
    return PublishError(f"{upload.repo_id}: {text}{state}")
