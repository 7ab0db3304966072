import json
import re

import pytest

from eval.report import format_table, read_metrics, score_table, write_report
from mm_moe.errors import DataError

SCORES = {
    "conditions": ["complete", "text missing", "image missing"],
    "metrics": ["accuracy", "macro_f1"],
    "models": {
        "replay": {
            "complete": {"accuracy": 0.8, "macro_f1": 0.7},
            "text missing": {"accuracy": 0.5, "macro_f1": 0.4},
            "image missing": {"accuracy": 0.7, "macro_f1": 0.6},
        },
        "no prompts": {
            "complete": {"accuracy": 0.81, "macro_f1": 0.7},
            "text missing": {"accuracy": 0.4, "macro_f1": 0.4},
            "image missing": {"accuracy": 0.6, "macro_f1": 0.6},
        },
    },
    "chance": {
        name: {"majority": {"accuracy": 0.2}, "uniform": {"accuracy": 0.1}}
        for name in ("complete", "text missing", "image missing")
    },
    "num_rows": {"complete": 10, "text missing": 10, "image missing": 10},
    "expert_load": {"image.blocks.1": [5, 3]},
}
RUN = {
    "arguments": {"learning_rate": 0.001, "moe": {"num_experts": 4}},
    "versions": {"torch": "2.15.0"},
    "data": {"name": "emoji"},
    "missing": {"train": "50% = 50% of samples lack something: 25% no text, 25% no image"},
    "commands": {"resume": "deepspeed a --x", "evaluate": "python b", "push": "python c"},
    "bad_samples": ["row-7"],
}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    rows = [{"step": step, "loss": 2 / step, "learning_rate": 0.1} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_table_has_models_chance_and_the_mean_of_the_missing():
    table = score_table(SCORES, metric="accuracy")
    assert table["header"] == ["", "replay", "no prompts", "chance", "samples"]
    assert table["rows"][0] == ["complete", "80.0%", "81.0%", "20.0%", "10"]
    # (50 + 70) / 2 and (40 + 60) / 2; the complete inputs are no part of it
    assert table["rows"][-1] == ["mean of the missing", "60.0%", "50.0%", "20.0%", ""]
    assert table["best"] == [2, 1, 1, 1]


def test_lower_is_better_for_errors():
    scores = {
        "conditions": ["complete"],
        "models": {"a": {"complete": {"mae": 1.0}}, "b": {"complete": {"mae": 0.5}}},
    }
    table = score_table(scores, metric="mae")
    assert table["rows"] == [["complete", "1.000", "0.500", "-", ""]]
    assert table["best"] == [2]


def test_plain_table_lines_up():
    lines = format_table(SCORES).splitlines()
    assert lines[0].split() == ["accuracy", "replay", "no", "prompts", "chance", "samples"]
    assert lines[3].split() == ["text", "missing", "50.0%", "40.0%", "20.0%", "10"]
    assert {line.index("20.0%") for line in lines[2:]} == {lines[2].index("20.0%")}
    assert format_table({}) == ""


def test_page_says_what_ran_and_needs_no_other_file(run_dir):
    path = write_report(run_dir)
    page = path.read_text()
    assert path == run_dir / "report.html"
    for text in ("60.0%", "moe.num_experts", "2.15.0", "25% no text", "row-7", "deepspeed a --x"):
        assert text in page
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 3
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_before_the_first_evaluation(run_dir):
    (run_dir / "scores.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    page = write_report(run_dir).read_text()
    assert "No scores yet" in page
    assert "<img" not in page


def test_planted_markup_stays_text(run_dir):
    evil = "<script>alert(1)</script>"
    one = {evil: {"accuracy": 0.5}}
    chance = {evil: {"majority": {"accuracy": 0.1}}}
    scores = {"conditions": [evil], "models": {evil: one}, "chance": chance}
    scores |= {"num_rows": {evil: 3}, "expert_load": {evil: [1, 1]}}
    run = {key: {evil: evil} for key in ("arguments", "versions", "data", "missing", "commands")}
    (run_dir / "run.json").write_text(json.dumps({**run, "bad_samples": [evil, {"id": evil}]}))
    (run_dir / "scores.json").write_text(json.dumps(scores))
    page = write_report(run_dir).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 14


def test_many_bad_samples_are_counted_not_all_listed(run_dir):
    run = {**RUN, "bad_samples": [f"bad-{index}" for index in range(250)]}
    (run_dir / "run.json").write_text(json.dumps(run))
    page = write_report(run_dir).read_text()
    assert "250 samples could not be read" in page
    assert "and 150 more" in page
    assert "bad-99<" in page
    assert "bad-100<" not in page


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named_with_their_line(run_dir):
    (run_dir / "scores.json").write_text('{\n "a": 1,,\n}')
    with pytest.raises(DataError, match=r"scores\.json, line 2, column 9"):
        write_report(run_dir)


def test_a_cut_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
