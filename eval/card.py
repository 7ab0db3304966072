"""The model card of a run: what was trained on what, and its scores beside chance.

Everything in it was written by the run itself; no row of the data and no place on the machine.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from eval.metrics import IN_UNITS_OF_THE_LABEL
from eval.report import score_table
from mm_moe.checkpoint.hub import scrub
from mm_moe.checkpoint.hub_stage import put
from mm_moe.registry import FILLS

CARD = "README.md"
PLAIN_FUSION = "concat"  # not worth a word
# What the report draws, in the card's order.
PICTURES = {"expert_load.png": "Load of the experts", "training_loss.png": "Training loss"}
_PLACE = re.compile(r"^(--[\w-]+=)?(~|/|\.\.?/|[A-Za-z]:\\).*")
_OWN_SETTINGS = ("router", "moe_mode", "fusion", "fusion_config", "fill", "fill_config")


def write_card(
    folder: Path,
    record: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    *,
    pictures: Path | None = None,
    name: str = "model",
) -> None:
    """Write the card and its pictures beside the weights.

    Args:
        folder: of the weights.
        record: the content of `run.json`.
        scores: the content of `scores.json`, or None before any evaluation.
        pictures: the folder of the report, where there is one.
        name: of the model, for the Hub's table of results.
    """
    found = [file for file in PICTURES if pictures is not None and (pictures / file).is_file()]
    for file in found:
        assert pictures is not None
        put(folder, file, (pictures / file).read_bytes())
    put(folder, CARD, model_card(record, scores, pictures=found, name=name))


def model_card(
    record: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    *,
    pictures: list[str] | None = None,
    name: str = "model",
) -> str:
    """The card's text: YAML that the Hub reads, then Markdown.

    Args:
        record: the content of `run.json`.
        scores: the content of `scores.json`, or None.
        pictures: files beside the card.
        name: of the model, for the Hub's table of results.
    """
    sections = [
        f"---\n{_front(record, scores, name=name)}\n---",
        _summary(record),
        _scores(record, scores),
        *[f"![{PICTURES[file]}]({file})" for file in pictures or []],
        _data(record),
        _limits(record, scores),
        "## Use\n\n```python\nimport mm_moe.models  # registers the model type: no remote code\n"
        "from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(FOLDER_OR_NAME)\n"
        "```",
        _training(record),
    ]
    return scrub("\n\n".join(sections)) + "\n"


def _front(record: Mapping[str, Any], scores: Mapping[str, Any] | None, *, name: str) -> str:
    arguments, data = record["arguments"], record["data"]
    license_id = arguments.get("hub_license") or "other"
    results = _results(record, scores) if scores else []
    hub_data = hub_name(arguments.get("data_dir")) if arguments.get("dataset") == "columns" else ""
    tags = ["mm-moe", "mixture-of-experts", "multimodal", "missing-modality", str(data["name"])]
    return ModelCardData(
        license=license_id,
        license_name="see-data-and-base-model" if license_id == "other" else None,
        library_name="transformers",
        base_model=hub_name(arguments.get("pretrained")) or None,
        datasets=[hub_data] if hub_data else None,
        metrics=list(scores["metrics"]) if scores else None,
        model_name=name if results else None,
        eval_results=results or None,
        tags=sorted(set(tags), key=tags.index),
    ).to_yaml()


def hub_name(value: Any) -> str:
    """The Hub's name that a flag holds, or "": ORG/NAME that is no folder or file here."""
    text = str(value or "").removeprefix("hf-hub:")
    try:
        validate_repo_id(text)
    except HFValidationError:
        return ""
    return text if text.count("/") == 1 and not Path(text).exists() else ""


