"""Scores of latent spaces, by hand and against scib-metrics."""

import numpy as np
import pytest

from eval.integration_scores import (
    clisi,
    cluster_scores,
    graph_connectivity,
    ilisi,
    integration_scores,
    label_transfer,
    lisi,
    neighbours,
    posterior_collapse,
    silhouette_batch,
    silhouette_label,
    species_mixing,
)
from mm_moe.errors import DataError


def line(*places):
    return np.array(places, dtype=float)[:, None]


def test_neighbours_by_hand():
    near = neighbours(line(0, 1, 3, 7), count=2)
    assert near.place.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert near.distance.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6]]
    equal = neighbours(line(5, 5, 5, 5), count=2)  # a cell is never its own neighbour
    assert not (equal.place == np.arange(4)[:, None]).any()
    assert neighbours(line(0, 1), count=9).place.tolist() == [[1], [0]]


def test_species_mixing_by_hand():
    # human 0 1, mouse 10 11: the nearest is always one's own
    assert species_mixing(neighbours(line(0, 1, 10, 11), count=1), ["h", "h", "m", "m"]) == 0
    # pairs of human and mouse: the nearest is always the other; by chance it is 2 of 3
    mixed = species_mixing(neighbours(line(0, 1, 10, 11), count=1), ["h", "m", "h", "m"])
    assert mixed == pytest.approx(1.5)
    # all others are neighbours: exactly chance, whatever the numbers
    even = species_mixing(neighbours(line(0, 1, 2, 5, 9), count=4), ["h", "m", "m", "m", "m"])
    assert even == pytest.approx(1)
    assert np.isnan(species_mixing(neighbours(line(0, 1), count=1), ["h", "h"]))


def test_lisi_of_equal_distances_counts_labels():
    near = neighbours(np.zeros((5, 1)), count=4)
    # four equal neighbours: of one label 1; two and two 2; three and one 1 / (9/16 + 1/16) = 1.6
    assert lisi(near, ["a"] * 5).tolist() == pytest.approx([1] * 5)
    assert lisi(near, ["a", "a", "a", "b", "b"])[0] == pytest.approx(2)
    assert lisi(near, ["a", "a", "a", "a", "b"])[0] == pytest.approx(1.6)
    assert ilisi(near, ["a", "a", "a", "b", "b"]) == pytest.approx(1)  # the median of 2 2 2 1.6 1.6
    assert clisi(near, ["a", "a", "a", "a", "b"]) == pytest.approx(0.4)
    assert np.isnan(ilisi(near, ["a"] * 5))


def test_lisi_weighs_by_the_wanted_perplexity():
    # two neighbours at 1 and two at 2: weights (p, p, q, q) whose entropy is log 3
    near = neighbours(line(0, 1, -1, 2, -2), count=4)
    index = lisi(near, ["x", "a", "a", "b", "b"], perplexity=3)[0]
    share = 1 / index  # (2p)^2 + (2q)^2 with p + q = 1/2
    p = (1 + np.sqrt(2 * share - 1)) / 4
    entropy = -2 * (p * np.log(p) + (0.5 - p) * np.log(0.5 - p))
    assert entropy == pytest.approx(np.log(3), abs=1e-9)


def test_graph_connectivity_by_hand():
    near = neighbours(line(0, 1, 2, 20, 21), count=1)  # 0 - 1, 2 -> 1, 20 - 21
    # type a is {0, 1, 2}: 2 is reached by nobody, so the largest part is 2 of 3; b is whole
    assert graph_connectivity(near, ["a", "a", "a", "b", "b"]) == pytest.approx((2 / 3 + 1) / 2)


def test_silhouettes_by_hand():
    z = line(0, 1, 9, 10)
    # 0: a = 1, b = 9.5; 1: a = 1, b = 8.5; and the same from the other side
    mean = ((9.5 - 1) / 9.5 + (8.5 - 1) / 8.5) / 2
    assert silhouette_label(z, ["a", "a", "b", "b"]) == pytest.approx((mean + 1) / 2)
    apart = silhouette_batch(z, ["h", "h", "m", "m"], ["t"] * 4)
    assert apart == pytest.approx(1 - mean)
    assert np.isnan(silhouette_batch(z, ["h", "h", "m", "m"], ["a", "a", "b", "b"]))
    assert np.isnan(silhouette_label(z, ["a"] * 4))


def test_clusters_and_label_transfer():
    z = line(0, 0.1, 0.2, 5, 5.1, 5.2)
    assert cluster_scores(z, list("aaabbb")) == {"ari": 1, "nmi": pytest.approx(1)}
    found = label_transfer(z, list("aaabbb"), line(0, 5, 5, 9), ["a", "b", "a", "new"], k=3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(2 / 3)  # a: 2/3, b: 2/3
    assert found["cells"] == 3
    with pytest.raises(DataError, match="no type in common"):
        label_transfer(z, list("aaabbb"), z, ["c"] * 6)


def test_posterior_collapse_by_hand():
    mu, logvar = np.array([[1.0, 0], [-1, 0]]), np.zeros((2, 2))
    assert posterior_collapse(mu, logvar) == {
        "active_units": 1,
        "active_share": 0.5,
        "kl": 0.5,
        "collapsed": 0,
    }
    assert posterior_collapse(mu * 0, logvar)["collapsed"] == 1


def test_all_scores_tell_mixed_from_parted():
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b"], 60)
    batch = np.tile(["h", "m"], 60)
    base = np.where(types == "a", 0, 6)[:, None] + rng.normal(size=(120, 3))
    shifted = base + np.where(batch == "h", 0, 20)[:, None]
    mixed, parted = (integration_scores(z, batch=batch, label=types) for z in (base, shifted))
    for name in ("species_mixing", "ilisi", "silhouette_batch", "graph_connectivity"):
        assert mixed[name] > parted[name], name
    assert mixed["ari"] == 1
    some = integration_scores(base, batch=batch, label=[t if t == "a" else None for t in types])
    assert np.isnan(some["clisi"])  # one type alone
    assert some["ilisi"] == mixed["ilisi"]


@pytest.mark.slow
def test_the_same_as_scib_metrics():
    scib = pytest.importorskip("scib_metrics", reason="pip install -e '.[single_cell]'")
    from scib_metrics.nearest_neighbors import NeighborsResults

    rng = np.random.default_rng(0)
    types, batch = rng.integers(0, 3, 200), rng.integers(0, 2, 200)
    z = rng.normal(size=(200, 4)) + types[:, None] + 0.7 * batch[:, None]
    near = neighbours(z, count=29)
    own = np.arange(200)[:, None]
    theirs = NeighborsResults(
        indices=np.hstack([own, near.place]),
        distances=np.hstack([np.zeros((200, 1)), near.distance]),
    )
    assert ilisi(near, batch) == pytest.approx(scib.ilisi_knn(theirs, batch), abs=2e-3)
    assert clisi(near, types) == pytest.approx(scib.clisi_knn(theirs, types), abs=2e-3)
    wanted = scib.graph_connectivity(theirs, types)
    assert graph_connectivity(near, types) == pytest.approx(wanted)
    wanted = scib.silhouette_label(z, types)
    assert silhouette_label(z, types) == pytest.approx(wanted, abs=1e-5)
    wanted = scib.silhouette_batch(z, types, batch)
    assert silhouette_batch(z, batch, types) == pytest.approx(wanted, abs=1e-5)
    apart = z + 9 * types[:, None]
    wanted = scib.nmi_ari_cluster_labels_kmeans(apart, types)
    assert cluster_scores(apart, types) == pytest.approx(wanted, abs=1e-6)
