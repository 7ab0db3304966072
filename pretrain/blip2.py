"""BLIP-2's first stage: the Q-Former learns to read a frozen image tower with texts as its aim.

Source: Li et al. 2023, section 3.2: image-text contrast, matching with hard negatives, and
image-grounded generation, added up.

N pairs of this rank (a blank row without any), B its samples, G samples of all ranks, L tokens of a
text, S patches, Q query tokens, D joint width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.backbones.base import Payload
from mm_moe.backbones.blip2 import Blip2Backbone
from mm_moe.backbones.blip2_stage1 import StageOnePasses
from mm_moe.batch import IMAGE, TEXT, Batch
from mm_moe.errors import ConfigError
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.output import MultimodalMoEOutput, mean_router_losses
from mm_moe.training.collectives import fetch_rows, gather_rows, mean_weight
from pretrain.contrastive import MAX_LOGIT_SCALE
from pretrain.hard_negatives import WANTS_IMAGE, WANTS_TEXT, Candidates, id_keys, text_keys


@dataclass(frozen=True)
class Contrast:
    """Scaled similarities of this rank's samples with all.

    Attributes:
        image_BG: of each image with all texts.
        text_BG: of each text with all images.
        first: number of this rank's first sample.
    """

    image_BG: Tensor
    text_BG: Tensor
    first: int

    @classmethod
    def of(cls, image_BQD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Contrast:
        """An image is as similar to a text as the closest of its queries; a collective.

        Args:
            image_BQD: features of length 1, or 0 where there is no pair.
            text_BD: likewise.
            logit_scale: natural logarithm of the inverse temperature, which is clamped as CLIP's.
        """
        queries = image_BQD.shape[1]
        packed, first = gather_rows(torch.cat([image_BQD.flatten(1), text_BD], dim=1))
        image_GQD, text_GD = packed.split([image_BQD[0].numel(), text_BD.shape[1]], dim=1)
        image_GQD = image_GQD.unflatten(1, (queries, -1))
        scale = logit_scale.to(text_BD.dtype).exp().clamp(max=MAX_LOGIT_SCALE)
        image_BG = (image_BQD @ text_GD.T).amax(1) * scale
        text_BG = torch.einsum("bd,gqd->bgq", text_BD, image_GQD).amax(2) * scale
        return cls(image_BG, text_BG, first)

    def loss(self, complete_B: Tensor, complete_G: Tensor, *, smoothing: float) -> Tensor:
        """This rank's share of the cross-entropy over all pairs, both directions' mean."""
        own_B = torch.arange(len(complete_B), device=complete_B.device) + self.first
        counts_B, counts_G = (c.to(self.image_BG.dtype) for c in (complete_B, complete_G))
        total = self.image_BG.new_zeros(())
        for logits_BG in (self.image_BG, self.text_BG):
            kept_BG = logits_BG.masked_fill(~complete_G, -1e4)  # exp gives exactly 0
            match_B = logits_BG.gather(1, own_B[:, None]).squeeze(1)
            mean_B = (logits_BG @ counts_G) / counts_G.sum().clamp(min=1)
            each_B = kept_BG.logsumexp(1) - (1 - smoothing) * match_B - smoothing * mean_B
            total = total + (each_B * counts_B).sum()
        return total * mean_weight(complete_B.sum(), dtype=total.dtype) / 2


@dataclass(frozen=True)
class Pairs:
    """The complete pairs of this rank's batch, or one blank row.

    Attributes:
        rows: positions (N,) in the batch; none for the blank row.
        image: payload (N, ...).
        text: payload (N, L).
        real: bool (N,), False for the blank row.
        complete: bool (B,).
    """

    rows: Tensor
    image: Payload
    text: Payload
    real: Tensor
    complete: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any], passes: StageOnePasses) -> Pairs:
        """Pick them from the packed payloads."""
        present_BM: Tensor = batch["present"]
        complete_B = present_BM.all(1)
        rows = complete_B.nonzero().squeeze(1)
        if not len(rows):
            image, text = passes.image.blank(), passes.text.blank()
            return cls(rows, image, text, complete_B.new_zeros(1), complete_B)
        image, text = (
            {
                key: value[complete_B[present_BM[:, m]]]
                for key, value in batch["inputs"][name].items()
            }
            for m, name in enumerate((IMAGE, TEXT))
        )
        return cls(rows, image, text, complete_B.new_ones(len(rows)), complete_B)

    def in_batch(self, values_ND: Tensor) -> Tensor:
        """Values (B, D) of the samples; zeros where there is no pair. The blank row's are lost."""
        zeros_BD = values_ND.new_zeros(len(self.complete), *values_ND.shape[1:])
        found_BD = zeros_BD.index_copy(0, self.rows, values_ND[: len(self.rows)])
        return found_BD + 0 * values_ND[len(self.rows) :].sum()


@dataclass(frozen=True)
class Blip2StageOne:
    """Contrast, matching and generation on complete pairs; a pair that lacks one feeds nothing.

    The paper's losses with its weights (1 each); its code smooths the labels of contrast and
    generation by 0.1. Differences: gradients go through the exchange of features, hard negatives
    come from all ranks' batch and never have the text of the pair they are for, and generation is
    the mean over the tokens of all ranks.

    Attributes:
        problem_type: of the data set; not used.
        itc_weight: of the contrast.
        itm_weight: of the matching.
        itg_weight: of the generation.
        itc_smoothing: share of a label that goes to all pairs alike.
        itg_smoothing: share of a label that goes to all words alike.
        seed: of the hard negatives.

    Raises:
        ConfigError: a weight or a share that cannot be.
    """

    uses_labels: ClassVar[bool] = False  # the model gets no head

    problem_type: str = "none"
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    itg_weight: float = 1.0
    itc_smoothing: float = 0.1
    itg_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("itc_weight", "itm_weight", "itg_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
                raise ConfigError(f"objective_config.{name} ({value!r}) must be a number from 0.")
        for name in ("itc_smoothing", "itg_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConfigError(f"objective_config.{name} ({value!r}) must lie in [0, 1).")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"objective_config.seed ({self.seed!r}) must be a whole number.")

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch, run=functools.partial(self.run, batch=batch))
        parts: dict[str, Tensor] = output.losses
        dtype = parts["itc"].dtype
        return torch.stack([part.to(dtype) for part in parts.values()]).sum(), parts, output

    def run(self, model: MultimodalMoEModel, *, batch: Mapping[str, Any]) -> MultimodalMoEOutput:
        """All passes of a step.

        Raises:
            ConfigError: a model without the Q-Former of the first stage.
        """
        backbone = model.backbone
        if not isinstance(backbone, Blip2Backbone) or model.logit_scale is None:
            raise ConfigError("blip2_stage1 trains --backbone blip2 without labels; take it.")
        passes = backbone.stage_one()
        pairs = Pairs.of(batch, passes)
        memory_NSD = passes.image.memory(pairs.image)
        queries = passes.queries(memory_NSD, pairs.real)
        text_ND = F.normalize(_wide(passes.texts(pairs.text, pairs.real)), dim=-1, eps=1e-6)
        image_BQD = pairs.in_batch(_wide(queries.feature))
        contrast = Contrast.of(image_BQD, pairs.in_batch(text_ND), model.logit_scale)
        candidates = self._candidates(pairs, batch["ids"])
        itc = contrast.loss(pairs.complete, candidates.complete, smoothing=self.itc_smoothing)
        itm = matching_loss(passes, pairs, memory_NSD, contrast, candidates)
        words = passes.words(queries, pairs.text, pairs.real, start=backbone.start_token)
        itg = generation_loss(words, pairs.text, pairs.real, smoothing=self.itg_smoothing)
        routing = passes.routing
        losses = {
            "itc": self.itc_weight * itc,
            "itm": self.itm_weight * itm,
            "itg": self.itg_weight * itg,
        }
        return MultimodalMoEOutput(
            features={}, losses=losses | mean_router_losses(routing), routing=routing
        )

    def _candidates(self, pairs: Pairs, ids: list[str]) -> Candidates:
        keys_B = id_keys(ids, seed=self.seed).to(pairs.complete.device)
        texts_N = text_keys(pairs.text["input_ids"], pairs.text["attention_mask"])
        return Candidates.of(keys_B, pairs.in_batch(texts_N), pairs.complete)[0]


def matching_loss(
    passes: StageOnePasses,
    pairs: Pairs,
    memory_NSD: Tensor,
    contrast: Contrast,
    candidates: Candidates,
) -> Tensor:
    """This rank's share of the mean cross-entropy over pairs and hard negatives; a collective.

    Each pair is one row that matches, its image with a wrong text one that does not, and a wrong
    image with its text another. Images that other ranks hold are fetched, gradient included.
    """
    real_N, text = pairs.real, pairs.text
    asked_N = pairs.rows if len(pairs.rows) else pairs.rows.new_zeros(1)
    own_N = asked_N + contrast.first
    draws = [
        candidates.draw(logits_BG.detach()[asked_N], own_N, what=what)
        for logits_BG, what in ((contrast.image_BG, WANTS_TEXT), (contrast.text_BG, WANTS_IMAGE))
    ]
    (text_N, has_text_N), (image_N, has_image_N) = draws
    fetched = fetch_rows(pairs.in_batch(memory_NSD).flatten(1), image_N)
    other_NSD = fetched.view_as(memory_NSD)
    positions = passes.text.position_embedding.num_embeddings
    wrong = {
        name: gather_rows(pairs.in_batch(F.pad(text[name], (0, positions - text[name].shape[1]))))[
            0
        ][text_N]
        for name in ("input_ids", "attention_mask")
    }
    rows = {
        name: torch.cat([F.pad(text[name], (0, positions - text[name].shape[1])), wrong[name]])
        for name in wrong
    }
    length = max(1, int(rows["attention_mask"].sum(1).max()))
    count = len(real_N)
    payload = {name: torch.cat([v, v[:count]])[:, :length] for name, v in rows.items()}
    real = torch.cat([real_N, real_N & has_text_N, real_N & has_image_N])
    memory = torch.cat([memory_NSD, memory_NSD, other_NSD])
    logits = _wide(passes.match(memory, payload, real))
    labels = torch.cat([real_N.long(), real_N.new_zeros(2 * count, dtype=torch.long)])
    each = F.cross_entropy(logits, labels, reduction="none") * real
    return each.sum() * mean_weight(real.sum(), dtype=each.dtype)


def generation_loss(
    logits_NLV: Tensor, text: Payload, real_N: Tensor, *, smoothing: float
) -> Tensor:
    """This rank's share of the mean cross-entropy over the tokens of all ranks' texts.

    The first token is given, the mark of the end is asked for.
    """
    keep_NL = (text["attention_mask"].bool() & real_N[:, None])[:, 1:]
    each_NL = F.cross_entropy(
        _wide(logits_NLV[:, :-1]).transpose(1, 2),
        text["input_ids"][:, 1:],
        reduction="none",
        label_smoothing=smoothing,
    )
    # the first term keeps texts of one token, and blank rows, in the graph
    total = 0 * logits_NLV.sum() + (each_NL * keep_NL).sum()
    return total * mean_weight(keep_NL.sum(), dtype=total.dtype)


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _finite(value: float) -> bool:
    return math.isfinite(value) and value >= 0
