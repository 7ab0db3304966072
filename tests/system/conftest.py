"""A clean place and environment for the programs of this folder's tests."""

import os
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def one_process():
    """As started by hand; what a program sets in the environment goes with the test."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
