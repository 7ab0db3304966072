"""pandas tables from pickles of strangers, through a reader that rebuilds tables and nothing else.

A pickle names the functions that rebuild it, and any importable function may stand there. Only
pandas' and numpy's own for tables of numbers, texts and categories are answered here; every other
name is refused before it is called.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

from mm_moe.data.prepare.pickles import RefusedNameError, array_name
from mm_moe.errors import DataError

TABLE_NAMES = {  # module -> names that a table of texts, numbers and categories is made of
    "builtins": ("slice",),
    "pandas.core.frame": ("DataFrame",),
    "pandas.core.series": ("Series",),
    "pandas.core.internals.managers": ("BlockManager", "SingleBlockManager"),
    "pandas._libs.internals": ("_unpickle_block",),
    "pandas.core.internals.blocks": ("new_block",),
    "pandas.core.indexes.base": ("_new_Index", "Index"),
    "pandas.core.indexes.range": ("RangeIndex",),
    "pandas.core.indexes.category": ("CategoricalIndex",),
    "pandas.core.arrays.categorical": ("Categorical",),
    "pandas.core.dtypes.dtypes": ("CategoricalDtype",),
    "pandas._libs.arrays": ("__pyx_unpickle_NDArrayBacked",),
}


class _TableUnpickler(pickle.Unpickler):
    """Rebuilds tables."""

    def find_class(self, module: str, name: str) -> Any:
        """The function behind a name of the short list; RefusedNameError for any other."""
        if name in TABLE_NAMES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        return array_name(module, name)


def read_table(path: Path) -> Any:
    """The table of a pickle, as a pandas `DataFrame`.

    Raises:
        DataError: it asks for anything that is no part of a table (named), is damaged, or holds
            something else.
    """
    import pandas as pd

    try:
        with path.open("rb") as file:
            table = _TableUnpickler(file).load()
    except RefusedNameError as error:
        raise DataError(
            f"{path} asks for {error}, which is no part of a table; it is not read, because a "
            "pickle can run any program. Take the table as Parquet or CSV from its publisher."
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is no pickle of a table: {type(error).__name__}.") from error
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{path} holds a {type(table).__name__}; it should be a table of pandas.")
    return table
