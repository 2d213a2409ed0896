"""Routes of the fake Hub. Spaces have those of models: `server` rewrites their paths.

Each function gets the request and the named groups of its pattern, and returns JSON content, or (status, headers,
body).
"""

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs

import yaml

from .repository import File, HubError, Repository


Route = tuple[str, re.Pattern, Callable]
ROUTES: list[Route] = []
REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"


def route(method: str, pattern: str):
    def add(function):
        ROUTES.append((method, re.compile(pattern.replace("REPO", REPO)), function))
        return function

    return add


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(request):
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    organizations = [{"name": name, "type": "org"} for name in request.account.organizations]
    role = "write" if request.account.can_write else "read"
    access = {"accessToken": {"displayName": "test", "role": role}}
    return {"type": "user", "name": request.account.name, "orgs": organizations, "auth": access}


@route("POST", "/api/repos/create")
def create_repo(request):
    payload = request.json()
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    namespace = payload.get("organization") or request.account.name
    request.check_writer(namespace)
    kind = {None: "", "model": "", "space": "spaces/"}.get(payload.get("type"))
    if kind is None or (kind and payload.get("sdk") != "gradio"):
        raise HubError(400, "the fake Hub has models, and Spaces with gradio")
    repo_id = f"{kind}{namespace}/{payload['name']}"
    url = f"{request.hub.url}/{repo_id}"
    with request.hub._lock:
        if repo_id in request.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        request.hub.repositories[repo_id] = Repository(repo_id, private, request.hub.large_files)
    return {"url": url, "name": repo_id, "id": repo_id}


@route("GET", "/api/models/REPO/auth-check(/write)?")
def auth_check(request, repo):
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    """Check a card's metadata as the Hub does, as far as this package's cards are concerned."""
    content = request.json()["content"]
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    errors = []
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        metadata, errors = {}, [f"not YAML: {error}"]
    if not isinstance(metadata, dict):
        metadata, errors = {}, [*errors, "the metadata must be a mapping"]
    repo_name = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("base_model", "datasets"):
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not repo_name.fullmatch(value):
                errors.append(f'"{key}" with value {value!r} is not valid: use an id of the Hub')
    if "license" in metadata and not re.fullmatch(r"[a-z0-9.-]+", str(metadata["license"])):
        errors.append(f'"license" must be one of the Hub\'s identifiers, not {metadata["license"]!r}')
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        errors.append('"license_name" is required where license is other')
    for index, entry in enumerate(metadata.get("model-index") or []):
        if not entry.get("name") or not all(
            {"task", "dataset", "metrics"} <= result.keys() for result in entry["results"]
        ):
            errors.append(f"model-index[{index}] needs a name, and a task, a dataset and metrics for each result")
    answer = {"errors": [{"message": error} for error in errors], "warnings": []}
    return (400 if errors else 200), {}, json.dumps(answer).encode()


# Upload


@route("POST", "/api/models/REPO/preupload/(?P<revision>[^/]+)")
def preupload(request, repo, revision):
    files = repo.find(revision).files
    answer = []
    for file in request.json()["files"]:
        path = file["path"]
        mode = repo.upload_mode(path, file["size"], base64.b64decode(file["sample"]))
        known = files[path].etag if path in files else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return {"files": answer}


@route("POST", r"/REPO\.git/info/lfs/objects/batch")
def lfs_batch(request, repo):
    objects = []
    for entry in request.json()["objects"]:
        oid, size = entry["oid"], entry["size"]
        answer = {"oid": oid, "size": size}
        if oid not in request.hub.large_files:
            answer["actions"] = {
                "upload": {"href": f"{request.hub.storage_url}/storage/upload/{oid}?size={size}"},
                "verify": {"href": f"{request.hub.url}/{repo.repo_id}.git/info/lfs/verify"},
            }
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/storage/upload/(?P<oid>[0-9a-f]{64})")
def lfs_put(request, oid):
    if "Content-Length" not in request.headers:
        raise HubError(411, "MissingContentLength")
    if File(request.body, True).sha256 != oid or request.query["size"] != [str(len(request.body))]:
        raise HubError(400, "BadDigest")
    request.hub.large_files[oid] = request.body
    return 200, {"ETag": f'"{oid[:32]}"'}, b""


@route("POST", r"/REPO\.git/info/lfs/verify")
def lfs_verify(request, repo):
    entry = request.json()
    if len(request.hub.large_files.get(entry["oid"], b"")) != entry["size"]:
        raise HubError(404, "the object has not arrived")
    return {}


@route("POST", "/api/models/REPO/commit/(?P<revision>[^/]+)")
def commit(request, repo, revision):
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    sha, number = repo.commit(revision, lines, create_pr=request.query.get("create_pr") == ["1"])
    url = f"{request.hub.url}/{repo.repo_id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{url}/discussions/{number}"
    return answer


@route("POST", "/api/models/REPO/branch/(?P<name>[^/]+)")
def create_branch(request, repo, name):
    repo.add_ref(repo.branches, name, request.json().get("startingPoint", "main"))
    return {}


@route("DELETE", "/api/models/REPO/branch/(?P<name>[^/]+)")
def delete_branch(request, repo, name):
    repo.remove_ref(repo.branches, name)
    return {}


@route("POST", "/api/models/REPO/tag/(?P<revision>[^/]+)")
def create_tag(request, repo, revision):
    repo.add_ref(repo.tags, request.json()["tag"], revision)
    return {}


@route("DELETE", "/api/models/REPO/tag/(?P<name>[^/]+)")
def delete_tag(request, repo, name):
    repo.remove_ref(repo.tags, name)
    return {}


# Download


@route("GET", "/api/models/REPO(/revision/(?P<revision>[^/]+))?")
def model_info(request, repo, revision):
    return repo.info(revision or "main", blobs="blobs" in request.query)


@route("GET", "/api/models/REPO/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(request, repo, revision, folder):
    return repo.tree(
        revision, folder.rstrip("/"), request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    )


@route("POST", "/api/models/REPO/paths-info/(?P<revision>[^/]+)")
def paths_info(request, repo, revision):
    return repo.paths_info(revision, parse_qs(request.body.decode()).get("paths", []))


@route("GET", "/api/models/REPO/refs")
def refs(request, repo):
    return repo.refs("include_prs" in request.query)


@route("GET", "/api/models/REPO/commits/(?P<revision>[^/]+)")
def commits(request, repo, revision):
    author = [{"user": repo.repo_id.split("/")[0]}]
    return [
        {"id": c.sha, "title": c.title, "message": c.description, "authors": author, "date": c.date}
        for c in repo.history(revision)
    ]


@route("GET", "/REPO/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request, repo, revision, path):
    commit, file = repo.file(revision, path)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.is_large:
        headers |= {
            "X-Linked-Size": str(len(file.data)),
            "X-Linked-ETag": f'"{file.sha256}"',
            "Location": f"{request.hub.storage_url}/storage/download/{file.sha256}",
        }
        return 302, headers, b""
    return 200, {**headers, "Content-Type": "text/plain; charset=utf-8"}, file.data


@route("GET", "/storage/download/(?P<oid>[0-9a-f]{64})")
def lfs_get(request, oid):
    data = request.hub.large_files[oid]
    start = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    if start is None:
        return 200, headers, data
    first, last = int(start[1]), min(int(start[2] or len(data) - 1), len(data) - 1)
    return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
