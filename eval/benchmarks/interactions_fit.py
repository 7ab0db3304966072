"""What the interaction benchmark trains: models of this library on made data, in this process.

N samples, M modalities, D width of a modality, C classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from finetune.interaction import Interaction
from finetune.supervised import Supervised
from mm_moe.batch import Batch
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.data.sets.interaction_dial import InteractionDialData
from mm_moe.models import MultimodalMoEConfig, build_model

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LOOK_EVERY = 4  # epochs between two looks at the validation split
TOWER = {"kind": "mlp", "hidden": 32, "size": 32}


@dataclass(frozen=True)
class Split:
    """One split as tensors.

    Attributes:
        label_N: int64.
        x_N2D: the two modalities.
        truth: what the data set says of each sample.
    """

    label_N: Tensor
    x_N2D: Tensor
    truth: np.ndarray

    @classmethod
    def of(cls, source: InteractionDialData, split: str) -> Split:
        """A split of the made data."""
        label_N, x_N2D, truth = source.arrays(split)
        return cls(torch.from_numpy(label_N), torch.from_numpy(x_N2D), truth)

    def batch(
        self, modalities: tuple[str, ...], rows: Tensor | slice, kind_N: Tensor | None = None
    ) -> Batch:
        """Some samples, complete, as a model takes them."""
        x_B2D, label_B = self.x_N2D[rows], self.label_N[rows]
        count = len(label_B)
        inputs = {}
        for m, name in enumerate(InteractionDialData.modalities):
            if name in modalities:
                mask = torch.ones(count, 1, dtype=torch.bool)
                inputs[name] = {"values": x_B2D[:, m : m + 1], "mask": mask}
        present = torch.ones(count, len(modalities), dtype=torch.bool)
        kind_B = None if kind_N is None else kind_N[rows]
        return Batch.of([""] * count, present, inputs, label_B, kind_B)


def config_of(
    source: InteractionDialData,
    modalities: tuple[str, ...] = InteractionDialData.modalities,
    **fields: Any,
) -> MultimodalMoEConfig:
    """A small model over some of the modalities; `fields` say what head it has."""
    sequences = {name: source.sequences[name] for name in modalities}
    return MultimodalMoEConfig(
        backbone="small",
        backbone_config={"sequences": sequences, "towers": dict.fromkeys(modalities, TOWER)},
        modalities=list(modalities),
        label_names=list(source.label_names),
        problem_type="single_label_classification",
        **fields,
    )


def fit(
    model: Any,
    splits: dict[str, Split],
    *,
    epochs: int,
    seed: int,
    kind_N: Tensor | None = None,
) -> Any:
    """Train with AdamW and return the model at its best validation accuracy.

    Args:
        model: new, or of trained members.
        splits: "train" and "validation".
        epochs: passes over the training split.
        seed: of the order of the samples.
        kind_N: kinds of interaction of the training rows, where the fuser is told.
    """
    mixes = getattr(model.config, "interaction_experts", None) is not None
    objective = (Interaction if mixes else Supervised)(problem_type=SINGLE_LABEL)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    generator = torch.Generator().manual_seed(seed)
    train = splits["train"]
    best = (mistakes(model, splits["validation"]), copy.deepcopy(model.state_dict()))
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(train.label_N), generator=generator).split(BATCH_SIZE):
            loss, _, _ = objective(model, train.batch(tuple(model.modalities), rows, kind_N))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch % LOOK_EVERY == 0:
            found = mistakes(model, splits["validation"])
            if found < best[0]:
                best = (found, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return model.eval()


@torch.no_grad()
def answer(model: nn.Module, split: Split) -> Any:
    """The model's output for a whole split."""
    model.eval()
    return model(**split.batch(tuple(model.modalities), slice(None)))  # type: ignore[arg-type]


def mistakes(model: nn.Module, split: Split) -> tuple[float, float]:
    """Share of wrong answers, and mean cross-entropy to choose among equals."""
    logits_NC = answer(model, split).logits
    loss = float(nn.functional.cross_entropy(logits_NC, split.label_N))
    return float((logits_NC.argmax(-1) != split.label_N).float().mean()), loss


def new_model(config: MultimodalMoEConfig, *, seed: int) -> Any:
    """A model with weights drawn from a seed."""
    set_seed(seed)
    return build_model(config)


def size_of(model: nn.Module) -> int:
    """Values that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
