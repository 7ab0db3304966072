"""Scores of a latent space that several species (or batches) share: pure functions of arrays.

How mixed the species are, whether types of cells stay apart, and whether the latent says anything.
Higher is better; what cannot be computed is NaN, never a number that stands for it. Scores of
rebuilt and generated cells are in `eval.generation_scores`.

The definitions are those of scIB (Luecken et al., 2022) as `scib-metrics` computes them, without
JAX, which takes longer to start than these to compute; a test compares the two.

N cells, D latent dimensions, K neighbours, L labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    silhouette_samples,
)
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from eval.generation_scores import Labels, mean
from mm_moe.errors import DataError

LISI_NEIGHBOURS, GRAPH_NEIGHBOURS = 90, 15  # of scIB
ACTIVE = 0.01  # variance of a mean over cells, from which a dimension says something
STEPS = 60  # halvings of an interval


class Neighbours(NamedTuple):
    """Nearest other cells.

    Attributes:
        distance: (N, K), ascending.
        place: (N, K).
    """

    distance: np.ndarray
    place: np.ndarray

    def first(self, count: int) -> Neighbours:
        """The nearest `count` of them."""
        return Neighbours(self.distance[:, :count], self.place[:, :count])


def neighbours(z: np.ndarray, *, count: int) -> Neighbours:
    """The `count` nearest other cells of each cell, exactly, or all there are."""
    z = np.asarray(z, float)
    count = min(count, len(z) - 1)
    distance, place = NearestNeighbors(n_neighbors=count + 1).fit(z).kneighbors(z)
    own = place == np.arange(len(z))[:, None]
    own[~own.any(1), -1] = True  # among equal cells, the cell itself may stand too far behind
    return Neighbours(distance[~own].reshape(-1, count), place[~own].reshape(-1, count))


def species_mixing(near: Neighbours, species: Labels) -> float:
    """Share of neighbours of another species over that of perfect mixing; mean over species.

    0: apart; 1: mixed like cards, whatever the numbers of cells.
    """
    code = _codes(species)
    other = (code[near.place] != code[:, None]).mean(1)
    count = np.bincount(code)
    if len(count) < 2:
        return float("nan")
    expected = (len(code) - count) / (len(code) - 1)
    return float(np.mean([other[code == s].mean() / expected[s] for s in range(len(count))]))


def lisi(near: Neighbours, labels: Labels, *, perplexity: float | None = None) -> np.ndarray:
    """Local inverse Simpson index of each cell: the effective number of labels around it, (N,).

    Neighbours weigh by a Gaussian kernel of their distance, whose width gives them the perplexity
    (Korsunsky et al., 2019); by default a third of the neighbours and the cell itself.
    """
    distance = near.distance
    if perplexity is None:
        perplexity = (distance.shape[1] + 1) // 3
    weight = _kernel(distance, perplexity=max(perplexity, 1.0))
    code = _codes(labels)
    share = np.stack(
        [(weight * (code[near.place] == label)).sum(1) for label in range(code.max() + 1)]
    )
    return np.asarray(1 / (share**2).sum(0))


def ilisi(near: Neighbours, batch: Labels) -> float:
    """Median LISI of the batch, from 0 (one batch around each cell) to 1 (all, evenly)."""
    count = len(set(batch))
    return float("nan") if count < 2 else float((np.median(lisi(near, batch)) - 1) / (count - 1))


def clisi(near: Neighbours, label: Labels) -> float:
    """Median LISI of the type, turned: 1 if each cell has its own type alone around it."""
    count = len(set(label))
    if count < 2:
        return float("nan")
    return float((count - np.median(lisi(near, label))) / (count - 1))


def graph_connectivity(near: Neighbours, label: Labels) -> float:
    """Share of a type's cells in the largest strongly connected part of its own graph; the mean."""
    count, width = near.place.shape
    edges = np.arange(0, count * width + 1, width)
    graph = scipy.sparse.csr_matrix(
        (np.ones(count * width), near.place.ravel(), edges), shape=(count, count)
    )
    code = _codes(label)
    found = []
    for one in range(code.max() + 1):
        mask = code == one
        _, part = connected_components(graph[mask][:, mask], connection="strong")
        found.append(np.bincount(part).max() / mask.sum())
    return float(np.mean(found))


def silhouette_label(z: np.ndarray, label: Labels) -> float:
    """Mean silhouette of the types, from 0 to 1."""
    code = _codes(label)
    if not 2 <= code.max() + 1 < len(code):
        return float("nan")
    return float((silhouette_samples(z, code).mean() + 1) / 2)


