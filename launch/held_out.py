"""Scores during training of models of their own kind, which have no labels to be scored by."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import DataLoader

from launch.scoring import Scorer
from launch.zero_shot import has_pairs
from mm_moe.arguments import DataArguments
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError
from mm_moe.registry import OBJECTIVES
from mm_moe.training import runtime
from mm_moe.training.held_out import HeldOut, held_out_means


def split_in_training(values: argparse.Namespace, source: DataSource) -> str:
    """The split that `--eval_strategy` scores; whether it exists is for the caller to look at.

    Raises:
        ConfigError: nothing says what a score would be.
    """
    kind: Any = OBJECTIVES.resolve(values.objective)
    if isinstance(kind, type) and issubclass(kind, HeldOut):
        return held_out_split(values.validation_split, values.test_split, known=source.splits())
    if source.problem_type == NO_LABEL and not has_pairs(source):
        raise ConfigError(
            f"--eval_strategy {values.eval_strategy} needs labels, and {values.dataset!r} has "
            f"none for the objective {values.objective}; take --eval_strategy no."
        )
    return str(values.validation_split)


def held_out_split(validation: str, test: str, *, known: Collection[str]) -> str:
    """The validation split, or the test split where there is none."""
    return test if validation not in known and test in known else validation


def held_out_scores(objective: HeldOut, scorer: Scorer, data: DataArguments) -> dict[str, float]:
    """What the objective says of the held-out split, lacking what training lacks. A collective.

    The state of torch's generator stays as it was.
    """
    source = scorer.source
    split = held_out_split(data.validation_split, data.test_split, known=source.splits())
    protocol = MissingProtocol(
        kind=data.missing_type,
        ratio=data.missing_ratio,
        seed=data.missing_seed,
        dataset=source.name,
        split=split,
    )
    stream = SampleStream(
        source,
        split=split,
        batch_size=scorer.batch_size,
        rank=runtime.rank(),
        world_size=runtime.world_size(),
        epochs=1,
    )
    collator = scorer.collator(scorer.tables.get(split, protocol))
    loader = DataLoader(
        stream,
        batch_size=scorer.batch_size,
        collate_fn=collator,
        generator=torch.Generator(),  # else the loader's seed is drawn from the training's
    )
    found = held_out_means(
        objective,
        scorer.model,
        loader,
        num_modalities=len(source.modalities),
        signals=scorer.signals,
    )
    scorer.note_bad(collator)
    return found
