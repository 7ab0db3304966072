"""A tiny first-stage BLIP-2 and a batch for it."""

from __future__ import annotations

import torch

from mm_moe.batch import Batch
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig

WIDTHS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
QFORMER = WIDTHS | {
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
FIELDS = {
    "vision_config": WIDTHS
    | {"intermediate_size": 24, "image_size": 16, "patch_size": 8, "initializer_range": 0.5},
    "qformer_config": QFORMER,
    "num_query_tokens": 3,
    "image_text_hidden_size": 8,
}
ROWS = 8
# Which of the 8 rows have (image, text); with 2 ranks and with 4, one has no pair at all.
PRESENT = [(1, 1), (0, 1), (1, 1), (1, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
FULL = [(1, 1)] * ROWS


def stage_one_model(*, moe: dict | None = None, **own):
    """A model in float64, the same at every call."""
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone="blip2",
        backbone_config=FIELDS | {"stage_one": True} | own,
        moe=moe,
        moe_layers=[0, 1],
        num_labels=0,
        upcycle_drop=0.5,
    )
    return build_model(config).double()


def batch_of(part: slice = slice(None), *, present=PRESENT) -> Batch:
    """Some of the 8 rows; texts are padded to the longest of the part. Rows 0 and 2 share one."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(ROWS, 3, 16, 16, generator=random).double()
    length_N = torch.tensor([3, 6, 3, 5, 4, 7, 3, 6])
    ids_NL = torch.randint(3, 39, (ROWS, 7), generator=random)
    ids_NL[2] = ids_NL[0]
    mask_NL = (torch.arange(7) < length_N[:, None]).long()
    has_BM = torch.tensor(present, dtype=torch.bool)[part]
    inputs = {}
    if has_BM[:, 0].any():
        inputs["image"] = {"pixel_values": pixels[part][has_BM[:, 0]]}
    if has_BM[:, 1].any():
        ids, mask = ids_NL[part][has_BM[:, 1]], mask_NL[part][has_BM[:, 1]]
        longest = int(mask.sum(1).max())
        ids = (ids * mask)[:, :longest]
        inputs["text"] = {"input_ids": ids, "attention_mask": mask[:, :longest]}
    return Batch.of([f"row{i}" for i in range(ROWS)][part], has_BM, inputs)
