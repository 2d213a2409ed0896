import pytest

from .client import connect
from .server import HubServer


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> HubServer:
    """The fake Hub, used by this process."""
    connect(monkeypatch, server, tmp_path / "home")
    return server
