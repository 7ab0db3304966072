"""Training interaction experts: the mixture's likelihood, and what the kinds of interaction add.

B samples, K kinds of interaction, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.supervised import task_loss
from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.interaction_head import InteractionOutput
from mm_moe.models.interaction_settings import InteractionSettings
from mm_moe.training.collectives import mean_weight

KEY = "interaction"  # of a batch


def kind_shares(kind_B: Tensor, num_kinds: int) -> Tensor:
    """Weights (B, K) of the kinds of a batch; rows of zeros where nothing is known.

    Args:
        kind_B: int64 (B,), IGNORED_LABEL where the kind is not known; or weights (B, K). Weights
            with one kind more (disagreement, which two classes do not have) lose it.
        num_kinds: K.

    Raises:
        DataError: a kind that the model has no expert for.
    """
    if kind_B.is_floating_point():
        if kind_B.shape[1] not in (num_kinds, num_kinds + 1):
            raise _other_kinds(kind_B.shape[1] - 1, num_kinds)
        return kind_B[:, :num_kinds]
    known_B = kind_B != IGNORED_LABEL
    found = kind_B[known_B]
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < num_kinds:
        raise _other_kinds(int(found.max()), num_kinds)
    return F.one_hot(kind_B.where(known_B, 0), num_kinds) * known_B.unsqueeze(1).float()


def _other_kinds(kind: int, num_kinds: int) -> DataError:
    return DataError(
        f"the table of interactions has kind number {kind}, the model has experts for kinds 0 to "
        f"{num_kinds - 1}; let --interaction_labels and the kinds of --interaction_config agree, "
        "and make the table of this data set."
    )


def fuser_loss(log_weight_BK: Tensor, share_BK: Tensor, explains_KK: Tensor) -> Tensor:
    """-log of the weight that the fuser gives to the kinds that explain a sample.

    With an identity for `explains_KK` this is the cross-entropy with the samples' kinds.

    Args:
        log_weight_BK: what the fuser says.
        share_BK: weights of the samples' kinds, rows of zeros where they are not known.
        explains_KK: bool, [c, k] is whether kind k may lie behind a sample that is called c.

    Returns:
        This rank's share, whose mean over ranks is the mean over all ranks' samples of known kind;
        exactly 0 without any.
    """
    masked_BKK = log_weight_BK.unsqueeze(1).masked_fill(~explains_KK, -torch.inf)
    each_B = -(masked_BKK.logsumexp(-1) * share_BK).sum(-1)
    return each_B.sum() * mean_weight((share_BK.sum(-1) > 0).sum())


def log_likelihood(logits_BKC: Tensor, labels: Tensor, problem_type: str) -> tuple[Tensor, Tensor]:
    """Every expert's log p_k(y) (B, K), up to a constant, and which samples have a label (B,).

    Independent labels add up; a regression is a Laplace distribution of scale 1, whose logarithm is
    the absolute error.
    """
    if problem_type == "single_label_classification":
        real_B = labels != IGNORED_LABEL
        index_BK1 = labels.where(real_B, 0).view(-1, 1, 1).expand(-1, logits_BKC.shape[1], 1)
        return logits_BKC.log_softmax(-1).gather(-1, index_BK1).squeeze(-1), real_B
    if problem_type == "multi_label_classification":
        real_BC = labels != IGNORED_LABEL
        sign_B1C = (2 * labels.clamp(min=0) - 1).unsqueeze(1).to(logits_BKC.dtype)
        each_BKC = F.logsigmoid(sign_B1C * logits_BKC) * real_BC.unsqueeze(1)
        return each_BKC.sum(-1), real_BC.any(-1)
    real_B = torch.isfinite(labels) & (labels != IGNORED_LABEL)
    value_B1 = labels.where(real_B, 0.0).unsqueeze(1).to(logits_BKC.dtype)
    return -(logits_BKC.squeeze(-1) - value_B1).abs(), real_B


def own_loss(
    said: InteractionOutput, labels: Tensor, problem_type: str, explaining_BK: Tensor
) -> Tensor:
    """Each expert's loss on its own samples, averaged over all ranks' labelled samples.

    A sample belongs to the expert with the largest posterior w_k p_k(y) among those that may lie
    behind it (hard EM). Where that is one, this is the paper's training on subsets.

    Args:
        said: of the model.
        labels: of the batch.
        problem_type: of the labels.
        explaining_BK: weights of the kinds that may lie behind each sample; rows of zeros (nothing
            is known) leave all of them.
    """
    assert said.logits_BKC is not None  # all experts answer in training
    log_p_BK, real_B = log_likelihood(said.logits_BKC, labels, problem_type)
    known_B1 = explaining_BK.sum(-1, keepdim=True) > 0
    prior_BK = torch.where(known_B1, explaining_BK, torch.ones_like(explaining_BK)).log()
    best_B = (said.log_weight_BK + log_p_BK + prior_BK).detach().argmax(-1)
    each_B = -log_p_BK.gather(-1, best_B.unsqueeze(-1)).squeeze(-1) * real_B
    return each_B.sum() * mean_weight(real_B.sum())


@dataclass(frozen=True)
class Interaction:
    """The likelihood of the mixture of interaction experts, and two optional terms.

    The task's loss of the mixed logits is -log sum_k w_k(x) p_k(y | x) for classes, and needs no
    kind. Where the batch says the kinds, `fuser_coef` supervises the fuser's weights with them;
    `own_coef` trains each expert on its own samples. Both stand in the model's configuration.

    Source: Mixtures of Multimodal Interaction Experts (Yu et al. 2024) trains experts on subsets
    and the fuser on kinds, one after the other. The likelihood of the mixture, and a fuser that is
    asked for any kind that explains a sample, are ours.
    """

    problem_type: str

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor], object]:
        """Return (loss, parts of it for the log, the model's output).

        Raises:
            ConfigError: a model without interaction experts.
            DataError: a kind that the model has no expert for.
        """
        inner = getattr(model, "module", model)
        if inner.config.interaction_experts is None:
            raise ConfigError(
                "the objective interaction needs a model with interaction experts; add "
                "--interaction_experts true, or take the objective supervised."
            )
        settings = InteractionSettings.from_dict(inner.config.interaction_experts)
        kind_B = batch.get(KEY)
        soft = kind_B is not None and kind_B.is_floating_point()  # no router reads weights
        labels = batch.labels
        output = model(**{key: value for key, value in batch.items() if not soft or key != KEY})
        parts = {"task": task_loss(output.logits, labels, self.problem_type)}
        parts |= self._of_kinds(settings, output.interaction, labels, kind_B)
        parts |= output.losses
        return torch.stack([part.float() for part in parts.values()]).sum(), parts, output

    def _of_kinds(
        self,
        settings: InteractionSettings,
        said: InteractionOutput,
        labels: Tensor | None,
        kind_B: Tensor | None,
    ) -> dict[str, Tensor]:
        """The optional terms, coefficients applied."""
        num_kinds = said.log_weight_BK.shape[1]
        share_BK = torch.zeros_like(said.log_weight_BK)
        if kind_B is not None:
            share_BK = kind_shares(kind_B, num_kinds).to(share_BK)
        explains_KK = settings.explains(num_kinds).to(share_BK.device)
        parts = {}
        if settings.fuser_coef and kind_B is not None:
            found = fuser_loss(said.log_weight_BK, share_BK, explains_KK)
            parts["fuser"] = settings.fuser_coef * found
        if settings.own_coef and labels is not None:
            explaining_BK = share_BK @ explains_KK.to(share_BK)
            found = own_loss(said, labels, self.problem_type, explaining_BK)
            parts["own"] = settings.own_coef * found
        return parts
