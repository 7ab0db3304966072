"""How well a cell autoencoder brings species together, and what it makes of one in another.

    python -m eval.integration RUN --data_dir DATA
    python -m eval.integration RUN --data_dir DATA --types cell_type --split test

`RUN` is a folder that launch/train.py wrote for the objective mmvae. Writes `integration.json`,
`integration.html` with the pictures inside, and prints one JSON line. Types come from a column of
the cells; a species whose cells have none gets them from genes that mark a lineage
(`eval.cell_types`), and `cell_type` of published clusters is read as lineages.

N cells, G genes, D latent width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as library_logging

from eval.cell_tables import (
    CellTable,
    Tables,
    decoded,
    encoded,
    joined,
    read_tables,
    reconstruction_loss,
    translated,
)
from eval.cell_types import coarse, marked_types
from eval.generation_scores import by_type, critic_auc, cross_correlation, mean, reconstruction
from eval.integration_scores import integration_scores, label_transfer, posterior_collapse
from mm_moe.arguments import parse_json
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.sets.cells import CellsData
from mm_moe.errors import CheckpointError, ConfigError, DataError, MMMoEError
from mm_moe.registry import nearest

RUN_FILE, MODEL_FOLDER = "run.json", "final"
TYPES = "cell_type"  # the usual column of types; genes mark them where no file has it
LEAST_OF_A_TYPE = 5  # cells of a type in a species, below which its mean profile says little
MARKED, PUBLISHED = "genes that mark a lineage", "a column of the cells"


def scores(
    model: CellVAE, tables: Tables, *, critics: bool = True, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All scores of a model on some cells, and the latent means by species.

    Args:
        model: in evaluation mode.
        tables: species -> its cells, with types where these are known.
        critics: whether to train fresh critics of generated cells, which takes longest.
        seed: of critics and of k-means.
    """
    posterior = {name: encoded(model, table, name) for name, table in tables.items()}
    z = {name: mu for name, (mu, _) in posterior.items()}
    values = {name: table.values() for name, table in tables.items()}
    rebuilt = {name: decoded(model, z[name], table, name) for name, table in tables.items()}
    found: dict[str, Any] = latent_scores(z, tables, seed=seed)
    found["reconstruction"] = {
        name: {
            **reconstruction(values[name], rebuilt[name]),
            "loss": reconstruction_loss(model, table, name),
        }
        for name, table in tables.items()
    }
    found["posterior"] = posterior_collapse(
        *(np.concatenate([pair[part] for pair in posterior.values()]) for part in (0, 1))
    )
    found["generation"] = {}
    for source in tables:
        for target in tables:
            if source == target:
                continue
            made = translated(model, tables[source], source, target)
            pair = generation_scores(
                made, tables[source], values[target], tables[target], rebuilt[target]
            )
            if critics:
                pair["critic_auc"] = critic_auc(values[target], made, seed=seed)
            found["generation"][f"{source} to {target}"] = pair
    if critics:
        for name in tables:
            auc = critic_auc(values[name], rebuilt[name], seed=seed)
            found["reconstruction"][name]["critic_auc"] = auc
    return found, z


def latent_scores(z: Mapping[str, np.ndarray], tables: Tables, *, seed: int = 0) -> dict[str, Any]:
    """Scores of latents alone, whoever made them: of all cells, and of labels sent across."""
    names = np.concatenate([np.full(len(rows), name, dtype=object) for name, rows in z.items()])
    types = np.concatenate([tables[name].types for name in z])
    known = types if any(one is not None for one in types) else None
    found: dict[str, Any] = {
        "integration": integration_scores(
            np.concatenate(list(z.values())), batch=names, label=known, seed=seed
        ),
        "label_transfer": {},
    }
    for source in z:
        for target in z:
            if source == target or known is None:
                continue
            here, there = (_typed(tables[name]) for name in (source, target))
            if set(tables[source].types[here]) & set(tables[target].types[there]):
                found["label_transfer"][f"{source} to {target}"] = label_transfer(
                    z[source][here],
                    tables[source].types[here],
                    z[target][there],
                    tables[target].types[there],
                )
    return found


