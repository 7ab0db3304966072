"""The objective of the cell autoencoder, in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.training.discriminator import Discriminator, Discriminators
from pretrain.mmvae import CellObjective
from tests.unit.cells.cell_batches import batch, model

CPU = torch.device("cpu")
ADVERSARY = {"adversary_weight": 1.0, "adversary_hidden": [5], "adversary_ramp": 0}
CRITIC = {"critic_weight": 1.0, "critic_hidden": [4]}


def ready(vae, **options: Any) -> CellObjective:
    objective = CellObjective(**options)
    objective.prepare(vae, device=CPU, seed=0)
    return objective


def test_the_bound_is_the_mean_over_cells_of_sums_over_genes():
    vae, cells = model(), batch("hhm")
    objective = ready(vae, kl_low=0.25, kl_high=0.25)
    loss, parts, output = objective(vae, cells)
    passes_kl = (output.mu.square() + output.logvar.exp() - 1 - output.logvar).sum(1) / 2
    assert parts["kl"].item() == pytest.approx(0.25 * passes_kl.mean().item())
    assert parts["kl_nats"].item() == pytest.approx(passes_kl.mean().item())
    assert loss.item() == pytest.approx((parts["reconstruction"] + parts["kl"]).item())
    summed = ready(vae, compatibility=True)(vae, cells)[1]["reconstruction"]
    assert summed.item() == pytest.approx(3 * parts["reconstruction"].item())


def test_balance_weighs_by_the_length_of_the_gene_list():
    # 7 and 4 genes: mean 5.5
    vae = model()
    plain, fair = ready(vae), ready(vae, balance="genes")
    for species, factor in (("hh", 5.5 / 7), ("mm", 5.5 / 4)):
        one = plain(vae, batch(species))[1]["reconstruction"].item()
        assert fair(vae, batch(species))[1]["reconstruction"].item() == pytest.approx(factor * one)


def test_draws_belong_to_the_cell_and_the_step():
    vae, cells = model(), batch("hmhm")
    objective = ready(vae)
    first = objective(vae, cells)[0].item()
    torch.manual_seed(99)
    assert objective(vae, cells)[0].item() == first
    objective.annealer.step()
    assert objective(vae, cells)[0].item() != first


def test_a_discriminator_step_leaves_the_model_alone():
    vae, cells = model(), batch("hmhm")
    objective = ready(vae, **ADVERSARY, **CRITIC)
    assert objective.adversary is not None
    assert objective.critics is not None
    players = [objective.adversary, *objective.critics.held.values()]
    before = [copy.deepcopy(player.module.state_dict()) for player in players]
    objective(vae, cells)
    for player, old in zip(players, before, strict=True):
        weights = [n for n in old if n.endswith(("weight", "original", "bias"))]
        assert any(not torch.equal(player.module.state_dict()[n], old[n]) for n in weights)
        assert all(p.grad is None and not p.requires_grad for p in player.module.parameters())
    assert all(p.grad is None for p in vae.parameters())


def test_the_model_gets_minus_lambda_times_the_gradient_of_the_adversary():
    vae, cells = model(), batch("hmhm")
    objective = ready(vae, **ADVERSARY, adversary_steps=0)
    parts = objective(vae, cells)[1]
    got = torch.autograd.grad(parts["adversary"], list(vae.core.encoder.parameters()))
    adversary: Any = objective.adversary
    seen: dict[str, torch.Tensor] = {}

    def run(passes):
        posterior = passes.posterior()
        z = posterior.sample(objective._noise(cells["ids"], passes, "z"))
        classes = {
            name: passes.conditioner.classes(name, passes.cells.conditions, passes.cells.species_N)
            for name in adversary.module.heads
        }
        weights = 1 / adversary.module.counts(classes).clamp(min=1)
        loss, _ = adversary.module({**posterior.hidden, "z": z}, classes, weights)
        seen["loss"] = loss
        return loss

    vae(**cells, run=run)
    plain = torch.autograd.grad(seen["loss"], list(vae.core.encoder.parameters()))
    ramp = 0.9999092042625951  # 2 / (1 + exp(-10)) - 1
    for mine, theirs in zip(got, plain, strict=True):
        assert torch.allclose(mine, -ramp * theirs, atol=1e-12)
    assert parts["adversary"].item() == pytest.approx(seen["loss"].item())


def test_an_adversary_learns_and_its_state_comes_back():
    vae, cells = model(), batch("hmhmhmhm")
    options = {**ADVERSARY, "adversary_columns": ["species"], "adversary_learning_rate": 0.01}
    objective = ready(vae, **options, adversary_steps=0)
    before = objective(vae, cells)[1]["adversary"].item()
    objective.adversary_steps = 60
    assert objective(vae, cells)[1]["adversary"].item() < 0.9 * before
    objective.adversary_steps, again = 1, ready(vae, **options)
    for name, part in objective.carried().items():
        again.carried()[name].load_state_dict(part.state_dict())
    for _ in range(2):  # weights and moments
        assert again(vae, cells)[0].item() == objective(vae, cells)[0].item()


def test_half_precision_sums_in_full():
    vae = model(conditioner="concat").bfloat16()
    objective = ready(vae, **ADVERSARY, **CRITIC, cycle_weight=1.0)
    loss, parts, _ = objective(vae, batch("hmhm"))
    assert all(part.dtype == torch.float32 for part in parts.values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters())


def test_critics_rest_when_they_are_too_good_and_without_cells():
    vae = model()
    objective = ready(vae, **CRITIC, critic_auc=0.0)
    assert objective.critics is not None
    before = copy.deepcopy(objective.critics.held["human"].module.state_dict())
    objective(vae, batch("hmhm"))
    objective(vae, batch(""))
    after = objective.critics.held["human"].module.state_dict()
    weights = [name for name in before if "original" in name and not name.endswith(("_u", "_v"))]
    assert weights
    assert all(torch.equal(before[name], after[name]) for name in weights)


def test_cycle_and_translation_reach_both_experts():
    vae = model()
    objective = ready(vae, cycle_weight=1.0, latent_cycle_weight=1.0)
    parts = objective(vae, batch("hh"))[1]
    (parts["cycle"] + parts["latent_cycle"]).backward()
    mouse = vae.species.experts["mouse"]
    assert all(p.grad is not None for p in mouse.parameters())
    assert mouse.read.grad.any()
    assert mouse.write.grad.any()


def test_weight_zero_is_off():
    vae = model()
    objective = ready(vae)
    assert (objective.adversary, objective.critics) == (None, None)
    assert list(objective.carried()) == ["kl_weight"]
    assert set(objective(vae, batch("hm"))[1]) == {"reconstruction", "kl", "kl_nats"}


def test_a_step_without_a_finite_gradient_is_not_taken():
    player = Discriminator(torch.nn.Linear(2, 1), learning_rate=0.1, sum_over=lambda x: x)
    before = player.module.weight.clone()
    assert not player.step(lambda: player.module(torch.full((1, 2), torch.inf)).sum())
    assert torch.equal(player.module.weight, before)
    assert player.step(lambda: player.module(torch.ones(1, 2)).sum())
    assert not torch.equal(player.module.weight, before)


def test_critics_are_dealt_to_whoever_holds_their_species():
    def held(*names):
        return Discriminators(
            {
                n: Discriminator(torch.nn.Linear(1, 1), learning_rate=0.1, sum_over=torch.clone)
                for n in names
            }
        )

    human, mouse, both = held("human"), held("mouse"), held("human", "mouse")
    states = [human.state_dict(), mouse.state_dict()]
    both.load_state_dict(both.dealt(states, rank=0, world_size=1))
    for name, other in (("human", human), ("mouse", mouse)):
        assert torch.equal(both.held[name].module.weight, other.held[name].module.weight)
    with pytest.raises(CheckpointError, match="no critic of 'mouse'"):
        both.load_state_dict(states[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"balance": "gene"}, "did you mean genes"),
        ({"critic_loss": "hing"}, "did you mean hinge"),
        ({"adversary_weight": -1}, "adversary_weight"),
        ({"cycle_weight": True}, "cycle_weight"),
        ({"kl_low": -0.1}, "negative"),
    ],
)
def test_a_wrong_option_is_named(options, match):
    with pytest.raises(ConfigError, match=match):
        CellObjective(**options)


def test_what_a_model_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="did you mean donor"):
        ready(model(), adversary_weight=1.0, adversary_columns=["doner"])
    alone = model(modalities=["human"], genes={"human": list("abcdefg")})
    with pytest.raises(ConfigError, match="'human' alone"):
        ready(alone, cycle_weight=1.0)
    with pytest.raises(ConfigError, match="CellVAE"):
        ready(torch.nn.Linear(1, 1))


def test_generated_cells_leave_the_running_statistics_alone():
    norms = {"expert_norm": "batch", "core_norm": "batch"}
    plain, crossed = model(**norms).train(), model(**norms).train()
    ready(plain)(plain, batch("hmhm"))
    ready(crossed, latent_cycle_weight=1.0)(crossed, batch("hmhm"))
    for mine, theirs in zip(plain.buffers(), crossed.buffers(), strict=True):
        assert torch.equal(mine, theirs)
