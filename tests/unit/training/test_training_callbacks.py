"""`metrics.jsonl` holds each step once, also after a crash and a resume."""

import json
from types import SimpleNamespace

import pytest

from mm_moe.training.callbacks import EpochOfStream, MetricsFile, Progress


def state(step: int, *, main: bool = True, max_steps: int = 10) -> SimpleNamespace:
    return SimpleNamespace(
        is_world_process_zero=main, global_step=step, max_steps=max_steps, epoch=0.0
    )


def log(callback, step: int, **logs) -> None:
    callback.on_log(None, state(step), None, logs=logs)


def steps(folder) -> list[int]:
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_resume_drops_the_steps_that_run_again(tmp_path):
    first = MetricsFile(tmp_path)
    first.on_train_begin(None, state(0), None)
    for step in range(1, 6):
        log(first, step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the crash came here
    again = MetricsFile(tmp_path)
    again.on_train_begin(None, state(3), None)
    assert steps(tmp_path) == [1, 2, 3]
    for step in range(4, 8):
        log(again, step, loss=0.0)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_values_as_json(tmp_path):
    callback = MetricsFile(tmp_path)
    log(callback, 2, loss=0.5, grad_norm=float("nan"), rate=float("inf"))
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert entry == {"step": 2, "loss": 0.5, "grad_norm": "nan", "rate": "inf"}


def test_the_summary_of_the_run_and_other_ranks_write_nothing(tmp_path):
    callback = MetricsFile(tmp_path)
    log(callback, 2, train_runtime=1.0, train_loss=0.5)
    callback.on_log(None, state(2, main=False), None, logs={"loss": 1.0})
    callback.on_log(None, state(2), None, logs=None)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_leave_the_file_alone(tmp_path):
    log(MetricsFile(tmp_path), 5, loss=1.0)
    MetricsFile(tmp_path).on_train_begin(None, state(0, main=False), None)
    assert steps(tmp_path) == [5]


def test_the_progress_line_starts_where_the_run_resumes(capsys):
    callback = Progress("replay")
    callback.on_train_begin(None, state(4), None)
    assert callback.bar.n == 4
    callback.on_step_end(None, state(6), None)
    assert callback.bar.n == 6
    logs = {"loss": 0.51234, "learning_rate": 1e-3, "moe/load_imbalance": 1.254}
    log(callback, 6, **logs, **{"perf/samples_per_second": 99.6, "perf/matmul_share": 0.126})
    expected = "loss=0.512, lr=1.0e-03, samples/s=100, of matmul=13%, load=1.25x"
    assert callback.bar.postfix == expected
    callback.on_train_end(None, state(6), None)
    assert callback.bar is None
    log(callback, 6, loss=1.0, learning_rate=1.0)  # a late log is no error
    said = capsys.readouterr().err
    assert "replay" in said
    assert "6/10" in said


def test_other_ranks_have_no_progress_line(capsys):
    callback = Progress("replay")
    callback.on_train_begin(None, state(0, main=False), None)
    callback.on_step_end(None, state(1, main=False), None)
    assert callback.bar is None
    assert capsys.readouterr().err == ""


def test_the_epoch_of_an_endless_stream():
    now = state(30)
    EpochOfStream(samples_per_epoch=96, samples_per_step=8).on_step_end(None, now, None)
    assert now.epoch == pytest.approx(2.5)
    now = state(30, max_steps=40)  # unknown size: the share of the run, also after a resume
    EpochOfStream(samples_per_epoch=None, samples_per_step=8).on_step_end(None, now, None)
    assert now.epoch == 0.75
