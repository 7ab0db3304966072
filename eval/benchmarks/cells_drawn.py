"""Cells of two species whose counterfactual is known: what each would be in the other species.

A cell has a latent vector near that of its type; each species reads it through genes of its own
(some of them the same gene in both, under another number), its donor shifts it, and its counts are
negative binomial. The same latent read by the other species is what a translation should say.

N cells, D latent width, G genes, L types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from eval.cell_tables import SCALE, CellTable

GENES = {"human": 200, "mouse": 150}
SHARED_GENES = 60  # the same in both; only models with anchors are told which
SHARES = (0.4, 0.25, 0.17, 0.12, 0.06)  # of the types, alike in both species
LATENT, DONORS = 6, 3
SPREAD, DONOR_SHIFT, DISPERSION = 0.35, 0.3, 4.0


@dataclass(frozen=True)
class Drawn:
    """Cells, and the truth about them.

    Attributes:
        tables: species -> cells with their types.
        crossed: species -> log-normalised expectation of its cells in the other species (N, G).
        donors: species -> names.
    """

    tables: dict[str, CellTable]
    crossed: dict[str, np.ndarray]
    donors: Mapping[str, list[str]]


class World:
    """Types, genes and donors.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.centres_LD = rng.normal(size=(len(SHARES), LATENT)) * 1.2
        self.loads = {name: rng.normal(size=(count, LATENT)) for name, count in GENES.items()}
        own, other = (rng.permutation(count)[:SHARED_GENES] for count in GENES.values())
        human, mouse = GENES
        self.loads[mouse][other] = self.loads[human][own]
        self.pairs = {human: own, mouse: other}
        self.base = {name: rng.normal(size=count) for name, count in GENES.items()}
        self.base[mouse][other] = self.base[human][own]
        self.donors = {
            name: DONOR_SHIFT * rng.normal(size=(DONORS, count)) for name, count in GENES.items()
        }

    def anchors(self, count: int) -> dict[str, list[str]]:
        """Names of the first so many genes that are the same in both species."""
        return {name: [_gene(name, g) for g in own[:count]] for name, own in self.pairs.items()}

    def share(self, z: np.ndarray, species: str, shift: np.ndarray | float = 0.0) -> np.ndarray:
        """Each gene's share of the counts (N, G) of cells with these latents."""
        logits = self.base[species] + 0.6 * z @ self.loads[species].T + shift
        share = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(share / share.sum(1, keepdims=True))

    def draw(self, count: int, *, seed: int) -> Drawn:
        """So many cells of each species.

        Args:
            count: of cells of one species.
            seed: of the cells; the world stays.
        """
        rng = np.random.default_rng(seed)
        tables, crossed = {}, {}
        for name in GENES:
            kind_N = rng.choice(len(SHARES), count, p=SHARES)
            z = self.centres_LD[kind_N] + SPREAD * rng.normal(size=(count, LATENT))
            donor_N = rng.integers(DONORS, size=count)
            library_N = rng.lognormal(np.log(2000), 0.3, count)
            mean = library_N[:, None] * self.share(z, name, self.donors[name][donor_N])
            counts = rng.poisson(mean * rng.gamma(DISPERSION, 1 / DISPERSION, mean.shape))
            tables[name] = CellTable(
                scipy.sparse.csr_matrix(counts.astype(np.float32)),
                tuple(_gene(name, number) for number in range(GENES[name])),
                np.array([f"{name}/{seed}/{cell}" for cell in range(count)], dtype=object),
                (donor_N + 1)[:, None].astype(np.int64),
                np.array([f"type {kind}" for kind in kind_N], dtype=object),
            )
            other = next(one for one in GENES if one != name)
            crossed[name] = np.log1p(SCALE * self.share(z, other))
        donors = {name: [f"donor {n}" for n in range(DONORS)] for name in GENES}
        return Drawn(tables, crossed, donors)


def _gene(species: str, number: int) -> str:
    return f"{species[0]}{number}"
