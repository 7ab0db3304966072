"""What a finished grid leaves behind: a table for the terminal, curves, and one HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from eval.grid_plan import by_kind
from eval.grid_table import MEAN_MISSING
from eval.metrics import IN_UNITS_OF_THE_LABEL
from eval.patterns import parse_pattern
from eval.pictures import png, save_png, score_curves

PUBLISHED = Path(__file__).parent / "published.json"
Rows = Sequence[Mapping[str, Any]]


def select(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def value_text(mean: float | None, std: float | None, metric: str) -> str:
    """A mean with its spread, as a percentage or in units of the label."""
    if mean is None:
        return "-"
    scale, digits = (1, 3) if metric in IN_UNITS_OF_THE_LABEL else (100, 1)
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def wide_table(rows: Rows, *, train: str, metric: str) -> list[list[str]]:
    """One training pattern: test patterns down, methods and chance across, the header first."""
    rows = select(rows, train=train, metric=metric)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [["tested on", *methods, "chance", "seeds", "samples"]]
    for test in dict.fromkeys(row["test"] for row in rows):
        of_test = {row["method"]: row for row in select(rows, test=test)}
        first = next(iter(of_test.values()))
        counts = sorted({len(row["seeds"]) for row in of_test.values()})
        lines.append(
            [test]
            + [value_text(of_test[m]["mean"], of_test[m]["std"], metric) for m in methods]
            + [value_text(first["chance"], None, metric)]
            + ["-".join(map(str, [counts[0], counts[-1]] if len(counts) > 1 else counts))]
            + [str(first["num_rows"])]
        )
    return lines


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    scale, digits = (1, 3) if row["metric"] in IN_UNITS_OF_THE_LABEL else (100, 1)
    mean, low, high = (scale * row[key] for key in ("difference", "low", "high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def comparison_table(rows: Rows) -> list[list[str]]:
    """Methods minus the reference: training and test patterns down, the header first."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [["trained on", "tested on", *methods]]
    for train, test in dict.fromkeys((row["train"], row["test"]) for row in rows):
        found = {row["method"]: row for row in select(rows, train=train, test=test)}
        cells = [difference_text(found[m]) if m in found else "-" for m in methods]
        lines.append([train, test, *cells])
    return lines


def pair_table(rows: Rows) -> list[list[str]]:
    """Every method minus every other: the difference with both intervals, the header first."""
    lines = [["difference", "trained on", "mean", "over samples", "over seeds", "seeds"]]
    for row in rows:
        mean, over_samples = difference_text(row).split(" ", 1)
        over_seeds = "-"
        if row["seeds_low"] is not None:
            spread = {"low": row["seeds_low"], "high": row["seeds_high"]}
            over_seeds = difference_text({**row, **spread}).split(" ", 1)[1]
        name = f"{row['method']} - {row['other']}"
        lines.append([name, row["train"], mean, over_samples, over_seeds, str(len(row["seeds"]))])
    return lines


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as plain text, the first column to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def published_for(data: Mapping[str, Any], *, metric: str) -> list[dict[str, Any]]:
    """What others published for this data set and metric: tables, each with rows and caveats."""
    tables = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]
    found = []
    for table in tables:
        of_data = table["datasets"].get(data["name"])
        if of_data and of_data["metric"] == metric:
            found.append({**table, "metric": metric, "rows": of_data["rows"]})
    return found


def beside_ours(published: Mapping[str, Any], rows: Rows) -> list[list[str]]:
    """A published table with our methods in the columns on the right, the header first.

    Our number stands where training and test pattern are those of the row; a published row that
    does not say on what it was trained gets none of ours.
    """
    theirs = list(published["rows"][0]["values"])
    ours = list(dict.fromkeys(row["method"] for row in rows))
    metric = published["metric"]
    lines = [["trained on", "tested on", *theirs, *(f"{name} (here)" for name in ours)]]
    for row in published["rows"]:
        here = {
            one["method"]: value_text(one["mean"], one["std"], metric)
            for one in select(rows, metric=metric, train=row["train"], test=row["test"])
        }
        train, test = row["train"] or "not stated", row["test"]
        if "kind" in row and test == "complete":
            test = f"complete ({row['kind']} panel)"
        numbers = [f"{row['values'][name]:g}" for name in theirs]
        lines.append([train, test, *numbers, *(here.get(name, "-") for name in ours)])
    return lines


def curves(rows: Rows, *, metric: str, tests: Sequence[str]) -> dict[str, Figure]:
    """Score against the missing rate: one figure per training pattern and kind of test."""
    figures = {}
    rows = select(rows, metric=metric)
    for train in dict.fromkeys(row["train"] for row in rows):
        for kind, patterns in by_kind(tests).items():
            if len(patterns) < 2:
                continue
            of_train = select(rows, train=train)
            lines: dict[str, list[tuple[float, float, float]]] = {}
            for row in of_train:
                if row["test"] in patterns:
                    point = (parse_pattern(row["test"])[1], row["mean"], row["std"] or 0.0)
                    lines.setdefault(row["method"], []).append(point)
            if not lines:
                continue
            level = next((r["chance"] for r in of_train if r["test"] == patterns[-1]), None)
            figures[f"trained on {train}, tested on {kind}"] = score_curves(
                {method: sorted(points) for method, points in lines.items()},
                metric=metric,
                kind=kind,
                chance=level,
                percent=metric not in IN_UNITS_OF_THE_LABEL,
            )
    return figures


def file_name(title: str) -> str:
    """A title as the name of a file."""
    kept = "".join(letter if letter.isalnum() or letter in ".+" else "-" for letter in title)
    return "-".join(part for part in kept.split("-") if part)


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write `report.html` and its pictures beside it as PNG; return the page's path.

    Args:
        folder: of the grid.
        result: the content of its `results.json` (see `eval.grid.result_of`).
    """
    metric, tests, rows = result["metric"], result["tests"], result["table"]
    test_rows = select(rows, split=result["data"]["test_split"])
    figures = curves(test_rows, metric=metric, tests=tests)
    for title, figure in figures.items():
        save_png(figure, folder / f"{file_name(title)}.png")
    trains = dict.fromkeys(row["train"] for row in rows)
    splits = dict.fromkeys(row["split"] for row in rows)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("grid.html.jinja").render(
        name=folder.resolve().name,
        result=result,
        mean_missing=MEAN_MISSING,
        tables={
            split: {
                train: wide_table(select(rows, split=split), train=train, metric=metric)
                for train in trains
            }
            for split in reversed(splits)
        },
        others={
            name: {train: wide_table(test_rows, train=train, metric=name) for train in trains}
            for name in result["metrics"]
            if name != metric
        },
        comparisons=comparison_table(result["comparisons"]) if result["comparisons"] else [],
        pairs=pair_table(result["pairs"]) if result["pairs"] else [],
        published=[
            {**table, "lines": beside_ours(table, test_rows)} for table in result["published"]
        ],
        pictures={
            title: base64.b64encode(png(figure)).decode() for title, figure in figures.items()
        },
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
