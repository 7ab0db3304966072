"""Which modality each expert of a shared tower works for, over the steps of a run.

S logged steps, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.pictures import modality_maps

_KEY = re.compile(r"moe/(?P<modality>[^/]+)\.(?P<block>\d+)/expert_(?P<expert>\d+)")
Loads = dict[str, dict[str, np.ndarray]]  # block -> modality -> rows (S, E)


def shares_experts(run: Mapping[str, Any]) -> bool:
    """Whether the modalities of a run go through the same experts (LIMoE's one tower).

    Args:
        run: content of `run.json`.
    """
    config = run.get("arguments", {}).get("backbone_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError:
            return False
    return isinstance(config, Mapping) and config.get("one_tower") is True


def loads_by_modality(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], Loads]:
    """Rows that each expert got from each modality, by block and logged step.

    Args:
        metrics: lines of `metrics.jsonl`.

    Returns:
        The steps (S), and the loads of the blocks that two modalities or more pass.
    """
    rows = [row for row in metrics if "loss" in row and any(map(_KEY.fullmatch, row))]
    found: dict[str, dict[str, list[dict[int, float]]]] = {}
    for place, row in enumerate(rows):
        for key, value in row.items():
            if match := _KEY.fullmatch(key):
                series = found.setdefault(match["block"], {}).setdefault(match["modality"], [])
                series.extend({} for _ in range(place + 1 - len(series)))
                series[place][int(match["expert"])] = float(value)
    loads = {
        block: {name: _table(series, len(rows)) for name, series in by_modality.items()}
        for block, by_modality in found.items()
        if len(by_modality) > 1
    }
    return [int(row["step"]) for row in rows], loads


def _table(series: list[dict[int, float]], steps: int) -> np.ndarray:
    """Rows by step and expert; 0 where a log says nothing."""
    rows_SE = np.zeros((steps, 1 + max(max(row, default=0) for row in series)))
    for step, row in enumerate(series):
        for expert, value in row.items():
            rows_SE[step, expert] = value
    return rows_SE


def expert_shares(by_modality: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Share (S, E) of each modality in what an expert gets, each modality counting the same.

    A modality's rows are divided by their sum first: an image has more tokens than a caption, and
    that is nothing that the router decides. NaN for an expert that gets nothing.
    """
    of_all = {
        name: rows_SE / np.maximum(rows_SE.sum(-1, keepdims=True), 1)
        for name, rows_SE in by_modality.items()
    }
    total_SE = sum(of_all.values(), start=np.zeros(1))
    with np.errstate(invalid="ignore"):
        return {name: share_SE / total_SE for name, share_SE in of_all.items()}


def separation(first_SE: np.ndarray, second_SE: np.ndarray) -> np.ndarray:
    """How far two modalities keep to different experts (S,): 0 the same use, 1 no expert shared.

    The total variation distance between their distributions over experts.
    """
    first_SE, second_SE = (
        rows_SE / np.maximum(rows_SE.sum(-1, keepdims=True), 1) for rows_SE in (first_SE, second_SE)
    )
    return np.abs(first_SE - second_SE).sum(-1) / 2


def summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's log says, as JSON: block -> shares of the last log, and separation by step.

    Returns:
        "steps", and for each block "tokens" (modality -> share of its tokens by expert),
        "expert_share" (first modality's share in each expert, None for an idle one) and
        "separation" of the first two modalities by step.
    """
    steps, loads = loads_by_modality(metrics)
    blocks = {}
    for block, by_modality in loads.items():
        (name, first_SE), (_, second_SE) = list(by_modality.items())[:2]
        last = expert_shares(by_modality)[name][-1]
        blocks[block] = {
            "tokens": {
                name: (rows_SE[-1] / max(rows_SE[-1].sum(), 1)).round(4).tolist()
                for name, rows_SE in by_modality.items()
            },
            "expert_share": [None if np.isnan(v) else round(float(v), 4) for v in last],
            "separation": separation(first_SE, second_SE).round(4).tolist(),
        }
    return {"steps": steps, "blocks": blocks}


def picture(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Heat maps of the first modality's share by expert and step; None where nothing is shared."""
    steps, loads = loads_by_modality(metrics)
    if not loads:
        return None
    name = next(iter(next(iter(loads.values()))))
    shares = {block: expert_shares(rows)[name] for block, rows in loads.items()}
    return modality_maps(shares, steps=steps, modality=name)
