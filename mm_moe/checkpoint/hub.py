"""Publishing: the model card of a run, and the upload of its Hugging Face folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mm_moe.errors import CheckpointError, ConfigError

RETRY_WAITS_S = (1.0, 4.0, 16.0)
CARD = "README.md"


def score_table(scores: dict[str, Any]) -> str:
    """The scores per missing pattern as a Markdown table.

    Args:
        scores: the content of a run's `scores.json`.
    """
    metric = scores["metrics"][0]
    models = list(scores["models"])
    lines = [
        "| inputs | rows | " + " | ".join([*models, "chance"]) + " |",
        "|---" * (len(models) + 3) + "|",
    ]
    for condition in scores["conditions"]:
        cells = [f"{scores['models'][name][condition][metric]:.3f}" for name in models]
        levels = scores["chance"][condition].values()
        cells.append(f"{max(level[metric] for level in levels if metric in level):.3f}")
        rows = scores["num_rows"][condition]
        lines.append(f"| {condition} | {rows} | " + " | ".join(cells) + " |")
    return f"Test {metric} by what the inputs lack:\n\n" + "\n".join(lines)


def model_card(record: dict[str, Any], scores: dict[str, Any] | None) -> str:
    """The card of a run, without any row of its data.

    Args:
        record: the content of `run.json`.
        scores: the content of `scores.json`, or None before any evaluation.
    """
    arguments, data = record["arguments"], record["data"]
    card = ModelCardData(
        license="other",
        license_name="see-data-and-base-model",
        library_name="transformers",
        tags=["mm-moe", "mixture-of-experts", "multimodal", "missing-modality"],
    )
    missing = record["missing"]
    parts = [
        f"---\n{card.to_yaml()}\n---",
        f"# A sparse multimodal model trained on {data['name']}",
        f"Backbone `{arguments['backbone']}`, {arguments['num_experts']} experts per sparse layer "
        f"(top {arguments['top_k_experts']}), prompts `{arguments['prompt']}`. In training: "
        f"{missing['words']}.",
        score_table(scores) if scores else "Not evaluated.",
        f"## Data\n\n{data['name']}: {data['license']}. Content hash `{data['sha256'][:16]}`.",
        "## Use\n\n```python\nimport mm_moe.models  # registers the model type\n"
        "from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(FOLDER_OR_NAME)\n"
        "```",
        "## Training command\n\n```\n" + " ".join(record["command"]) + "\n```\n\nmm-moe commit "
        f"`{record['commit'][:12]}`, torch {record['versions']['torch']}, "
        f"DeepSpeed {record['versions']['deepspeed']}.",
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path, record: dict[str, Any], scores: dict[str, Any] | None) -> None:
    """Write the card beside the weights."""
    ModelCard(model_card(record, scores)).save(folder / CARD)


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub cannot have.

    Raises:
        ConfigError: not of the form ORG/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no repository name; write ORG/NAME.") from error


def push(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a Hugging Face folder and return its address; without a token, HF_TOKEN is taken.

    Server errors and cut connections are retried with growing waits; a refusal (401, 403) is not.

    Raises:
        ConfigError: a repository name that cannot be.
        CheckpointError: the upload failed for good; the folder stays as it is.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token or os.environ.get("HF_TOKEN"))
    reason = ""
    for wait in (*RETRY_WAITS_S, None):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repo_id)
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            reason = f"the Hub answered {status}"
            if status in (401, 403):
                reason += "; set HF_TOKEN to a token that may write there"
                break
        except Exception as error:  # connection libraries raise their own families
            reason = type(error).__name__
        else:
            return f"{api.endpoint}/{repo_id}"
        if wait is not None:
            time.sleep(wait)
    raise CheckpointError(
        f"the push to {repo_id} failed: {reason}. The model is complete in {folder}; push it again "
        f"with: python launch/export.py {folder.parent} --push_to_hub {repo_id}"
    )
