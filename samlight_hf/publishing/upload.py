"""Upload of a verified checkpoint folder to the Hub in one commit."""

import io
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi, constants
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
from .checks import LOADED_FILES, check_folder
from .verify import verify_folder


__all__ = ["PublishError", "PublishedRevision", "check_target", "publish"]

# HTTPError is that of httpx or httpx2, whichever huggingface_hub uses; hf_xet raises RuntimeError.
HUB_ERRORS = (HTTPError, ConnectionError, TimeoutError, LocalTokenNotFoundError, RuntimeError)
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

Result = TypeVar("Result")
_File: TypeAlias = str | os.PathLike | bytes  # path or content


class PublishError(RuntimeError):
    """Error for a failed upload. The message is one line; it says so where the repository was changed."""


@dataclass(frozen=True)
class PublishedRevision:
    """Result of a publication.

    Attributes:
        repo_id: Name of the repository ("org/name").
        commit: Full hash of the commit; None after a dry run.
        url: Address of the commit, or of the repository after a dry run.
        revision: Branch that was published on.
        tag: Tag of the commit.
        pr_url: Address of the pull request.
        pr_revision: Revision of the pull request ("refs/pr/1").
    """

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
    """Upload a folder made by `build_folder` to a model repository in one commit: all of it, or nothing.

    The repository is created where it does not exist. Weights, code and processor files of an earlier commit that are
    not in the folder are deleted in the same commit; other files stay. Publishing the same content again makes no
    second commit.

    Args:
        folder: Folder made by `build_folder`.
        repo_id: Name of the repository ("org/name").
        private: Create a private repository, and refuse an existing public one.
        revision: Branch, created where it does not exist. Default: the main branch.
        tag: Name for the new commit.
        create_pr: Open a pull request instead of committing to the branch.
        token: Hub token. Default: that of the environment.
        dry_run: Verify only, without using the network.
        commit_message: Default: "Publish " and the name of the repository.
        retries: Number of retries, each from the start, after a failure that may be temporary. A pull request whose
            response was lost is not retried: it may be open.
        retry_wait: Seconds before the first retry; doubled for each further one, to at most 60.
        verify: Run `verify_folder` first. With False, only `check_folder`.
        extra_files: Files, by their paths in sub-folders of the repository, that are uploaded unchecked and replace the
            content of those sub-folders: states that a training needs to resume, which are not part of the model.

    Raises:
        FolderError: For a folder that must not be published.
        ValueError: For an invalid repo id, branch or tag, and for options that exclude each other.
        PublishError: Where the Hub refuses or cannot be reached, or where `private=True` and the repository is public.
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
    files: dict[str, _File] = {path.name: path for path in sorted(folder.iterdir())}
    files.update(extra_files or {})
    return _Upload(api, files, repo_id, private, branch, tag, create_pr, message).run(retries, retry_wait)


@dataclass
class _Upload:
    """A publication. Each attempt runs it from the start."""

    api: HfApi
    files: Mapping[str, _File]  # by their paths in the repository
    repo_id: str
    private: bool | None
    branch: str
    tag: str | None
    create_pr: bool
    message: str
    published: str | None = None  # the commit, once it is made
    is_uncertain: bool = False  # a pull request may have been opened, but no response came

    def run(self, retries: int, retry_wait: float) -> PublishedRevision:
        """Publish, with retries; raise PublishError where that fails."""

        def may_retry(error: Exception) -> bool:
            if 400 <= (_status(error) or 0) < 500:
                self.is_uncertain = False  # refused: nothing was done
            return _may_pass(error) and not self.is_uncertain

        return retried(self._run_once, retries, retry_wait, lambda error: _publish_error(error, self), may_retry)

    def _run_once(self) -> PublishedRevision:
        self.is_uncertain = False
        head = self._prepare_repository()
        if self.tag:
            self._check_tag(head)
        operations = self._operations()
        if self.create_pr:
            additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
            self.api.preupload_lfs_files(self.repo_id, additions, revision=self.branch, create_pr=True)
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
        """Create repository and branch where they are missing, and return the branch's head commit.

        Raises PublishError for a public repository where a private one was asked for.
        """
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
                f"{self.repo_id} is public, and private was asked for. Make it private on the Hub, or choose another "
                "name."
            )
        if self.branch == constants.DEFAULT_REVISION:
            return info.sha
        if not self.branch.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return self.api.model_info(self.repo_id, revision=self.branch).sha

    def _operations(self) -> list[CommitOperation]:
        """Return new operations for each attempt; huggingface_hub skips files that an earlier attempt has uploaded."""
        remote_names = self.api.list_repo_files(self.repo_id, revision=self.branch)
        folders = {name.split("/")[0] for name in self.files if "/" in name}
        replaced = [name for name in remote_names if LOADED_FILES.fullmatch(name) or name.split("/")[0] in folders]
        stale = [name for name in replaced if name not in self.files]
        return [
            *(CommitOperationAdd(name, content) for name, content in self.files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]

    def _tagged_commit(self) -> str | None:
        tags = self.api.list_repo_refs(self.repo_id).tags
        return next((tag.target_commit for tag in tags if tag.name == self.tag), None)

    def _check_tag(self, head: str):
        """Raise PublishError where the tag exists, unless it names a head commit with exactly these files."""
        tagged = self._tagged_commit()
        if tagged is not None and not (tagged == head and self._has_files(head)):
            raise PublishError(f"{self.repo_id}: the tag {self.tag} is there, on {tagged}. Choose another one.")

    def _has_files(self, commit: str) -> bool:
        siblings = self.api.model_info(self.repo_id, revision=commit, files_metadata=True).siblings
        remote = {sibling.rfilename: sibling for sibling in siblings}
        return all(name in remote and _is_same(remote[name], content) for name, content in self.files.items())

    def _tag(self, commit: str):
        tagged = self._tagged_commit()
        if tagged is None:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=commit)
        elif tagged != commit:
            raise PublishError(
                f"{self.repo_id}: published as {commit}, but the tag {self.tag} stays on {tagged}. Choose another tag."
            )


def _is_same(sibling: RepoSibling, content: _File) -> bool:
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        if sibling.lfs:
            return sha_fileobj(file).hex() == sibling.lfs.sha256
        return git_hash(file.read()) == sibling.blob_id


def check_target(repo_id: str, revision: str | None, tag: str | None, create_pr: bool):
    """Raise ValueError for a target that cannot be published to, without asking the Hub.

    Args:
        repo_id: Name of the repository, with user or organization.
        revision: Name of the branch.
        tag: Name of the tag; excludes a pull request.
        create_pr: Whether a pull request is to be opened.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r}: {one_line(error)}") from error
    if not isinstance(repo_id, str) or "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} must name user or organization too, such as org/name.")
    for option, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not _REF.fullmatch(name) or ".." in name):
            raise ValueError(
                f"{option}={name!r} is no name that git takes. Use letters, digits, dots and dashes, such as v1.0."
            )
    if tag and create_pr:
        raise ValueError("tag and pr exclude each other: tag the commit when the pull request is merged.")


