"""Turn a trained dense feed-forward into a sparse layer that starts as the same function.

Source: Komatsuzaki et al. 2023. We renormalise the router's weights over the chosen experts, so the
sparse layer equals the dense one for every number of choices, not only for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.moe.companion import SharedExpert
from mm_moe.moe.experts import ACTIVATIONS
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings


def upcycle(
    mlp: nn.Module,
    *,
    settings: MoESettings,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> MoELayer:
    """Copy a dense feed-forward into every expert of a new sparse layer.

    The feed-forward is known by its structure, not by its class: two linear layers D -> F -> D and
    one activation (transformers' CLIPMLP, open_clip's Sequential, timm's Mlp, and the like). A
    missing bias becomes a zero bias.

    Args:
        mlp: the dense module; left as it is.
        settings: of the new layer.
        noise: standard deviation of a perturbation of each expert's weights, relative to the
            standard deviation of the dense weight; breaks the symmetry between experts.
        generator: draws the router's weight and the noise.

    Returns:
        A layer on the same device and with the same dtype. Without noise its output equals the
        dense one (<= 1e-5 in float32).

    Raises:
        ConfigError: the module is not such a feed-forward; the message says what was found.
    """
    first, second, activation = _parts(mlp)
    layer = MoELayer(
        width=first.in_features,
        hidden=first.out_features,
        settings=settings,
        activation=_activation_name(activation),
    ).to(device=first.weight.device, dtype=first.weight.dtype)
    with torch.no_grad():
        if generator is not None:
            layer.router.reset_parameters(generator)
        experts = layer.experts
        for stacked, dense in (
            (experts.w_in, first.weight.t()),
            (experts.w_out, second.weight.t()),
        ):
            stacked.copy_(dense.expand_as(stacked))
            if noise > 0:
                stacked.add_(_normal_like(stacked, generator), alpha=noise * float(dense.std()))
        for stacked, bias in ((experts.b_in, first.bias), (experts.b_out, second.bias)):
            stacked.zero_() if bias is None else stacked.copy_(bias.expand_as(stacked))
        _upcycle_companion(layer, first, second)
    return layer.train(mlp.training)


def _upcycle_companion(layer: MoELayer, first: nn.Linear, second: nn.Linear) -> None:
    """Fill the dense feed-forward beside the experts so that the sum stays the dense function.

    A residual branch is mixed with weights that sum to 1: a copy will do. Each of n shared experts
    and the routed part give 1 / (n + 1) of the output.
    """
    beside = layer.companion
    if beside is None:
        return
    copies = beside.fc1.out_features // first.out_features
    part = 1.0
    if isinstance(beside, SharedExpert):
        part = 1 / (copies + 1)
        layer.experts.w_out.mul_(part)
        layer.experts.b_out.mul_(part)
    beside.fc1.weight.copy_(first.weight.repeat(copies, 1))
    beside.fc2.weight.copy_(second.weight.repeat(1, copies) * part)
    for linear, bias in ((beside.fc1, first.bias), (beside.fc2, second.bias)):
        linear.bias.zero_() if bias is None else linear.bias.copy_(_tiled(bias, linear.bias))
    if isinstance(beside, SharedExpert):
        beside.fc2.bias.mul_(copies * part)
    else:
        for parameter in beside.coefficient.parameters():
            parameter.zero_()  # start from equal shares


def _tiled(bias: Tensor, like: Tensor) -> Tensor:
    return bias.repeat(len(like) // len(bias))


def _normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal values drawn where the generator lives, so that a seed means one thing."""
    device = tensor.device if generator is None else generator.device
    noise = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.float32)
    return noise.to(tensor)


def _parts(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Module]:
    """The two linear layers and the activation of a feed-forward."""
    leaves = [
        module
        for module in mlp.modules()
        if not list(module.children())
        and not isinstance(module, nn.Identity)
        and not (isinstance(module, nn.Dropout) and module.p == 0)
    ]
    linears = [module for module in leaves if isinstance(module, nn.Linear)]
    others = [module for module in leaves if not isinstance(module, nn.Linear)]
    found = ", ".join(type(module).__name__ for module in leaves) or "nothing"
    if len(linears) != 2 or len(others) != 1:
        raise ConfigError(
            f"cannot upcycle {type(mlp).__name__}: it needs two linear layers and one activation "
            f"(dropout only at 0), found: {found}. Leave this layer out of moe_layers."
        )
    first, second = linears
    if (first.in_features, first.out_features) != (second.out_features, second.in_features):
        raise ConfigError(
            f"cannot upcycle {type(mlp).__name__}: its linear layers are "
            f"{first.in_features} -> {first.out_features} and "
            f"{second.in_features} -> {second.out_features}, not D -> F -> D. "
            "Leave this layer out of moe_layers."
        )
    _check_order(mlp, first, others[0], second)
    return first, second, others[0]


def _check_order(
    mlp: nn.Module, first: nn.Linear, activation: nn.Module, second: nn.Linear
) -> None:
    """Try the parts one after the other on two rows: a module may do more than its parts say."""
    if first.weight.is_meta:  # shapes only, values are loaded later
        return
    probe = torch.linspace(-1, 1, 2 * first.in_features).view(2, -1).to(first.weight)
    try:
        with torch.no_grad():
            same = torch.allclose(
                mlp(probe), second(activation(first(probe))), rtol=1e-2, atol=1e-2
            )
    except RuntimeError:  # declared last to first: the widths do not fit
        same = False
    if not same:
        raise ConfigError(
            f"cannot upcycle {type(mlp).__name__}: its output is not linear, activation, "
            "linear in the order in which it declares them. Leave this layer out of moe_layers."
        )


def _activation_name(activation: nn.Module) -> str:
    """The name of the activation with the same values; every library has a class of its own."""
    probe = torch.linspace(-6, 6, 97, device="cpu")
    with torch.no_grad():
        value = activation(probe)
        for name, known in ACTIVATIONS.items():
            # erf and tanh forms of GELU differ by up to 5e-4
            if torch.allclose(value, known.forward(probe), rtol=0, atol=1e-5):
                return name
    raise ConfigError(
        f"cannot upcycle a feed-forward with {type(activation).__name__}; "
        f"known activations: {', '.join(ACTIVATIONS)}. Leave this layer out of moe_layers."
    )
