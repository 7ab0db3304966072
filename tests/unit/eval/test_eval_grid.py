"""Grids of faked trainings: the programs in `fakes` stand for those of `launch/`."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from eval import grid, grid_cells
from eval.grid_plan import method_digest
from mm_moe.errors import ConfigError

CHECK = """
import json, sys
data = {"name": "mm_imdb", "sha256": "00", "license": "", "modalities": ["image", "text"],
        "label_names": ["a", "b"], "problem_type": "single_label_classification",
        "task": "single_label_classification", "unlabelled": {},
        "splits": {"train": 4, "validation": 4, "test": 4}, "tables": {}}
splits = {f"{name}_split": name for name in ("train", "validation", "test")}
print("a line before")
print(json.dumps({"runs": [{"arguments": {"words": words, **splits}, "data": data}
                           for words in json.load(sys.stdin)]}))
"""
TRAIN = """
import sys
from pathlib import Path
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
output = Path(value("--output_dir"))
with open("trained.txt", "a") as file:
    file.write(f"{value('--prompt')} {value('--missing_type')} {value('--seed')}\\n")
if Path("broken").exists() and value("--prompt") == "replay" and value("--seed") == "1":
    sys.exit("error: it broke")
(output / "final").mkdir(parents=True)
(output / "final" / "model.safetensors").write_text(value("--prompt") + value("--seed"))
"""
# Four rows of class 0 0 1 1. "none" says 0 always; "replay" is right, except for its last row with
# seed 1, and with something missing for one row more.
EVALUATE = """
import json, sys
from pathlib import Path
import numpy as np
words = sys.argv[1:]
run, at = Path(words[0]), words.index("--patterns")
patterns = [word for word in words[at + 1:] if not word.startswith("--")]
model = (run / "final" / "model.safetensors").read_text()
labels = np.array([0, 0, 1, 1])
start = words.index("--split") + 1
for split in words[start:at]:
    entries, scores = {}, {}
    for pattern in patterns:
        said = labels.copy()
        if model.startswith("none"):
            said[:] = 0
        elif model == "replay1":
            said[3] = 0
        if pattern != "complete" and not model.startswith("none"):
            said[2] = 0
        entries[f"logits {pattern}"] = np.eye(2, dtype=np.float32)[said]
        entries[f"labels {pattern}"] = labels
        scores[pattern] = {"accuracy": float((said == labels).mean())}
    ids = np.array(["p", "q", "r", "s"])
    np.savez(run / f"predictions-{split}.npz", ids=ids, groups=ids, **entries)
    half = {"majority": {"accuracy": 0.5}}
    (run / f"evaluation-{split}.json").write_text(json.dumps({
        "conditions": patterns, "metrics": ["accuracy"], "models": {"m": scores},
        "chance": dict.fromkeys(patterns, half), "num_rows": dict.fromkeys(patterns, 4)}))
