"""The one currency between data, model and objective.

Axes: B samples of a batch, M modalities (in the model's fixed order), N rows of one modality that
are present (N <= B). Payloads are packed: a modality's tensors hold its N present rows only, in the
order of the batch, so an absent payload does not exist anywhere downstream.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_moe.errors import DataError

IMAGE, TEXT = "image", "text"
CONTEXT = "context"  # a second text: what was said before
NUMBERED = re.compile(rf"({IMAGE}|{TEXT})_\d+")
IGNORED_LABEL = -100  # a row that takes no part in the loss or the scores (torch's ignore_index)


def base_modality(name: str) -> str:
    """What a modality is one of: "image" for "image_0", "text" for "context", else its own name."""
    found = NUMBERED.fullmatch(name)
    return found[1] if found else TEXT if name == CONTEXT else name


@dataclass(frozen=True)
class PackedArray:
    """An array as its bytes, so that samples can be compared and sent to workers cheaply.

    Attributes:
        content: the values, row by row.
        dtype: "uint8" or "float32".
        shape: of the array.
    """

    content: bytes
    dtype: str
    shape: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A view of the values.

        Raises:
            DataError: the bytes are not those of such an array.
        """
        count = math.prod(self.shape)
        if len(self.content) != count * np.dtype(self.dtype).itemsize:
            raise DataError(
                f"an array of {len(self.content)} bytes is not one of {self.dtype} and shape "
                f"{self.shape}; prepare the data again."
            )
        return np.frombuffer(self.content, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Sample:
    """One row of a data set before it is batched.

    Attributes:
        id: stable and unique within the data set.
        payload: modality name -> raw value (encoded image bytes, str, array). A modality that the
            row lacks by nature is absent from the dict.
        label: class index (int), multi-hot list, {class index: share in [0, 1]} for soft targets,
            float, or None.
        group: rows of one group (the plots of a movie, two drawings of one emoji) are no
            independent samples and are resampled together; None: the row is alone.
        mask_key: what a missing mask is keyed by; by default the group, so that its rows share one
            fate, or the id of a row that is alone. Kept apart from the group, because another key
            is another mask.
        epoch: how often the stream has gone through the data before; chance in training is keyed by
            it. Not a part of what a sample is.
    """

    id: str
    payload: dict[str, Any] = field(default_factory=dict)
    label: Any = None
    group: str | None = None
    mask_key: str = ""
    epoch: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not self.mask_key:
            object.__setattr__(self, "mask_key", self.group_key)

    @property
    def group_key(self) -> str:
        """The group, or the id of a row that is alone."""
        return self.id if self.group is None else self.group


class Batch(dict):
    """A batch as the keyword arguments of a model's `forward`.

    A dict (so that Trainer, accelerate and DeepSpeed move it between devices) with these keys:
        ids: list of B sample ids.
        present: bool (B, M).
        inputs: modality -> {name: Tensor (N, ...)}; a modality with N = 0 has no entry.
        labels: (B,) int64, (B, C) float or (B,) float; IGNORED_LABEL marks rows out of the loss.
        interaction: (B,) int64, the type of the interaction between a sample's modalities,
            IGNORED_LABEL where a row has none; or its weights (B, Q) float, rows of zeros. It holds
            the label: the key is there only in training, under `--interaction_table`.
        supports: training rows that have what samples lack, see `mm_moe.data.support_batch`; the
            key is there only for a fill that asks for it.
    """

    @classmethod
    def of(
        cls,
        ids: list[str],
        present: Tensor,
        inputs: dict[str, dict[str, Tensor]],
        labels: Tensor | None = None,
        interaction: Tensor | None = None,
    ) -> Batch:
        """Build a batch; the model checks that each payload has exactly its present rows."""
        batch = cls(ids=ids, present=present, inputs=inputs, labels=labels)
        if interaction is not None:
            batch["interaction"] = interaction
        return batch

    @property
    def ids(self) -> list[str]:
        """The B sample ids."""
        return self["ids"]

    @property
    def present(self) -> Tensor:
        """Which modalities each row has, bool (B, M)."""
        return self["present"]

    @property
    def inputs(self) -> dict[str, dict[str, Tensor]]:
        """Packed payloads by modality."""
        return self["inputs"]

    @property
    def labels(self) -> Tensor | None:
        """Labels, or None without any."""
        return self["labels"]


def pattern_index(present_BM: Tensor) -> Tensor:
    """Index (B,) int64 of each row's set of present modalities: bit m stands for modality m.

    With two modalities (image, text): 3 complete, 1 text missing, 2 image missing, 0 nothing.
    """
    weight_M = 2 ** torch.arange(present_BM.shape[1], device=present_BM.device)
    return (present_BM.long() * weight_M).sum(-1)


def pattern_name(index: int, modalities: tuple[str, ...]) -> str:
    """Words for a pattern index: "complete", "text missing", "image+text missing"."""
    absent = [name for m, name in enumerate(modalities) if not index >> m & 1]
    return f"{'+'.join(absent)} missing" if absent else "complete"
