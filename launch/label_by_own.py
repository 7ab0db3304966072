"""Our own unimodal predictors: a head on each modality's frozen features, cross-fitted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mm_moe.arguments import parse_json
from mm_moe.batch import Sample
from mm_moe.data.collate import Collator
from mm_moe.data.interactions.cross_fit import STRENGTHS, CrossFitted, folds_of
from mm_moe.data.interactions.hard_labels import TRAIN, UniScores
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.features import FrozenFeatures, frozen_features, mean_features
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.processing import processors_for
from mm_moe.registry import BACKBONES

SEED = 0  # of a backbone without weights
WITHOUT = "none"  # no backbone: the mean of a sequence's steps is its feature


def add_flags(flags: argparse._ArgumentGroup, *, folds: int) -> None:
    """The flags of this labeller."""
    flags.add_argument(
        "--backbone",
        default="small_clip",
        help="a registered backbone, or none: means of sequences",
    )
    flags.add_argument("--pretrained", help="its weights, as in training")
    flags.add_argument("--backbone_config", help="JSON object, as in training")
    flags.add_argument("--tokenizer", help="folder or Hub name, as in training")
    flags.add_argument("--folds", type=int, default=folds, help="of the training split")


def label(
    options: argparse.Namespace, source: DataSource, samples: Mapping[str, list[Sample]]
) -> tuple[dict[str, dict[str, UniScores]], None, dict[str, Any]]:
    """Scores of every split; those of train come from heads that did not see the row.

    Raises:
        ConfigError: no training split, or a backbone that does not fit the data.
        DataError: a modality without training rows, or with one class.
    """
    if TRAIN not in samples:
        raise ConfigError(f"--labeller own is fitted on the split {TRAIN!r}; add it to --splits.")
    found = _features(options, source, list(samples))
    scores, heads = {}, {}
    for modality in source.modalities:
        scores[modality], heads[modality] = judge_alone(
            modality, samples, found, source=source, num_folds=options.folds
        )
    origin = {
        "backbone": options.backbone,
        "pretrained": options.pretrained,
        "folds": options.folds,
        "heads": heads,
    }
    return scores, None, origin


def _features(
    options: argparse.Namespace, source: DataSource, splits: list[str]
) -> dict[str, FrozenFeatures]:
    """The features of each split."""
    streams = {
        split: SampleStream(source, split=split, batch_size=options.batch_size, epochs=1)
        for split in splits
    }
    if options.backbone == WITHOUT:
        if set(source.sequences) != set(source.modalities):
            raise ConfigError(
                f"--backbone {WITHOUT} takes the means of feature sequences, and {source.name!r} "
                f"holds {', '.join(source.modalities)}; name a backbone."
            )
        return {
            split: mean_features(stream, sequences=source.sequences)
            for split, stream in streams.items()
        }
    model = _model(options, source)
    collator = Collator(
        modalities=source.modalities,
        processors=processors_for(model.config, source=options.tokenizer or options.pretrained),
        problem_type=NO_LABEL,
        num_labels=0,
        vectors=source.sequences,
    )
    size = options.batch_size
    return {
        split: frozen_features(model, DataLoader(stream, batch_size=size, collate_fn=collator))
        for split, stream in streams.items()
    }


def _model(options: argparse.Namespace, source: DataSource) -> MultimodalMoEModel:
    kind = BACKBONES.resolve(options.backbone)
    given = parse_json("backbone_config", options.backbone_config)
    if source.sequences:
        if not kind.takes_sequences:
            raise ConfigError(
                f"data set {source.name!r} holds feature sequences ({', '.join(source.sequences)}),"
                f" which backbone {options.backbone!r} does not take; take sequences, or none."
            )
        given = {"sequences": {n: dict(about) for n, about in source.sequences.items()}} | given
    torch.manual_seed(SEED)
    pretrained = options.pretrained
    if pretrained is not None and pretrained.lower() == "none":
        pretrained = None
    no_head: dict[str, Any] = {"num_labels": 0}
    config = MultimodalMoEConfig(
        backbone=options.backbone,
        backbone_config=given,
        modalities=list(source.modalities),
        moe=None,
        **no_head,
    )
    model = build_model(config, pretrained=pretrained)
    if torch.cuda.is_available() and not options.use_cpu:
        model.to(device="cuda")  # type: ignore[call-arg]
    return model


def judge_alone(
    modality: str,
    samples: Mapping[str, list[Sample]],
    features: Mapping[str, FrozenFeatures],
    *,
    source: DataSource,
    num_folds: int,
) -> tuple[dict[str, UniScores], dict[str, Any]]:
    """Split -> scores from one modality, and what the head was.

    Raises:
        ConfigError: more folds than groups.
        DataError: no usable training row, or one class only.
    """
    train, given_ND = samples[TRAIN], features[TRAIN].feature_ND[modality]
    labels = np.array([-1 if sample.label is None else sample.label for sample in train])
    usable_N = ~np.isnan(given_ND).any(-1) & (labels >= 0)
    if not usable_N.any():
        raise DataError(f"no training row of {source.name!r} has a label and {modality!r}.")
    kept = [sample for sample, usable in zip(train, usable_N, strict=True) if usable]
    heads = CrossFitted(STRENGTHS).fit(
        given_ND[usable_N],
        label_N=labels[usable_N],
        # in whole groups: the twin of a held-out row must not be learnt from
        fold_N=folds_of(
            [sample.group_key for sample in kept], dataset=source.name, num_folds=num_folds
        ),
        num_classes=len(source.label_names),
    )
    scores = {}
    for split, rows in samples.items():
        feature_ND = features[split].feature_ND[modality]
        there_N = ~np.isnan(feature_ND).any(-1)
        score_NC = np.full((len(rows), len(source.label_names)), np.nan)
        score_NC[there_N] = heads.predict(feature_ND[there_N])
        if split == TRAIN:
            score_NC[usable_N] = heads.probability_NC
        scores[split] = UniScores(features[split].ids, modality, score_NC)
    return scores, {"strength": heads.strength, "held_out_log_loss": heads.log_loss}
