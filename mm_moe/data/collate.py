"""Samples to a batch: mask first, then decode and pack what is left.

A payload that the missing protocol takes is deleted before it is decoded, so nothing downstream can
see it. An image that does not decode, or a text that is no UTF-8, makes its modality absent for
that row; it is counted, named once in the log of `mm_moe.data`, and the run goes on up to a limit.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mm_moe.batch import IGNORED_LABEL, IMAGE, TEXT, Batch, PackedArray, Sample, base_modality
from mm_moe.data.augment import Variation
from mm_moe.data.captions import Captions
from mm_moe.data.decode import UndecodableImageError, decode_image
from mm_moe.data.modality_dropout import ModalityDropout
from mm_moe.data.retrying import Remote
from mm_moe.data.schema import (
    MULTI_LABEL,
    NO_LABEL,
    SINGLE_LABEL,
    SURVIVAL,
    check_label,
    dense_label,
)
from mm_moe.errors import ConfigError, DataError

# B samples, M modalities, N present rows of one modality, C classes

BAD = "bad"  # key of a worker's batch: id -> reason

logger = logging.getLogger("mm_moe.data")
Processor = Callable[[list[Any]], dict[str, Tensor]]


class Missing(Protocol):
    """What decides the imposed missingness: `MissingProtocol` or `MissingTable`."""

    def present(self, ids: Sequence[str], modalities: Sequence[str]) -> Tensor:
        """Bool (B, M)."""


class Interactions(Protocol):
    """What knows the interaction of training samples: `interactions.training`."""

    def __call__(self, ids: Sequence[str]) -> Tensor:
        """Int64 (B,), or float (B, Q)."""


class Support(Protocol):
    """What adds supports to a batch: `support_batch.Supports`."""

    def pack(
        self,
        samples: Sequence[Sample],
        present_BM: Tensor,
        *,
        modalities: Sequence[str],
        processors: Mapping[str, Processor],
        decode: Callable[[str, Any], Any],
    ) -> dict[str, dict[str, Any]]:
        """The batch's key "supports"."""


