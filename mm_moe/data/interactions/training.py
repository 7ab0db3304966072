"""The categories of training rows as a batch carries them.

Axes: B samples of a batch, Q fine categories, K coarse ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.interactions.categories import COARSE, NONE, coarse_weights
from mm_moe.data.interactions.table import NAMED, InteractionTable
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

FORMS = ("coarse", "fine", "coarse_soft", "fine_soft")


class TrainingInteractions:
    """ids -> the key "interaction" of a training batch.

    It holds the rows of one split and no others: a category contains the label, so rows that are
    to be scored must not have theirs.

    Args:
        table: the categories.
        split: the training split.
        form: "coarse" for the place in R, U, AS, DS; "fine" for U by modality; "coarse_soft" or
            "fine_soft" for the weights of these.

    Raises:
        ConfigError: an unknown form.
        DataError: the table has no row of the split.
    """

    def __init__(self, table: InteractionTable, *, split: str, form: str = FORMS[0]) -> None:
        if form not in FORMS:
            raise ConfigError(
                f"--interaction_labels {form!r} is unknown; {nearest(form, list(FORMS))}"
            )
        place_R = table.rows_of(split)
        if not len(place_R):
            known = ", ".join(sorted(set(table.splits)))
            raise DataError(
                f"the interaction table of {table.dataset!r} has no row of split {split!r}; it has "
                f"{known}. Make it with --splits {split}."
            )
        self.split = split
        self.position = {table.ids[row]: n for n, row in enumerate(place_R)}
        if form.endswith("_soft"):
            soft_RQ = np.nan_to_num(table.soft_NQ[place_R])
            value = coarse_weights(soft_RQ) if form.startswith("coarse") else soft_RQ
            self.value = torch.from_numpy(value.astype(np.float32))
        else:
            code_R = (table.coarse_N if form == "coarse" else table.code_N)[place_R]
            self.value = torch.from_numpy(np.where(code_R == NONE, IGNORED_LABEL, code_R))
        self.num_kinds = len(COARSE) if form.startswith("coarse") else len(table.names)

    def __call__(self, ids: Sequence[str]) -> Tensor:
        """Int64 (B,), IGNORED_LABEL without a category; or float (B, Q) or (B, K), then zeros.

        Raises:
            DataError: samples that the table does not have in its training split.
        """
        lacking = [sample_id for sample_id in ids if sample_id not in self.position]
        if lacking:
            raise DataError(
                f"{len(lacking)} samples of a batch are not in split {self.split!r} of the "
                f"interaction table, first {', '.join(map(repr, lacking[:NAMED]))}; make the table "
                "from this data set and split."
            )
        return self.value[[self.position[sample_id] for sample_id in ids]]
