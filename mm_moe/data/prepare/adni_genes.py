"""ADNI's genotypes: allele counts of the participants, from an AnnData file or from PLINK's.

Files in `genomic/`: genomic_merged.h5ad, counts {0, 1, 2, NaN} (people, variants) with the PTID as
index of `obs`; or one set .bed, .bim, .fam, whose individual ids are the PTIDs
(see `mm_moe.data.prepare.plink` for how several sets become one).

N people, D variants.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.events import MISSING_DOSAGE
from mm_moe.data.prepare.plink import PlinkSet
from mm_moe.errors import ConfigError, DataError

FILE = "genomic_merged.h5ad"
PER_READ = 64  # people read at once
WRONG = 255  # a cell that is no count


class Genotypes:
    """Allele counts by participant.

    Args:
        counts_ND: uint8, `MISSING_DOSAGE` where not called, `WRONG` where the file has no count.
        names: the participants.
        skipped: variants that were left out.
    """

    def __init__(self, counts_ND: np.ndarray, names: list[str], *, skipped: int = 0) -> None:
        self.counts_ND, self.skipped = counts_ND, skipped
        self.row_of = {name: row for row, name in enumerate(names)}
        width = counts_ND.shape[1]
        self._mode_D = np.zeros(width, np.uint8)
        self._low_D, self._high_D = np.zeros(width), np.full(width, 2.0)

    def fit(self, names: Collection[str]) -> None:
        """Most frequent, smallest and largest count of each variant over these participants."""
        known_ND = self.counts_ND[[self.row_of[name] for name in names if name in self.row_of]]
        times_3D = np.stack([(known_ND == count).sum(0) for count in range(3)])
        self._mode_D = times_3D.argmax(0).astype(np.uint8)  # ties: the smaller count
        seen_3D = times_3D > 0
        self._low_D = np.where(seen_3D.any(0), seen_3D.argmax(0), 0).astype(float)
        self._high_D = np.where(seen_3D.any(0), 2 - seen_3D[::-1].argmax(0), 0).astype(float)

    def counts(self, name: str) -> np.ndarray | None:
        """Uint8 (D,) of one participant; None for one who is not there.

        Raises:
            ValueError: a cell of the file was no count.
        """
        row = self.row_of.get(name)
        if row is None:
            return None
        if (self.counts_ND[row] == WRONG).any():
            raise ValueError("a genotype that is not 0, 1, 2 or empty")
        return self.counts_ND[row]

    def scaled(self, counts_D: np.ndarray) -> np.ndarray:
        """Float32 (D,): the mode where not called, then to [-1, 1]; 0 for a constant variant."""
        filled_D = np.where(counts_D == MISSING_DOSAGE, self._mode_D, counts_D).astype(float)
        span_D = self._high_D - self._low_D
        scaled_D = 2 * (filled_D - self._low_D) / np.where(span_D > 0, span_D, 1) - 1
        return np.where(span_D > 0, np.clip(scaled_D, -1, 1), 0).astype(np.float32)


def read_genotypes(folder: Path, wanted: Collection[str], *, max_variants: int) -> Genotypes | None:
    """The genotypes of the participants that are wanted; None where there is no file.

    Raises:
        ConfigError: anndata is not installed, or there are more variants than are allowed.
        DataError: a file is damaged, several sets lie there, or none of the people is wanted.
    """
    beds = sorted(folder.glob("*.bed")) if folder.is_dir() else []
    if (folder / FILE).is_file():
        found = _from_anndata(folder / FILE, wanted, max_variants)
    elif len(beds) > 1:
        raise DataError(
            f"{folder} holds {len(beds)} sets of PLINK; merge them first "
            "(`plink --bfile FIRST --merge-list OTHERS.txt --make-bed --out genomic`)."
        )
    elif beds:
        plink = PlinkSet(beds[0])
        _check_width(len(plink.kept), max_variants)
        rows = np.array([n for n, name in enumerate(plink.people) if name in wanted], int)
        names = [plink.people[n] for n in rows]
        found = Genotypes(plink.dosages(rows), names, skipped=plink.skipped)
    else:
        return None
    if not len(found.counts_ND):
        raise DataError(f"{folder}: none of the people there has a label.")
    return found


def _check_width(width: int, max_variants: int) -> None:
    if not 0 < width <= max_variants:
        raise ConfigError(
            f"the genotypes have {width:,} variants of the letters A, C, G, T; 1 to max_variants "
            f"({max_variants:,}) can be taken. Prune those in linkage (`plink --indep-pairwise 50 "
            "5 0.1`, then `--extract`), or raise it by --options '{\"max_variants\": ...}'."
        )


def _from_anndata(path: Path, wanted: Collection[str], max_variants: int) -> Genotypes:
    try:
        anndata: Any = importlib.import_module("anndata")
    except ImportError as error:
        raise ConfigError(
            f"{path.name} is an AnnData file; install its reader with "
            "`pip install -e '.[clinical]'`."
        ) from error
    try:
        table = anndata.read_h5ad(path, backed="r")
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(f"{path} is no AnnData file: {type(error).__name__}.") from error
    try:
        people = [str(name) for name in table.obs_names]
        if len(set(people)) != len(people):
            raise DataError(f"{path} names an individual twice.")
        _check_width(table.n_vars, max_variants)
        rows = [n for n, name in enumerate(people) if name in wanted]
        counts_ND = np.empty((len(rows), table.n_vars), np.uint8)
        for start in range(0, len(rows), PER_READ):
            chosen = rows[start : start + PER_READ]
            part = table.X[chosen]
            dense_ND = part.toarray() if not isinstance(part, np.ndarray) else part
            counts_ND[start : start + len(chosen)] = _as_counts(dense_ND)
    finally:
        table.file.close()
    return Genotypes(counts_ND, [people[n] for n in rows])


def _as_counts(values_ND: np.ndarray) -> np.ndarray:
    counts_ND = np.where(np.isnan(values_ND), MISSING_DOSAGE, WRONG).astype(np.uint8)
    for count in range(3):
        counts_ND[values_ND == count] = count
    return counts_ND
