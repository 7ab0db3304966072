"""The experts of one layer: stacked feed-forwards, computed on contiguous rows.

Rows arrive sorted by expert. On a CPU (and wherever grouped matrix products are missing) each
expert works on its slice inside one autograd function; on a GPU that has them, grouped products do
all experts at once.

R rows, D width, F hidden width, E experts (those of this process).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

_QUICK = 1.702


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(_QUICK * x)
    return grad * (gate + _QUICK * x * gate * (1 - gate))


@dataclass(frozen=True)
class Activation:
    """An elementwise function and the product of a gradient with its derivative."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
}


class _SlicedFeedForward(torch.autograd.Function):
    """All experts, slice by slice.

    Plain indexing under autograd would build a full-size zero gradient per expert and add E of
    them. Here every gradient is written once, in place; only the hidden values before the
    activation are kept, the activation itself is cheap to do again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
        rows_E: list[int],
        activation: Activation,
    ) -> Tensor:
        pre_RF = x_RD.new_empty(x_RD.shape[0], w_in.shape[2])
        y_RD = torch.empty_like(x_RD)
        pieces = zip(x_RD.split(rows_E), pre_RF.split(rows_E), y_RD.split(rows_E), strict=True)
        for e, (x, pre, y) in enumerate(pieces):
            if len(x):
                torch.addmm(b_in[e], x, w_in[e], out=pre)
                torch.addmm(b_out[e], activation.forward(pre), w_out[e], out=y)
        ctx.save_for_backward(x_RD, pre_RF, w_in, w_out)
        ctx.rows_E, ctx.activation = rows_E, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, pre_RF, w_in, w_out = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        gx_RD = torch.empty_like(x_RD) if ctx.needs_input_grad[0] else None
        sizes = (w_in.shape, (w_in.shape[0], w_in.shape[2]), w_out.shape, w_out.shape[::2])
        gw_in, gb_in, gw_out, gb_out = (
            w_in.new_empty(size) if needed else None
            for size, needed in zip(sizes, ctx.needs_input_grad[1:5], strict=True)
        )
        start = 0
        for e, rows in enumerate(ctx.rows_E):
            piece, start = slice(start, start + rows), start + rows
            if not rows:
                for grad in (gw_in, gb_in, gw_out, gb_out):
                    if grad is not None:
                        grad[e].zero_()
                continue
            x, pre, grad = x_RD[piece], pre_RF[piece], grad_RD[piece]
            if gw_out is not None:
                torch.mm(ctx.activation.forward(pre).t(), grad, out=gw_out[e])
            if gb_out is not None:
                torch.sum(grad, 0, out=gb_out[e])
            g_pre = ctx.activation.backward(grad @ w_out[e].t(), pre)
            if gw_in is not None:
                torch.mm(x.t(), g_pre, out=gw_in[e])
            if gb_in is not None:
                torch.sum(g_pre, 0, out=gb_in[e])
            if gx_RD is not None:
                torch.mm(g_pre, w_in[e].t(), out=gx_RD[piece])
        return gx_RD, gw_in, gb_in, gw_out, gb_out, None, None


def grouped_feed_forward(
    x_RD: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    rows_E: Tensor,
    activation: Activation,
) -> Tensor:
    """All experts in two grouped matrix products, without a look at the counts by the host."""
    ends_E = rows_E.cumsum(0).to(torch.int32)
    expert_R = torch.repeat_interleave(rows_E, output_size=x_RD.shape[0])
    pre_RF = F.grouped_mm(x_RD, w_in, offs=ends_E) + b_in.index_select(0, expert_R)
    y_RD = F.grouped_mm(activation.forward(pre_RF), w_out, offs=ends_E)
    return y_RD + b_out.index_select(0, expert_R)


def _can_group(x_RD: Tensor, w_in: Tensor) -> bool:
    """Whether the device has grouped products for these tensors (bf16, rows of 16 bytes)."""
    return (
        x_RD.is_cuda
        and x_RD.dtype == torch.bfloat16
        and x_RD.shape[0] > 0
        and w_in.shape[1] % 8 == 0
        and w_in.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(x_RD.device) >= (8, 0)
    )


class Experts(nn.Module):
    """E feed-forwards `act(x w_in + b_in) w_out + b_out` with stacked parameters.

    Args:
        num_experts: E, the experts that this process holds.
        width: D.
        hidden: F.
        activation: a name in `ACTIVATIONS`.

    Raises:
        ConfigError: an unknown activation.
    """

    def __init__(self, *, num_experts: int, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation {activation!r}; {nearest(activation, list(ACTIVATIONS))}"
            )
        self.activation = activation
        self.w_in = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b_in = nn.Parameter(torch.zeros(num_experts, hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.b_out = nn.Parameter(torch.zeros(num_experts, width))
        nn.init.normal_(self.w_in, std=width**-0.5)
        nn.init.normal_(self.w_out, std=hidden**-0.5)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        """Outputs (R, D) of rows sorted by expert; `rows_E` (int64) says how many each expert has.

        Zero rows, for one expert or for all, are legal; every parameter still gets a gradient.
        """
        weights: tuple[Tensor, ...] = (self.w_in, self.b_in, self.w_out, self.b_out)
        if torch.is_autocast_enabled(x_RD.device.type):
            dtype = torch.get_autocast_dtype(x_RD.device.type)
            x_RD, weights = x_RD.to(dtype), tuple(weight.to(dtype) for weight in weights)
        activation = ACTIVATIONS[self.activation]
        if _can_group(x_RD, self.w_in):
            return grouped_feed_forward(x_RD, *weights, rows_E=rows_E, activation=activation)
        return _SlicedFeedForward.apply(x_RD, *weights, rows_E.tolist(), activation)

    def slice(self, start: int, stop: int) -> Experts:
        """A copy of the experts [start, stop) with the same dtype, device and trainability."""
        _, width, hidden = self.w_in.shape
        with torch.device("meta"):
            part = Experts(
                num_experts=stop - start, width=width, hidden=hidden, activation=self.activation
            )
        for name, whole in self.named_parameters():
            piece = whole.detach()[start:stop].clone()
            setattr(part, name, nn.Parameter(piece, requires_grad=whole.requires_grad))
        return part.train(self.training)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        num_experts, width, hidden = self.w_in.shape
        return f"experts={num_experts}, width={width}, hidden={hidden}, {self.activation}"