def retried(
    run: Callable[[], Result],
    retries: int,
    retry_wait: float,
    told: Callable[[Exception], Exception],
    may_retry: Callable[[Exception], bool] | None = None,
) -> Result:
    """Call the Hub, and again after failures that may pass.

    Args:
        run: Each attempt calls it from the start. Its PublishErrors are raised as they are.
        retries: Number of retries.
        retry_wait: Seconds before the first retry; doubled for each further one, to at most 60.
        told: Returns what is raised for an error of the Hub.
        may_retry: Returns whether a retry may succeed. Default: after a network error, a busy server, or a concurrent
            commit.
    """
    attempt = 0
    while True:
        try:
            return run()
        except PublishError:
            raise
        except HUB_ERRORS as raised:
            error = _cause(raised)
            if not (may_retry or _may_pass)(error) or attempt >= retries:
                raise told(error) from raised
            time.sleep(min(retry_wait * 2**attempt, _LONGEST_WAIT))
            attempt += 1


def _cause(error: Exception) -> Exception:
    """Return the error behind huggingface_hub's RuntimeError: the server's response, where there was one."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """Return the HTTP status of the response, where there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Return whether a retry may succeed: after a network error, a busy server, or a concurrent commit."""
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    if (status := _status(error)) is not None:
        return status in _TRANSIENT
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError)


def reason_of(raised: Exception) -> str:
    """Return a sentence that says why the Hub did not do something, with the fix."""
    error = _cause(raised)
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to publish."
    if isinstance(error, LocalTokenNotFoundError):
        return _HTTP_FIXES[401]
    if status is not None:
        return f"the Hub answered {status}. " + _HTTP_FIXES.get(status, one_line(error, 300))
    return f"the Hub could not be reached ({one_line(error, 300)})."


def _publish_error(error: Exception, upload: _Upload) -> PublishError:
    if upload.published:
        state = f" Published as {upload.published}, but the tag was not made."
    elif upload.is_uncertain:
        state = " A pull request may have been opened: look before you try again."
    else:
        state = " Nothing was published."
    return PublishError(f"{upload.repo_id}: {reason_of(error)}{state}")
