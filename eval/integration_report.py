"""The integration of species as one page: pictures of the latent space, and the scores."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from eval.cell_tables import Tables
from eval.generation_scores import Labels
from eval.pictures import COLOURS, png

PAGE = "integration.html"
NEIGHBOURS, LEAST_DISTANCE = 30, 0.3  # of UMAP
SHOWN_LABELS = 15


def two_dimensions(z: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Places in a plane (N, 2) and how they were found: UMAP where installed, else PCA."""
    try:
        from umap import UMAP
    except ImportError:
        return PCA(2).fit_transform(z), "PCA"
    count = min(NEIGHBOURS, len(z) - 1)
    made = UMAP(
        n_neighbors=count,
        min_dist=LEAST_DISTANCE,
        metric="cosine",
        n_epochs=200,
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(made.fit_transform(z)), "UMAP"


def scatter(places: np.ndarray, labels: Labels, *, title: str) -> Figure:
    """Cells in a plane, coloured by the commonest labels; all else is grey."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    named = np.array([str(one) if one is not None else "unknown" for one in labels])
    kinds, counts = np.unique(named, return_counts=True)
    common = [kind for kind in kinds[np.argsort(-counts)] if kind != "unknown"][:SHOWN_LABELS]
    rest = ~np.isin(named, common)
    axes.scatter(places[rest, 0], places[rest, 1], s=3, color="#dddddd", linewidths=0)
    for number, kind in enumerate(common):
        marker = "o^s"[number // len(COLOURS) % 3]
        colour = COLOURS[number % len(COLOURS)]
        x, y = places[named == kind].T
        axes.scatter(x, y, s=4, color=colour, marker=marker, linewidths=0, label=kind)
    axes.legend(
        frameon=False, fontsize=8, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number of nested scores with its names; None is left out."""
    found: list[tuple[str, float]] = []
    for key, value in document.items():
        name = f"{prefix}, {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            found += flat(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name.replace("_", " "), value))
    return found


def write_page(
    document: Mapping[str, Any], *, z: Mapping[str, np.ndarray], tables: Tables, folder: Path
) -> Path:
    """A page that needs no other file.

    Args:
        document: what `eval.integration` found.
        z: species -> latent means of all cells.
        tables: species -> the same cells.
        folder: where the page goes.
    """
    places, how = two_dimensions(np.concatenate(list(z.values())))
    species = np.concatenate([np.full(len(rows), name) for name, rows in z.items()])
    types = np.concatenate([tables[name].types for name in z])
    figures = {
        "species": scatter(places, species, title=f"{how} of all cells by species"),
        "types": scatter(places, types, title=f"{how} of all cells by type"),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = {
        name: flat(document[name])
        for name in ("integration", "label_transfer", "reconstruction", "generation", "posterior")
    }
    page = environment.get_template("integration.html.jinja").render(
        document=document,
        parts=parts,
        pictures={name: base64.b64encode(png(one)).decode() for name, one in figures.items()},
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path
