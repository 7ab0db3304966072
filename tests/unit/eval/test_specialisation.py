"""Which modality each expert of a shared tower works for."""

import json

import numpy as np
import pytest

from eval.report import write_report
from eval.specialisation import (
    expert_shares,
    loads_by_modality,
    picture,
    separation,
    shares_experts,
    summary,
)


def log(step: int, image: list[float], text: list[float], block: int = 1) -> dict:
    """One line of a log with the rows of both modalities in one block."""
    rows = {"image": image, "text": text}
    return {"step": step, "loss": 1.0} | {
        f"moe/{name}.{block}/expert_{e}": value
        for name, values in rows.items()
        for e, value in enumerate(values)
    }


METRICS = [
    {"step": 0, "eval_acc1": 0.5},  # no training log
    log(10, [30.0, 10.0, 0.0], [3.0, 1.0, 0.0]),  # both 3 : 1
    log(20, [40.0, 0.0, 0.0], [0.0, 4.0, 0.0]),  # apart
]


def test_modalities_count_the_same_whatever_their_number_of_tokens():
    steps, loads = loads_by_modality(METRICS)
    assert steps == [10, 20]
    image_SE = expert_shares(loads["1"])["image"]
    np.testing.assert_allclose(image_SE, [[0.5, 0.5, np.nan], [1.0, 0.0, np.nan]])


def test_separation_is_0_for_the_same_use_and_1_for_none_in_common():
    _, loads = loads_by_modality(METRICS)
    assert separation(loads["1"]["image"], loads["1"]["text"]).tolist() == [0.0, 1.0]
    half = separation(np.array([[2.0, 2.0, 0.0]]), np.array([[0.0, 1.0, 1.0]]))
    assert half.tolist() == [0.5]


def test_the_summary_is_json_and_says_the_last_log():
    found = json.loads(json.dumps(summary(METRICS)))
    assert found["steps"] == [10, 20]
    block = found["blocks"]["1"]
    assert block["tokens"] == {"image": [1.0, 0.0, 0.0], "text": [0.0, 1.0, 0.0]}
    assert block["expert_share"] == [1.0, 0.0, None]
    assert block["separation"] == [0.0, 1.0]


def test_a_block_of_one_modality_alone_is_not_shared():
    alone = [{"step": 10, "loss": 1.0, "moe/image.1/expert_0": 4.0, "moe/text.3/expert_0": 2.0}]
    assert loads_by_modality(alone)[1] == {}
    assert picture(alone) is None


@pytest.mark.parametrize(
    ("config", "shared"),
    [
        ('{"one_tower": true}', True),
        ({"one_tower": True}, True),
        ('{"one_tower": false}', False),
        ("None", False),
        (None, False),
    ],
)
def test_one_tower_is_known_from_the_run(config, shared):
    assert shares_experts({"arguments": {"backbone_config": config}}) is shared


@pytest.mark.parametrize("one_tower", [True, False])
def test_the_report_shows_the_picture_of_a_shared_tower_alone(tmp_path, one_tower):
    run = {"arguments": {"backbone_config": json.dumps({"one_tower": one_tower})}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    page = write_report(tmp_path).read_text()
    assert ("Experts by modality" in page) is one_tower
    assert (tmp_path / "experts_by_modality.png").is_file() is one_tower
