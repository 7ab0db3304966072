"""The supports of a run's fill: index and store of its training split, for training and scoring."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mm_moe.arguments import STREAM_FLAGS
from mm_moe.data.collate import Missing
from mm_moe.data.schema import DataSource
from mm_moe.data.support_batch import Supports
from mm_moe.data.support_store import open_supports, write_store
from mm_moe.registry import FILLS
from mm_moe.training import runtime

FOLDER = ".mm_moe-supports"  # in the folder of a run; named as ours, see `checks.OURS`


def supports_of(
    fill: str | None,
    options: Mapping[str, Any],
    source: DataSource,
    *,
    split: str,
    missing: Missing,
    seed: int,
    folder: Path,
    source_options: Mapping[str, Any],
) -> Supports | None:
    """What adds supports to batches; None without a fill that asks for them. A collective.

    Args:
        fill: name in the registry.
        options: the fill's own; `num_supports` and `num_draws` are read.
        source: the data set.
        split: the training split; no other lends anything, whatever is scored.
        missing: what training takes from its rows: that is not lent.
        seed: of the draws.
        folder: of the run; rank 0 writes the payloads there, unless the data set has random access.
        source_options: that the data set was opened with, see `mm_moe.arguments.dataset_options`.

    Raises:
        DataError: the data cannot be read or written.
    """
    if fill is None or not (kind := FILLS.resolve(fill)).needs_supports:
        return None
    found = open_supports(source, split=split, missing=missing)
    if found is None:
        write = partial(
            write_store,
            source,
            split=split,
            missing=missing,
            folder=folder / FOLDER,
            options={k: v for k, v in source_options.items() if k not in STREAM_FLAGS},
        )
        runtime.from_main(lambda: [write()][:0])  # what it opens stays on its rank
        found = write()
    index, store = found
    options = {**_defaults(kind), **options}
    return Supports(
        index=index,
        store=store,
        dataset=source.name,
        seed=seed,
        num_supports=options.get("num_supports"),
        whole=kind.needs_whole,
        num_draws=options.get("num_draws", 1),
    )


def _defaults(kind: type) -> dict[str, Any]:
    """The options of a fill that have a default."""
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}
