"""Parts that play against the model: trained beside it, by an optimizer of their own.

They are no part of the model: DeepSpeed does not see them and a published folder does not hold
them. Their weights and moments are in the checkpoints, as what a rank carries from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.errors import CheckpointError


class Discriminator:
    """A module with its own Adam.

    Outside of `step` its parameters ask for no gradient, so that what flows through it reaches the
    model alone.

    Args:
        module: the same on all processes that share it.
        learning_rate: of Adam.
        max_norm: to which the norm of a step's gradient is clipped.
        sum_over: sums a tensor over the processes that share the module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        learning_rate: float,
        sum_over: Callable[[Tensor], Tensor],
        max_norm: float = 10.0,
    ) -> None:
        self.module, self.max_norm, self.sum_over = module, max_norm, sum_over
        self.optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
        module.requires_grad_(False)

    def step(self, loss_of: Callable[[], Tensor]) -> bool:
        """One step; whether it was taken: not with a gradient that is not finite. A collective.

        Args:
            loss_of: this process' share of the loss; the shares are added up. Whatever it reads of
                the model must be detached.
        """
        self.module.requires_grad_(True)
        parameters = list(self.module.parameters())
        try:
            found = torch.autograd.grad(loss_of(), parameters)
        finally:
            self.module.requires_grad_(False)
        flat = self.sum_over(torch.cat([grad.flatten() for grad in found]))
        norm = flat.norm()
        if not torch.isfinite(norm):
            return False  # the guard of the run looks at the model's own numbers
        flat = flat * (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, grad in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments, apart from those that training goes on with."""
        weights = {name: value.detach().cpu().clone() for name, value in self._weights().items()}
        return {"weights": weights, "optimizer": _copied(self.optimizer.state_dict())}

    def _weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """All processes hold the same."""
        return states[0]


class Discriminators:
    """Discriminators by name, of which a process holds some.

    Args:
        held: those of this process.
    """

    def __init__(self, held: dict[str, Discriminator]) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        """Of those held here."""
        return {name: one.state_dict() for name, one in self.held.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that has all that are held here.

        Raises:
            CheckpointError: one is not in it.
        """
        for name, one in self.held.items():
            if name not in state:
                raise CheckpointError(
                    f"this process of the earlier run held no critic of {name!r}; resume with the "
                    "--ep_size of that run, or on another number of processes."
                )
            one.load_state_dict(state[name])

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """Those of all processes; each takes its own."""
        return {name: one for state in states for name, one in state.items()}


def _copied(state: Any) -> Any:
    """The same with tensors of their own, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state
