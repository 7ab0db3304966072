"""What differs between two starts of a run, in words, and what becomes of it."""

import dataclasses
from pathlib import Path

import pytest

from launch.cli import RecipeParser
from launch.drift import MOVES_THE_CURVE, Facts, compare, settle_drift
from launch.manifest import plain_flags
from mm_moe.errors import CheckpointError

RUN = Path("runs/mine")


def facts(*argv: str, samples: int = 32, max_steps: int = 100, **others: str) -> Facts:
    flags = plain_flags(RecipeParser().namespace(list(argv)))
    return Facts(flags, samples, max_steps, others)


def drift(*argv: str, **changed):
    return compare(facts(), facts(*argv, **changed), step=50)


def test_nothing_has_changed():
    found = drift("--output_dir", "elsewhere", "--hub_token", "hf_x")
    assert found.all == []
    assert settle_drift(found, run=RUN, allowed=False) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--save_steps", "7"),
        ("--logging_steps", "3"),
        ("--dataloader_num_workers", "1"),
        ("--report_to", "csv"),
        ("--ep_size", "2"),
        ("--test_split", "validation"),
    ],
)
def test_what_cannot_move_the_curve_is_noted(words):
    found = drift(*words)
    (line,) = settle_drift(found, run=RUN, allowed=False)
    assert words[0].lstrip("-") in line
    assert found.noted == found.all


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("learning_rate", "0.5"),
        ("seed", "9"),
        ("router_aux_loss_coef", "0.5"),
        ("missing_ratio", "0.9"),
        ("shuffle_buffer", "3"),
        ("lock_image", "true"),
        ("bf16", "true"),
    ],
)
def test_what_moves_the_curve_needs_a_word(flag, value):
    found = drift(f"--{flag}", value)
    with pytest.raises(CheckpointError, match=f"{flag} was .*--allow_drift true"):
        settle_drift(found, run=RUN, allowed=False)
    (line,) = settle_drift(found, run=RUN, allowed=True)
    assert f"{flag} was" in line


def test_another_data_set_is_another_run():
    with pytest.raises(CheckpointError, match="dataset was emoji, is mm_imdb"):
        settle_drift(drift("--dataset", "mm_imdb"), run=RUN, allowed=True)


def test_the_samples_of_a_step_are_compared_not_how_they_are_made_up():
    words = ("--gradient_accumulation_steps", "2")
    assert drift(*words).curve == []
    (said,) = drift(*words, samples=64).curve
    assert said.startswith("samples of a step was 32, is 64")


def test_the_length_of_a_run():
    assert "longer schedule" in drift(max_steps=200).noted[0]
    constant = compare(
        facts("--lr_scheduler_type", "constant"),
        facts("--lr_scheduler_type", "constant", max_steps=200),
        step=50,
    )
    assert constant.noted == ["max_steps was 100, is 200"]
    assert drift(max_steps=60).curve == ["max_steps was 100, is 60"]
    assert "step 50 is done" in drift(max_steps=40).refused[0]


def test_data_and_masks_by_their_hashes_and_the_rest_of_the_world():
    before = facts(**{"data hash": "a" * 64, "torch version": "2.14", "commit": "c" * 40})
    now = facts(**{"data hash": "b" * 64, "torch version": "2.15", "commit": "d" * 40})
    found = compare(before, now, step=0)
    assert found.curve == ["data hash was aaaaaaaaaaaa, is bbbbbbbbbbbb"]
    assert found.noted == [
        "commit was cccccccccccc, is dddddddddddd",
        "torch version was 2.14, is 2.15",
    ]


def test_the_same_json_in_another_spelling_is_no_change():
    one = facts("--prompt_config", '{"length": 4, "x": 1}')
    other = facts("--prompt_config", '{"x":1,"length":4}')
    assert compare(one, other, step=0).all == []


def test_a_flag_that_one_release_does_not_have_is_no_change():
    old = facts()
    del old.flags["seed"]
    assert compare(old, facts("--seed", "7"), step=0).all == []
    assert compare(dataclasses.replace(old, flags={}), facts("--seed", "7"), step=0).all == []


def test_the_names_of_the_list_are_flags():
    assert set(RecipeParser().flags) >= MOVES_THE_CURVE


def test_facts_of_a_record_and_of_an_empty_one():
    record = {
        "flags": {"seed": 1},
        "arguments": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 7,
        },
        "world_size": 3,
        "versions": {"torch": "2"},
    }
    found = Facts.of(record)
    assert (found.step_samples, found.max_steps) == (24, 7)
    assert found.others["torch version"] == "2"
    assert Facts.of({}).step_samples is None
    assert compare(Facts.of({}), found, step=0).all == []
