"""The missingness of a data set as a picture and a page (numbers: `mm_moe.data.missingness`)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.pictures import COLOURS, png

PICTURE, PAGE = "missingness.png", "missingness.html"
MAX_PATTERNS = 12  # of the picture


def picture(splits: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A line of axes for each split: what is missing by modality, and the patterns.

    Args:
        splits: split -> what `mm_moe.data.missingness.report` says.
    """
    figure = Figure(figsize=(9.0, 2.9 * len(splits)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(splits), 2, squeeze=False)
    for (split, found), (left, right) in zip(splits.items(), grid, strict=True):
        names = list(found["natural"])
        natural = [100 * found["natural"][name]["rate"] for name in names]
        imposed = [100 * found["imposed"][name]["rate"] for name in names]
        left.bar(names, natural, color=COLOURS[0], label="by nature")
        left.bar(names, imposed, bottom=natural, color=COLOURS[1], label="imposed")
        left.set_ylabel("rows that lack it (%)")
        left.set_title(f"{split}: {found['rows']:,} rows", fontsize=9, loc="left")
        left.legend(frameon=False, fontsize=8)
        shown = dict(list(found["patterns_left"].items())[:MAX_PATTERNS])
        words = list(shown)[::-1]
        right.barh(words, [100 * shown[word]["rate"] for word in words], color=COLOURS[2])
        right.set_xlabel("rows with this pattern (%)")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    return figure


def write_page(document: Mapping[str, Any], folder: Path) -> None:
    """The picture, and a page that needs no other file."""
    drawn = png(picture(document["splits"]))
    (folder / PICTURE).write_bytes(drawn)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("missingness.html.jinja").render(
        document=document, picture=base64.b64encode(drawn).decode()
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
