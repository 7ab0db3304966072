"""Turn a trained dense feed-forward into a sparse layer that starts as the same function.

Source: Komatsuzaki et al. 2023. We renormalise the router's weights over the chosen experts, so the
sparse layer equals the dense one for every number of choices, not only for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_moe.moe.companion import SharedExpert
from mm_moe.moe.dense_parts import DenseParts, dense_parts
from mm_moe.moe.experts import Experts
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings


def upcycle(
    mlp: nn.Module,
    *,
    settings: MoESettings,
    noise: float = 0.0,
    drop: float = 0.0,
    generator: torch.Generator | None = None,
) -> MoELayer:
    """Copy a dense feed-forward into every expert of a new sparse layer.

    The feed-forward is known by its structure, not by its class (`dense_parts`): two linear layers
    and an activation, or a gated one (transformers' CLIPMLP, T5DenseGatedActDense and LlamaMLP,
    open_clip's Sequential, timm's Mlp and SwiGLU, and the like). A missing bias becomes
    a zero bias.

    Args:
        mlp: the dense module; left as it is.
        settings: of the new layer.
        noise: standard deviation of a perturbation of each expert's weights, relative to the
            standard deviation of the dense weight; breaks the symmetry between experts.
        drop: share of the hidden units that each expert loses and draws anew (`_redraw_units`);
            breaks the symmetry and gives up the dense function.
        generator: draws the router's weight, the noise and the units; torch's own if None, so that
            equal seeds give equal layers on every process.

    Returns:
        A layer on the same device and with the same dtype. Without noise and drop its output equals
        the dense one (<= 1e-5 in float32).

    Raises:
        ConfigError: the module is not such a feed-forward; the message says what was found.
    """
    parts = dense_parts(mlp)
    layer = MoELayer(
        width=parts.width, hidden=parts.hidden, settings=settings, activation=parts.activation
    ).to(device=parts.w_in.device, dtype=parts.w_in.dtype)
    with torch.no_grad():
        if generator is not None:
            layer.router.reset_parameters(generator)
        experts = layer.experts
        for stacked, dense in ((experts.w_in, parts.w_in), (experts.w_out, parts.w_out)):
            stacked.copy_(dense.expand_as(stacked))
            if noise > 0:
                stacked.add_(_normal_like(stacked, generator), alpha=noise * float(dense.std()))
        for stacked, bias in ((experts.b_in, parts.b_in), (experts.b_out, parts.b_out)):
            stacked.copy_(bias.expand_as(stacked))
        if drop > 0:
            _redraw_units(experts, share=drop, generator=generator)
        _upcycle_companion(layer, parts)
    return layer.train(mlp.training)


def _redraw_units(experts: Experts, *, share: float, generator: torch.Generator | None) -> None:
    """Draw a random share of each expert's hidden units anew.

    For each expert and each matrix (gate, value and output), the weights of the chosen units become
    normal values with the mean and the standard deviation that those weights had. Source: Nakamura
    et al. 2025, Drop-Upcycling. Their models have no biases; we draw the units' entries of `b_in`
    in the same way and keep `b_out`.
    """
    num_experts, hidden, _ = experts.w_out.shape
    count = int(share * hidden)
    if not count:
        return
    device = experts.w_out.device if generator is None else generator.device
    for e in range(num_experts):
        order_F = torch.randperm(hidden, generator=generator, device=device)
        units = order_F[:count].to(experts.w_out.device)
        for start in range(0, experts.w_in.shape[2], hidden):
            _redraw(experts.w_in[e].t(), units + start, generator)
            _redraw(experts.b_in[e], units + start, generator)
        _redraw(experts.w_out[e], units, generator)


def _redraw(weight: Tensor, units: Tensor, generator: torch.Generator | None) -> None:
    """Replace the rows `units` of a weight, in place, by normal values of the same spread."""
    old = weight[units].float()
    new = _normal_like(old, generator) * old.std(correction=0) + old.mean()
    weight[units] = new.to(weight.dtype)


def _upcycle_companion(layer: MoELayer, parts: DenseParts) -> None:
    """Fill the dense feed-forward beside the experts so that the sum stays the dense function.

    A residual branch is mixed with weights that sum to 1: a copy will do. Each of n shared experts
    and the routed part give 1 / (n + 1) of the output.
    """
    beside = layer.companion
    if beside is None:
        return
    copies = beside.fc2.in_features // parts.hidden
    part = 1.0
    if isinstance(beside, SharedExpert):
        part = 1 / (copies + 1)
        layer.experts.w_out.mul_(part)
        layer.experts.b_out.mul_(part)
    w_in, b_in = parts.by_part_in
    beside.fc1.weight.copy_(w_in.repeat(1, 1, copies).flatten(1).t())
    beside.fc1.bias.copy_(b_in.repeat(1, copies).flatten())
    beside.fc2.weight.copy_(parts.w_out.repeat(copies, 1).t() * part)
    beside.fc2.bias.copy_(parts.b_out)
    if isinstance(beside, SharedExpert):
        beside.fc2.bias.mul_(copies * part)
    else:
        for parameter in beside.coefficient.parameters():
            parameter.zero_()  # start from equal shares


def _normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal values drawn where the generator lives, so that a seed means one thing."""
    device = tensor.device if generator is None else generator.device
    noise = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.float32)
    return noise.to(tensor)
