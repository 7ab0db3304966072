"""Tables from a name to a `module:attribute` string: adding a thing is one file and one line.

Strings instead of imports: the core can name a prompt or an objective that lives above it without
importing it, and nothing heavy is imported until it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from mm_moe.errors import ConfigError


def nearest(name: str, known: list[str]) -> str:
    """A phrase that lists the known names closest to `name`, or all of them if none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}."


class Registry(Mapping[str, str]):
    """A read-only table of one kind of thing.

    Args:
        kind: what the entries are, for error messages ("router").
        entries: name -> "package.module:attribute".
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, name: str) -> str:
        """Return `name` if it is registered or has the outside form `pkg.mod:Class`.

        Raises:
            ConfigError: the name is unknown; the message lists the nearest ones.
        """
        if name in self._entries or ":" in name:
            return name
        raise ConfigError(f"unknown {self.kind} {name!r}; {nearest(name, list(self._entries))}")

    def resolve(self, name: str) -> Any:
        """Import and return the object behind `name`, or behind `pkg.mod:Class` from outside.

        Raises:
            ConfigError: the name is unknown, or its module or attribute does not import.
        """
        target = self._entries.get(self.check(name), name)
        module_name, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{self.kind} {name!r} points to {target!r}, which does not import: {error}"
            ) from error


BACKBONES = Registry(
    "backbone",
    {
        "small_clip": "mm_moe.backbones.clip_small:SmallClipBackbone",
        "clip": "mm_moe.backbones.clip:ClipBackbone",
        "siglip": "mm_moe.backbones.siglip:SiglipBackbone",
        "blip2": "mm_moe.backbones.blip2:Blip2Backbone",
        "sequences": "mm_moe.backbones.sequences:SequencesBackbone",
        "small": "mm_moe.backbones.small:SmallBackbone",
        "clinical": "mm_moe.backbones.clinical:ClinicalBackbone",
        "text_encoder": "mm_moe.backbones.text_encoder:TextEncoderBackbone",
        "timm": "mm_moe.backbones.timm_image:TimmBackbone",
        "dual": "mm_moe.backbones.dual:DualBackbone",
        "features": "mm_moe.backbones.features:FeaturesBackbone",
        "open_clip": "mm_moe.backbones.openclip:OpenClipBackbone",
    },
)
ROUTERS = Registry(
    "router",
    {
        "topk_softmax": "mm_moe.moe.router:TopKSoftmaxRouter",
        "topk_sigmoid": "mm_moe.moe.router_sigmoid:TopKSigmoidRouter",
        "noisy_topk": "mm_moe.moe.router_noisy:NoisyTopKRouter",
        "jitter_topk": "mm_moe.moe.router_jitter:JitterTopKRouter",
        "rsample_topk": "mm_moe.moe.router_rsample:RSampleTopKRouter",
        "expert_choice": "mm_moe.moe.router_expert_choice:ExpertChoiceRouter",
        "soft_slots": "mm_moe.moe.router_soft:SoftSlotsRouter",
        "by_modality": "mm_moe.moe.router_by_modality:ByModalityRouter",
        "by_combination": "mm_moe.moe.router_by_combination:ByCombinationRouter",
        "by_interaction": "mm_moe.moe.router_by_interaction:ByInteractionRouter",
        "noisy_candidates": "mm_moe.moe.router_candidates:CandidatesRouter",
        "flex": "mm_moe.moe.router_flex:FlexRouter",
    },
)
FILLS = Registry(
    "fill",
    {
        "zero": "mm_moe.fill.simple:ZeroFill",
        "default": "mm_moe.fill.simple:DefaultFill",
        "mean": "mm_moe.fill.mean:MeanFill",
        "bank": "mm_moe.fill.bank:BankFill",
        "neighbour": "mm_moe.fill.neighbour:NeighbourFill",
        "retriever": "mm_moe.fill.retriever:RetrieverFill",
        "similar_retriever": "mm_moe.fill.similar:SimilarRetrieverFill",
    },
)
PROMPTS = Registry(
    "prompt",
    {
        "none": "prompts.base:NoPrompt",
        "missing_aware": "prompts.missing_aware:MissingAwarePrompt",
        "correlated": "prompts.correlated:CorrelatedPrompt",
        "replay": "prompts.replay:ReplayPrompt",
        "generative": "prompts.generative:GenerativePrompt",
        "rep_code": "prompts.rep_code:RepCodePrompt",
        "rep_fixed": "prompts.rep_fixed:RepFixedPrompt",
    },
)
DATASETS = Registry(
    "data set",
    {
        "emoji": "mm_moe.data.sets.emoji:EmojiData",
        "columns": "mm_moe.data.sets.columns:ColumnsData",
        "webdataset": "mm_moe.data.sets.webdataset:WebData",
        "mixture": "mm_moe.data.sets.mixture:MixtureData",
        "openclipart_emoji": "mm_moe.data.sets.openclipart:OpenclipartEmojiData",
        "grocery": "mm_moe.data.sets.grocery:GroceryData",
        "prepared": "mm_moe.data.sets.prepared:PreparedData",
        "mm_imdb": "mm_moe.data.sets.prepared:MmImdbData",
        "food101": "mm_moe.data.sets.prepared:Food101Data",
        "hateful_memes": "mm_moe.data.sets.prepared:HatefulMemesData",
        "cmu_mosi": "mm_moe.data.sets.prepared:CmuMosiData",
        "cmu_mosei": "mm_moe.data.sets.prepared:CmuMoseiData",
        "ch_sims": "mm_moe.data.sets.prepared:ChSimsData",
        "iemocap": "mm_moe.data.sets.prepared:IemocapData",
        "mimic_impk": "mm_moe.data.sets.prepared:MimicImpkData",
        "mmsd": "mm_moe.data.sets.prepared:MmsdData",
        "mustard": "mm_moe.data.sets.prepared:MustardData",
        "urfunny": "mm_moe.data.sets.prepared:UrfunnyData",
        "interaction_dial": "mm_moe.data.sets.interaction_dial:InteractionDialData",
        "av_mnist": "mm_moe.data.sets.prepared:AvMnistData",
        "avmnist_npy": "mm_moe.data.sets.prepared:AvMnistNpyData",
        "digit_pairs": "mm_moe.data.sets.prepared:DigitPairsData",
        "fastmri_knee": "mm_moe.data.sets.prepared:FastmriKneeData",
        "cached_features": "mm_moe.data.sets.cached_features:CachedFeaturesData",
        "vqa_rad": "mm_moe.data.sets.vqa_rad:VqaRadData",
        "nlvr": "mm_moe.data.sets.nlvr:NlvrData",
        "vqa_v2": "mm_moe.data.sets.prepared:VqaV2Data",
        "vqa_vs": "mm_moe.data.sets.prepared:VqaVsData",
        "nlvr2": "mm_moe.data.sets.prepared:Nlvr2Data",
        "tables": "mm_moe.data.sets.prepared:TablesData",
        "tcga_luad": "mm_moe.data.sets.tcga_luad:TcgaLuadData",
        "physionet2012": "mm_moe.data.sets.physionet2012:Physionet2012Data",
        "adni": "mm_moe.data.sets.prepared:AdniData",
        "cells": "mm_moe.data.sets.cells:CellsData",
        "mimic3": "mm_moe.data.sets.prepared:Mimic3Data",
        "mimic4": "mm_moe.data.sets.prepared:Mimic4Data",
        "eicu": "mm_moe.data.sets.prepared:EicuData",
        "mimic_tensors": "mm_moe.data.sets.prepared:MimicTensorsData",
    },
)
RAW_DATASETS = Registry(
    "raw data set",
    {
        "mm_imdb": "mm_moe.data.prepare.mm_imdb:MmImdbRaw",
        "food101": "mm_moe.data.prepare.food101:Food101Raw",
        "hateful_memes": "mm_moe.data.prepare.hateful_memes:HatefulMemesRaw",
        "cmu_mosi": "mm_moe.data.prepare.sentiment:MosiRaw",
        "cmu_mosei": "mm_moe.data.prepare.sentiment:MoseiRaw",
        "ch_sims": "mm_moe.data.prepare.sentiment:SimsRaw",
        "iemocap": "mm_moe.data.prepare.iemocap:IemocapRaw",
        "mimic_impk": "mm_moe.data.prepare.mimic_impk:MimicImpkRaw",
        "mmsd": "mm_moe.data.prepare.mmsd:MmsdRaw",
        "mustard": "mm_moe.data.prepare.mustard:MustardRaw",
        "urfunny": "mm_moe.data.prepare.urfunny:UrfunnyRaw",
        "av_mnist": "mm_moe.data.prepare.av_mnist:AvMnistRaw",
        "avmnist_npy": "mm_moe.data.prepare.avmnist_npy:AvMnistNpyRaw",
        "digit_pairs": "mm_moe.data.prepare.digit_pairs:DigitPairsRaw",
        "fastmri_knee": "mm_moe.data.prepare.fastmri_knee:FastmriKneeRaw",
        "vqa_v2": "mm_moe.data.prepare.vqa:VqaV2Raw",
        "vqa_vs": "mm_moe.data.prepare.vqa:VqaVsRaw",
        "nlvr2": "mm_moe.data.prepare.nlvr2:Nlvr2Raw",
        "tables": "mm_moe.data.prepare.tables:TablesRaw",
        "adni": "mm_moe.data.prepare.adni:AdniRaw",
        "mimic3": "mm_moe.data.prepare.mimic:Mimic3Raw",
        "mimic4": "mm_moe.data.prepare.mimic:Mimic4Raw",
        "eicu": "mm_moe.data.prepare.eicu:EicuRaw",
        "mimic_tensors": "mm_moe.data.prepare.mimic_tensors:MimicTensorsRaw",
    },
)
MODELS = Registry(  # of their own kind, by `model_type`; what an objective may train
    "model",
    {
        "mm_moe_cell_vae": "mm_moe.cells.modeling:CellVAE",
        "mm_moe_mixture_vae": "mm_moe.models.mixture.modeling:MixtureVAE",
    },
)
OBJECTIVES = Registry(
    "objective",
    {
        "supervised": "finetune.supervised:Supervised",
        "soft_bce": "finetune.soft_targets:SoftBce",
        "soft_cross_entropy": "finetune.soft_targets:SoftCrossEntropy",
        "interaction": "finetune.interaction:Interaction",
        "cox": "finetune.survival:Cox",
        "contrastive": "pretrain.contrastive:Contrastive",
        "siglip": "pretrain.contrastive:Siglip",
        "blip2_stage1": "pretrain.blip2:Blip2StageOne",
        "mmvae": "pretrain.mmvae:CellObjective",
        "mixture_vae": "pretrain.mixture:MixtureObjective",
    },
)
