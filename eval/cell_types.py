"""Coarse types of bone-marrow cells in two species: published clusters, and genes that mark a type.

N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

COMPONENTS, NEIGHBOURS = 30, 15
LEAST_SCORE, LEAST_MARGIN = 0.1, 0.05  # standard deviations of a gene

# Well-known markers of the lineages of human CD34+ marrow. A cell that looks like a stem cell is
# told apart because the mouse cells (myeloid progenitors) have no such type.
MARKERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stem": ("AVP", "CRHBP", "HLF", "MEIS1"),
        "erythroid": ("GATA1", "KLF1", "CA1", "TFRC", "EPOR", "BLVRB", "CNRIP1", "HBB"),
        "megakaryocyte": ("PF4", "ITGA2B", "VWF", "GP9"),
        "basophil": ("MS4A2", "HDC", "PRG2", "EPX"),
        "granulocyte-monocyte": ("MPO", "ELANE", "CTSG", "PRTN3", "AZU1", "LYZ", "CEBPA", "CEBPE"),
        "dendritic": ("IRF8", "IRF7", "CLEC4C", "TCF4", "CST3", "CD74"),
        "lymphoid": ("CD79A", "CD79B", "VPREB1", "DNTT", "MS4A1"),
    }
)
# The 19 published clusters of Paul et al. (2015), by the lineage of their names.
CLUSTERS: Mapping[str, str] = MappingProxyType(
    {
        **{f"{n}Ery": "erythroid" for n in range(1, 7)},
        "7MEP": "erythroid",
        "8Mk": "megakaryocyte",
        **dict.fromkeys(("9GMP", "10GMP", "14Mo", "15Mo"), "granulocyte-monocyte"),
        **dict.fromkeys(("16Neu", "17Neu"), "granulocyte-monocyte"),
        "11DC": "dendritic",
        **dict.fromkeys(("12Baso", "13Baso", "18Eos"), "basophil"),
        "19Lymph": "lymphoid",
    }
)


def coarse(clusters: Sequence[str | None] | np.ndarray) -> np.ndarray:
    """The lineage of published clusters; a name that is none of them stays, None stays None."""
    return np.array([None if c is None else CLUSTERS.get(c, c) for c in clusters], dtype=object)


def marked_types(
    values: np.ndarray,
    genes: Sequence[str],
    *,
    markers: Mapping[str, Sequence[str]] = MARKERS,
    neighbours: int = NEIGHBOURS,
) -> np.ndarray:
    """The type whose genes a cell and the cells like it express most; None where it is unclear.

    Each marker is standardised over all cells; a type's score is the mean of its markers, averaged
    over a cell and its nearest neighbours in principal components of all genes. A cell has a type
    if the best score is above 0.1 and 0.05 above the next.

    Args:
        values: log-normalised (N, G).
        genes: names; case does not count.
        markers: type -> genes; those that lack are left out, and a type without any.
        neighbours: to smooth over; 0: none.
    """
    place = {gene.upper(): number for number, gene in enumerate(genes)}
    found = {kind: [place[g] for g in own if g in place] for kind, own in markers.items()}
    found = {kind: places for kind, places in found.items() if places}
    spread = values.std(0)
    standard = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    score_TN = np.stack([standard[:, places].mean(1) for places in found.values()])
    if neighbours:
        width = min(COMPONENTS, *values.shape)
        low = PCA(width, svd_solver="randomized", random_state=0).fit_transform(values)
        count = min(neighbours + 1, len(values))
        near = NearestNeighbors(n_neighbors=count).fit(low).kneighbors(return_distance=True, X=low)
        score_TN = score_TN[:, near[1]].mean(-1)
    best = score_TN.argmax(0)
    top = score_TN.max(0)
    second = np.sort(score_TN, 0)[-2] if len(score_TN) > 1 else np.full(len(top), -np.inf)
    clear = (top > LEAST_SCORE) & (top - second > LEAST_MARGIN)
    names = np.array(list(found), dtype=object)
    types = names[best]
    types[~clear] = None
    return types