def generation_scores(
    made: np.ndarray, source: CellTable, real: np.ndarray, target: CellTable, rebuilt: np.ndarray
) -> dict[str, Any]:
    """Cells of one species as another would have them, against real cells of that species.

    Returns:
        what `by_type` says of mean profiles; "centred_r", its mean r when the mean over all real
        cells is taken off both, since any two profiles of a species are alike otherwise; and
        "correlation", what `cross_correlation` says of rebuilt and translated cells.
    """
    found: dict[str, Any] = {"correlation": cross_correlation(rebuilt, made)}
    here, there = _frequent(source), _frequent(target)
    if not set(source.types[here]) & set(target.types[there]):
        return found
    centre = real.mean(0)
    profiles = by_type(made[here], source.types[here], real[there], target.types[there])
    around = by_type(
        made[here] - centre, source.types[here], real[there] - centre, target.types[there]
    )
    return {
        **found,
        **profiles,
        "centred_r": around["mean_r"],
        "centred_own_first": around["own_first"],
    }


def _typed(table: CellTable) -> np.ndarray:
    return np.array([one is not None for one in table.types])


def _frequent(table: CellTable) -> np.ndarray:
    """Cells of types that have enough of them."""
    kinds, counts = np.unique(table.types[_typed(table)].astype(str), return_counts=True)
    return np.isin(table.types, kinds[counts >= LEAST_OF_A_TYPE])


def with_types(tables: Tables) -> tuple[dict[str, CellTable], dict[str, str]]:
    """Lineages for all cells, and where those of each species come from.

    Genes mark lineages among all cells that are given: give all splits at once.
    """
    found, told = {}, {}
    for name, table in tables.items():
        own = coarse(table.types)
        told[name] = PUBLISHED
        if all(one is None for one in own):
            own, told[name] = marked_types(table.values(), table.genes), MARKED
        found[name] = replace(table, types=own)
    return found, told


def split_tables(
    source: CellsData, *, types: str
) -> tuple[dict[str, dict[str, CellTable]], dict[str, str]]:
    """Split -> species -> cells with their types, and where these come from."""
    parts = {split: read_tables(source, split, types=types) for split in source.splits()}
    whole = {
        name: joined([tables[name] for tables in parts.values() if name in tables])
        for name in source.modalities
    }
    whole, told = with_types(whole)
    first = dict.fromkeys(whole, 0)
    found: dict[str, dict[str, CellTable]] = {}
    for split, tables in parts.items():
        found[split] = {}
        for name, table in tables.items():
            place = np.arange(first[name], first[name] + len(table))
            found[split][name] = whole[name].rows(place)
            first[name] += len(table)
    found["all"] = whole
    return found, told


def read_run(folder: Path, data_dir: str | None) -> tuple[CellVAE, CellsData]:
    """The model of a run, and its data with the genes and labels that the model knows.

    Raises:
        CheckpointError: no run, or not one of a cell autoencoder, or a damaged one.
        ConfigError: no folder of data.
        DataError: data that are not in order.
    """
    saved = _fields(folder / RUN_FILE).get("arguments")
    if not isinstance(saved, dict) or "dataset" not in saved:
        raise CheckpointError(_no_run(folder / RUN_FILE))
    options = _options(saved)
    kind = _fields(folder / MODEL_FOLDER / "config.json").get("model_type")
    if kind != CellVAE.config_class.model_type or saved["dataset"] != "cells":
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {kind!r} and data set {saved['dataset']!r}; "
            "integration is scored for the objective mmvae on --dataset cells."
        )
    model = _model(folder / MODEL_FOLDER)
    words = {"genes": model.config.genes, "conditions": model.config.conditions}
    place = data_dir or saved.get("data_dir")
    if place is None:
        raise ConfigError("where are the cells? Give --data_dir.")
    options.pop("conditions", None)
    try:
        return model, CellsData(place, **{**options, "vocabulary": words})
    except TypeError as error:
        raise ConfigError(f"dataset_options of {str(folder / RUN_FILE)!r}: {error}.") from error


