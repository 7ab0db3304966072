"""Fusing experts for types of interaction: p(y|x) = sum_k w_k(x) p_k(y|x), and its rivals.

Pure functions over arrays; no model and no file. Source: MMoE (Yu et al. 2024), section 3. The
released code mixes ids, orders of experts and un-normalised weights; here all are joined before
(`joined`) and named.

K experts, N samples, C classes. Every rule gives probabilities (N, C), and none depends on the
order of the experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from mm_moe.errors import ConfigError, DataError

BASELINE = "baseline"
LAST_RESORT = "AS"  # the expert that a cascade asks when the others are not sure
SHOWN_IDS = 5
DEFAULT_TAU = 0.9


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64; the largest logit is taken off first."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def mixture(probs_KNC: np.ndarray, *, weights_NK: np.ndarray) -> np.ndarray:
    """sum_k w_k p_k, (N, C): experts' probabilities under weights of each sample.

    One-hot weights give that expert; equal experts give themselves whatever the weights.

    Raises:
        ConfigError: shapes that do not fit, weights that are negative or do not sum to 1.
    """
    probs_KNC, weights_NK = np.asarray(probs_KNC, np.float64), np.asarray(weights_NK, np.float64)
    if probs_KNC.ndim != 3 or weights_NK.shape != (probs_KNC.shape[1], probs_KNC.shape[0]):
        raise ConfigError(
            f"weights {weights_NK.shape} do not fit probabilities {probs_KNC.shape}; they must be "
            "(N, K) for (K, N, C)."
        )
    sums_N = weights_NK.sum(-1)
    if (weights_NK < 0).any() or not np.allclose(sums_N, 1.0, atol=1e-6):
        raise ConfigError(
            "the weights of each sample must not be negative, and sum to 1; take softmax first."
        )
    return np.einsum("knc,nk->nc", probs_KNC, weights_NK / sums_N[:, None])


def without_reject(logits_NC: np.ndarray, *, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes' logits (N, C), and the probability of the reject class (N,).

    An expert that was trained on all rows has one class more, the last, for rows that are not its
    own. Dropping its logit renormalises the others. Without such a class the probability is 0.

    Raises:
        DataError: neither C nor C + 1 logits.
    """
    logits_NC = np.asarray(logits_NC, np.float64)
    width = logits_NC.shape[-1]
    if width not in (num_classes, num_classes + 1):
        raise DataError(
            f"an expert has {width} logits for {num_classes} classes; there must be {num_classes}, "
            f"or {num_classes + 1} with a last one for rows that are not its own."
        )
    if width == num_classes:
        return logits_NC, np.zeros(len(logits_NC))
    return logits_NC[:, :num_classes], softmax(logits_NC)[:, num_classes]


@dataclass(frozen=True)
class Experts:
    """What experts, fuser and baselines say about the same samples, in the same order.

    Attributes:
        ids: N ids, each once.
        names: K names, such as ("R", "U", "AS").
        logits: (K, N, C) of the classes, without a reject class.
        labels: class indices (N,).
        reject: (K, N) probability of the reject class; zeros without one.
        gate: (N, K) logits of the fuser, or None without a fuser.
        category: (N,) index of each sample's own expert, or None. It is made with the label, so
            what uses it leaks; -1: the sample has none.
        baselines: name -> logits (N, C) of models of the whole training set.
        groups: (N,) rows of one group are no independent samples; None: all are.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray
    reject: np.ndarray
    gate: np.ndarray | None = None
    category: np.ndarray | None = None
    baselines: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[-1]

    @property
    def probs_KNC(self) -> np.ndarray:
        """Each expert's probabilities of the classes."""
        return softmax(self.logits)

    def reordered(self, order: Sequence[int]) -> Experts:
        """The same experts in another order."""
        order = list(order)
        place = np.argsort(order)  # old index -> new index
        category = self.category
        if category is not None:
            category = np.where(category >= 0, place[category], -1)
        return replace(
            self,
            names=tuple(self.names[index] for index in order),
            logits=self.logits[order],
            reject=self.reject[order],
            gate=None if self.gate is None else self.gate[:, order],
            category=category,
        )