def _results(record: Mapping[str, Any], scores: Mapping[str, Any]) -> list[EvalResult]:
    """Each finite score of the run's own model: a missing condition is a data set's configuration.

    Chance stands in the table below; the Hub's index has no room for it.
    """
    data, own = record["data"], next(iter(scores["models"].values()))
    return [
        EvalResult(
            task_type=data.get("task") or "multimodal-classification",
            dataset_type=str(data["name"]),
            dataset_name=f"{data['name']} ({condition})",
            dataset_config=condition,
            dataset_split=record["arguments"].get("test_split"),
            metric_type=metric,
            metric_name=f"{metric}, inputs: {condition}",
            metric_value=value,
        )
        for condition in scores["conditions"]
        for metric, value in own.get(condition, {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _summary(record: Mapping[str, Any]) -> str:
    arguments, data = record["arguments"], record["data"]
    experts = ""
    if arguments.get("moe_enable", True):
        count = _plain(arguments["num_experts"])
        experts = f"{count} experts per sparse layer (top {arguments['top_k_experts']}), "
    return (
        f"# A sparse multimodal model trained on {data['name']}\n\n"
        f"Backbone `{arguments['backbone']}`, {experts}prompts `{arguments['prompt']}`"
        f"{_fusion(arguments)}. In training: {record['missing']['words']}."
    )


def _fusion(arguments: Mapping[str, Any]) -> str:
    """How modalities meet, and what stands in for missing ones; "" where nothing was asked for."""
    name, text = arguments.get("fill"), ""
    if (fusion := arguments.get("fusion", PLAIN_FUSION)) != PLAIN_FUSION:
        text = f", fusion `{fusion}`"
    if not name:
        return text
    text += f", fill `{name}`: tokens that it makes stand in for missing modalities"
    if FILLS.resolve(name).needs_supports:
        text += (
            ". It makes them from training rows that have the modality. Those are not in this "
            "folder: a batch in which a modality is missing has to bring them (`supports`)"
        )
    return text


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _scores(record: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    if not scores:
        return "## Scores\n\nNot evaluated by missing pattern."
    split = record["arguments"].get("test_split", "test")
    parts = [
        f"## Scores by what the inputs lack\n\nSplit `{split}`; chance is the best model that "
    ]
    parts[0] += "ignores its input."
    for metric in scores["metrics"]:
        table = score_table(scores, metric=metric)
        unit = " (in units of the label)" if metric in IN_UNITS_OF_THE_LABEL else ""
        header = ["inputs", *table["header"][1:]]
        lines = [header, ["---"] * len(header), *table["rows"]]
        rows = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        parts.append(f"{metric}{unit}:\n\n{rows}")
    return "\n\n".join(parts)


def _data(record: Mapping[str, Any]) -> str:
    data, missing = record["data"], record["missing"]
    text = f"## Data\n\n{data['name']}: {data['license']}. Content hash `{data['sha256'][:16]}`."
    if missing.get("mask_sha256"):
        seed = "" if missing.get("seed") is None else f" (seed {missing['seed']})"
        text += f" What the training samples lack: mask hash `{missing['mask_sha256'][:16]}`{seed}."
    return text


def _limits(record: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    """What is known and what is not; nothing else is claimed."""
    data = record["data"]["name"]
    tested = f"the conditions in the table, on one split of {data}" if scores else "nothing so far"
    base = record["arguments"].get("pretrained")
    lines = [
        f"- Meant for inputs like those of {data}, complete or lacking modalities as said above.",
        f"- Measured: {tested}. Other data, shifts and groups of people were not tested.",
        f"- One training run with one seed ({record['arguments'].get('seed')}); the spread over "
        "seeds is not in the table.",
        "- Terms of use follow those of the data" + (" and of the base model." if base else "."),
    ]
    return "## Intended use and limits\n\n" + "\n".join(lines)


def _training(record: Mapping[str, Any]) -> str:
    arguments, versions = record["arguments"], record["versions"]
    command = shlex.join(without_places(record["command"]))
    facts = {
        "steps": arguments.get("max_steps"),
        "seed": arguments.get("seed"),
        "samples per step": arguments.get("global_batch_size") or None,
        "learning rate": arguments.get("learning_rate"),
        "pretrained weights": _shown(arguments.get("pretrained")),
    }
    facts |= {key: arguments[key] for key in _OWN_SETTINGS if arguments.get(key)}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    return (
        f"## Training\n\n```\n{command}\n```\n\n| setting | value |\n| --- | --- |\n{rows}\n\n"
        f"mm-moe commit `{record['commit'][:12]}`, torch {versions['torch']}, "
        f"DeepSpeed {versions['deepspeed']}."
    )


def _shown(value: Any) -> str | None:
    """A flag's value, or "a local file" for a place on the machine."""
    if not value:
        return None
    return "a local file" if _PLACE.match(str(value)) or Path(str(value)).exists() else str(value)


def without_places(words: list[str]) -> list[str]:
    """A command line whose folders and files on the machine are the word PATH."""
    return [f"{found[1] or ''}PATH" if (found := _PLACE.match(word)) else word for word in words]


def card_of_run(run_dir: Path, folder: Path, *, evaluated: bool = True) -> bool:
    """Write the card of a run's model from the run's files; False: the folder is no run.

    Args:
        run_dir: the run.
        folder: of the weights.
        evaluated: whether the run's scores are those of these weights.
    """
    if not (run_dir / "run.json").is_file():
        return False
    scores = run_dir / "scores.json"
    write_card(
        folder,
        json.loads((run_dir / "run.json").read_text()),
        json.loads(scores.read_text()) if evaluated and scores.is_file() else None,
        pictures=run_dir if evaluated else None,
        name=run_dir.resolve().name,
    )
    return True