def _fields(file: Path) -> dict[str, Any]:
    """A JSON object of a run."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_run(file)) from error
    if not isinstance(found, dict):
        raise CheckpointError(_no_run(file))
    return found


def _no_run(file: Path) -> str:
    return (
        f"{str(file)!r} is not there or cannot be read, so this is no run that ended; name a "
        "folder that launch/train.py wrote."
    )


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The data set's options, which a run keeps as an object or as its text."""
    found = saved.get("dataset_options")
    return parse_json("dataset_options", found) if isinstance(found, str) else dict(found or {})


def _model(folder: Path) -> CellVAE:
    """The model, in evaluation mode."""
    try:
        return CellVAE.from_pretrained(folder).eval()
    except MMMoEError:
        raise
    except Exception as error:  # the library and safetensors have one for each kind of damage
        raise CheckpointError(
            f"the model in {str(folder)!r} cannot be read ({type(error).__name__}); publish a "
            "checkpoint again with launch/export.py."
        ) from error


def evaluate(folder: Path, *, data_dir: str | None, types: str, split: str) -> dict[str, Any]:
    """Score a run and write `integration.json` and `integration.html` into its folder."""
    from eval.integration_report import write_page

    model, source = read_run(folder, data_dir)
    _check_types(source, types)
    tables, told = split_tables(source, types=types)
    if split not in tables:
        raise ConfigError(f"no split {split!r}; there are {', '.join(tables)}.")
    if min(len(table) for table in tables[split].values()) < LEAST_OF_A_TYPE:
        raise DataError(f"split {split!r} has too few cells to score; take --split all.")
    found, _ = scores(model, tables[split])
    document = {
        "run": folder.name,
        "split": split,
        "cells": {name: len(table) for name, table in tables[split].items()},
        "types": told,
        "left_out": dict(source.left_out),
        "unseen_labels": source.unseen.get(split, {}),
        **found,
    }
    text = json.dumps(finite(document), indent=1, allow_nan=False)
    (folder / "integration.json").write_text(text + "\n")
    z = {name: encoded(model, table, name)[0] for name, table in tables["all"].items()}
    write_page(finite(document), z=z, tables=tables["all"], folder=folder)
    return document


def _check_types(source: CellsData, types: str) -> None:
    """Refuse a column that was asked for and that no file has.

    Raises:
        ConfigError: it is misspelt, most likely.
    """
    known = sorted({name for file in source.files for name in file.store.columns})
    if types not in ("", TYPES, *known):
        raise ConfigError(f"no file has a column {types!r}; {nearest(types, known)}")


def finite(value: Any) -> Any:
    """The same without NaN, which JSON does not know: None."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def headline(found: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers that a table has room for; means over directions and species."""
    transfers = found["label_transfer"].values()
    short = {
        **{name: found["integration"].get(name, float("nan")) for name in SHOWN},
        "transfer": mean(np.array([one["accuracy"] for one in transfers])),
        "transfer_f1": mean(np.array([one["macro_f1"] for one in transfers])),
    }
    if "reconstruction" in found:
        rebuilt, made = found["reconstruction"].values(), found["generation"].values()
        short |= {
            "loss": mean(np.array([one["loss"] for one in rebuilt])),
            "cell_r": mean(np.array([one["cell_r"] for one in rebuilt])),
            **{
                name: mean(np.array([one.get(name, np.nan) for one in made]))
                for name in ("centred_r", "centred_own_first")
            },
        }
    return short


SHOWN = ("species_mixing", "ilisi", "silhouette_batch", "silhouette_label", "ari", "nmi")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that launch/train.py wrote")
    parser.add_argument("--data_dir", help="folder of the cells, where it has moved")
    parser.add_argument("--types", default=TYPES, help="column with the cells' types")
    parser.add_argument("--split", default="test", help="whose cells are scored; or all")
    options = parser.parse_args(argv)
    library_logging.disable_progress_bar()
    try:
        found = evaluate(
            options.run, data_dir=options.data_dir, types=options.types, split=options.split
        )
    except MMMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(finite(headline(found))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
