"""Anchors of the cell autoencoder: which genes, and the map that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm_moe.errors import ConfigError
from pretrain.cell_anchors import LEAST_SPREAD, anchor_places, standardised
from pretrain.mmvae import CellObjective
from tests.unit.cells.cell_batches import batch, model

PAIRS = {"human": ["human0", "human5"], "mouse": ["mouse3", "mouse0"]}
GENES = {"human": ["GATA1", "MPO", "ACTB", "KLF1"], "mouse": ["Actb", "Xist", "Gata1"]}


def ready(vae, **options: Any) -> CellObjective:
    objective = CellObjective(**options)
    objective.prepare(vae, device=torch.device("cpu"), seed=0)
    return objective


def test_same_names_are_paired_up_to_case():
    # ACTB, GATA1 in the order of their names
    assert anchor_places("same_name", GENES) == {"human": [2, 0], "mouse": [0, 2]}


def test_a_name_that_a_species_has_twice_is_no_anchor():
    genes = {**GENES, "mouse": ["Actb", "ACTB", "Gata1"]}
    assert anchor_places("same_name", genes) == {"human": [0], "mouse": [2]}


def test_named_pairs_keep_their_order():
    named = {"mouse": ["Xist", "Actb"], "human": ["MPO", "KLF1"]}
    assert anchor_places(named, GENES) == {"human": [1, 3], "mouse": [1, 0]}


@pytest.mark.parametrize(
    ("anchors", "words"),
    [
        ("orthologues", "must be 'same_name' or lists of genes of each species"),
        ({"human": "MPO", "mouse": "Mpo"}, "must be 'same_name' or lists of genes"),
        (5, "must be 'same_name' or lists of genes"),
        ({"human": ["MPO"]}, "must be 'same_name' or lists of genes of each species"),
        ({"human": ["MPO"], "mouse": ["Actb", "Xist"]}, "equally many in every species"),
        ({"human": [], "mouse": []}, "name one or more"),
        ({"human": ["MPOX"], "mouse": ["Actb"]}, "'MPOX' is no gene of 'human'.*did you mean MPO"),
        ({"human": ["MPO", "MPO"], "mouse": ["Actb", "Xist"]}, "'MPO' of 'human' is named twice"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(anchors, words):
    with pytest.raises(ConfigError, match=words):
        anchor_places(anchors, GENES)


def test_species_without_a_common_name_are_refused():
    with pytest.raises(ConfigError, match="no gene has the same name in human and mouse"):
        ready(model(), anchor_weight=1.0)


def test_values_are_standardised_within_each_species():
    x_NA = torch.tensor([[1.0, 5.0], [3.0, 5.1], [10.0, 0.0]])
    found = standardised(x_NA, torch.tensor([0, 0, 1]), kinds=2)
    # species 0: means 2 and 5.05, deviations 1 and .05, which counts as the least
    expected = torch.tensor([[-1.0, -0.05 / LEAST_SPREAD], [1.0, 0.05 / LEAST_SPREAD], [0.0, 0.0]])
    assert torch.allclose(found.float(), expected, atol=1e-5)


def test_the_model_pays_the_share_that_the_map_does_not_explain():
    vae, cells = model(), batch("hmhhm")
    objective = ready(vae, anchor_weight=0.5, anchors=PAIRS, anchor_steps=0)
    _, parts, output = objective(vae, cells)
    assert objective.anchor is not None
    counts = {
        name: torch.log1p(1e4 * x / x.sum(1, keepdim=True).clamp(min=1))
        for name, x in ((n, _dense(cells, n)) for n in ("human", "mouse"))
    }
    truth = torch.cat([counts["human"][:, [0, 5]], counts["mouse"][:, [3, 0]]])
    truth = standardised(truth, torch.tensor([0, 0, 0, 1, 1]), kinds=2)
    error = (objective.anchor.held.module(output.mu) - truth).square().sum()
    share = (error / truth.square().sum()).item()
    assert parts["anchors"].item() == pytest.approx(0.5 * share)
    assert parts["anchors_unexplained"].item() == pytest.approx(share)


def test_map_and_model_work_to_the_same_end():
    torch.manual_seed(0)
    vae, cells = model().train(), batch("hmhmhmhm")
    objective = ready(vae, anchor_weight=1.0, anchors=PAIRS, anchor_learning_rate=0.01)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
    unexplained = []
    for _ in range(150):
        optimizer.zero_grad()
        parts = objective(vae, cells)[1]
        parts["anchors"].backward()
        optimizer.step()
        unexplained.append(parts["anchors_unexplained"].item())
    assert unexplained[0] > 0.8
    assert unexplained[-1] < 0.3


def test_the_map_is_carried_from_step_to_step_and_is_no_part_of_the_model():
    vae = model()
    names = set(vae.state_dict())
    first = ready(vae, anchor_weight=1.0, anchors=PAIRS)
    first(vae, batch("hmhm"))
    second = ready(model(), anchor_weight=1.0, anchors=PAIRS)
    second.carried()["anchors"].load_state_dict(first.carried()["anchors"].state_dict())
    assert set(vae.state_dict()) == names
    assert first.anchor is not None
    assert second.anchor is not None
    for mine, theirs in zip(
        first.anchor.held.module.parameters(), second.anchor.held.module.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert "anchors" not in ready(model()).carried()


def _dense(cells: dict[str, Any], species: str) -> torch.Tensor:
    payload = cells["inputs"][species]
    crow, genes = payload["crow"], {"human": 7, "mouse": 4}[species]
    found = torch.zeros(len(crow) - 1, genes, dtype=torch.float64)
    for row in range(len(found)):
        own = slice(int(crow[row]), int(crow[row + 1]))
        found[row, payload["col"][own].long()] = payload["val"][own].double()
    return found
