"""What a dense feed-forward of any library is made of, found by its structure and checked by a run.

D width, F hidden width, G columns before the activation: F, or 2F (gate first) where it is gated.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.moe.experts import ACTIVATIONS, GATED

_OUT_OF_REACH = "Leave this layer out of moe_layers."
_PROBE_ROWS = 5


@dataclass(frozen=True)
class DenseParts:
    """A dense feed-forward in the layout of the experts.

    Attributes:
        w_in: (D, G).
        b_in: (G,), zeros where there is none.
        w_out: (F, D).
        b_out: (D,), zeros where there is none.
        activation: a name in `ACTIVATIONS`.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    activation: str

    @property
    def width(self) -> int:
        """D."""
        return self.w_out.shape[1]

    @property
    def hidden(self) -> int:
        """F."""
        return self.w_out.shape[0]

    @property
    def by_part_in(self) -> tuple[Tensor, Tensor]:
        """`w_in` as (D, parts, F) and `b_in` as (parts, F); the gate is the first of two parts."""
        shape = (self.w_in.shape[1] // self.hidden, self.hidden)
        return self.w_in.unflatten(1, shape), self.b_in.unflatten(0, shape)


@dataclass(frozen=True)
class _Plan:
    """A guess at what a module does with its linear layers.

    Attributes:
        into: D -> F (plain), D -> 2F (fused, gated) or gate and value D -> F.
        out: F -> D.
        gate: which half or which of the two layers is the gate, None where there is none.
    """

    into: tuple[nn.Linear, ...]
    out: nn.Linear
    gate: int | None

    def run(self, x: Tensor, small: dict[nn.Linear, nn.Linear], activation: nn.Module) -> Tensor:
        """What the module would return if the guess were right."""
        h = torch.cat([small[linear](x) for linear in self.into], -1)
        if self.gate is None:
            return small[self.out](activation(h))
        halves = h.chunk(2, -1)
        return small[self.out](activation(halves[self.gate]) * halves[1 - self.gate])


def dense_parts(mlp: nn.Module) -> DenseParts:
    """Take a feed-forward apart: two or three linear layers and one activation.

    Known are `out(act(in(x)))`, and gated `out(act(gate(x)) * in(x))` with two layers or with one
    whose halves are gate and value in either order. What the module really does is found by running
    it, with small random layers in place of its own, against every possible reading; so the class
    and the order of declaration do not matter, nor do the values of the weights, and it works on
    the meta device.

    Raises:
        ConfigError: anything else (a norm or convolution inside, dropout above 0, other parameters,
            an unknown activation); the message says what was found.
    """
    linears, activation = _leaves(mlp)
    plans = list(_plans(linears))
    if not plans:
        shapes = " and ".join(f"{layer.in_features} -> {layer.out_features}" for layer in linears)
        raise ConfigError(
            f"cannot upcycle {type(mlp).__name__}: its linear layers are {shapes}, not "
            f"D -> F -> D or, with a gate, D -> 2F and F -> D. {_OUT_OF_REACH}"
        )
    plan = _plan_that_holds(mlp, plans, activation)
    name = _activation_name(activation) + ("" if plan.gate is None else GATED)
    into = plan.into[::-1] if plan.gate and len(plan.into) == 2 else plan.into
    w_in = _joined([layer.weight.t() for layer in into], dim=1)
    b_in = _joined([_bias(layer) for layer in into], dim=0)
    if plan.gate and len(plan.into) == 1:  # fused, gate last
        w_in, b_in = w_in.roll(plan.out.in_features, 1), b_in.roll(plan.out.in_features, 0)
    return DenseParts(w_in, b_in, plan.out.weight.t(), _bias(plan.out), name)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _leaves(mlp: nn.Module) -> tuple[list[nn.Linear], nn.Module]:
    """The linear layers and the activation of a feed-forward, which must hold nothing else."""
    leaves = [
        module
        for module in mlp.modules()
        if not list(module.children())
        and not isinstance(module, nn.Identity)
        and not (isinstance(module, nn.Dropout) and module.p == 0)
    ]
    # a subclass with a forward of its own (quantised, low-rank) is no linear layer to be copied
    linears = [
        module
        for module in leaves
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]
    others = [module for module in leaves if module not in linears]
    found = ", ".join(_described(module) for module in leaves) or "nothing"
    if len(linears) not in (2, 3) or len(others) != 1:
        raise ConfigError(
            f"cannot upcycle {type(mlp).__name__}: it needs two linear layers (three with a gate) "
            f"and one activation, found: {found}. Dropout is possible only at 0: experts have "
            f"none. {_OUT_OF_REACH}"
        )
    own = {id(parameter) for linear in linears for parameter in linear.parameters()}
    for name, parameter in mlp.named_parameters():
        if id(parameter) not in own:
            raise ConfigError(
                f"cannot upcycle {type(mlp).__name__}: parameter {name!r} belongs to none of its "
                f"linear layers. {_OUT_OF_REACH}"
            )
    return linears, others[0]


def _described(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name} at {module.p:g}" if isinstance(module, nn.Dropout) else name


def _plans(linears: list[nn.Linear]) -> Iterator[_Plan]:
    """Every reading that the shapes allow, the usual order first."""
    for *into, out in itertools.permutations(linears):
        widths = {layer.in_features for layer in into} | {out.out_features}
        hidden = {layer.out_features for layer in into}
        if len(widths) > 1 or len(hidden) > 1:
            continue
        if len(into) == 2 and hidden == {out.in_features}:
            yield _Plan(tuple(into), out, gate=0)
        elif len(into) == 1 and hidden == {out.in_features}:
            yield _Plan(tuple(into), out, gate=None)
        elif len(into) == 1 and hidden == {2 * out.in_features}:
            yield _Plan(tuple(into), out, gate=0)
            yield _Plan(tuple(into), out, gate=1)


def _plan_that_holds(mlp: nn.Module, plans: list[_Plan], activation: nn.Module) -> _Plan:
    """The first reading that gives the module's own output on random rows and weights."""
    failure = ""
    for plan in plans:
        generator = torch.Generator(device="cpu").manual_seed(0)
        small = _small_layers(plan, generator)
        x = _random((_PROBE_ROWS, small[plan.out].out_features), generator)
        memo = {id(linear): twin for linear, twin in small.items()}
        try:
            with torch.no_grad():
                found = copy.deepcopy(mlp, memo).eval()(x)  # type: ignore[arg-type]
                expected = plan.run(x, small, copy.deepcopy(activation))
        except (RuntimeError, TypeError, ValueError) as error:
            failure = failure or f"a trial run failed ({str(error).splitlines()[0]})"
            continue
        if _is_same(found, expected):
            return plan
        failure = "it does more than linear, activation (with or without a gate), linear"
    raise ConfigError(f"cannot upcycle {type(mlp).__name__}: {failure}. {_OUT_OF_REACH}")


def _is_same(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-6)


def _small_layers(plan: _Plan, generator: torch.Generator) -> dict[nn.Linear, nn.Linear]:
    """A small random float64 layer for each linear layer; equal sizes stay equal."""
    width, hidden = plan.out.out_features, plan.out.in_features
    sizes = {hidden: 4, 2 * hidden: 8}
    sizes.setdefault(width, 6)
    small = {}
    for linear in (*plan.into, plan.out):
        shape = (sizes[linear.out_features], sizes[linear.in_features])
        twin = nn.Linear(1, 1, bias=linear.bias is not None, device="meta")
        twin.in_features, twin.out_features = shape[1], shape[0]
        twin.weight = nn.Parameter(_random(shape, generator))
        if linear.bias is not None:
            twin.bias = nn.Parameter(_random(shape[:1], generator))
        small[linear] = twin
    return small


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values in float64 on the CPU, whatever the default dtype and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _activation_name(activation: nn.Module) -> str:
    """The name of the activation with the same values; every library has a class of its own."""
    # wide enough to tell a clipped function (ReLU6) from its namesake
    probe = torch.linspace(-12, 12, 193, dtype=torch.float32, device="cpu")
    plain = {name: known for name, known in ACTIVATIONS.items() if not name.endswith(GATED)}
    with torch.no_grad():
        value = copy.deepcopy(activation)(probe.clone())  # it may work in place
        for name, known in plain.items():
            # erf and tanh forms of GELU differ by up to 5e-4
            if torch.allclose(value, known.forward(probe), rtol=0, atol=1e-5):
                return name
    raise ConfigError(
        f"cannot upcycle a feed-forward with {type(activation).__name__}; "
        f"known activations: {', '.join(plain)}. {_OUT_OF_REACH}"
    )
