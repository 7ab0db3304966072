"""What objectives say of held-out samples: by hand, drawn from nothing, whatever the batches."""

from __future__ import annotations

import pytest
import torch

from mm_moe.batch import Batch
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from mm_moe.training.held_out import HeldOut, held_out_means
from pretrain.mixture import BOUNDS, MixtureObjective
from pretrain.mmvae import CellObjective
from tests.unit.cells.cell_batches import batch, model

CELLS = "hmhhm"


class Halves(HeldOut):
    """Half of each value; of negative ones a second score."""

    def held_out(self, model, batch):
        assert not model.training
        values = batch.inputs["x"]["values"] if len(batch.present) else torch.zeros(0)
        return {"half": values / 2, "negative": values[values < 0], "none": values[:0]}


def toy(values: list[float]) -> Batch:
    present = torch.ones(len(values), 1, dtype=torch.bool)
    return Batch.of([str(v) for v in values], present, {"x": {"values": torch.tensor(values)}})


def test_means_are_over_samples_and_not_over_batches():
    layer = torch.nn.Linear(1, 1).train()
    found = held_out_means(Halves(), layer, [toy([1, 2, 3]), toy([-4])], num_modalities=1)
    assert found == {"half": 0.25, "negative": -4.0}  # (0.5 + 1 + 1.5 - 2) / 4
    assert layer.training


def cells(rows: slice = slice(None)) -> Batch:
    found = batch(CELLS, rows=rows)
    return Batch.of(found["ids"], found["present"], found["inputs"])


def test_cells_are_scored_at_the_means_of_their_posteriors():
    vae = model(dropout=0.5).train()
    objective = CellObjective(balance="genes", kl_low=0.1, free_bits=2.0)
    before = torch.get_rng_state()
    found = held_out_means(objective, vae, [cells()], num_modalities=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert vae.training
    output = vae.eval()(**batch(CELLS))
    kl = (output.mu.square() + output.logvar.exp() - 1 - output.logvar).sum(1).mean() / 2
    errors = output.losses["reconstruction"]  # humans first: 3 and 2
    assert found["kl_nats"] == pytest.approx(kl.item())
    assert found["human_reconstruction"] == pytest.approx(errors[:3].mean().item())
    assert found["mouse_reconstruction"] == pytest.approx(errors[3:].mean().item())
    assert found["reconstruction"] == pytest.approx(errors.mean().item())
    assert found["loss"] == pytest.approx((errors.mean() + kl).item())
    pieces = [cells(slice(0, 1)), cells(slice(1, 1)), cells(slice(1, 5))]
    again = held_out_means(objective, vae, pieces, num_modalities=2)
    assert again == pytest.approx(found, rel=1e-9)


def test_a_species_without_a_held_out_cell_has_no_score():
    found = held_out_means(CellObjective(), model(), [cells(slice(2, 4))], num_modalities=2)
    assert set(found) == {"loss", "reconstruction", "kl_nats", "human_reconstruction"}


def mixture(**options) -> MixtureVAE:
    torch.manual_seed(0)
    fields = {
        "modalities": ["a", "b"],
        "arrays": {"a": {"shape": [3]}, "b": {"shape": [4]}},
        "latent_size": 2,
        "networks": {"a": {"hidden": [5]}, "b": {"hidden": [5]}},
        **options,
    }
    return MixtureVAE(MixtureVAEConfig(**fields)).double()


PRESENT = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)


def pairs(rows: slice = slice(None)) -> Batch:
    draw = torch.Generator().manual_seed(1)
    x = {name: torch.randn(4, size, generator=draw).double() for name, size in (("a", 3), ("b", 4))}
    shown = PRESENT[rows]
    inputs = {
        name: {"values": values[rows][shown[:, m]]}
        for m, (name, values) in enumerate(x.items())
        if shown[:, m].any()
    }
    return Batch.of([f"p{row}" for row in range(4)][rows], shown, inputs)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("families", [("laplace", "laplace"), ("laplace", "normal")])
def test_the_draws_of_a_sample_are_its_own(bound, families):
    vae = mixture(posterior=families[0], prior=families[1]).train()
    objective = MixtureObjective(bound=bound, samples=3)
    before = torch.get_rng_state()
    found = held_out_means(objective, vae, [pairs()], num_modalities=2)
    pieces = [pairs(slice(0, 1)), pairs(slice(1, 4)), pairs(slice(4, 4))]
    again = held_out_means(objective, vae, pieces, num_modalities=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert again == pytest.approx(found, rel=1e-9)
    name = "iwae_looser" if bound == "dreg_looser" else bound
    assert found == {name: pytest.approx(-found["loss"]), "loss": found["loss"]}


def test_draws_from_given_quantiles_are_of_the_posterior():
    vae = mixture(posterior="laplace", prior="normal").eval()
    uniform = torch.rand(4, 2, 4000, 2).double()
    values = pairs()
    draws = vae.draw(values.present, values.inputs, samples=4000, uniform_BRKL=uniform)
    z_RBL, spread = draws.z_RKBL.mean(1), draws.z_RKBL.std(1)
    assert torch.allclose(z_RBL, draws.location_RBL, atol=0.15)
    assert torch.allclose(spread, 2**0.5 * draws.scale_RBL, rtol=0.15)
