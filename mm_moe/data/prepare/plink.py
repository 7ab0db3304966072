"""PLINK's binary genotypes (.bed, .bim, .fam) as allele counts of people by variants.

A .bed file starts with three bytes (6C 1B, and 01 for variant after variant); then each variant
takes ceil(N / 4) bytes, two bits a person, lowest bits first: 00 two copies of the first allele of
the .bim file (A1), 10 one, 11 none, 01 not called. The count is that of A1.

Arrays from several chips must be brought together before, for example:

    liftOver old.bed hg19ToHg38.over.chain new.bed unmapped.bed     (positions to one assembly)
    plink --bfile one --merge-list others.txt --make-bed --out merged
    plink --bfile merged --indep-pairwise 50 5 0.1 --out pruned     (variants in linkage, pruned)
    plink --bfile merged --extract pruned.prune.in --make-bed --out genomic

N people, D variants.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mm_moe.data.events import MISSING_DOSAGE
from mm_moe.errors import DataError

MAGIC = bytes((0x6C, 0x1B))
BY_VARIANT = 1
COUNT_OF = np.array([2, MISSING_DOSAGE, 1, 0], np.uint8)  # two bits -> copies of A1
# one byte -> the counts of its four people
COUNTS_OF_BYTE = COUNT_OF[(np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3]
ALLELES = frozenset("ACGT")
CHROMOSOMES = frozenset([*map(str, range(1, 25)), "X", "Y"])  # PLINK writes X and Y as 23 and 24
PER_READ = 1024  # variants decoded at once


class PlinkSet:
    """One set of three files.

    Args:
        bed: path of the .bed file; the other two lie beside it.

    Attributes:
        people: individual ids (second column of the .fam file), N of them.
        kept: which of the variants are of the letters A, C, G, T on the chromosomes 1 to 22, X, Y.
        skipped: how many are not.

    Raises:
        DataError: a file is missing, no table of PLINK, or the .bed file is of another size.
    """

    def __init__(self, bed: Path) -> None:
        self.bed = bed
        fam = _lines(bed.with_suffix(".fam"), width=6)
        bim = _lines(bed.with_suffix(".bim"), width=6)
        self.people = [fields[1] for fields in fam]
        if len(set(self.people)) != len(self.people):
            raise DataError(
                f"{bed.with_suffix('.fam')} names an individual twice; drop the duplicates with "
                "`plink --remove`."
            )
        good = [
            {fields[4].upper(), fields[5].upper()} <= ALLELES
            and fields[0].upper().removeprefix("CHR") in CHROMOSOMES
            for fields in bim
        ]
        self.kept = np.flatnonzero(good)
        self.skipped = len(bim) - len(self.kept)
        self._stride = math.ceil(len(self.people) / 4)
        self._check(len(bim))

    def _check(self, variants: int) -> None:
        """The header and the size, before anything is believed."""
        try:
            with self.bed.open("rb") as file:
                head = file.read(3)
            size = self.bed.stat().st_size
        except OSError as error:
            raise DataError(f"{self.bed} cannot be read: {error.strerror}.") from error
        if head[:2] != MAGIC:
            raise DataError(f"{self.bed} does not start as a PLINK 1 .bed file does.")
        if head[2:] != bytes((BY_VARIANT,)):
            raise DataError(
                f"{self.bed} is not ordered by variants; write it again with `plink --make-bed`."
            )
        wanted = 3 + variants * self._stride
        if size != wanted:
            raise DataError(
                f"{self.bed} has {size:,} bytes; {variants:,} variants of {len(self.people):,} "
                f"people make {wanted:,}. The file is cut, or of other .bim and .fam files."
            )

    def dosages(self, rows: np.ndarray) -> np.ndarray:
        """Counts of A1, uint8 (len(rows), D), `MISSING_DOSAGE` where not called.

        Args:
            rows: places of people in `people`.
        """
        packed_DW = np.memmap(self.bed, np.uint8, "r", 3).reshape(-1, self._stride)
        found_ND = np.empty((len(rows), len(self.kept)), np.uint8)
        for start in range(0, len(self.kept), PER_READ):
            chosen = self.kept[start : start + PER_READ]
            counts_DN = COUNTS_OF_BYTE[packed_DW[chosen]].reshape(len(chosen), -1)
            found_ND[:, start : start + len(chosen)] = counts_DN[:, rows].T
        return found_ND


def _lines(path: Path, *, width: int) -> list[list[str]]:
    """The fields of a table without heading, separated by blanks.

    Raises:
        DataError: no such file, no line, or a line of another width.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
    bad = next((number for number, fields in enumerate(lines, 1) if len(fields) != width), None)
    if bad or not lines:
        raise DataError(f"{path}: line {bad or 1} does not have the {width} fields of PLINK.")
    return lines
