"""Fusion rules that are learnt from validation samples: a gate, and stacking.

Both see what experts and fuser say, never the sample. K experts, N samples, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from eval.interaction_fusion import Experts, mixture, softmax
from mm_moe.errors import DataError

FLOOR = 1e-12  # of a probability, before its logarithm


@dataclass(frozen=True)
class Scaling:
    """Brings features to mean 0 and variance 1, as they are on the validation samples."""

    mean_F: np.ndarray
    std_F: np.ndarray

    @classmethod
    def of(cls, feature_NF: np.ndarray) -> Scaling:
        """From the validation samples; a feature that is constant there becomes 0."""
        std_F = feature_NF.std(0)
        return cls(feature_NF.mean(0), np.where(std_F > 0, std_F, np.inf))

    def __call__(self, feature_NF: np.ndarray) -> np.ndarray:
        """The features, scaled."""
        return (feature_NF - self.mean_F) / self.std_F


@dataclass(frozen=True)
class LearnedGate:
    """Weights of the experts as a linear softmax of what experts and fuser say.

    Fitted on validation by the marginal likelihood, min -sum_n log sum_k w_k(x_n) p_k(y_n | x_n)
    + |W|^2 / 2: no category is needed. It starts at equal weights; so it is the same every time.
    """

    scaling: Scaling
    slope_FK: np.ndarray
    bias_K: np.ndarray

    @classmethod
    def fit(cls, experts: Experts) -> LearnedGate:
        """Fit on validation samples.

        Raises:
            DataError: there is no sample.
        """
        _check(experts)
        scaling = Scaling.of(features(experts))
        feature_NF = torch.tensor(scaling(features(experts)))
        said_NK = torch.tensor(_of_label(experts)).clamp(min=FLOOR).log()
        shape = (feature_NF.shape[1], len(experts.names))
        slope_FK = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        bias_K = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [slope_FK, bias_K], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            weight_NK = (feature_NF @ slope_FK + bias_K).log_softmax(-1)
            lost = -(weight_NK + said_NK).logsumexp(-1).sum() + slope_FK.square().sum() / 2
            lost.backward()
            return lost

        solver.step(loss)  # type: ignore[no-untyped-call]
        return cls(scaling, slope_FK.detach().numpy(), bias_K.detach().numpy())

    def weights(self, experts: Experts) -> np.ndarray:
        """(N, K), each row summing to 1."""
        return softmax(self.scaling(features(experts)) @ self.slope_FK + self.bias_K)

    def apply(self, experts: Experts) -> np.ndarray:
        """Probabilities (N, C)."""
        return mixture(experts.probs_KNC, weights_NK=self.weights(experts))


@dataclass(frozen=True)
class Stacking:
    """Logistic regression on the experts' logits, fitted on validation; penalty |W|^2 / 2.

    A class that no validation sample has gets probability 0.
    """

    scaling: Scaling
    model: LogisticRegression

    @classmethod
    def fit(cls, experts: Experts) -> Stacking:
        """Fit on validation samples.

        Raises:
            DataError: they all have one class.
        """
        _check(experts)
        if len(np.unique(experts.labels)) < 2:
            raise DataError("the validation samples all have one class; stacking needs two.")
        scaling = Scaling.of(_logits(experts))
        model = LogisticRegression(max_iter=2000)
        return cls(scaling, model.fit(scaling(_logits(experts)), experts.labels))

    def apply(self, experts: Experts) -> np.ndarray:
        """Probabilities (N, C)."""
        probs_NC = np.zeros((len(experts.labels), experts.num_classes))
        probs_NC[:, self.model.classes_] = self.model.predict_proba(self.scaling(_logits(experts)))
        return probs_NC


def features(experts: Experts) -> np.ndarray:
    """What the gate sees (N, F): log-probabilities of every expert, p(reject), the fuser's."""
    parts = [np.log(np.maximum(one, FLOOR)) for one in experts.probs_KNC]
    parts.append(experts.reject.T)
    if experts.gate is not None:
        parts.append(np.log(np.maximum(softmax(experts.gate), FLOOR)))
    return np.concatenate(parts, axis=1)


def _logits(experts: Experts) -> np.ndarray:
    """The experts' logits side by side (N, K * C), each centred: softmax ignores shifts."""
    centred_KNC = experts.logits - experts.logits.mean(-1, keepdims=True)
    return np.concatenate(list(centred_KNC), axis=1)


def _of_label(experts: Experts) -> np.ndarray:
    """Each expert's probability of the true class (N, K)."""
    return experts.probs_KNC[:, np.arange(len(experts.labels)), experts.labels].T


def _check(experts: Experts) -> None:
    if not len(experts.labels):
        raise DataError("there is no validation sample to fit a fusion rule on.")