class Collator:
    """Builds a `Batch` from `Sample` objects.

    Args:
        modalities: the model's modalities in order.
        processors: modality -> function from a list of N values (RGB images, str) to tensors whose
            first dimension is N.
        problem_type: see `mm_moe.data.schema`.
        num_labels: number of classes.
        missing: imposed missingness, or None. It never takes the last modality that a row has.
        vectors: modalities that are feature sequences, whatever their names: not to be decoded.
        max_bad_samples: how many samples with an undecodable image are borne before an error; None:
            somebody else counts.
        interactions: gives the key "interaction" of training batches, or None.
        remote: how images at addresses are read.
        variation: of captions and pictures in training; None: the first caption, unchanged
            pictures.
        supports: gives the key "supports", or None.
        dropout: takes further modalities in training, or None.

    Attributes:
        bad: id -> reason, of such samples that *this process* met or was told of, in order. In a
            loader worker the batch carries them home (key `BAD`), see `loading.SampleLoader`;
            `num_bad` counts over all processes.

    Raises:
        ConfigError: a modality has no processor.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        processors: dict[str, Processor],
        problem_type: str,
        num_labels: int,
        missing: Missing | None = None,
        vectors: Collection[str] = (),
        max_bad_samples: int | None = 100,
        interactions: Interactions | None = None,
        remote: Remote | None = None,
        variation: Variation | None = None,
        supports: Support | None = None,
        dropout: ModalityDropout | None = None,
    ) -> None:
        lacking = [name for name in modalities if name not in processors]
        if lacking:
            raise ConfigError(f"no processor for {', '.join(lacking)}.")
        self.modalities, self.processors = tuple(modalities), processors
        self._kinds = {name: base_modality(name) for name in modalities}
        self.problem_type, self.num_labels = problem_type, num_labels
        self.missing, self.max_bad_samples = missing, max_bad_samples
        self.interactions, self.supports = interactions, supports
        self.remote, self.variation = remote or Remote(), variation
        self.dropout = dropout
        self.vectors = frozenset(vectors)
        self.bad: dict[str, str] = {}
        self._fresh: dict[str, str] = {}
        # One flag per hashed id in shared memory: loader workers set it without a lock and without
        # counting twice. With 2**20 places, 100 ids collide with a chance of 0.5%.
        self._flags = torch.zeros(2**20, dtype=torch.uint8).share_memory_()

    @property
    def num_bad(self) -> int:
        """Distinct samples with an undecodable image, over this process and its loader workers."""
        return int(self._flags.sum(dtype=torch.int64))

    @property
    def bad_ids(self) -> list[str]:
        """The ids of `bad`."""
        return list(self.bad)

    def remember(self, found: Mapping[str, str]) -> None:
        """Take over what a loader worker met."""
        self.bad |= {name: why for name, why in found.items() if name not in self.bad}

    def __call__(self, samples: list[Sample]) -> Batch:
        """Pack samples; an empty list gives a batch of zero rows.

        Raises:
            DataError: a label outside its classes, or too many undecodable images.
        """
        ids = [sample.id for sample in samples]
        present_BM = presence(samples, modalities=self.modalities, missing=self.missing)
        if self.dropout is not None:
            present_BM = self.dropout(samples, present_BM)
        inputs = {}
        for m, name in enumerate(self.modalities):
            values = [
                self._decode(name, sample) if present_BM[row, m] else None
                for row, sample in enumerate(samples)
            ]
            present_BM[:, m] = torch.tensor(
                [value is not None for value in values], dtype=torch.bool
            )
            rows = [value for value in values if value is not None]
            if rows:
                inputs[name] = self.processors[name](rows)
        labels = self._labels(samples, present_BM.any(-1))
        interaction = None if self.interactions is None else self.interactions(ids)
        batch = Batch.of(ids, present_BM, inputs, labels, interaction)
        if self.supports is not None:
            batch["supports"] = self.supports.pack(
                samples,
                present_BM,
                modalities=self.modalities,
                processors=self.processors,
                decode=self._plain,
            )
        if self._fresh and torch.utils.data.get_worker_info() is not None:
            batch[BAD] = self._fresh
        self._fresh = {}
        return batch

    def _decode(self, modality: str, sample: Sample) -> Any:
        """The value for the processor, or None for an image or text that does not decode."""
        value = sample.payload[modality]
        if isinstance(value, PackedArray) or modality in self.vectors:
            return value
        kind = self._kinds[modality]
        if kind == TEXT:
            return self._text(sample, value)
        if kind != IMAGE:
            return value
        try:
            image = decode_image(value, remote=self.remote)
        except UndecodableImageError as error:
            self._count_bad(sample.id, str(error))
            return None
        if self.variation is None:
            return image
        return self.variation.picture(sample, image, modality=modality)

    def _plain(self, modality: str, value: Any) -> Any:
        """A support's value as evaluation sees it, or None for one that does not decode.

        It is not counted: its own row is, when training comes to it.
        """
        if isinstance(value, PackedArray) or modality in self.vectors:
            return value
        if base_modality(modality) == TEXT:
            value = value.first if isinstance(value, Captions) else value
            return None if isinstance(value, bytes) else value
        if base_modality(modality) != IMAGE:
            return value
        try:
            return decode_image(value, remote=self.remote)
        except UndecodableImageError:
            return None

    def _text(self, sample: Sample, value: Any) -> Any:
        """One text of a sample."""
        if isinstance(value, bytes):
            self._count_bad(sample.id, "its text is no UTF-8", what="text")
            return None
        if not isinstance(value, Captions):
            return value
        return self.variation.caption(sample, value) if self.variation else value.first

    def _count_bad(self, sample_id: str, reason: str, *, what: str = "image") -> None:
        place = zlib.crc32(sample_id.encode()) % len(self._flags)
        if self._flags[place]:
            return
        self._flags[place] = 1
        self.bad[sample_id] = self._fresh[sample_id] = reason
        logger.warning(
            "%s of sample %r does not decode (%s); taken as missing", what, sample_id, reason
        )
        if self.max_bad_samples is not None and self.num_bad > self.max_bad_samples:
            raise DataError(
                f"{self.num_bad} samples have an image that does not decode, over the limit of "
                f"max_bad_samples ({self.max_bad_samples}); the last one is {sample_id!r}. "
                "Mend the data or raise the limit."
            )

    def _labels(self, samples: list[Sample], kept_B: Tensor) -> Tensor | None:
        """Labels with IGNORED_LABEL for rows without a label or without any modality."""
        if self.problem_type == NO_LABEL:
            return None
        width = {MULTI_LABEL: (self.num_labels,), SURVIVAL: (2,)}.get(self.problem_type, ())
        dtype = torch.int64 if self.problem_type == SINGLE_LABEL else torch.float32
        labels = torch.full((len(samples), *width), IGNORED_LABEL, dtype=dtype)
        for row, sample in enumerate(samples):
            check_label(
                sample.label,
                problem_type=self.problem_type,
                num_labels=self.num_labels,
                sample_id=sample.id,
            )
            if sample.label is not None and kept_B[row]:
                labels[row] = torch.as_tensor(
                    dense_label(sample.label, self.num_labels), dtype=dtype
                )
        return labels


def presence(
    samples: Sequence[Sample], *, modalities: Sequence[str], missing: Missing | None
) -> Tensor:
    """What samples have by nature and a protocol leaves them, before decoding: bool (B, M).

    A sample that would be left with nothing keeps what it has.
    """
    rows = [[_exists(sample.payload.get(name)) for name in modalities] for sample in samples]
    natural_BM = torch.tensor(rows, dtype=torch.bool).reshape(len(samples), len(modalities))
    if missing is None or not samples:
        return natural_BM
    left_BM = natural_BM & missing.present([sample.mask_key for sample in samples], modalities)
    return torch.where(left_BM.any(-1, keepdim=True), left_BM, natural_BM)


def _exists(value: Any) -> bool:
    """Whether a payload value is there at all: not None, not empty, not blank text."""
    if value is None:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return len(value) > 0 if hasattr(value, "__len__") else True