"""
WORDS = ("--prompts", "none", "replay", "--train", "both:0.7", "--output", "out")
TESTS = ("--test", "complete", "text:0.5", "both:0.50")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with faked programs."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in (("train", TRAIN), ("evaluate_run", EVALUATE), ("check_runs", CHECK)):
        (fakes / f"{name}.py").write_text(text)
    monkeypatch.setattr(grid_cells, "PROGRAMS", fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more: str) -> int:
    return grid.main([*WORDS, *TESTS, *more])


def trained() -> list[str]:
    """What was trained since the last call."""
    path = Path("trained.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def row(rows: list[dict], **wanted) -> dict:
    (found,) = (one for one in rows if all(one[key] == value for key, value in wanted.items()))
    return found


def test_numbers_of_a_small_grid(here, capsys):
    assert run("--seeds", "0", "1", "--resamples", "50") == 0
    said = capsys.readouterr().out
    assert said.count("50% = 50% of samples lack something: 25% no text, 25% no image") == 1
    assert "4 cells, each scored on 3 test patterns (complete, text:0.5, both:0.5)" in said
    assert sorted(trained()) == ["none both 0", "none both 1", "replay both 0", "replay both 1"]
    result = json.loads(Path("out/results.json").read_text())
    rows = [one for one in result["table"] if one["split"] == "test"]
    complete = row(rows, method="replay", test="complete")
    # accuracies 1 and 3/4: mean 7/8, standard deviation 1/4 / sqrt(2)
    assert complete["mean"] == pytest.approx(0.875)
    assert complete["std"] == pytest.approx(0.25 / 2**0.5)
    assert (complete["chance"], complete["seeds"], complete["num_rows"]) == (0.5, [0, 1], 4)
    missing = row(rows, method="replay", test="mean of the missing")
    assert missing["values"] == [0.75, 0.5]
    difference = row(result["comparisons"], test="complete")
    assert (difference["method"], difference["reference"]) == ("replay", "none")
    assert difference["difference"] == pytest.approx(0.375)
    assert difference["low"] == pytest.approx(0.0, abs=0.1)  # a resample of class 0 alone
    (pair,) = result["pairs"]
    assert (pair["method"], pair["other"], pair["train"]) == ("replay", "none", "both:0.7")
    assert pair["values"] == [0.25, 0.0]  # 3/4 and 1/2, minus 1/2
    # mean 1/8, standard error 1/8, and 12.706 of it on either side with one degree of freedom
    assert pair["seeds_high"] == pytest.approx(0.125 * 13.706, rel=1e-4)
    assert "replay - none" in said
    assert {one["split"] for one in result["table"]} == {"validation", "test"}
    page = Path("out/report.html").read_text()
    assert "87.5 ± 17.7" in page
    assert "[-146.3, +171.3]" in page
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert Path("out/trained-on-both-0.7-tested-on-text.png").exists()


def test_finished_cells_are_kept_and_a_grid_grows(here, capsys):
    run("--seeds", "0")
    assert len(trained()) == 2
    run("--seeds", "0")
    assert trained() == []
    assert capsys.readouterr().out.count(": kept") == 2
    run("--seeds", "0", "1")
    assert sorted(trained()) == ["none both 1", "replay both 1"]
    assert grid.main([*WORDS, "--test", "image:1", "--seeds", "0"]) == 0  # scored, not trained
    assert trained() == []
    cell = json.loads(Path("out/cells/none__both-0.7__seed-0/cell.json").read_text())
    assert cell["splits"]["test"]["conditions"] == ["complete", "text:0.5", "both:0.5", "image:1"]
    Path("out/cells/none__both-0.7__seed-0/cell.json").write_text("{")  # cut off while written
    run("--seeds", "0")
    assert trained() == ["none both 0"]


def test_a_failed_cell_is_named_and_run_again(here, capsys):
    Path("broken").touch()
    assert run("--seeds", "0", "1", "--jobs", "2") == 1
    said = capsys.readouterr()
    assert "failed: replay, trained on both:0.7, seed 1: train ended with 1: error: it broke" in (
        said.err
    )
    result = json.loads(Path("out/results.json").read_text())
    assert row(result["table"], method="replay", test="complete", split="test")["seeds"] == [0]
    assert "it broke" in Path("out/report.html").read_text()
    trained()
    Path("broken").unlink()
    assert run("--seeds", "0", "1") == 0
    assert trained() == ["replay both 1"]


def test_several_training_patterns_have_a_common_mean(here):
    assert run("--seeds", "0", "1", "--train", "both:0.7", "complete") == 0
    result = json.loads(Path("out/results.json").read_text())
    wanted = {"train": "all patterns", "method": "replay"}
    mean = row(result["table"], split="test", **wanted)
    assert (mean["test"], mean["seeds"]) == ("mean of the missing", [0, 1])
    assert mean["values"] == [0.75, 0.5]  # the fakes learn the same from every pattern
    assert row(result["comparisons"], **wanted)["difference"] == pytest.approx(0.125)
    trains = [pair["train"] for pair in result["pairs"]]
    assert trains == ["all patterns", "both:0.7", "complete"]
    assert result["pairs"][0]["values"] == [0.25, 0.0]
    assert result["pairs"][0]["difference"] == pytest.approx(0.125)
    assert len(list(Path("out").glob("*.png"))) == 4  # none for the mean


def test_models_can_be_dropped(here):
    run("--seeds", "0", "--drop_models")
    assert not list(Path("out").rglob("model.safetensors"))
    trained()
    run("--seeds", "0", "--drop_models")
    assert trained() == []


def test_a_dry_run_writes_nothing(here, capsys):
    assert run("--seeds", "0", "1", "2", "--dry_run") == 0
    assert "[6/6] replay, trained on both:0.7, seed 2" in capsys.readouterr().out
    assert not Path("out").exists()
    assert trained() == []


def test_methods_with_flags_of_their_own(here):
    variant = ("--variant", "probe=--prompt none --lock_image true")
    assert run("--seeds", "0", *variant, "--reference", "probe", "--drop_models") == 0
    result = json.loads(Path("out/results.json").read_text())
    assert result["methods"]["probe"]["words"] == ["--prompt", "none", "--lock_image", "true"]
    assert {one["method"] for one in result["comparisons"]} == {"none", "replay"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train", "text"), "'text' is neither complete nor KIND:RATIO"),
        (("--test", "text:1.5"), "'text:1.5' has the ratio 1.5, which must lie in [0, 1]"),
        (("--test", "text:nan"), "'text:nan' is neither"),
        (("--test", "sound:0.5"), "unknown missing kind 'sound'"),
        (("--seeds", "1", "1"), "seed 1 must"),
        (("--jobs", "0"), "--jobs 0 must be at least 1"),
        (("--resamples", "0"), "--resamples 0 must be at least 1"),
        (("--prompts", "none", "none"), "method 'none' is there twice"),
        (("--reference", "other"), "--reference 'other' is no method"),
        (("--seed", "3"), "the grid sets --seed itself; instead: --seeds"),
        (("--variant", "a/b=--prompt none"), "method 'a/b' must be letters"),
        (("--variant", "a=--prompt 'none"), "No closing quotation"),
        (("--variant", "none"), "has no name"),
        (("--variant", "a=--missing_ratio=0.1"), "--variant a: the grid sets --missing_ratio"),
    ],
)
def test_what_a_grid_refuses(here, words, said):
    with pytest.raises(ConfigError) as caught:
        run(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_folder_of_another_grid_is_refused(here):
    run("--seeds", "0")
    for words, said in (
        (("--test_seed", "3"), "test_seed was 0, is 3"),
        (("--max_steps", "7"), "method 'none' had other settings"),
    ):
        with pytest.raises(ConfigError, match=said):
            run("--seeds", "0", *words)
    with grid_cells.alone_in(Path("out")), pytest.raises(ConfigError, match="another call works"):
        run("--seeds", "0")
    Path("notes").mkdir()
    Path("notes/mine.txt").touch()
    with pytest.raises(ConfigError, match="no grid"):
        run("--output", "notes")
    Path("out/grid.json").write_text("[]")
    with pytest.raises(ConfigError, match="damaged"):
        run("--seeds", "0")


def test_a_method_is_known_by_what_changes_its_numbers():
    data = {"sha256": "00"}
    base = {"max_steps": 3, "save_steps": 5, "prompt_config": None}
    known = method_digest({"arguments": base, "data": data})
    assert known == method_digest({"arguments": base | {"save_steps": 7, "seed": 3}, "data": data})
    for key, value in (("max_steps", 4), ("prompt_config", "{}")):
        assert known != method_digest({"arguments": base | {key: value}, "data": data})
    assert known != method_digest({"arguments": base, "data": {"sha256": "01"}})


def test_a_refused_training_is_told_in_its_own_words(here):
    Path("fakes/check_runs.py").write_text("import sys; sys.exit('error: unknown prompt x.')")
    with pytest.raises(ConfigError, match=r"^unknown prompt x\.$"):
        run()


@pytest.fixture
def control_c():
    """Ctrl-C raises, also where this process was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_grid_that_is_stopped_ends_its_trainings_and_goes_on_later(here, control_c):
    sleeps = "import os, time; open('pid.txt', 'w').write(str(os.getpid())); time.sleep(60)"
    Path("fakes/train.py").write_text(sleeps)
    main_thread = threading.main_thread().ident

    def stop():  # Ctrl-C, as soon as the first training runs
        while not Path("pid.txt").exists() or not Path("pid.txt").read_text():
            time.sleep(0.02)
        signal.pthread_kill(main_thread, signal.SIGINT)

    watcher = threading.Thread(target=stop)
    watcher.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "0")
    watcher.join()
    assert time.monotonic() - begin < 50  # not the 60 seconds of the training
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid.txt").read_text()), 0)
    cells = list(Path("out/cells").iterdir())
    assert [path.name for path in cells] == ["none__both-0.7__seed-0"]
    assert json.loads((cells[0] / "cell.json").read_text())["status"] == "failed"
    Path("fakes/train.py").write_text(TRAIN)
    assert run("--seeds", "0") == 0
    assert trained() == ["none both 0", "replay both 0"]


def test_a_stored_table_is_a_pattern_where_there_is_one(here, monkeypatch, capsys):
    tables = ("--train", "table", "--test", "complete", "table", "--seeds", "0")
    words = ("--prompts", "none", "--output", "out", *tables)
    with pytest.raises(ConfigError, match="stored table of the split 'train'; name one"):
        grid.main([*words])
    text = CHECK.replace('"tables": {}', '"tables": {"train": "aa", "validation": "bb"}')
    (here / "fakes" / "check_runs.py").write_text(text)
    with pytest.raises(ConfigError, match="stored table of the split 'test'; name one"):
        grid.main([*words])
    with pytest.raises(ConfigError, match=r"--train can only be table, not both:0\.7; drop one"):
        grid.main([*WORDS, *TESTS])
    text = CHECK.replace('"tables": {}', '"tables": {"train": "", "validation": "", "test": ""}')
    (here / "fakes" / "check_runs.py").write_text(text)
    assert grid.main([*words, "--dry_run"]) == 0
    assert "table: what the stored table of the split says" in capsys.readouterr().out
