"""Cells of two species in one latent space: tables, types, scores and the page of a run."""

import json

import numpy as np
import pytest
import scipy.sparse

from eval import integration, integration_report
from eval.benchmarks.cells_controlled import against_truth
from eval.benchmarks.cells_drawn import GENES, SHARED_GENES, World
from eval.benchmarks.cells_integration import same_names
from eval.benchmarks.cells_training import RUNGS, batches, table_of, train
from eval.cell_tables import CellTable, batch_of, decoded, encoded, translated, variable_genes
from eval.cell_types import coarse, marked_types

SIZES = {"expert_hidden": [8], "expert_width": 8, "core_hidden": [8], "latent_size": 3}


def table(counts, *, types=None, genes=None):
    counts = np.asarray(counts, np.float32)
    genes = genes or tuple(f"g{n}" for n in range(counts.shape[1]))
    ids = np.array([f"cell {n}" for n in range(len(counts))], dtype=object)
    types = np.array(types or [None] * len(counts), dtype=object)
    conditions = np.zeros((len(counts), 0), np.int64)
    return CellTable(scipy.sparse.csr_matrix(counts), genes, ids, conditions, types)


def small_model(tables, rung="plain", steps=1):
    return train(
        tables,
        RUNGS[rung],
        seed=0,
        steps=steps,
        batch=8,
        learning_rate=1e-3,
        options={**SIZES, "likelihood": "nb"},
        objective={},
        anchors=World(0).anchors(RUNGS[rung].anchors) if RUNGS[rung].anchors else None,
    )[0]


def test_values_by_hand():
    values = table([[1, 3], [0, 0]]).values()
    assert np.allclose(values, [[np.log(2501), np.log(7501)], [0, 0]])


def test_genes_are_taken_by_name_and_by_how_much_they_vary():
    found = table([[1, 5, 9], [2, 5, 1]]).of_genes(("g2", "g0"))
    assert found.counts.toarray().tolist() == [[9, 1], [1, 2]]
    steady = table([[10, 1, 9], [10, 9, 1]])
    assert variable_genes(steady, 2) == ("g1", "g2")


def test_a_batch_holds_each_species_cells_in_order():
    found = batch_of({"human": table([[0, 2]]), "mouse": table([[3], [4]])})
    assert found["present"].tolist() == [[True, False], [False, True], [False, True]]
    human, mouse = found["inputs"]["human"], found["inputs"]["mouse"]
    assert (human["col"].tolist(), human["val"].tolist(), human["library"].tolist()) == (
        [1],
        [2],
        [2],
    )
    assert mouse["crow"].tolist() == [0, 1, 2]


def test_batches_hold_as_many_of_each_species_in_passes():
    line = batches({"human": table(np.eye(4)), "mouse": table([[1], [2]])}, size=4, seed=0)
    ids = [next(line).ids for _ in range(2)]
    assert sorted(ids[0][:2] + ids[1][:2]) == [f"cell {n}" for n in range(4)]
    assert sorted(ids[0][2:]) == sorted(ids[1][2:]) == ["cell 0", "cell 1"]


def test_markers_name_a_cell_that_expresses_them():
    values = np.array([[4.0, 0, 0], [4, 0, 0], [0, 4, 4], [0, 4, 4], [2, 2, 2]])
    markers = {"red": ["HBB"], "white": ["mpo".upper(), "LYZ"], "absent": ["XYZ"]}
    found = marked_types(values, ("Hbb", "Mpo", "Lyz"), markers=markers, neighbours=0)
    assert found.tolist() == ["red", "red", "white", "white", None]


def test_published_clusters_become_lineages():
    assert coarse(["3Ery", "17Neu", None, "other"]).tolist() == [
        "erythroid",
        "granulocyte-monocyte",
        None,
        "other",
    ]


def test_generation_is_scored_around_the_mean_of_real_cells():
    rows = np.repeat([[9.0, 1, 0], [9, 0, 1]], 5, axis=0) + np.arange(10)[:, None] % 5 * 1e-3
    kinds = ["a"] * 5 + ["b"] * 5
    own = table(rows, types=kinds)
    right = integration.generation_scores(rows, own, rows, own, rows)
    assert right["centred_r"] == pytest.approx(1)
    assert right["centred_own_first"] == 1
    wrong = integration.generation_scores(rows[::-1], own, rows, own, rows)
    assert wrong["centred_r"] == pytest.approx(-1, abs=1e-3)
    assert wrong["centred_own_first"] == 0
    assert wrong["mean_r"] > 0.9  # the same genes are loud in all cells of a species


def test_latents_that_agree_carry_labels_across():
    place = np.repeat([[0.0, 0.0], [9.0, 9.0]], 20, axis=0)
    place = place + np.random.default_rng(0).normal(size=place.shape)
    own = table(np.ones((40, 1)), types=["a"] * 20 + ["b"] * 20)
    found = integration.latent_scores(
        {"human": place, "mouse": place + 0.1}, {"human": own, "mouse": own}
    )
    assert found["label_transfer"]["human to mouse"]["accuracy"] == 1
    short = integration.headline(found)
    assert short["transfer"] == 1
    assert short["species_mixing"] > 0.8


