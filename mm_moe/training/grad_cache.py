"""Accumulation that keeps all negatives: one contrastive loss over all micro-batches of a step.

GradCache (Gao et al. 2021): every micro-batch goes through the towers without a graph, the loss and
its gradient are taken at the features of the whole step, and each micro-batch goes through again
with a graph, weighted by the gradient at its features. Random numbers (dropout, router noise) are
replayed, so that the second pass is the first.

A micro-batches of a step, B samples of a micro-batch, D width of a feature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.batch import Batch

Terms = tuple[Tensor, dict[str, Tensor], Any]


class FeatureObjective(ABC):
    """An objective whose loss is a function of the features of all samples of a step."""

    @property
    @abstractmethod
    def part(self) -> str:
        """Name of the loss in the log."""

    @property
    @abstractmethod
    def logit_start(self) -> tuple[float, float | None]:
        """What a new model's `logit_scale` and `logit_bias` (None: it has none) start from."""

    @abstractmethod
    def from_features(
        self, features: Mapping[str, Tensor], present: Tensor, own: Mapping[str, Tensor]
    ) -> Tensor:
        """This rank's share of the loss, whose mean over ranks is the loss of the global batch.

        Args:
            features: modality -> (B, D).
            present: bool (B, M).
            own: the model's own parameters by name, such as `logit_scale`.
        """

    def __call__(self, model: Any, batch: Batch) -> Terms:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch)
        loss = self.from_features(output.features, batch.present, _own(model))
        return with_auxiliary(self.part, loss, output)


def with_auxiliary(part: str, loss: Tensor, output: Any) -> Terms:
    """The loss with what the model adds to it (routers, prompts), coefficients applied."""
    parts = {part: loss, **output.losses}
    return torch.stack([value.to(loss.dtype) for value in parts.values()]).sum(), parts, output


@dataclass
class _Step:
    """What the first pass found.

    Attributes:
        loss: of the step, on this rank.
        grads: modality -> gradient at the features (A * B, D).
        own: name -> gradient of the model's own parameters.
        random: state of the generators before each micro-batch.
        first: row of each micro-batch's first sample.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    own: dict[str, Tensor]
    random: list[tuple[Tensor, Tensor | None]]
    first: list[int]


class GradCache:
    """An objective that sees one micro-batch at a time and gives the gradient of the whole step.

    The mean over the micro-batches of the returned losses has the value and the gradient of: the
    loss over the features of all micro-batches (and ranks), plus the mean of the micro-batches'
    auxiliary losses. That equals the big batch where the auxiliary coefficients are 0. A router's
    z-loss and local entropy are means over tokens and equal it too where micro-batches have equally
    many tokens; balance and global entropy are products or logarithms of means and do not: theirs
    are the micro-batch's, as in any accumulation.

    Every rank runs both passes over every micro-batch: the same collectives everywhere. Buffers
    (running statistics) move in the second pass only.

    Args:
        objective: what is computed.
    """

    def __init__(self, objective: FeatureObjective) -> None:
        self.objective = objective
        self._step: _Step | None = None
        self._done = 0

    def begin(self, model: Any, batches: Sequence[Batch]) -> None:
        """Make the first pass over the micro-batches of the next step; a collective.

        Args:
            model: to train.
            batches: already where the model is.
        """
        model.train()
        self._step, self._done = self._first_pass(model, batches), 0

    def __call__(self, model: Any, batch: Batch) -> Terms:
        """As an objective, for the next of the step's micro-batches."""
        assert self._step is not None  # `begin` was called
        step, number = self._step, self._done
        self._done += 1
        _replay(step.random[number])  # the last one's forward ends where the first pass ended
        output = model(**batch)
        rows = slice(step.first[number], step.first[number] + len(batch.present))
        count = len(step.random)
        surrogate = step.loss.new_zeros(())
        for name, feature_BD in output.features.items():
            grad_BD = step.grads[name][rows]
            surrogate = surrogate + count * (feature_BD.to(grad_BD.dtype) * grad_BD).sum()
        for name, parameter in _own(model).items():
            surrogate = surrogate + (parameter * step.own[name]).sum()
        # the value is the step's loss, the gradient that of this micro-batch
        loss = surrogate - surrogate.detach() + step.loss
        return with_auxiliary(self.objective.part, loss, output)

    def _first_pass(self, model: Any, batches: Sequence[Batch]) -> _Step:
        """Features of all micro-batches without a graph, and the gradient there."""
        inner: nn.Module = getattr(model, "module", model)
        random: list[tuple[Tensor, Tensor | None]] = []
        first, outputs = [0], []
        kept = {name: value.clone() for name, value in inner.named_buffers()}
        with torch.no_grad():
            for batch in batches:
                random.append(_random_state())
                outputs.append(inner(**batch).features)
                first.append(first[-1] + len(batch.present))
            for name, value in inner.named_buffers():
                value.copy_(kept[name])
        features = {
            name: torch.cat([output[name] for output in outputs]).requires_grad_()
            for name in outputs[0]
        }
        own = {name: value.detach().requires_grad_() for name, value in _own(model).items()}
        present = torch.cat([batch.present for batch in batches])
        with torch.enable_grad():
            loss = self.objective.from_features(features, present, own)
        leaves = [*features.values(), *own.values()]
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return _Step(
            loss.detach(),
            grads=dict(zip(features, grads, strict=False)),
            own=dict(zip(own, grads[len(features) :], strict=True)),
            random=random,
            first=first,
        )


def _own(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that are the model's own and no part's."""
    inner: nn.Module = getattr(model, "module", model)
    return dict(inner.named_parameters(recurse=False))


def _random_state() -> tuple[Tensor, Tensor | None]:
    """State of the generators that a forward pass draws from: torch's, and the device's."""
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), device


def _replay(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
