"""Figures of a run. Each function returns a matplotlib Figure and touches no global state.

L MoE layers, S logged steps, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Told apart also by colour-blind readers (Okabe and Ito); the run's own model comes first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")


def score_bars(
    values: Mapping[str, Mapping[str, float]],
    *,
    conditions: Sequence[str],
    metric: str,
    chance: Mapping[str, float] | None = None,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    percent: bool = True,
) -> Figure:
    """Bars per condition, one colour per model, with chance as a dashed line.

    Args:
        values: model -> condition -> value; a condition that a model lacks has no bar.
        conditions: order along the axis.
        metric: what the values are, for the axis.
        chance: condition -> value of a model that ignores its input.
        intervals: model -> condition -> (low, high), drawn as whiskers.
        percent: the values are shares, written as percentages.
    """
    figure, axes = _new(width=1.6 + 1.5 * len(conditions), height=3.6)
    scale = 100 if percent else 1
    width = 0.8 / max(len(values), 1)
    for index, (model, of_condition) in enumerate(values.items()):
        colour = COLOURS[index % len(COLOURS)]
        offset = (index + 0.5) * width - 0.4
        bars = {x + offset: c for x, c in enumerate(conditions) if c in of_condition}
        heights = [scale * of_condition[condition] for condition in bars.values()]
        axes.bar(list(bars), heights, 0.94 * width, color=colour, label=_plain(model))
        whiskers = (intervals or {}).get(model, {})
        for (x, condition), height in zip(bars.items(), heights, strict=True):
            low, high = (scale * end for end in whiskers.get(condition, [height / scale] * 2))
            axes.vlines(x, low, high, color="#333333", linewidth=1)
            _write(axes, f"{height:.1f}" if percent else f"{height:.3g}", x, max(high, height))
    levels = {x: scale * chance[c] for x, c in enumerate(conditions) if chance and c in chance}
    if levels:
        ends = [x - 0.45 for x in levels], [x + 0.45 for x in levels]
        axes.hlines(list(levels.values()), *ends, color="black", linestyle="--", label="chance")
    axes.set_xticks(range(len(conditions)), [_plain(name) for name in conditions])
    axes.set_ylabel(_plain(f"{metric} (%)" if percent else metric))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def score_curves(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    metric: str,
    kind: str,
    chance: float | None = None,
    percent: bool = True,
) -> Figure:
    """Score against the share of samples that lack something, one line per model.

    Args:
        lines: model -> (ratio, mean, standard deviation) by rising ratio; the band is one deviation
            to either side.
        metric: what the values are, for the axis.
        kind: what is missing, for the axis.
        chance: value of a model that ignores its input.
        percent: the values are shares, written as percentages.
    """
    figure, axes = _new(width=4.8, height=3.4)
    scale = 100 if percent else 1
    for index, (model, points) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        ratio_P, mean_P, std_P = np.array(points, dtype=float).T
        low_P, high_P = scale * (mean_P - std_P), scale * (mean_P + std_P)
        axes.fill_between(100 * ratio_P, low_P, high_P, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            100 * ratio_P,
            scale * mean_P,
            color=colour,
            marker="osD^v<>"[index % 7],
            markersize=4,
            linewidth=1.4,
            label=_plain(model),
        )
    if chance is not None:
        axes.axhline(scale * chance, color="black", linestyle="--", linewidth=1, label="chance")
    what = "something" if kind in ("both", "any", "subset") else kind
    axes.set_xlabel(_plain(f"test samples that lack {what} (%)"))
    axes.set_ylabel(_plain(f"{metric} (%)" if percent else metric))
    axes.legend(frameon=False, fontsize=8)
    return figure


def loss_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss against the step, with the learning rate on the right-hand axis.

    Args:
        rows: lines of `metrics.jsonl`; those without "step" and "loss" are left out.
    """
    rows = [row for row in rows if "step" in row and "loss" in row]
    steps = [row["step"] for row in rows]
    figure, axes = _new(width=7.0, height=3.2)
    axes.plot(steps, [row["loss"] for row in rows], color=COLOURS[0], linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color=COLOURS[0])
    rates = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color=COLOURS[1], linewidth=1, linestyle=":")
        right.set_ylabel("learning rate", color=COLOURS[1])
        right.tick_params(labelsize=8)
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)
    return figure


def expert_load_map(load: Mapping[str, Sequence[float]]) -> Figure:
    """Heat map, layers down and experts across: each expert's share of its layer's rows.

    Args:
        load: layer -> rows routed to each expert. Layers may have different numbers of experts; a
            layer that routed nothing is shown as zeros.
    """
    num_experts = max((len(row) for row in load.values()), default=1)
    share_LE = np.full((max(len(load), 1), num_experts), np.nan)
    for index, row in enumerate(load.values()):
        share_LE[index, : len(row)] = np.asarray(row, dtype=float) / max(sum(row), 1)
    figure, axes = _new(width=2.6 + 0.55 * num_experts, height=1.3 + 0.36 * len(load))
    image = axes.imshow(share_LE, cmap="cividis", vmin=0, aspect="auto")
    axes.set_xticks(range(num_experts))
    axes.set_yticks(range(len(load)), [_plain(name) for name in load])
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="share of the layer's rows").ax.tick_params(labelsize=8)
    if num_experts <= 16:
        middle = np.nanmax(share_LE) / 2 if load else 0
        for (layer, expert), share in np.ndenumerate(share_LE):
            if np.isfinite(share):
                axes.text(
                    expert,
                    layer,
                    f"{100 * share:.0f}%",
                    color="black" if share > middle else "white",
                    fontsize=7,
                    ha="center",
                    va="center",
                )
    return figure


def modality_maps(
    share: Mapping[str, np.ndarray], *, steps: Sequence[int], modality: str
) -> Figure:
    """Heat maps, one for each block: a modality's share in what each expert gets, over the steps.

    Args:
        share: block -> (S, E), from 0 to 1; NaN (an idle expert) is left white.
        steps: S logged steps.
        modality: whose share it is.
    """
    figure = Figure(figsize=(1.5 + 3.2 * len(share), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(share), squeeze=False)[0]
    for axes, (block, share_SE) in zip(row, share.items(), strict=True):
        edges = np.array([0, *steps]), np.arange(share_SE.shape[1] + 1) - 0.5
        image = axes.pcolormesh(*edges, share_SE.T, cmap="coolwarm", vmin=0, vmax=1)
        axes.set_yticks(range(share_SE.shape[1]) if share_SE.shape[1] <= 16 else [])
        axes.tick_params(labelsize=8)
        axes.set_title(f"block {_plain(block)}", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("expert")
    what = f"share of {_plain(modality)} in an expert's tokens"
    figure.colorbar(image, ax=row, label=what).ax.tick_params(labelsize=8)
    return figure


def png(figure: Figure, *, dpi: int = 130) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path, *, dpi: int = 130) -> None:
    """Write the figure as a PNG file, for a model card or a paper."""
    path.write_bytes(png(figure, dpi=dpi))


def _write(axes: Axes, text: str, x: float, y: float) -> None:
    """Write a small number just above a point."""
    axes.annotate(
        text, (x, y), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7
    )


def _new(*, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with its own Agg canvas: no window system and no pyplot state is involved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _plain(text: str) -> str:
    """Text that matplotlib shows as it stands: a pair of dollar signs would start mathematics."""
    return text.replace("$", r"\$")