def test_types_that_no_species_shares_are_no_transfer():
    tables = {"human": table(np.ones((4, 1)), types=["a"] * 4), "mouse": table(np.ones((4, 1)))}
    z = {name: np.arange(8.0).reshape(4, 2) for name in tables}
    assert integration.latent_scores(z, tables)["label_transfer"] == {}


def test_the_other_species_says_what_the_latent_is_there():
    world = World(0)
    drawn = world.draw(30, seed=1)
    assert drawn.tables["human"].counts.shape == (30, GENES["human"])
    assert drawn.crossed["human"].shape == (30, GENES["mouse"])
    assert np.allclose(np.expm1(drawn.crossed["human"]).sum(1), 1e4)
    alike = (world.loads["human"][:, None] == world.loads["mouse"][None]).all(-1).sum()
    assert alike == SHARED_GENES
    same = World(0).draw(30, seed=1)
    assert (same.tables["mouse"].counts != drawn.tables["mouse"].counts).nnz == 0


def test_translation_against_truth_by_hand():
    truth = np.array([[1.0, 0, 2], [0, 1, 2], [2, 2, 2]])
    assert against_truth(2 * truth + 1, truth)["truth_gene_r"] == pytest.approx(1)
    assert against_truth(-truth, truth)["truth_gene_r"] == pytest.approx(-1)
    assert against_truth(truth, truth)["truth_cell_r"] == pytest.approx(1)


def test_anchors_of_drawn_cells_are_the_same_gene():
    world = World(3)
    human, mouse = (
        [int(gene[1:]) for gene in world.anchors(20)[name]] for name in ("human", "mouse")
    )
    assert len(set(human)) == len(set(mouse)) == 20
    assert np.array_equal(world.loads["human"][human], world.loads["mouse"][mouse])


def test_anchors_of_real_cells_are_drawn_from_equal_names():
    tables = {
        "human": table([[1, 1, 1, 1]], genes=("MPO", "KLF1", "ACTB", "GATA1")),
        "mouse": table([[1, 1, 1]], genes=("Gata1", "Xist", "Mpo")),
    }
    drawn = [same_names(tables, 1, seed=seed) for seed in range(8)]
    assert {"human": ["MPO"], "mouse": ["Mpo"]} in drawn
    assert {"human": ["GATA1"], "mouse": ["Gata1"]} in drawn
    both = {"human": ["GATA1", "MPO"], "mouse": ["Gata1", "Mpo"]}
    assert same_names(tables, 99, seed=0) == both
    assert same_names(tables, 0, seed=0) is None


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_trains_and_translates(rung):
    drawn = World(0).draw(16, seed=0).tables
    tables = {
        name: CellTable(t.counts, t.genes, t.ids, t.conditions[:, :0], t.types)
        for name, t in drawn.items()
    }
    model = small_model(tables, rung, steps=2)
    assert not model.training
    mu, logvar = encoded(model, tables["human"], "human")
    assert mu.shape == logvar.shape == (16, 3)
    assert decoded(model, mu, tables["human"], "human").shape == (16, GENES["human"])
    made = translated(model, tables["human"], "human", "mouse")
    assert made.shape == (16, GENES["mouse"])
    assert np.isfinite(made).all()


def test_rungs_are_summed_up_over_seeds():
    rows = [{"model": "plain", "short": {"ari": v, "loss": None}} for v in (1.0, 3.0)]
    assert table_of(rows) == {"plain": {"ari": {"mean": 2.0, "sd": pytest.approx(2**0.5)}}}


def test_a_folder_that_is_no_run_is_told_in_one_line(tmp_path, capsys):
    assert integration.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "is no run" in told
    assert told.count("\n") == 1


def test_a_run_is_scored_with_the_genes_of_its_model(tmp_path, monkeypatch, capsys):
    anndata = pytest.importorskip("anndata")
    import pandas

    drawn = World(0).draw(40, seed=0).tables
    for name, own in drawn.items():
        index = pandas.Index([str(n) for n in range(40)])
        obs = pandas.DataFrame({"cell_type": own.types.astype(str)}, index=index)
        genes = pandas.DataFrame(index=pandas.Index(own.genes))
        anndata.AnnData(own.counts, obs=obs, var=genes).write_h5ad(tmp_path / f"{name}.h5ad")
    tables = {
        name: CellTable(t.counts, t.genes, t.ids, t.conditions[:, :0], t.types)
        for name, t in drawn.items()
    }
    small_model(tables).save_pretrained(tmp_path / "final")
    files = {name: f"{name}.h5ad" for name in drawn}
    saved = {"dataset": "cells", "dataset_options": {"files": files}, "data_dir": None}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": saved}))
    monkeypatch.setattr(
        integration_report, "two_dimensions", lambda z: (np.asarray(z)[:, :2], "PCA")
    )
    assert integration.main([str(tmp_path), "--data_dir", str(tmp_path), "--split", "all"]) == 0
    line = json.loads(capsys.readouterr().out)
    found = json.loads((tmp_path / "integration.json").read_text())
    assert found["cells"] == {"human": 40, "mouse": 40}
    assert found["integration"]["species_mixing"] == line["species_mixing"]
    assert 0 <= found["generation"]["human to mouse"]["critic_auc"] <= 1
    page = (tmp_path / "integration.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert integration.main([str(tmp_path), "--data_dir", str(tmp_path), "--split", "moon"]) == 2
