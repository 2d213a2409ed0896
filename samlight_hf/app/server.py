"""The server of `samlight app`: a page on a port of this machine, with files in a private folder."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .body_limit import BodyLimit
from .limits import Limits
from .segmenter import Segmenter


if TYPE_CHECKING:
    from .page import Page

LOOPBACK = "127.0.0.1"
_SWEEP_SECONDS = 15
_THREADS = 8  # of gradio: more than events that run at once, and few, since each keeps memory that it has used


class Server(NamedTuple):
    """A running server.

    Attributes:
        url: Of the page.
        page: With its sessions.
    """

    url: str
    page: "Page"


def check_port(host: str, port: int):
    """Raise ValueError where the server could not listen, before a model is loaded. Port 0 stands for any free one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} must be from 0, any free one, to 65535.")
    try:
        with _listen(host, port):
            pass
    except OSError as error:
        raise ValueError(
            f"the server cannot listen on {_in_url(host)}:{port} ({error.strerror or error}). Choose another --port, "
            "such as 0 for any free one, or another --host."
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    bare = host.removeprefix("[").removesuffix("]")
    return socket.create_server((bare, port), family=socket.AF_INET6 if ":" in bare else socket.AF_INET)


def _in_url(host: str) -> str:
    """Return a host as addresses of pages and gradio have it: of IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def require_gradio():
    """Raise ImportError, which says what to install, where gradio is missing."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the app needs gradio: pip install "samlight-hf[app]".') from error


@contextlib.contextmanager
def running(
    segmenter: Segmenter,
    model_name: str,
    *,
    host: str = LOOPBACK,
    port: int = 7860,
    limits: Limits | None = None,
    thresholds: tuple[float, float] = (0.88, 0.95),
    examples: Sequence[Path] = (),
    points_per_side: int = 16,
    in_browser: bool = False,
) -> Iterator[Server]:
    """Serve the page as long as the context lasts. Nothing is sent to other machines, and no file is left.

    Args:
        segmenter: The model.
        model_name: Shown on the page.
        host: Address to listen on: 127.0.0.1 or ::1 is this machine alone, 0.0.0.0 or :: all networks.
        port: 0 is any free one.
        limits: Default: `Limits()`.
        thresholds: See `Page`.
        examples: See `Page`.
        points_per_side: See `Page`.
        in_browser: Open the page in a browser.

    Raises:
        ImportError: Without gradio.
        ValueError: Where the port cannot be had.
    """
    require_gradio()
    check_port(host, port)
    limits = Limits() if limits is None else limits
    with tempfile.TemporaryDirectory(prefix="samlight-app-") as folder, _environment(GRADIO_TEMP_DIR=folder):
        from starlette.middleware import Middleware

        from .page import CSS, THEME, Page

        page = Page(segmenter, model_name, limits, thresholds, examples, points_per_side)
        if port == 0:
            with _listen(host, 0) as found:
                port = found.getsockname()[1]
        _, url, _ = page.blocks.launch(
            server_name=_in_url(host), server_port=port, inbrowser=in_browser, share=False, quiet=True,
            prevent_thread_lock=True, max_threads=_THREADS, max_file_size=f"{limits.upload_mb}mb",
            state_session_capacity=4 * limits.sessions, allowed_paths=[], enable_monitoring=False,
            run_history=False, mcp_server=False, ssr_mode=False, pwa=False,
            strict_cors=True, footer_links=["api"], theme=THEME, css=CSS, show_error=False,
            app_kwargs={"middleware": [Middleware(BodyLimit, upload_mb=limits.upload_mb)]},
        )  # fmt: skip
        stopped = threading.Event()

        def sweep():
            while not stopped.wait(_SWEEP_SECONDS):
                page.store.sweep()

        threading.Thread(target=sweep, name="samlight-sweep", daemon=True).start()
        try:
            yield Server(url.replace("[::]", "[::1]"), page)  # all networks are no address for a browser
        finally:
            stopped.set()
            page.blocks.close(verbose=False)


def serve(segmenter: Segmenter, model_name: str, *, host: str = LOOPBACK, **options):
    """Serve the page until Ctrl-C or a SIGTERM, see `running`, and print where it is."""
    with contextlib.suppress(ValueError):  # in another thread than the main one
        # Not by a SIGINT: a shell lets what it starts in the background ignore that.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running(segmenter, model_name, host=host, **options) as server:
        try:  # a signal may come as soon as the first line is out
            print(f"Open {server.url} in a browser. Ctrl-C stops the server.", flush=True)
            if host not in (LOOPBACK, "localhost", "::1", "[::1]"):
                print(f"It listens on {host}: whoever reaches this machine can use it.", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped.")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
