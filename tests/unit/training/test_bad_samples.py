"""Undecodable samples over a run: written once, kept over a resume, limited by count and share."""

import json
from types import SimpleNamespace

import pytest

from mm_moe.errors import DataError
from mm_moe.training.bad_samples import BadSamples

ARGS = SimpleNamespace(logging_steps=2)
QUIET = SimpleNamespace(should_save=False)


def watcher(folder, found, **fields):
    options = {"max_samples": 100, "max_share": 0.0, "size": None, "samples_seen": lambda: 5000}
    return BadSamples(folder, found=found, **{**options, **fields})


def begin(watch, step):
    watch.on_train_begin(ARGS, SimpleNamespace(global_step=step), QUIET)


def end_step(watch, step, control=QUIET):
    watch.on_step_end(ARGS, SimpleNamespace(global_step=step), control)


def lines(folder):
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_each_sample_stands_once_with_its_reason(tmp_path):
    found = {"a": "OSError"}
    watch = watcher(tmp_path, found)
    begin(watch, 0)
    end_step(watch, 1)  # not yet: every second step
    assert not watch.known
    end_step(watch, 2)
    found["b"] = "cut"
    end_step(watch, 3, SimpleNamespace(should_save=True))
    end_step(watch, 4)
    assert lines(tmp_path) == [
        {"id": "a", "reason": "OSError", "step": 2},
        {"id": "b", "reason": "cut", "step": 3},
    ]


def test_a_resume_keeps_what_its_checkpoint_saw_and_meets_the_rest_again(tmp_path):
    watch = watcher(tmp_path, {"a": "x"})
    begin(watch, 0)
    end_step(watch, 2)
    watch.found["b"] = "x"
    end_step(watch, 6)
    with (tmp_path / "bad_samples.jsonl").open("a") as stream:
        stream.write('{"id": "c", "rea')  # a crash cut this line
    again = watcher(tmp_path, {})
    begin(again, 4)
    assert again.known == {"a": "x"}
    again.found |= {"a": "x", "b": "x"}  # a fresh collator meets both
    end_step(again, 6)
    assert [(entry["id"], entry["step"]) for entry in lines(tmp_path)] == [("a", 2), ("b", 6)]


def test_too_many(tmp_path):
    watch = watcher(tmp_path, {str(n): "cut" for n in range(12)}, max_samples=11)
    begin(watch, 0)
    with pytest.raises(
        DataError, match=r"12 samples .* max_bad_samples \(11\): '0' \(cut\), .* and 2"
    ):
        end_step(watch, 2)
    assert len(lines(tmp_path)) == 12


@pytest.mark.parametrize(
    ("seen", "size", "count", "over"),
    [
        (8, None, 10, False),  # 10 of 1000
        (8, None, 11, True),
        (8, 100, 1, False),  # 1 of the 100 that there are
        (8, 100, 2, True),
        (5000, None, 50, False),
        (5000, None, 51, True),
        (5000, 2000, 21, True),  # of 2000 distinct ones
    ],
)
def test_a_share_is_of_distinct_samples_and_of_no_handful(tmp_path, seen, size, count, over):
    found = {str(n): "cut" for n in range(count)}
    watch = watcher(tmp_path, found, max_share=0.01, size=size, samples_seen=lambda: seen)
    begin(watch, 0)
    if not over:
        return end_step(watch, 2)
    with pytest.raises(DataError, match=r"over the limit of max_bad_share \(0.01\)"):
        end_step(watch, 2)
    return None
