"""The cell autoencoder as a whole, in one process."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from mm_moe.cells.counts import GeneRows, SparseRows
from mm_moe.cells.modeling import CellVAE
from mm_moe.errors import CheckpointError, ConfigError, DataError
from tests.unit.cells.cell_batches import GENES, batch, config, model


def test_one_species_is_a_plain_autoencoder():
    vae = model(modalities=["human"], genes={"human": list("abcdefg")}, conditioner="none")
    x = torch.randint(0, 4, (4, 7)).double()
    found = vae(torch.ones(4, 1).bool(), {"human": {"values": x}})
    expert = vae.expert("human")
    rows = GeneRows(SparseRows.of({"values": x}, dtype=torch.float64), 7)
    profile = torch.log1p(1e4 * x / x.sum(1, keepdim=True).clamp(min=1))
    expected = vae.core.encoder(expert.encode(profile))
    said = expert.decode(vae.core.decoder(expected.mu)[0])
    assert torch.allclose(found.mu, expected.mu, atol=1e-12)
    assert torch.allclose(found.losses["reconstruction"], expert.loss(said, rows), atol=1e-10)


def test_cells_come_back_sorted_by_species():
    vae, cells = model(), batch("mhhm")
    found = vae(**cells)
    for row, (name, n) in enumerate([("human", 0), ("human", 1), ("mouse", 0), ("mouse", 1)]):
        rows = SparseRows.of(cells["inputs"][name], dtype=torch.float64)
        counts = GeneRows(rows, GENES[name]).counts
        assert torch.allclose(found.mu[row], vae.encode(counts[n : n + 1], name).mu[0])


@pytest.mark.parametrize("likelihood", ["mse", "nb", "zinb"])
def test_only_the_active_expert_learns(likelihood):
    vae = model(likelihood=likelihood)
    loss = vae(**batch("hhh")).losses["reconstruction"]
    loss.mean().backward()
    experts = vae.species.experts
    assert all(p.grad.abs().sum() > 0 for p in experts["human"].parameters())
    assert all(p.grad is not None and not p.grad.any() for p in experts["mouse"].parameters())


def test_an_empty_batch_gives_every_weight_a_gradient_of_zero():
    vae = model(conditioner="sequential")
    found = vae(**batch(""))
    assert found.mu.shape == (0, 3)
    found.losses["reconstruction"].sum().backward()
    reached = [name for name, p in vae.named_parameters() if p.grad is None]
    assert reached == ["core.encoder.variance.weight", "core.encoder.variance.bias"]  # no draw


def test_translation_conditions_on_the_target():
    vae = model(kept_columns=["tissue"])
    x, own = torch.randint(0, 4, (2, 7)).double(), torch.tensor([[1, 2], [2, 1]])
    z = vae.encode(x, "human").mu
    expected = vae.decode(z, "mouse", torch.tensor([[0, 2], [0, 1]]))
    assert torch.equal(vae.translate(x, "human", "mouse", metadata=own), expected)
    named = vae.translate(x, "human", "mouse", {"donor": "b"}, metadata=own)
    assert torch.equal(named, vae.decode(z, "mouse", torch.tensor([[2, 2], [2, 1]])))
    assert expected.shape == (2, 4)
    # what the source's conditions would give is something else
    human = torch.zeros(2, dtype=torch.int64)
    wrong = vae.expert("mouse").decode(vae.core.decode(vae.conditioner(z, own, human))).profile
    assert not torch.allclose(wrong, expected)
    with pytest.raises(ConfigError, match="did you mean mouse"):
        vae.translate(x, "human", "mose")


def test_what_is_generated_from_counts_is_normalised():
    found = model(likelihood="nb").decode(torch.randn(3, 3).double(), "human")
    assert torch.expm1(found).sum(1).tolist() == pytest.approx([1e4] * 3)


def test_saved_and_loaded_with_its_words(tmp_path):
    vae = model(conditions={"donor": {"human": ["a"], "mouse": ["b", "c"]}})
    vae.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, CellVAE)
    assert again.config.genes == vae.config.genes
    assert again.config.conditions == vae.config.conditions
    z = torch.randn(2, 3).double()
    code = torch.tensor([[2], [0]])
    assert torch.equal(again.decode(z, "mouse", code), vae.decode(z, "mouse", code))
    vae.config.expert_width = 6
    vae.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the model needs"):
        CellVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conditioner": "flim"}, "did you mean film"),
        ({"latent_size": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"condition_order": ["species", "doner"]}, "did you mean donor"),
        ({"genes": {"human": ["g"]}}, "'mouse' has no genes"),
        ({"conditions": {"donor": {"rat": ["a"]}}}, "no species of the model"),
    ],
)
def test_a_wrong_setting_is_named(options, match):
    with pytest.raises(ConfigError, match=match):
        config(**options)


def test_a_batch_that_does_not_fit_is_refused():
    vae = model()
    two = batch("hm")
    two["present"][0, 1] = True
    with pytest.raises(DataError, match="two species"):
        vae(**two)
    short = batch("hm")
    short["inputs"]["human"]["col"] += 5
    with pytest.raises(DataError, match="counts of 1"):
        vae(**short)
    with pytest.raises(DataError, match="0 cells of 'mouse', but 1"):
        vae(**{**batch("hm"), "inputs": {"human": batch("h")["inputs"]["human"]}})
    with pytest.raises(ConfigError, match="7 genes in this model, these have 6"):
        vae.encode(torch.zeros(1, 6), "human")
