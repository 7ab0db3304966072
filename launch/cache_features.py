"""Frozen features of a data set: `python launch/prepare_data.py features --dataset NAME ...`.

Every split is read once, its images and texts go through a backbone whose weights do not change,
and the features are written as Parquet. `--dataset cached_features --data_dir OUTPUT --backbone
features` then trains heads on them, with the logits that the frozen backbone would give. What a
sample lacks by nature, or does not decode, is lacking in the features too.

Axes: B samples of a batch.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from launch.cli import ProgramParser
from mm_moe.arguments import parse_json
from mm_moe.backbones.base import Backbone
from mm_moe.batch import Batch, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.prepare.raw import SEQUENCES, RawDataSet, RawRow
from mm_moe.data.prepare.write import check_target, prepare
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.errors import ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.processing import processors_for
from mm_moe.registry import BACKBONES, DATASETS
from mm_moe.training.predict import to_device


class FeatureRows(RawDataSet):
    """The features of a data set, row by row, as something that `prepare` can write.

    Args:
        source: the data set.
        model: holds the frozen backbone; its head, if any, is not used.
        collator: turns samples into batches.
        batch_size: samples that are encoded at once.
        splits: those that are read.
        about: what the record says of the backbone.
    """

    notes = ("Features of a frozen backbone; see options for which.",)
    trims_padding = False
    statistics_over = ()  # used as they are
    needs_labels = False

    def __init__(
        self,
        source: DataSource,
        *,
        model: MultimodalMoEModel,
        collator: Collator,
        batch_size: int,
        splits: tuple[str, ...],
        about: dict[str, Any],
    ) -> None:
        self.data, self.model, self.collator = source, model.eval(), collator
        self.batch_size, self.about, self.chosen = batch_size, about, splits
        self.name = source.name  # type: ignore[misc]  # masks are keyed by it
        self.kinds = dict.fromkeys(source.modalities, SEQUENCES)
        self.problem_type = source.problem_type
        self.task = source.task or source.problem_type
        self.label_names, self.license = source.label_names, source.license
        self.unlabelled = {k: why for k, why in source.unlabelled.items() if k in splits}

    def splits(self) -> tuple[str, ...]:
        """The chosen ones."""
        return self.chosen

    def indices(self) -> list[Path]:
        """None: the data set's own fingerprint is among the options."""
        return []

    @property
    def options(self) -> dict[str, Any]:
        """Backbone, weights and data by name and hash."""
        return self.about

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each sample."""
        samples = map(self.data.to_sample, self.data.stream(split))
        for chunk in _chunks(samples, self.batch_size):
            batch = self.collator(chunk)
            features = self._features(batch)
            for row, sample in enumerate(chunk):
                payload = {
                    name: features[name][row][None]
                    for m, name in enumerate(self.kinds)
                    if batch.present[row, m]
                }
                yield RawRow(
                    sample.id, payload, sample.label, group=sample.group, mask_key=sample.mask_key
                )

    @torch.no_grad()
    def _features(self, batch: Batch) -> dict[str, Any]:
        """Modality -> array (B, width)."""
        device = next(self.model.parameters()).device
        output = self.model(**to_device(batch, device))
        return {name: value.float().cpu().numpy() for name, value in output.features.items()}


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def backbone_hash(backbone: Backbone) -> str:
    """sha256 over the names, types, shapes and bytes of a backbone's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    flags = ProgramParser(description=__doc__)
    flags.add_argument("--dataset", required=True, help="a registered data set")
    flags.add_argument("--data_dir", help="folder of its files")
    flags.add_argument("--dataset_options", help="JSON object with its own options")
    flags.add_argument("--backbone", default="small_clip", help="a registered backbone")
    flags.add_argument("--backbone_config", help="JSON object with its settings")
    flags.add_argument("--pretrained", help="weights: builtin, a file, a folder or a Hub name")
    flags.add_argument("--tokenizer", help="where it lies, if not with the weights")
    flags.add_argument("--output", type=Path, required=True, help="folder to write")
    flags.add_argument("--splits", nargs="+", help="splits to read (default: all)")
    flags.add_argument("--batch_size", type=int, default=64, help="samples encoded at once")
    flags.add_argument("--max_bad_samples", type=int, default=100, help="images that may be broken")
    flags.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    flags.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    options = flags.parse_args(argv)
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size} must be at least 1.")
    if options.pretrained in (None, "none"):
        raise ConfigError(
            "features of random weights are of no use; name weights with --pretrained (builtin: "
            "those of small_clip)."
        )
    return options


def open_source(options: argparse.Namespace) -> DataSource:
    """The data set, with the splits that are asked for.

    Raises:
        ConfigError: unknown options of it.
        DataError: an unknown split, or data that are not in order.
    """
    own = parse_json("dataset_options", options.dataset_options)
    try:
        source: DataSource = DATASETS.resolve(options.dataset)(options.data_dir, **own)
    except TypeError as error:
        raise ConfigError(f"--dataset_options for {options.dataset!r}: {error}") from error
    for split in options.splits or ():
        source.check_split(split)
    return source


def frozen_model(options: argparse.Namespace, source: DataSource) -> MultimodalMoEModel:
    """The backbone in a model without prompts and experts.

    Raises:
        ConfigError: a backbone that does not take the data's modalities.
        CheckpointError: no such weights.
    """
    settings = parse_json("backbone_config", options.backbone_config)
    if source.sequences:
        settings = {"sequences": {k: dict(v) for k, v in source.sequences.items()}, **settings}
    fields: dict[str, Any] = {"num_labels": 0}
    config = MultimodalMoEConfig(
        backbone=BACKBONES.check(options.backbone),
        backbone_config=settings,
        modalities=list(source.modalities),
        **fields,
    )
    model = build_model(config, pretrained=options.pretrained)
    model.requires_grad_(False)
    if torch.cuda.is_available() and not options.use_cpu:
        model.to(torch.device("cuda"))  # type: ignore[arg-type]  # the library hides the method's type
    return model


def feature_rows(options: argparse.Namespace) -> FeatureRows:
    """The rows that the flags ask for."""
    source = open_source(options)
    model = frozen_model(options, source)
    collator = Collator(
        modalities=source.modalities,
        processors=processors_for(model.config, source=options.tokenizer or options.pretrained),
        problem_type=NO_LABEL,  # labels go by, unread
        num_labels=0,
        vectors=source.sequences,
        max_bad_samples=options.max_bad_samples,
    )
    return FeatureRows(
        source,
        model=model,
        collator=collator,
        batch_size=options.batch_size,
        splits=tuple(options.splits or source.splits()),
        about={
            "dataset": options.dataset,
            "dataset_options": parse_json("dataset_options", options.dataset_options),
            "dataset_sha256": source.fingerprint(),
            "backbone": options.backbone,
            "pretrained": options.pretrained,
            "backbone_config": model.config.backbone_config,
            "backbone_sha256": backbone_hash(model.backbone),
        },
    )


def main(argv: list[str]) -> int:
    """Encode, write, tell."""
    options = parse(argv)
    check_target(options.output, overwrite=options.overwrite)
    info = prepare(feature_rows(options), output=options.output, overwrite=options.overwrite)
    for split, record in info["splits"].items():
        lacking = [f"{n:,} without {name}" for name, n in record["missing"].items() if n]
        print("; ".join([f"{split}: {record['rows']:,} rows", *lacking]))
    print(
        f"written to {options.output}; train heads on it with --dataset cached_features "
        f"--data_dir {options.output} --backbone features"
    )
    return 0
