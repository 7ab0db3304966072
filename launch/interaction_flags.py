"""The flags of interaction categories: read, checked against the data, kept out of scoring."""

from __future__ import annotations

import argparse

from mm_moe.arguments import DataArguments, parse_json
from mm_moe.data.interactions.table import InteractionTable, check_covers
from mm_moe.data.interactions.training import TrainingInteractions
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.settings import MoESettings

GIVEN_TYPE = "by_interaction"  # the router that reads a sample's category in every forward pass


def training_interactions(data: DataArguments) -> TrainingInteractions | None:
    """What the training collator takes, if a table is given.

    Raises:
        ConfigError: an unknown form.
        DataError: no such table, or no row of the training split in it.
    """
    if data.interaction_table is None:
        return None
    table = InteractionTable.load(data.interaction_table)
    return TrainingInteractions(table, split=data.train_split, form=data.interaction_labels)


def check_interactions(values: argparse.Namespace, source: DataSource) -> None:
    """Refuse a table that is not of these data, and a router that would need it when scoring.

    Raises:
        ConfigError: the router and the rest of the settings contradict each other.
        DataError: the table is of another data set, lacks training rows, or has other labels.
    """
    routed = values.moe_enable and values.router == GIVEN_TYPE
    if routed:
        _check_router(values)
    if values.interaction_table is None:
        return
    table = InteractionTable.load(values.interaction_table)
    interactions = TrainingInteractions(
        table, split=values.train_split, form=values.interaction_labels
    )
    _check_source(table, source, split=values.train_split, path=values.interaction_table)
    given = parse_json("moe_config", values.moe_config)
    room = given.get("num_interactions", MoESettings.num_interactions)
    if routed and (interactions.value.is_floating_point() or interactions.num_kinds > room):
        raise ConfigError(
            f"--router {GIVEN_TYPE} tells {room} types apart, --interaction_labels "
            f"{values.interaction_labels} has {interactions.num_kinds}; take coarse or fine, and "
            f"--moe_config '{{\"num_interactions\": {interactions.num_kinds}}}'."
        )
    if routed and (interactions.value < 0).any():
        raise DataError(
            f"{int((interactions.value < 0).sum())} training rows of the interaction table have no "
            f"category, and --router {GIVEN_TYPE} has no expert for them; make the table without "
            "a filter, or take another router."
        )


def _check_router(values: argparse.Namespace) -> None:
    if values.interaction_table is None:
        raise ConfigError(
            f"--router {GIVEN_TYPE} needs each sample's category; give --interaction_table FILE "
            "(from `launch/prepare_data.py interactions`)."
        )
    if values.final_evaluation or values.eval_strategy != "no":
        raise ConfigError(
            f"--router {GIVEN_TYPE} routes by a category that contains the label, which rows that "
            "are scored must not have; take --final_evaluation false and --eval_strategy no, or a "
            "router that learns its choice."
        )


def _check_source(table: InteractionTable, source: DataSource, *, split: str, path: str) -> None:
    """The table is of these data: name, classes, ids and labels of the training rows."""
    if (table.dataset, table.label_names) != (source.name, tuple(source.label_names)):
        raise DataError(
            f"the interaction table {path!r} is of {table.dataset!r} with "
            f"{len(table.label_names)} classes, the data set is {source.name!r} with "
            f"{len(source.label_names)}; make one for it with `launch/prepare_data.py interactions "
            f"--dataset {source.name}`."
        )
    samples = list(source.index(split))
    check_covers(table, [sample.id for sample in samples], split=split)
    label_of = dict(zip(table.ids, table.label_N.tolist(), strict=True))
    other = [s.id for s in samples if s.label is not None and label_of[s.id] != s.label]
    if other:
        raise DataError(
            f"{len(other)} training rows have another label in the interaction table {path!r} than "
            f"in the data, first {other[0]!r}; make the table again."
        )
