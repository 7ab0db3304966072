"""A Hub of one's own."""

import pytest

from tests.hub_server import HubServer


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running Hub, to which the processes that are started now will speak."""
    with HubServer() as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
