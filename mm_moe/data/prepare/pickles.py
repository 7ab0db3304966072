"""Pickles of arrays from strangers: numpy arrays and plain containers, nothing that runs.

A pickle names the functions that rebuild it, and any importable function may stand there. Only
those that rebuild numpy arrays are answered here; every other name is refused before it is called.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.errors import DataError

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class RefusedNameError(Exception):
    """A pickle asks for something that is no plain data."""


def _latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does in pickles of bytes; other codecs are not needed for data."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise RefusedNameError(f"_codecs.encode with {encoding!r}")
    return text.encode("latin-1")


def array_name(module: str, name: str) -> Any:
    """The function behind a name that numpy arrays are rebuilt with.

    Raises:
        RefusedNameError: any other name.
    """
    if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
        return getattr(np, name)
    if (module, name) == ("_codecs", "encode"):
        return _latin1
    if module in _ARRAY_MODULES and name in ("_reconstruct", "scalar"):
        return getattr(importlib.import_module("numpy._core.multiarray"), name)
    if module in _BUFFER_MODULES and name == "_frombuffer":
        return getattr(importlib.import_module("numpy._core.numeric"), name)
    raise RefusedNameError(f"{module}.{name}")


class _PlainUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and scalars; lists, dicts, texts and numbers need no name at all."""

    def find_class(self, module: str, name: str) -> Any:
        """The function behind a name of the short list; RefusedNameError for any other."""
        return array_name(module, name)


def read_arrays(path: Path) -> Any:
    """The content of a pickle of arrays; those written by Python 2 too.

    Raises:
        DataError: it asks for anything but arrays and plain containers (named), or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except RefusedNameError as error:
        raise DataError(
            f"{path} asks for {error}, which is no plain data; it is not read, because a pickle "
            "can run any program. Take the file from its publisher."
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is no pickle of arrays: {type(error).__name__}.") from error
