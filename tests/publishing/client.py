"""Connection of huggingface_hub's client to the fake Hub, in this process and in others."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from .server import HubServer


ROOT = Path(__file__).parents[2]
TOKEN = "hf_writer"


def environment(server: HubServer, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    """Return the environment of a process that uses the fake Hub.

    Its caches are in `home`, and this package is not on its path.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    paths = [
        path for path in inherited.pop("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT
    ]
    return {
        **inherited, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths), **({"HF_TOKEN": token} if token else {}), **more,
    }  # fmt: skip


def connect(monkeypatch, server: HubServer, home: Path, token: str | None = TOKEN):
    """Make this process use the fake Hub. The client keeps its number of retries, but waits a hundredth of the time."""
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.08)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)  # for child processes
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


BLOCK_PACKAGE = """\
import sys

class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "samlight_hf":
            raise ModuleNotFoundError("samlight_hf is not installed here", name=name)

sys.meta_path.insert(0, _Blocked())
"""


def run_without_package(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Run the script in a process where samlight_hf cannot be imported, and return its output."""
    process = subprocess.run(
        [sys.executable, "-c", BLOCK_PACKAGE + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout
