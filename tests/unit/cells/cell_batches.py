"""Small cell autoencoders and batches for their tests."""

from __future__ import annotations

from typing import Any

import torch

from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.cells.modeling import CellVAE

GENES = {"human": 7, "mouse": 4}
LABELS = {"donor": ["a", "b", "c"], "tissue": ["t", "u"]}


def config(**options: Any) -> CellVAEConfig:
    fields: dict[str, Any] = {
        "modalities": list(GENES),
        "genes": {name: [f"{name}{g}" for g in range(count)] for name, count in GENES.items()},
        "conditions": {name: list(labels) for name, labels in LABELS.items()},
        "expert_hidden": [6],
        "expert_width": 5,
        "core_hidden": [4],
        "latent_size": 3,
        "dropout": 0.0,
    }
    return CellVAEConfig(**{**fields, **options})


def model(**options: Any) -> CellVAE:
    torch.manual_seed(0)
    built = CellVAE(config(**options)).double()
    for bank in built.conditioner.banks.values():  # the identity would hide what they do
        for parameter in bank.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def compressed(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix as compressed rows."""
    row, col = values.nonzero(as_tuple=True)
    crow = torch.searchsorted(row.contiguous(), torch.arange(len(values) + 1))
    return {"crow": crow, "col": col.int(), "val": values[row, col].float()}


def batch(species: str, *, seed: int = 1, rows: slice = slice(None)) -> dict[str, Any]:
    """One letter per cell, h or m; compressed rows. Of these cells only those at `rows`."""
    draw = torch.Generator().manual_seed(seed)
    everyone = {
        name: torch.randint(0, 4, (8, size), generator=draw) for name, size in GENES.items()
    }
    codes = {name: torch.randint(0, 3, (8, len(LABELS)), generator=draw) for name in GENES}
    present = torch.tensor([[s == "h", s == "m"] for s in species], dtype=torch.bool)
    present = present.reshape(-1, 2)
    inputs = {}
    for m, name in enumerate(GENES):
        own = torch.arange(len(species))[rows][present[rows, m]]
        values = everyone[name][own].double()
        if len(own):
            inputs[name] = {
                **compressed(values),
                "library": values.sum(1).float(),
                "conditions": codes[name][own],
            }
    return {
        "ids": [f"{s}{i}" for i, s in enumerate(species)][rows],
        "present": present[rows],
        "inputs": inputs,
        "labels": None,
    }
