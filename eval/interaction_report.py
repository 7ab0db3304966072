"""What a table of fusion rules looks like: for the terminal, and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from eval.grid_report import align
from eval.interaction_table import LEAKING

METRICS = ("accuracy", "precision", "recall", "f1", "macro_f1", "ece")
MEANING = {
    "rus": "probabilities mixed by the fuser (the paper's rule)",
    "rus_reject": "the same, an expert weighted down where it says that a row is not its own",
    "mean_softmax": "mean of the experts' probabilities",
    "mean_logits": "mean of the experts' logits",
    "mean_logits_all": "mean of the logits of experts and baseline",
    "max_logits": "largest logit of each class",
    "weighted_logits": "logits weighted by the fuser's probabilities",
    "weighted_logits_raw": "logits weighted by the fuser's raw logits, as released",
    "cascaded": "the surest expert, or AS if R or U is not sure",
    "hard_routing": "the fuser's likeliest expert alone",
    "learned_gate": "weights fitted on validation by the marginal likelihood",
    "stacking": "logistic regression on the experts' logits, fitted on validation",
    "category_prior": "the fuser with each category's label frequencies instead of experts",
    "oracle": "the expert of the true category, which is made with the label",
    "subset_majority": "the commonest test label of the true category, both of which leak",
    "ensemble": "as many baselines of other seeds as the fused answer has models",
}


def score_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Answers down, metrics in percent and categories' accuracy across, the header first."""
    metrics = [metric for metric in METRICS if metric in rows[0]["scores"]]
    categories = list(dict.fromkeys(name for row in rows for name in row["by_category"]))
    counts = {
        name: next(r["by_category"][name]["n"] for r in rows if name in r["by_category"])
        for name in categories
    }
    heads = [f"acc on {name} ({counts[name]:g})" for name in categories]
    lines = [["", *(metric.replace("_", " ") for metric in metrics), *heads]]
    for row in rows:
        lines.append(
            [_title(row)]
            + [_percent(row["scores"][metric]) for metric in metrics]
            + [f"{100 * row['by_category'][name]['accuracy']:.1f}" for name in categories]
        )
    return lines


def difference_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Answers minus each reference with an interval, and McNemar's p; the header first."""
    references = [r["name"] for r in rows if any(r["name"] in row["against"] for row in rows)]
    if not references:
        return []
    heads = [[f"minus {name}", "McNemar p"] for name in references]
    lines = [["", *(head for pair in heads for head in pair)]]
    for row in rows:
        cells = [_difference(row["against"].get(name)) for name in references]
        lines.append([_title(row), *(cell for pair in cells for cell in pair)])
    return lines


def text(section: Mapping[str, Any]) -> str:
    """One section for the terminal."""
    parts = [section["title"], align(score_lines(section["rows"]))]
    if lines := difference_lines(section["rows"]):
        parts += [f"difference in {section['metric']}, points", align(lines)]
    parts += [f"- {note}" for note in section["notes"]]
    return "\n".join(parts)


def write_page(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the HTML page; it needs nothing else.

    Args:
        path: of the page.
        result: {"title", "about": lines, "command", "sections": [{"title", "metric", "notes",
            "rows"}]}, the rows those of `eval.interaction_table.score_table`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [
        {**one, "scores": score_lines(one["rows"]), "differences": difference_lines(one["rows"])}
        for one in result["sections"]
    ]
    named = {row["name"] for section in result["sections"] for row in section["rows"]}
    page = environment.get_template("interactions.html.jinja").render(
        result=result,
        sections=sections,
        meaning={name: words for name, words in MEANING.items() if name in named},
        mark=MARK,
    )
    aside = path.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


MARK = " (leaks)"


def _title(row: Mapping[str, Any]) -> str:
    """The name of an answer, marked where the answer has seen the label."""
    return row["name"] + (MARK if row["kind"] == LEAKING else "")


def _percent(spread: Mapping[str, Any]) -> str:
    deviation = "" if spread["std"] is None else f" ± {100 * spread['std']:.1f}"
    return f"{100 * spread['mean']:.1f}{deviation}"


def _difference(against: Mapping[str, Any] | None) -> list[str]:
    """A difference in points with its interval, and McNemar's p of each seed."""
    if against is None:
        return ["-", "-"]
    mean, low, high = (100 * against[key] for key in ("difference", "low", "high"))
    tests = " ".join(f"{one['p']:.3f}" for one in against["mcnemar"])
    return [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", tests]
