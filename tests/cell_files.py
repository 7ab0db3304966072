"""Small files of cells, with counts that can be checked by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse


def counts(cells: int, genes: int, *, seed: int = 0) -> np.ndarray:
    """Whole numbers, most of them 0, at least one in each cell: float32 (cells, genes)."""
    rng = np.random.default_rng(seed)
    values = rng.poisson(1.5, (cells, genes)) * (rng.random((cells, genes)) < 0.4)
    values[np.arange(cells), np.arange(cells) % genes] += 1
    return values.astype(np.float32)


def write_h5ad(
    path: Path,
    values: np.ndarray,
    *,
    genes: list[str] | None = None,
    obs: dict[str, Any] | None = None,
    form: str = "csr",
    **more: Any,
) -> Path:
    """An AnnData file; form is csr, csc or dense."""
    matrix = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}.get(form, np.asarray)
    names = [f"c{n}" for n in range(len(values))]
    table = pd.DataFrame(obs or {}, index=pd.Index(names))
    var = pd.DataFrame(index=pd.Index(genes or [f"g{n}" for n in range(values.shape[1])]))
    path.unlink(missing_ok=True)  # an earlier one may still be open
    anndata.AnnData(matrix(values), obs=table, var=var, **more).write_h5ad(path)
    return path


def two_species(folder: Path, *, cells: int = 40) -> Path:
    """human.h5ad with 6 genes and mouse.h5ad with 4 genes and half the cells."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, genes, number in (("human", 6, cells), ("mouse", 4, cells // 2)):
        obs = {
            "donor": [f"{name}-{n % 5}" for n in range(number)],
            "cell_type": (["blood", "bone"] * number)[:number],
        }
        write_h5ad(folder / f"{name}.h5ad", counts(number, genes), obs=obs)
    return folder
