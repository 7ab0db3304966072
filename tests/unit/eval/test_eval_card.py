"""The model card: what the Hub reads of it, what a reader is told, and what it must not say."""

import json
import math

import pytest
import yaml
from huggingface_hub import ModelCard

from eval import card

TOKEN = "hf_" + "Secret" * 5
RECORD = {
    "command": [
        *("launch/train.py", "--config", "emoji_replay", "--output_dir", "/home/me/run"),
        *("--data_dir=~/data", "--seed", "3"),
    ],
    "arguments": {
        "backbone": "small_clip",
        "num_experts": [4],
        "top_k_experts": 1,
        "prompt": "replay",
        "dataset": "emoji",
        "pretrained": "builtin",
        "test_split": "test",
        "max_steps": 20,
        "seed": 3,
        "hub_license": "other",
        "router": "topk_softmax",
    },
    "data": {"name": "emoji", "license": "OpenMoji CC BY-SA 4.0", "sha256": "ab12" * 16},
    "missing": {
        "words": "50% of samples lack something: 25% no text, 25% no image",
        "mask_sha256": "cd34" * 16,
        "seed": 7,
    },
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.15.0", "deepspeed": "0.19.8"},
}
SCORES = {
    "metrics": ["accuracy", "macro_f1"],
    "models": {
        "replay": {
            "complete": {"accuracy": 0.9125, "macro_f1": 0.5},
            "mixed": {"accuracy": 0.75, "macro_f1": math.nan},
        },
        "no prompts": {"complete": {"accuracy": 0.9}, "mixed": {"accuracy": 0.5}},
    },
    "conditions": ["complete", "mixed"],
    "chance": {
        "complete": {"majority": {"accuracy": 0.25}, "uniform": {"accuracy": 0.125}},
        "mixed": {"majority": {"accuracy": 0.25}, "prior": {"macro_f1": 0.9}},
    },
    "num_rows": {"complete": 200, "mixed": 199},
}


def with_arguments(**fields):
    return {**RECORD, "arguments": {**RECORD["arguments"], **fields}}


def front(text):
    return yaml.safe_load(text.split("---\n", 2)[1])


def test_the_card_says_what_was_trained_on_what(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (tmp_path / "expert_load.png").write_bytes(b"png")
    card.write_card(folder, RECORD, SCORES, pictures=tmp_path, name="run7")
    text = (folder / "README.md").read_text()
    assert [entry["name"] for entry in front(text)["model-index"]] == ["run7"]
    for words in (
        "# A sparse multimodal model trained on emoji",
        "`small_clip`, 4 experts per sparse layer (top 1), prompts `replay`",
        RECORD["missing"]["words"],
        "mask hash `cd34cd34cd34cd34` (seed 7)",
        "OpenMoji CC BY-SA 4.0",
        "`ab12ab12ab12ab12`",
        "| steps | 20 |",
        "| seed | 3 |",
        "![Load of the experts](expert_load.png)",
        "`0123456789ab`, torch 2.15.0, DeepSpeed 0.19.8",
        "import mm_moe.models",
    ):
        assert words in text
    assert "training_loss" not in text  # there is no such picture
    assert (folder / "expert_load.png").read_bytes() == b"png"
    accuracy = next(line for line in text.splitlines() if line.startswith("| mixed | 75.0"))
    assert accuracy == "| mixed | 75.0% | 50.0% | 25.0% | 199 |"


def test_the_hub_reads_it_and_finds_the_finite_scores():
    found = ModelCard(card.model_card(RECORD, SCORES, name="final")).data
    assert found.library_name == "transformers"
    assert {"mm-moe", "emoji"} <= set(found.tags)
    assert found.license_name == "see-data-and-base-model"
    results = {(r.dataset_config, r.metric_type): r.metric_value for r in found.eval_results}
    assert results == {
        ("complete", "accuracy"): 0.9125,
        ("complete", "macro_f1"): 0.5,
        ("mixed", "accuracy"): 0.75,
    }
    index = front(card.model_card(RECORD, SCORES, name="final"))["model-index"]
    assert index[0]["name"] == "final"
    assert index[0]["results"][0]["dataset"]["split"] == "test"


def test_a_run_without_scores_says_so():
    text = card.model_card(RECORD, None)
    assert "Not evaluated" in text
    assert "Measured: nothing so far." in text
    assert "model-index" not in front(text)


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("hf-hub:org/name", "org/name"),
        ("builtin", None),
        ("laion2b_s34b_b88k", None),
        ("/home/me/weights", None),
        (None, None),
    ],
)
def test_the_base_model_is_named_where_it_has_a_name_on_the_hub(pretrained, expected):
    text = card.model_card(with_arguments(pretrained=pretrained), SCORES)
    assert front(text).get("base_model") == expected
    assert "/home/me" not in text


def test_data_of_the_hub_and_a_chosen_license():
    text = card.model_card(
        with_arguments(dataset="columns", data_dir="org/pairs", hub_license="mit"), None
    )
    assert front(text)["datasets"] == ["org/pairs"]
    assert front(text)["license"] == "mit"
    assert "license_name" not in front(text)
    assert "datasets" not in front(card.model_card(RECORD, None))


def test_no_place_on_the_machine_and_no_token_is_told():
    told = {**RECORD, "command": [*RECORD["command"], "--run_name", TOKEN]}
    text = card.model_card(told, SCORES)
    assert (
        "launch/train.py --config emoji_replay --output_dir PATH --data_dir=PATH --seed 3" in text
    )
    assert "/home" not in text
    assert "~" not in text
    assert TOKEN not in text


def test_the_card_of_a_checkpoint_does_not_show_the_scores_of_the_end(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    folder = tmp_path / "staged"
    folder.mkdir()
    assert not card.card_of_run(tmp_path, folder)
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    assert card.card_of_run(tmp_path, folder, evaluated=False)
    assert "Not evaluated" in (folder / "README.md").read_text()
    card.card_of_run(tmp_path, folder)
    assert "75.0" in (folder / "README.md").read_text()
