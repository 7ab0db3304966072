"""The experts of one layer: stacked feed-forwards, computed on contiguous rows.

Rows arrive sorted by expert. On a CPU (and wherever grouped matrix products are missing) each
expert works on its slice inside one autograd function; on a GPU that has them, grouped products do
all experts at once.

An activation may be gated (SwiGLU and its kin; Shazeer 2020): the first product then has 2F
columns, gate first, and stays one product.

R rows, D width, F hidden width, E experts (those of this process), G = F columns per row before the
activation, 2F where it is gated.
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


def _sigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, x.sigmoid())


@dataclass(frozen=True)
class Activation:
    """What happens between the two products, and the product of a gradient with its derivative.

    Attributes:
        forward: (R, G) -> (R, F).
        backward: gradient (R, F) and input (R, G) -> gradient (R, G).
        parts: G / F, columns before the activation for each hidden unit.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    parts: int = 1


def _gated(gate: Activation) -> Activation:
    """`act(left half) * right half`."""

    def forward(pre_RG: Tensor) -> Tensor:
        gate_RF, value_RF = pre_RG.chunk(2, -1)
        return gate.forward(gate_RF) * value_RF

    def backward(grad_RF: Tensor, pre_RG: Tensor) -> Tensor:
        gate_RF, value_RF = pre_RG.chunk(2, -1)
        out_RG = torch.empty_like(pre_RG)
        out_gate_RF, out_value_RF = out_RG.chunk(2, -1)
        out_gate_RF.copy_(gate.backward(grad_RF * value_RF, gate_RF))
        torch.mul(grad_RF, gate.forward(gate_RF), out=out_value_RF)
        return out_RG

    return Activation(forward, backward, parts=2)


_PLAIN: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "relu": Activation(
        F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, threshold=0)
    ),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
}
GATED = "_gated"  # ending of an activation's name; silu_gated is SwiGLU, gelu_gated is GEGLU
ACTIVATIONS: dict[str, Activation] = {
    **_PLAIN,
    **{f"{name}{GATED}": _gated(plain) for name, plain in _PLAIN.items()},
}


def find_activation(name: str) -> Activation:
    """The activation of a name in `ACTIVATIONS`.

    Raises:
        ConfigError: an unknown name; lists the nearest.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; {nearest(name, list(ACTIVATIONS))}")
    return ACTIVATIONS[name]


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
        pre_RG = x_RD.new_empty(x_RD.shape[0], w_in.shape[2])
        y_RD = torch.empty_like(x_RD)
        pieces = zip(x_RD.split(rows_E), pre_RG.split(rows_E), y_RD.split(rows_E), strict=True)
        for e, (x, pre, y) in enumerate(pieces):
            if len(x):
                torch.addmm(b_in[e], x, w_in[e], out=pre)
                torch.addmm(b_out[e], activation.forward(pre), w_out[e], out=y)
        ctx.save_for_backward(x_RD, pre_RG, w_in, w_out)
        ctx.rows_E, ctx.activation = rows_E, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, pre_RG, w_in, w_out = ctx.saved_tensors
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
            x, pre, grad = x_RD[piece], pre_RG[piece], grad_RD[piece]
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
    pre_RG = F.grouped_mm(x_RD, w_in, offs=ends_E) + b_in.index_select(0, expert_R)
    y_RD = F.grouped_mm(activation.forward(pre_RG), w_out, offs=ends_E)
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

    `w_in` is (E, D, G) and `w_out` (E, F, D). Gated: columns [:F] of `w_in` make the gate and the
    others what it multiplies, `(act(x w_gate + b_gate) * (x w_value + b_value)) w_out + b_out`.

    Args:
        num_experts: E, the experts that this process holds.
        width: D.
        hidden: F.
        activation: a name in `ACTIVATIONS`; one that ends in `_gated` makes gated experts.

    Raises:
        ConfigError: an unknown activation.
    """

    def __init__(self, *, num_experts: int, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        columns = find_activation(activation).parts * hidden
        self.activation = activation
        self.w_in = nn.Parameter(torch.empty(num_experts, width, columns))
        self.b_in = nn.Parameter(torch.zeros(num_experts, columns))
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
        _, hidden, width = self.w_out.shape
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
        num_experts, hidden, width = self.w_out.shape
        return f"experts={num_experts}, width={width}, hidden={hidden}, {self.activation}"
