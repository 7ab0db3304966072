"""The report of a run: one HTML page that needs nothing else, and a table for the terminal."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from eval.chance import best_chance
from eval.metrics import IN_UNITS_OF_THE_LABEL, LOWER_IS_BETTER
from eval.pictures import expert_load_map, loss_curve, png, save_png, score_bars
from eval.specialisation import picture as specialisation_picture
from eval.specialisation import shares_experts
from mm_moe.errors import DataError

COMPLETE = "complete"
MEAN_MISSING = "mean of the missing"
CHANCE = "chance"


def write_report(run_dir: str | Path) -> Path:
    """Write `RUN/report.html` and its pictures beside it as PNG; return the page's path.

    Reads `run.json`, which must exist, `metrics.jsonl` and `scores.json`; the page says so where
    curves or scores are not there yet.

    Raises:
        DataError: the folder is no run folder, or one of its files is damaged.
    """
    run_dir = Path(run_dir)
    run = _read_json(run_dir / "run.json")
    if run is None:
        raise DataError(
            f"{run_dir} is no run folder: it has no run.json; name the folder of a run."
        )
    scores = _read_json(run_dir / "scores.json") or {}
    metrics = read_metrics(run_dir / "metrics.jsonl")
    pictures = _pictures(metrics, scores)
    if shares_experts(run) and (by_modality := specialisation_picture(metrics)):
        pictures["Experts by modality"] = by_modality
    for title, figure in pictures.items():
        save_png(figure, run_dir / f"{title.lower().replace(' ', '_')}.png")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        name=run_dir.resolve().name,
        sections={
            title: _flatten(run.get(key, {}))
            for title, key in (
                ("Missing modalities", "missing"),
                ("Data", "data"),
                ("Arguments", "arguments"),
                ("Versions", "versions"),
            )
        },
        commands=run.get("commands", {}),
        bad_samples=[str(sample) for sample in run.get("bad_samples", [])],
        tables=[score_table(scores, metric=metric) for metric in _metrics(scores)],
        pictures={
            title: base64.b64encode(png(figure)).decode() for title, figure in pictures.items()
        },
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def score_table(scores: Mapping[str, Any], *, metric: str) -> dict[str, Any]:
    """One metric as a table of texts: conditions down, models and chance across.

    Args:
        scores: content of `scores.json` (see `eval.patterns.scores_document`).
        metric: one of its metrics.

    Returns:
        {"metric", "header": [...], "rows": [[condition, value, ..., chance, n]], "best": [column of
        the best model in each row]}. With several conditions beside the complete one, a last row
        gives their mean, each condition counting the same.
    """
    models: Mapping[str, Mapping[str, Mapping[str, float]]] = scores["models"]
    values = {
        condition: [models[name].get(condition, {}).get(metric) for name in models]
        + [best_chance(scores.get("chance", {}).get(condition, {}), metric=metric)]
        for condition in scores["conditions"]
    }
    missing = [row for condition, row in values.items() if condition != COMPLETE]
    if len(missing) > 1:
        values[MEAN_MISSING] = [_mean(column) for column in zip(*missing, strict=True)]
    counts = scores.get("num_rows", {})
    return {
        "metric": metric,
        "header": ["", *models, CHANCE, "samples"],
        "rows": [
            [name, *(_text(value, metric) for value in row), str(counts.get(name, ""))]
            for name, row in values.items()
        ],
        "best": [_best(row[:-1], metric) for row in values.values()],
    }


def format_table(scores: Mapping[str, Any]) -> str:
    """The headline metric as plain text for a terminal; "" without scores."""
    metrics = _metrics(scores)
    if not metrics:
        return ""
    table = score_table(scores, metric=metrics[0])
    lines = [[table["metric"], *table["header"][1:]], *table["rows"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; [] without the file.

    A last line that was cut off while it was written is left out.

    Raises:
        DataError: another line is no JSON object; the message gives its number.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: no JSON ({error.msg}).") from error
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg})."
        ) from error


def _metrics(scores: Mapping[str, Any]) -> list[str]:
    """Names of the metrics, headline first."""
    if not scores.get("models"):
        return []
    of_condition = next(iter(scores["models"].values()))
    return list(scores.get("metrics") or next(iter(of_condition.values())))


def _pictures(metrics: list[dict[str, Any]], scores: Mapping[str, Any]) -> dict[str, Figure]:
    """Title -> figure, for what the run has written so far."""
    pictures = {}
    names = _metrics(scores)
    if names:
        pictures[f"Test {names[0]}"] = _score_picture(scores, metric=names[0])
    if any("loss" in row for row in metrics):
        pictures["Training loss"] = loss_curve(metrics)
    if scores.get("expert_load"):
        pictures["Expert load"] = expert_load_map(scores["expert_load"])
    return pictures


def _score_picture(scores: Mapping[str, Any], *, metric: str) -> Figure:
    levels = {
        condition: best_chance(level, metric=metric)
        for condition, level in scores.get("chance", {}).items()
    }
    return score_bars(
        {
            name: {condition: of[metric] for condition, of in by_condition.items()}
            for name, by_condition in scores["models"].items()
        },
        conditions=scores["conditions"],
        metric=metric,
        chance={condition: level for condition, level in levels.items() if level is not None},
        intervals=scores.get("intervals"),
        percent=metric not in IN_UNITS_OF_THE_LABEL,
    )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs in their order."""
    if isinstance(value, dict):
        return [
            pair
            for key, entry in value.items()
            for pair in _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(prefix, text)]


def _text(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if metric in IN_UNITS_OF_THE_LABEL else f"{100 * value:.1f}%"


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _best(values: list[float | None], metric: str) -> int | None:
    """Column of the best model; None where there is nothing to compare."""
    known = {index: value for index, value in enumerate(values) if value is not None}
    if len(known) < 2:
        return None
    choose = min if metric in LOWER_IS_BETTER else max
    return 1 + choose(known, key=lambda index: known[index])
