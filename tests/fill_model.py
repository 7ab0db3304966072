"""A small clinical model of three tables with a fill, and batches with supports for it.

B samples, M modalities, S support rows, N supports of one cell, D values of a row.
"""

import torch

from mm_moe.batch import Batch
from mm_moe.models import MultimodalMoEConfig, build_model

NAMES = ("gene", "lab", "note")
WIDTHS = {"gene": 5, "lab": 3, "note": 4}
P, H = 2, 8
RETRIEVER = {"num_candidates": 2, "num_candidates_shared": 2, "top_k": 2, "num_heads": 2}
PRESENT = torch.tensor(
    [[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 0]],
    dtype=torch.bool,
)


def config_of(fill="retriever", options=None, **more):
    return MultimodalMoEConfig(
        backbone="clinical",
        backbone_config={
            "num_tokens": P,
            "token_width": H,
            "num_heads": 2,
            "sequences": {name: {"width": width, "length": 1} for name, width in WIDTHS.items()},
        },
        modalities=NAMES,
        label_names=("no", "yes"),
        fill=fill,
        fill_config=options if options is not None else {},
        **more,
    )


def model_of(fill="retriever", options=None, *, seed=0, **more):
    torch.manual_seed(seed)
    if fill == "retriever":
        options = {**RETRIEVER, **(options or {})}
    return build_model(config_of(fill, options, **more))


def values_of(size, *, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, width, generator=generator, dtype=torch.float64).to(dtype)
        for name, width in WIDTHS.items()
    }


def batch_of(present_BM=PRESENT, *, part=slice(None), count=2, dtype=torch.float32, whole=False):
    """Rows `part` of a batch; each cell's supports depend on its sample alone.

    The support rows have all modalities. A sample at a multiple of 6 finds none.
    """
    values = values_of(len(present_BM), seed=2, dtype=dtype)
    support = values_of(9, seed=3, dtype=dtype)
    own_BM = present_BM[part]
    places = torch.arange(len(present_BM))[part]
    inputs, supports = {}, {}
    for m, name in enumerate(NAMES):
        there_B = own_BM[:, m]
        if there_B.any():
            inputs[name] = {"values": values[name][part][there_B]}
        rows_QN = (places[~there_B, None] * 2 + torch.arange(count) + m) % 9
        rows_QN[places[~there_B] % 6 == 0] = -1
        wanted = torch.arange(9) if whole else rows_QN[rows_QN >= 0].unique()
        packed_QN = torch.searchsorted(wanted, rows_QN.clamp(min=0)) if len(wanted) else rows_QN
        supports[name] = {
            "inputs": {"values": support[name][wanted]} if len(wanted) else {},
            "rows": torch.where(rows_QN >= 0, packed_QN, -1),
            "present": torch.ones(len(wanted), len(NAMES), dtype=torch.bool),
            "index": wanted,
        }
    batch = Batch.of([str(place) for place in places.tolist()], own_BM, inputs)
    batch["supports"] = supports
    return batch
