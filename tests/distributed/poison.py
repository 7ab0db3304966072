"""Real runs in the harness's ranks whose numbers are made bad at chosen steps."""

from __future__ import annotations

import math
from typing import Any

from tests.distributed.runs import train_here

EXPERT = "towers.text.blocks.1.mlp"  # part of the name of the layer whose expert is poisoned


def train_poisoned(
    rank: int, world_size: int, commands: list[list[str]], poison: dict[str, Any]
) -> list[dict[str, Any]]:
    """`train_here`, with the numbers of one rank made bad.

    Args:
        rank: of this process.
        world_size: number of processes.
        commands: the runs.
        poison: "rank", "steps", "kind" ("expert": gradient of one expert; "loss"), "value",
            and "before": what the spike windows hold of steps before the run.
    """
    from mm_moe.training.trainer import MultimodalTrainer

    prepare, compute = MultimodalTrainer._prepare_for_training, MultimodalTrainer.compute_loss

    def now(trainer: MultimodalTrainer) -> bool:
        return rank == poison["rank"] and trainer.guard.step + 1 in poison["steps"]

    def poisoned_prepare(self, *args: Any):
        model, loader = prepare(self, *args)
        for window in self.guard.windows.values():
            window.values.extend(poison.get("before", []))
        for name, parameter in model.module.named_parameters():
            if poison["kind"] == "expert" and "experts" in name and parameter.requires_grad:

                def spoil(grad, self=self):
                    bad = grad.clone()
                    bad[-1] = poison["value"]  # this rank's last expert
                    return bad if now(self) else grad

                parameter.register_hook(spoil)
                break
        return model, loader

    def poisoned_loss(self, *args: Any, **kwargs: Any):
        found = compute(self, *args, **kwargs)
        if poison["kind"] == "loss" and now(self):
            factor = poison["value"]
            self.guard._losses[-1] *= factor
            return found * factor
        return found

    MultimodalTrainer._prepare_for_training = poisoned_prepare
    MultimodalTrainer.compute_loss = poisoned_loss
    return train_here(rank, world_size, commands)


NAN = math.nan


def status_of_poisoned(
    rank: int, world_size: int, argv: list[str], poison: dict[str, Any]
) -> tuple[int, str]:
    """(exit status, text) of a poisoned run that ends by an expected error."""
    from mm_moe.errors import MMMoEError

    try:
        train_poisoned(rank, world_size, [argv], poison)
    except MMMoEError as error:
        return error.exit_code, str(error)
    return 0, ""
