"""Dense feed-forwards that work beside the experts, on every real token, replicated on all ranks.

T tokens, D width, F hidden width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mm_moe.moe.experts import find_activation


class FeedForward(nn.Module):
    """`fc2(act(fc1(x)))`; where that is gated, `fc1` has 2F rows, those of the gate first."""

    def __init__(self, *, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, find_activation(activation).parts * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Outputs (T, D)."""
        return self.fc2(find_activation(self.activation).forward(self.fc1(x_TD)))


class SharedExpert(FeedForward):
    """Added to the experts' output. Source: DeepSeekMoE (Dai et al. 2024).

    Several shared experts are one of several times the hidden width: the same function.
    """

    def join(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The experts' output plus that of the shared expert."""
        return y_TD + self(x_TD)


class Residual(FeedForward):
    """Mixed with the experts' output by two weights per token that sum to 1.

    Source: Residual-MoE (Rajbhandari et al. 2022, DeepSpeed-MoE), as in DeepSpeed's layer.
    """

    def __init__(self, *, width: int, hidden: int, activation: str) -> None:
        super().__init__(width=width, hidden=hidden, activation=activation)
        self.coefficient = nn.Linear(width, 2)

    def join(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Weighted mean of the experts' output and the dense one."""
        weight_T2 = self.coefficient(x_TD).softmax(-1)
        return y_TD * weight_T2[:, :1] + self(x_TD) * weight_T2[:, 1:]