def joined(
    parts: Mapping[str, Mapping[str, np.ndarray]], *, order: Sequence[str]
) -> dict[str, np.ndarray]:
    """Values of several sources for the same ids, in one order.

    Args:
        parts: source -> id -> value.
        order: the ids that every source must have, and no other.

    Returns:
        Source -> values in the order of `order`.

    Raises:
        DataError: an id stands in `order` twice, or a source lacks ids or has others; names the
            first ones.
    """
    doubled = sorted(one for one, times in Counter(order).items() if times > 1)
    if doubled:
        raise DataError(f"ids stand there twice: {_shown(doubled)}; each sample counts once.")
    wanted = set(order)
    for source, values in parts.items():
        for ids, what in ((wanted - set(values), "lacks"), (set(values) - wanted, "has also")):
            if ids:
                raise DataError(
                    f"{source} {what} {len(ids)} of the ids ({len(wanted)} are scored): "
                    f"{_shown(sorted(ids))}; every expert and the fuser must cover the same ids."
                )
    return {name: np.array([values[one] for one in order]) for name, values in parts.items()}


def _shown(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return ", ".join(map(repr, ids[:SHOWN_IDS])) + more


def fuser_weights(experts: Experts, *, reject_gate: bool = False) -> np.ndarray:
    """Softmax of the fuser's logits (N, K).

    Args:
        experts: with a fuser.
        reject_gate: also multiply each expert's weight by 1 - p(reject) and renormalise; ours.
    """
    gate_NK = np.asarray(_gate(experts), np.float64)
    if reject_gate:
        certain = 1.0 - 1e-12  # an expert that is sure to be the wrong one keeps a finite logit
        gate_NK = gate_NK - gate_NK.max(-1, keepdims=True)
        gate_NK = gate_NK + np.log1p(-np.minimum(experts.reject.T, certain))
    return softmax(gate_NK)


def rus(experts: Experts) -> np.ndarray:
    """The paper's rule: probabilities mixed by the softmax of the fuser's logits."""
    return mixture(experts.probs_KNC, weights_NK=fuser_weights(experts))


def rus_reject(experts: Experts) -> np.ndarray:
    """`rus`, each weight multiplied by 1 - p(reject) of its expert."""
    weights_NK = fuser_weights(experts, reject_gate=True)
    return mixture(experts.probs_KNC, weights_NK=weights_NK)


def mean_logits(experts: Experts) -> np.ndarray:
    """Softmax of the mean of the experts' logits."""
    return softmax(experts.logits.mean(0))


def mean_logits_all(experts: Experts) -> np.ndarray:
    """Softmax of the mean of the logits of the experts and the baseline.

    A plot in the released repository that is titled as the method's is this rule (see the
    specification of the re-scoring).
    """
    if BASELINE not in experts.baselines:
        raise ConfigError(f"this rule needs the logits of {BASELINE!r}; there are none.")
    return softmax(np.mean([*experts.logits, experts.baselines[BASELINE]], axis=0))


def max_logits(experts: Experts) -> np.ndarray:
    """Softmax of the largest logit of each class."""
    return softmax(experts.logits.max(0))


def mean_softmax(experts: Experts) -> np.ndarray:
    """Mean of the experts' probabilities: the mixture with equal weights."""
    return experts.probs_KNC.mean(0)


def weighted_logits(experts: Experts) -> np.ndarray:
    """Softmax of the experts' logits, weighted by the fuser's probabilities."""
    return softmax(np.einsum("knc,nk->nc", experts.logits, fuser_weights(experts)))


def weighted_logits_raw(experts: Experts) -> np.ndarray:
    """As the released code has it: weighted by the fuser's raw logits, which may be negative."""
    return softmax(np.einsum("knc,nk->nc", experts.logits, np.asarray(_gate(experts), np.float64)))


def cascaded(experts: Experts, *, tau: float = DEFAULT_TAU) -> np.ndarray:
    """The most confident expert if all but the last resort are surer than tau, else that one.

    With R, U and AS: if max p_R > tau and max p_U > tau the more confident of the two (U where they
    are equally so), else AS. More experts than three (one U for each modality) are ours.
    """
    if LAST_RESORT not in experts.names:
        raise ConfigError(
            f"a cascade needs an expert named {LAST_RESORT!r}; there are {experts.names}."
        )
    last = experts.names.index(LAST_RESORT)
    # By name, so that a tie does not depend on the order of the experts.
    others = sorted((k for k in range(len(experts.names)) if k != last), key=_name_of(experts))
    probs_KNC = experts.probs_KNC
    sure_ON = probs_KNC[others].max(-1)
    best_N = len(others) - 1 - sure_ON[::-1].argmax(0)
    chosen_N = np.where((sure_ON > tau).all(0), np.array(others)[best_N], last)
    return _chosen(probs_KNC, chosen_N)


def hard_routing(experts: Experts) -> np.ndarray:
    """The expert that the fuser takes for the likeliest; the first by name where two are."""
    by_name = sorted(range(len(experts.names)), key=_name_of(experts))
    chosen_N = np.array(by_name)[_gate(experts)[:, by_name].argmax(-1)]
    return _chosen(experts.probs_KNC, chosen_N)


def oracle(experts: Experts) -> np.ndarray:
    """The expert of each sample's true category. Leaks: the category is made with the label.

    A sample without a category gets the mean of the experts.
    """
    if experts.category is None:
        raise ConfigError("the oracle needs the category of every sample.")
    has_N = experts.category >= 0
    chosen_NC = _chosen(experts.probs_KNC, np.maximum(experts.category, 0))
    return np.where(has_N[:, None], chosen_NC, mean_softmax(experts))


def category_prior(experts: Experts, *, prior_KC: np.ndarray) -> np.ndarray:
    """The fuser with experts that know nothing but their category's label frequencies."""
    prior_KNC = np.repeat(np.asarray(prior_KC, np.float64)[:, None], len(experts.labels), axis=1)
    return mixture(prior_KNC, weights_NK=fuser_weights(experts))


def subset_majority(experts: Experts, *, prior_KC: np.ndarray) -> np.ndarray:
    """The frequencies of labels in each sample's true category. Leaks, like the oracle."""
    if experts.category is None:
        raise ConfigError("the subset majority needs the category of every sample.")
    prior_KC = np.asarray(prior_KC, np.float64)
    chosen_NC = prior_KC[np.maximum(experts.category, 0)]
    return np.where((experts.category >= 0)[:, None], chosen_NC, prior_KC.mean(0))


def label_frequencies(
    labels: np.ndarray, category: np.ndarray, *, num_experts: int, num_classes: int
) -> np.ndarray:
    """Share of each class among the samples of each category (K, C); even for an empty one."""
    counts_KC = np.zeros((num_experts, num_classes))
    kept = category >= 0
    np.add.at(counts_KC, (category[kept], labels[kept]), 1)
    counts_KC[counts_KC.sum(-1) == 0] = 1
    return counts_KC / counts_KC.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Rule:
    """A way to fuse.

    Attributes:
        apply: experts -> probabilities (N, C).
        fuser: whether it needs the fuser's logits.
        baseline: whether it needs the baseline's.
        leaks: whether it looks at what is made with the test labels.
    """

    apply: Callable[[Experts], np.ndarray]
    fuser: bool = False
    baseline: bool = False
    leaks: bool = False


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "rus": Rule(rus, fuser=True),
        "rus_reject": Rule(rus_reject, fuser=True),
        "mean_softmax": Rule(mean_softmax),
        "mean_logits": Rule(mean_logits),
        "mean_logits_all": Rule(mean_logits_all, baseline=True),
        "max_logits": Rule(max_logits),
        "weighted_logits": Rule(weighted_logits, fuser=True),
        "weighted_logits_raw": Rule(weighted_logits_raw, fuser=True),
        "cascaded": Rule(cascaded),
        "hard_routing": Rule(hard_routing, fuser=True),
        "oracle": Rule(oracle, leaks=True),
    }
)


def _gate(experts: Experts) -> np.ndarray:
    if experts.gate is None:
        raise ConfigError("this rule needs a fuser's logits for every sample; there is no fuser.")
    return experts.gate


def _name_of(experts: Experts) -> Callable[[int], str]:
    return lambda index: experts.names[index]


def _chosen(probs_KNC: np.ndarray, chosen_N: np.ndarray) -> np.ndarray:
    """The probabilities of one expert for each sample."""
    return probs_KNC[chosen_N, np.arange(probs_KNC.shape[1])]
