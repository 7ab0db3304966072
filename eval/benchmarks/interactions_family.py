"""One modality, intra, inter and I2M2 over a dial: which dependence each of them captures.

Samples are alike: the log-odds of the label are w_1 s_1 + w_2 s_2 + w_x c_1 c_2, with a score s_m
and a sign c_m hidden in modality m. I2M2 is trained in both published ways: in two stages, where
its members start from the finished unimodal and joint models, and all at once from new weights.

Found over 5 seeds (`results/interactions_family.json`): trained at once, I2M2 is near the better of
intra and inter everywhere. On the balanced mixture it is 1.0 ± 1.4 points below inter. The mixtures
that are mostly additive were added after that was seen; there it is 0.3 ± 0.8 and 0.4 ± 0.5 points
above inter, which is no more than noise. A joint model of this size learns both parts by itself.
In two stages it is 13 points below inter on xor, where its unimodal members start overfitted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from eval.benchmarks.interactions_fit import (
    LOOK_EVERY,
    Split,
    answer,
    config_of,
    fit,
    new_model,
)
from mm_moe.data.sets.interaction_dial import FIRST, SECOND, InteractionDialData
from mm_moe.models import ComposedConfig, ComposedModel

JOINT = f"{FIRST}+{SECOND}"
HIDDEN = 32  # of every head
EPOCHS = 40
STAGE_TWO_EPOCHS = 2 * LOOK_EVERY
STRENGTH = 3.0
REGIMES: tuple[tuple[str, dict[str, float], int], ...] = (
    ("first", {"first": STRENGTH}, 300),
    ("additive", {"first": STRENGTH, "second": STRENGTH}, 300),
    ("xor", {"xor": STRENGTH}, 300),
    ("mixture", {"first": 2.0, "second": 2.0, "xor": 2.0}, 300),
    ("mixture, mostly additive", {"first": 3.0, "second": 3.0, "xor": 1.5}, 300),
    ("mixture, mostly additive", {"first": 3.0, "second": 3.0, "xor": 1.5}, 600),
)


def composed(members: dict[str, Any], source: InteractionDialData) -> ComposedModel:
    """The product of copies of finished models."""
    config = ComposedConfig(
        modalities=list(source.modalities),
        members={name: model.config.to_dict() for name, model in members.items()},
        combine="product",
        label_names=list(source.label_names),
        problem_type="single_label_classification",
    )
    return ComposedModel(config, members={n: copy.deepcopy(m) for n, m in members.items()})


def family_row(name: str, weights: dict[str, float], num_rows: int, *, seed: int) -> dict[str, Any]:
    """Test accuracy of every member of the family on one draw of the data."""
    source = InteractionDialData(weights=weights, noise=0.5, sizes=(num_rows, 500, 4000), seed=seed)
    splits = {split: Split.of(source, split) for split in source.splits()}
    parts = {FIRST: (FIRST,), SECOND: (SECOND,), JOINT: (FIRST, SECOND)}
    new = {
        member: new_model(
            config_of(source, modalities, head_hidden_size=HIDDEN), seed=100 * seed + n
        )
        for n, (member, modalities) in enumerate(parts.items())
    }
    both_new = composed(new, source)  # copies, before the models are trained
    alone = {name: fit(model, splits, epochs=EPOCHS, seed=seed) for name, model in new.items()}
    intra = composed({m: alone[m] for m in (FIRST, SECOND)}, source)
    both = composed(alone, source)
    models = {
        "unimodal first": alone[FIRST],
        "unimodal second": alone[SECOND],
        "inter": alone[JOINT],
        "intra": fit(intra, splits, epochs=STAGE_TWO_EPOCHS, seed=seed),
        "I2M2, two stages": fit(both, splits, epochs=STAGE_TWO_EPOCHS, seed=seed),
        "I2M2, at once": fit(both_new, splits, epochs=EPOCHS, seed=seed),
    }
    return {
        "data": f"{name}, {num_rows} training rows",
        "weights": weights,
        "seed": seed,
        "scores": {
            method: {"accuracy": accuracy(model, splits["test"])}
            for method, model in models.items()
        },
    }


def accuracy(model: torch.nn.Module, split: Split) -> float:
    """Share of right answers."""
    return float((answer(model, split).logits.argmax(-1) == split.label_N).float().mean())


def family_rows(
    seeds: Sequence[int], *, regimes: Sequence[tuple[str, dict[str, float], int]] = REGIMES
) -> list[dict[str, Any]]:
    """One row for each regime and seed."""
    return [family_row(*regime, seed=seed) for regime in regimes for seed in seeds]
