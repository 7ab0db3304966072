"""Trackers and tables of runs that are killed and resumed."""

import csv
import json
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from launch.check_reports import wanted_trackers
from launch.cli import RecipeParser
from mm_moe.errors import ConfigError
from mm_moe.training.callbacks import MetricsFile
from mm_moe.training.reporting import MetricsCsv, Tracker, last_logged


def state(step: int, *, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=main, global_step=step)


def log(callback, step: int, **logs) -> None:
    callback.on_log(None, state(step), None, logs=logs)


def table(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_train_and_evaluation_lines_stand_once_after_many_kills(tmp_path):
    """A checkpoint every 2 steps, an evaluation every 2; killed behind 3, 5 and 5 again."""
    for kind in (MetricsFile, MetricsCsv):
        for start, killed in ((0, 3), (2, 5), (4, 5), (4, 6)):
            callback = kind(tmp_path)
            callback.on_train_begin(None, state(start), None)
            log(callback, start, eval_accuracy=start / 10)  # --eval_on_start
            for step in range(start + 1, killed + 1):
                log(callback, step, loss=1 / step)
                if step % 2 == 0:
                    log(callback, step, eval_accuracy=step / 10)
            with callback.file.open("a") as stream:
                stream.write('{"step": 9, "lo')  # the kill came in the middle of a line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
    entries = [json.loads(line) for line in lines]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in entries if "eval_accuracy" in e] == [0, 2, 4, 6]
    rows = table(tmp_path)[:-1]
    assert [int(r["step"]) for r in rows if r["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [int(r["step"]) for r in rows if r["eval_accuracy"]] == [0, 2, 4, 6]


def test_a_resume_at_an_earlier_checkpoint_drops_all_behind_it(tmp_path):
    for kind in (MetricsFile, MetricsCsv):
        first = kind(tmp_path)
        for step in range(1, 9):
            log(first, step, loss=float(step))
        kind(tmp_path).on_train_begin(None, state(2), None)
    assert last_logged(tmp_path) == 2
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]


def test_a_line_that_is_json_and_no_log_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'5\n{"step": "x"}\n\xff\xfe\n{"step": 1}\n')
    assert last_logged(tmp_path) == 1
    MetricsFile(tmp_path).on_train_begin(None, state(4), None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_columns_that_come_later_stand_in_one_table(tmp_path):
    callback = MetricsCsv(tmp_path)
    log(callback, 1, loss=0.5)
    log(callback, 2, loss=0.25)
    log(callback, 2, eval_f1=float("nan"))
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "step,loss,eval_f1",
        "1,0.5,",
        "2,0.25,",
        "2,,nan",
    ]
    log(callback, 3, train_runtime=1.0)
    callback.on_log(None, state(4, main=False), None, logs={"loss": 1.0})
    assert len(table(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


class Kept(TrainerCallback):
    """A tracker that keeps what it gets, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.steps: list[int] = []
        self.fails = fails

    def on_train_begin(self, args, state, control, **kwargs):
        if self.fails == "begin":
            raise OSError("no\nnetwork")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.fails == "log":
            raise OSError("no network")
        self.steps.append(state.global_step)


def test_a_tracker_that_appends_gets_each_step_once(tmp_path):
    inner = Kept()
    for start in (0, 2):
        both = [Tracker(lambda step: inner, name="t", folder=tmp_path), MetricsFile(tmp_path)]
        for callback in both:
            callback.on_train_begin(None, state(start), None)
        for step in range(start + 1, 5):
            for callback in both:
                log(callback, step, loss=1.0)
    assert inner.steps == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["make", "begin", "log"])
def test_a_tracker_that_fails_is_named_once_and_left_out(tmp_path, caplog, where):
    def make(step: int) -> TrainerCallback:
        if where == "make":
            raise ImportError("no module")
        return Kept(where)

    tracker = Tracker(make, name="wandb", folder=tmp_path)
    with caplog.at_level("WARNING", logger="mm_moe"):
        tracker.on_train_begin(None, state(0), None)
        log(tracker, 1, loss=1.0)
        log(tracker, 2, loss=1.0)
        tracker.on_train_end(None, state(2), None)
    (said,) = caplog.messages
    assert "wandb" in said
    assert "\n" not in said


def wanted(*words: str) -> list[str]:
    values = RecipeParser().namespace(["--report_to", *words])
    return wanted_trackers(values)


def test_the_words_of_report_to():
    assert wanted("none") == []
    assert wanted("csv,csv") == wanted("csv", "none") == ["csv"]
    assert "csv" in wanted("all")
    assert wanted_trackers(RecipeParser().namespace([])) == []


def test_a_tracker_without_its_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("launch.check_reports.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ConfigError, match="pip install wandb"):
        wanted("csv", "wandb")
    with pytest.raises(ConfigError, match="pip install comet-ml"):
        wanted("comet_ml")
    with pytest.raises(ConfigError, match=r"'tensorbord'.*tensorboard"):
        wanted("tensorbord")
