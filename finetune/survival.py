"""Cox's partial likelihood over the samples of all processes, with tied times.

B samples of this rank, G of all ranks that have a label, in order of falling time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest
from mm_moe.training.collectives import gather_rows

TIES = ("efron", "breslow")


def cox_loss(risk_B: Tensor, labels_B2: Tensor, *, ties: str = "efron") -> Tensor:
    """Mean negative log partial likelihood of the events of all ranks' rows, a scalar.

    An event's risk set are all rows whose time is not before its own, on whatever rank. Where
    several events share a time, Breslow's rule leaves all of them in the set for each; Efron's
    takes the l-th of d events with the weight 1 - l / d, as if they had come one after the other.
    Without any event the loss is exactly 0, connected to the risks.

    With gradient accumulation the risk sets are those of a micro-batch: its rows on all ranks.

    Source: Cox (1972); Breslow (1974); Efron (1977).

    Args:
        risk_B: logarithm of the relative risk. Float64 is kept, all else becomes float32.
        labels_B2: time and event (1, or 0 for censored); rows of IGNORED_LABEL are left out.
        ties: "efron" or "breslow".

    Returns:
        The loss of the global batch, the same on every rank; gradients averaged over ranks, as
        DeepSpeed does, are its gradients.
    """
    risk_B = risk_B if risk_B.dtype == torch.float64 else risk_B.float()
    own_B3 = torch.cat([risk_B[:, None], labels_B2.to(risk_B.dtype)], dim=1)
    rows, _ = gather_rows(own_B3)
    rows = rows[(rows[:, 1:] != IGNORED_LABEL).all(1)]
    rows = rows[rows[:, 1].argsort(descending=True, stable=True)]
    risk_G, time_G, event_G = rows.unbind(1)
    event_G = event_G > 0
    if not event_G.any():
        return 0 * own_B3[:, 0].sum() + 0 * risk_G.sum()
    _, group_G, size_K = time_G.unique_consecutive(return_inverse=True, return_counts=True)
    last_G = size_K.cumsum(0)[group_G] - 1
    set_G = risk_G.logcumsumexp(0)[last_G]  # log of the sum over everyone of this time or later
    if ties == "efron":
        set_G = set_G + _efron(risk_G, event_G, group_G, set_G, num_times=len(size_K))
    return -(risk_G - set_G)[event_G].mean()


def _efron(
    risk_G: Tensor, event_G: Tensor, group_G: Tensor, set_G: Tensor, *, num_times: int
) -> Tensor:
    """What Efron's rule adds to the logarithm of each event's risk set (G,)."""
    events_K = torch.zeros_like(risk_G[:num_times]).index_add(0, group_G, event_G.to(risk_G))
    # l of the l-th event of its time: events before this row, less those of earlier groups
    before_K = events_K.cumsum(0) - events_K
    place_G = event_G.cumsum(0) - 1 - before_K[group_G]
    # the share of the set that the tied events make up; no exponent above 0
    part_G = torch.where(event_G, (risk_G - set_G).exp(), 0.0)
    share_K = torch.zeros_like(events_K).index_add(0, group_G, part_G)
    weight_G = torch.where(event_G, place_G / events_K.clamp(min=1)[group_G], 0.0)
    return torch.log1p(-weight_G * share_K[group_G].clamp(max=1))


@dataclass(frozen=True)
class Cox:
    """Proportional hazards: the model's one output is the logarithm of a relative risk.

    Attributes:
        problem_type: of the data set; "survival" ("none" while flags are checked).
        ties: "efron" or "breslow".

    Raises:
        ConfigError: other data, or an unknown rule for ties.
    """

    problem_type: str = "survival"
    ties: str = "efron"

    def __post_init__(self) -> None:
        if self.ties not in TIES:
            hint = nearest(str(self.ties), list(TIES))
            raise ConfigError(f"unknown objective_config.ties {self.ties!r}; {hint}")
        if self.problem_type not in ("survival", "none"):
            raise ConfigError(
                f"--objective cox needs labels of (time, event), the data are {self.problem_type}; "
                "take --objective supervised."
            )

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor], object]:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch)
        assert output.logits is not None, "survival gives the model one output"
        assert batch.labels is not None, "a data set of survival has labels"
        task = cox_loss(output.logits.squeeze(-1), batch.labels, ties=self.ties)
        parts = {"task": task, **output.losses}
        return torch.stack([part.float() for part in parts.values()]).sum(), parts, output
