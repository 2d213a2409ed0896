"""A fake Hub: an HTTP server on this machine for huggingface_hub's own client.

It implements the properties of the Hub that a publisher relies on: a commit is atomic, is refused unless its parent is
the branch's head, and may only refer to large files that were uploaded completely; tags, branches and pull requests are
refs; private repositories are hidden from others; the metadata of a model card is checked. Large files use plain LFS
(HF_HUB_DISABLE_XET=1). `HubServer.fail` injects faults.
"""

import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .repository import HubError, Repository
from .routes import ROUTES


class Account(NamedTuple):
    name: str
    organizations: tuple[str, ...] = ()
    can_write: bool = True


class Request(NamedTuple):
    method: str
    path: str
    status: int | None  # None where the connection was cut


@dataclass
class Fault:
    """A fault injected into matching requests; see `HubServer.fail`."""

    method: str
    pattern: str
    status: int | None
    cut: str | None
    delay: float
    until: threading.Event | None
    skip: int
    times: int


class HubServer:
    """Context manager that runs the server. `url` is the value for HF_ENDPOINT.

    `accounts` maps tokens to accounts: "hf_writer" may write to the namespaces "user" and "org"; "hf_reader" only
    reads.
    """

    def __init__(self):
        self.accounts = {
            "hf_writer": Account("user", ("org",)),
            "hf_reader": Account("user", ("org",), can_write=False),
        }
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._httpd = _Listener(("127.0.0.1", 0), _Handler)
        self._httpd.daemon_threads, self._httpd.hub = True, self
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        # Large files are on another host (a second name of this one): the client treats such redirects differently.
        self.storage_url = f"http://localhost:{self._httpd.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        """Stop listening. May be called twice."""
        self._httpd.shutdown()
        self._httpd.server_close()

    def repository(self, repo_id: str) -> Repository:
        return self.repositories[repo_id]

    def fail(
        self,
        method: str,
        pattern: str,
        status: int | None = None,
        *,
        cut: str | None = None,
        delay: float = 0,
        until: threading.Event | None = None,
        skip: int = 0,
        times: int = 10**9,
    ):
        """Inject a fault into the next `times` requests whose path matches `pattern`, after `skip` unaffected ones.

        Args:
            method: HTTP method.
            pattern: Regular expression, searched in the path.
            status: Status of the response, instead of carrying out the request.
            cut: "request" closes the connection after half of the body was read, without carrying out the request;
                "response" carries it out and closes the connection in the middle of the response.
            delay: Seconds to wait first.
            until: Event to wait for first, for at most a minute.
            skip: Number of matching requests that are not affected.
            times: Number of requests that are affected.
        """
        assert cut in (None, "request", "response")
        self._faults.append(Fault(method, pattern, status, cut, delay, until, skip, times))

    def heal(self):
        """Remove all faults."""
        self._faults.clear()

    def count(self, method: str, pattern: str) -> int:
        return sum(method == request.method and bool(re.search(pattern, request.path)) for request in self.requests)

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method == method and re.search(fault.pattern, path) and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Ignore clients that were stopped in the middle of a request."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together

    def log_message(self, *arguments):
        pass

    def _answer(self):
        self.hub: HubServer = self.server.hub
        self.address = urlsplit(self.path)
        self.query = parse_qs(self.address.query)
        fault = self.hub._fault(self.command, self.address.path)
        status, is_cut = None, False
        try:
            if fault:
                time.sleep(fault.delay)
            if fault and fault.until and not fault.until.wait(timeout=60):
                raise _Cut
            length = int(self.headers.get("Content-Length", 0))
            if fault and fault.cut == "request":
                self.rfile.read(length // 2)
                raise _Cut
            self.body = self.rfile.read(length)
            if len(self.body) < length:
                raise _Cut
            status, headers, content = self._failure(fault) if fault and fault.status else self._dispatch()
            if fault and fault.cut == "response":
                status = self._send_half(status, headers, content)
                raise _Cut
            self._send(status, headers, content)
        except (_Cut, ConnectionError):
            is_cut = self.close_connection = True
        finally:
            self.hub.requests.append(Request(self.command, self.path, status))
        if is_cut:  # last, because a test may count the requests once the connection is closed
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _failure(self, fault: Fault) -> tuple[int, dict, bytes]:
        message = {413: "Payload Too Large", 401: "Invalid username or password.", 409: "Conflict"}.get(
            fault.status, "fault"
        )
        return fault.status, {}, json.dumps({"error": message}).encode()

    def _dispatch(self) -> tuple[int, dict, bytes]:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            self.account = self._authenticate()
            is_space = self.address.path.startswith(("/api/spaces/", "/spaces/"))
            path = self.address.path.replace("/api/spaces/", "/api/models/").removeprefix("/spaces")
            for route_method, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and method == route_method:
                    arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    if "repo_id" in arguments:
                        arguments["repo"] = self._repository(
                            "spaces/" * is_space + arguments.pop("repo_id"), writes=_is_write(method, self.address.path)
                        )
                    result = function(self, **arguments)
                    return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            return error.status, headers, json.dumps({"error": error.message, **error.content}).encode()

    def _authenticate(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def check_writer(self, namespace: str):
        if self.account is None:
            raise HubError(401, "Invalid username or password.")
        if not self.account.can_write or namespace not in (self.account.name, *self.account.organizations):
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def _repository(self, repo_id: str, writes: bool) -> Repository:
        repo = self.hub.repositories.get(repo_id)
        namespace = repo_id.removeprefix("spaces/").split("/")[0]
        is_member = self.account is not None and namespace in (self.account.name, *self.account.organizations)
        if repo is None or (repo.private and not is_member):
            raise HubError(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        if writes:
            self.check_writer(namespace)
        return repo

    def json(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error

    def _send_half(self, status: int, headers: dict, content: bytes) -> None:
        """Send half of the response; of an empty one, nothing."""
        if content:
            self._send(status, {"Content-Length": str(len(content)), **headers}, content[: len(content) // 2])
            self.wfile.flush()

    def _send(self, status: int, headers: dict, content: bytes):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _is_write(method: str, path: str) -> bool:
    return path.endswith("/auth-check/write") or (method != "GET" and "/paths-info/" not in path)
