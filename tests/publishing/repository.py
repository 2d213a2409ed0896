"""Repositories of the fake Hub: commits, branches, tags, pull requests and large files."""

import base64
import dataclasses
import hashlib
import json
import threading
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import PurePosixPath


# Patterns in a new .gitattributes.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.npz", "*.tar", "*.zip")
MAX_REGULAR_BYTES = 10 * 2**20


class HubError(Exception):
    """An error response: status, message, and the Hub's X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status, self.message, self.code, self.content = status, message, code, content


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit. git stores only a pointer with the sha256 of a large file."""

    data: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.is_large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_oid


@dataclasses.dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]
    title: str
    description: str
    date: str


class Repository:
    """A repository: atomic commits, and branches, tags and `refs/pr/N` that point at them."""

    def __init__(self, repo_id: str, private: bool, large_files: dict[str, bytes]):
        self.repo_id, self.private = repo_id, private
        self.large_files = large_files
        self.lock = threading.RLock()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[str, str] = {}
        lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.branches["main"] = self._add(None, {".gitattributes": File(lines.encode(), False)}, "initial commit", "")

    def _add(self, parent: str | None, files: dict[str, File], title: str, description: str) -> str:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        content = [parent, title, description, date, sorted((path, file.git_oid) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), content]).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, files, title, description, date)
        return sha

    def find(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag, `refs/pr/N`, or a full sha."""
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for refs in (self.branches, self.tags, self.pull_requests):
            if (sha := refs.get(revision) or refs.get(short)) is not None:
                return self.commits[sha]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.find(revision).files.items()}

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits

    def upload_mode(self, path: str, size: int, sample: bytes) -> str:
        is_large = size > MAX_REGULAR_BYTES or b"\0" in sample
        return "lfs" if is_large or any(fnmatch(PurePosixPath(path).name, p) for p in LFS_PATTERNS) else "regular"

    def commit(self, revision: str, lines: list[dict], create_pr: bool = False) -> tuple[str, int | None]:
        """Apply the lines of a commit's ndjson, all of them or none.

        Returns the sha, and the number of the pull request, if any.
        """
        if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
            raise HubError(400, "the first line must be a header with a summary")
        header = lines[0]["value"]
        with self.lock:
            parent = self.find(revision)
            if revision not in self.branches and revision not in self.pull_requests:
                raise HubError(400, f"{revision} is no branch: nothing can be committed to it")
            if header.get("parentCommit") not in (None, parent.sha):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            sha = self._add(parent.sha, files, header["summary"], header.get("description", ""))
            if create_pr:
                number = len(self.pull_requests) + 1
                self.pull_requests[f"refs/pr/{number}"] = sha
                return sha, number
            (self.branches if revision in self.branches else self.pull_requests)[revision] = sha
            return sha, None

    def _apply(self, files: dict[str, File], key: str, value: dict):
        path = value["path"]
        if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            if len(data) > MAX_REGULAR_BYTES:
                raise HubError(400, f"{path} is larger than 10 MiB and must be an LFS file")
            files[path] = File(data, False)
        elif key == "lfsFile":
            if len(self.large_files.get(value["oid"], b"")) != value["size"]:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.large_files[value["oid"]], True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder" and any(name.startswith(path.rstrip("/") + "/") for name in files):
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        elif key in ("deletedFile", "deletedFolder"):
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"unknown operation {key}")

    def add_ref(self, refs: dict[str, str], name: str, revision: str):
        with self.lock:
            if name in refs:
                raise HubError(409, f"Reference already exists: {name}")
            refs[name] = self.find(revision).sha

    def remove_ref(self, refs: dict[str, str], name: str):
        with self.lock:
            if refs.pop(name, None) is None:
                raise HubError(404, f"Reference not found: {name}", "RevisionNotFound")

    # JSON responses

    def info(self, revision: str, blobs: bool) -> dict:
        commit = self.find(revision)
        return {
            "_id": hashlib.sha1(self.repo_id.encode()).hexdigest()[:24], "id": self.repo_id, "modelId": self.repo_id,
            "author": self.repo_id.split("/")[0], "sha": commit.sha, "private": self.private, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": self.history()[-1].date,
            "lastModified": commit.date,
            "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
        }  # fmt: skip

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        prefix, entries = f"{folder}/" if folder else "", {}
        for path, file in sorted(self.find(revision).files.items()):
            if not path.startswith(prefix):
                continue
            parents = [
                str(parent) for parent in reversed(PurePosixPath(path).parents[:-1]) if len(str(parent)) > len(folder)
            ]
            for parent in parents:
                entries[parent] = {
                    "type": "directory",
                    "path": parent,
                    "oid": hashlib.sha1(parent.encode()).hexdigest(),
                    "size": 0,
                }
            entries[path] = {"type": "file", "path": path, "oid": file.git_oid, **_described(file)}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return [entry for path, entry in entries.items() if recursive or "/" not in path[len(prefix) :]]

    def paths_info(self, revision: str, paths: list[str]) -> list[dict]:
        return [entry for entry in self.tree(revision, "", recursive=True) if entry["path"] in paths]

    def refs(self, with_pull_requests: bool) -> dict:
        groups = {"branches": ("refs/heads/", self.branches), "tags": ("refs/tags/", self.tags), "converts": ("", {})}
        if with_pull_requests:
            groups["pullRequests"] = ("", self.pull_requests)
        return {
            group: [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]
            for group, (prefix, refs) in groups.items()
        }


def _sibling(path: str, file: File, blobs: bool) -> dict:
    if not blobs:
        return {"rfilename": path}
    lfs = (
        {"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}}
        if file.is_large
        else {}
    )
    return {"rfilename": path, "blobId": file.git_oid, "size": len(file.data), **lfs}


def _described(file: File) -> dict:
    if not file.is_large:
        return {"size": len(file.data)}
    lfs = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return {"size": len(file.data), "lfs": lfs}