def silhouette_batch(z: np.ndarray, batch: Labels, label: Labels) -> float:
    """1 - |silhouette of the batch| within each type, the mean over types: 1 is mixed.

    Types that are in one batch alone are left out.
    """
    z, batch_N, label_N = np.asarray(z), _codes(batch), _codes(label)
    found = []
    for one in range(label_N.max() + 1):
        mask = label_N == one
        if 1 < len(set(batch_N[mask])) < mask.sum():
            found.append(1 - np.abs(silhouette_samples(z[mask], batch_N[mask])).mean())
    return mean(np.array(found))


def cluster_scores(z: np.ndarray, label: Labels, *, seed: int = 0) -> dict[str, float]:
    """ARI and NMI of k-means with as many clusters as there are types."""
    code = _codes(label)
    clusters = KMeans(code.max() + 1, n_init=10, random_state=seed).fit_predict(np.asarray(z))
    return {
        "ari": float(adjusted_rand_score(code, clusters)),
        "nmi": float(normalized_mutual_info_score(code, clusters)),
    }


def label_transfer(
    known: np.ndarray, known_label: Labels, asked: np.ndarray, asked_label: Labels, *, k: int = 15
) -> dict[str, float]:
    """Types of one species told by the nearest cells of another: accuracy, macro F1, chance.

    Only types that both have are asked; chance is the share of the commonest one of these.
    """
    shared = sorted(set(known_label) & set(asked_label))
    known_keep, asked_keep = np.isin(known_label, shared), np.isin(asked_label, shared)
    if not shared:
        raise DataError("the two sets of cells have no type in common; nothing can be transferred.")
    truth = np.asarray(asked_label)[asked_keep]
    model = KNeighborsClassifier(min(k, int(known_keep.sum())))
    model.fit(np.asarray(known)[known_keep], np.asarray(known_label)[known_keep])
    told = model.predict(np.asarray(asked)[asked_keep])
    return {
        "accuracy": float(np.mean(told == truth)),
        "macro_f1": float(f1_score(truth, told, labels=shared, average="macro", zero_division=0)),
        "chance": float(max(np.mean(truth == t) for t in shared)),
        "cells": len(truth),
    }


def integration_scores(
    z: np.ndarray, *, batch: Labels, label: Labels | None = None, seed: int = 0
) -> dict[str, float]:
    """All scores of a latent space, by name; those of types where labels are given.

    Args:
        z: (N, D), the means of the posterior.
        batch: species (or batch) of each cell.
        label: type of each cell; cells with None are left out of the scores of types.
        seed: of k-means.
    """
    z = np.asarray(z, float)
    near = neighbours(z, count=LISI_NEIGHBOURS)
    found = {
        "species_mixing": species_mixing(near.first(GRAPH_NEIGHBOURS), batch),
        "ilisi": ilisi(near, batch),
    }
    if label is None:
        return found
    kept = np.array([one is not None for one in label])
    z, types = z[kept], np.asarray(label, dtype=object)[kept]
    near = neighbours(z, count=LISI_NEIGHBOURS)
    return found | {
        "clisi": clisi(near, types),
        "graph_connectivity": graph_connectivity(near.first(GRAPH_NEIGHBOURS), types),
        "silhouette_label": silhouette_label(z, types),
        "silhouette_batch": silhouette_batch(z, np.asarray(batch)[kept], types),
        **cluster_scores(z, types, seed=seed),
    }


def posterior_collapse(mu: np.ndarray, logvar: np.ndarray) -> dict[str, float]:
    """Whether the latent says anything: active dimensions and KL to the standard normal.

    "active_units": dimensions whose mean varies over cells by more than 0.01 (Burda et al., 2016);
    "active_share" of all; "kl": nats of a cell, the mean; "collapsed": 1 where none is active.
    """
    mu, logvar = np.asarray(mu, float), np.asarray(logvar, float)
    active = int((mu.var(0) > ACTIVE).sum())
    kl_ND = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar)
    return {
        "active_units": active,
        "active_share": active / mu.shape[1],
        "kl": float(kl_ND.sum(1).mean()),
        "collapsed": float(active == 0),
    }


def _codes(labels: Labels) -> np.ndarray:
    """Labels as numbers from 0."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)


def _kernel(distance_NK: np.ndarray, *, perplexity: float) -> np.ndarray:
    """Weights exp(-b d), b such that their entropy is log(perplexity): (N, K), rows sum to 1.

    The width is found by halving, as in t-SNE. Equal distances weigh equally.
    """
    shifted = distance_NK - distance_NK.min(1, keepdims=True)
    scale = np.maximum(shifted.mean(1, keepdims=True), np.finfo(float).tiny)
    scaled = shifted / scale
    low, high = np.full((len(scaled), 1), -25.0), np.full((len(scaled), 1), 25.0)  # of log b
    for _ in range(STEPS):
        middle = (low + high) / 2
        weight = np.exp(-np.exp(middle) * scaled)
        weight /= weight.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(weight > 0, np.log(weight), 0.0)
        wide = -(weight * logs).sum(1, keepdims=True) > np.log(perplexity)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return np.asarray(weight)
