"""The mixture autoencoder's bounds over two ranks equal one process, however uneven they are.

DeepSpeed averages gradients over ranks, so that is what is compared. Noise is made a function of
the experts' locations, so that a row has the same draws wherever it is.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from mm_moe.batch import Batch
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from pretrain.mixture import BOUNDS, MixtureObjective
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

ROWS = 3  # per rank
PRESENT = [  # uneven; no picture on one rank; nothing on one rank; nothing at all
    [[1, 1], [1, 0], [0, 1], [1, 1], [1, 1], [0, 0]],
    [[0, 1], [0, 1], [0, 0], [1, 1], [1, 0], [1, 1]],
    [[0, 0], [0, 0], [0, 0], [1, 1], [0, 1], [1, 0]],
    [[0, 0]] * 6,
]


def noise_of_the_row(self, shape=()):
    """(K, R, B, L) draws that are a function of their location."""
    phase = torch.arange(float(shape[0]), dtype=self.loc.dtype).view(-1, 1, 1, 1)
    return self.loc + self.scale * torch.sin(97 * self.loc.detach() + 1.7 * phase)


def found(name: str, present: list[list[int]], part: slice):
    """(loss, gradients) of some rows."""
    torch.manual_seed(0)
    Normal.rsample = noise_of_the_row  # in this process alone
    config = MixtureVAEConfig(
        modalities=["a", "b"],
        arrays={"a": {"shape": [3]}, "b": {"shape": [4]}},
        latent_size=2,
        posterior="normal",
        prior="normal",
        networks={"a": {"hidden": [5]}, "b": {"hidden": [5]}},
        likelihoods={"b": {"kind": "nb"}},
    )
    model = MixtureVAE(config).double()
    x = {"a": torch.randn(2 * ROWS, 3).double(), "b": torch.randint(0, 5, (2 * ROWS, 4)).double()}
    shown = torch.tensor(present, dtype=torch.bool)[part]
    inputs = {
        key: {"values": value[part][shown[:, m]]}
        for m, (key, value) in enumerate(x.items())
        if shown[:, m].any()
    }
    batch = Batch.of([str(row) for row in range(len(shown))], shown, inputs)
    loss, _, _ = MixtureObjective(bound=name, samples=3)(model, batch)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def of_rank(rank: int, world_size: int):
    """What this rank finds in every case."""
    return [
        found(name, present, slice(rank * ROWS, (rank + 1) * ROWS))
        for name in BOUNDS
        for present in PRESENT
    ]


def whole(rank: int, world_size: int):
    """The same in one process."""
    return [found(name, present, slice(None)) for name in BOUNDS for present in PRESENT]


def test_two_ranks_equal_one_process():
    ranks = run_distributed(of_rank, 2)
    (expected,) = run_distributed(whole, 1)
    for parts, (loss, grads) in zip(zip(*ranks, strict=True), expected, strict=True):
        mean = sum(part[0] for part in parts) / 2
        assert torch.allclose(mean, loss, rtol=1e-10, atol=1e-12)
        for *mine, theirs in zip(*(part[1] for part in parts), grads, strict=True):
            assert torch.allclose(sum(mine) / 2, theirs, rtol=1e-8, atol=1e-10)
