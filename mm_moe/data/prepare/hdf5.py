"""The optional reader of HDF5 files."""

from __future__ import annotations

import importlib
from typing import Any

from mm_moe.errors import ConfigError


def need_h5py(what: str) -> Any:
    """The library h5py.

    Args:
        what: the files that it is needed for, in the plural.

    Raises:
        ConfigError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ConfigError(
            f"{what} are HDF5 files; install their reader with `pip install h5py`."
        ) from error
