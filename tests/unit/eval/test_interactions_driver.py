"""`python -m eval.interactions` with faked trainings, whose answers a pencil can fuse.

Six samples a split with the labels 1 1 1 0 0 0 and the categories R U AS R U AS.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import grid_cells, interactions
from eval.predictions import PredictionFile, hash_ids
from mm_moe.data.interactions.table import table_of
from mm_moe.errors import ConfigError, DataError

DATA = {
    "name": "toy",
    "sha256": "00",
    "license": "CC0",
    "modalities": ["text", "context"],
    "label_names": ["no", "yes"],
    "problem_type": "single_label_classification",
    "task": "single_label_classification",
    "unlabelled": {},
    "splits": {"train": 6, "validation": 6, "test": 6},
}
SAYS = {
    "R": [1, 1, 1, 1, 1, 1],
    "U": [1, 1, 0, 0, 0, 1],
    "AS": [0, 0, 1, 0, 0, 0],
    "baseline": [1, 0, 0, 0, 0, 0],
    "member": [1, 1, 1, 1, 1, 1],
    "fuser": [0, 1, 2, 1, 2, 0],
}


def check(runs):
    """Stands for `eval.grid_cells.check_runs`."""
    splits = {f"{name}_split": name for name in ("train", "validation", "test")}
    return [{"arguments": {"words": words[2:], **splits}, "data": DATA} for words in runs]


def train(words) -> str | None:
    """Stands for `launch/train.py`; what it says where it fails."""

    def value(flag):
        return words[words.index(flag) + 1] if flag in words else None

    role = value("--interaction_subset")
    role = role or ("fuser" if "--interaction_target" in words else "baseline")
    with open("trained.txt", "a") as file:
        said = (role, value("--seed"), value("--pretrained"), value("--reject_class"))
        file.write(" ".join(map(str, said)) + "\n")
    if role == "U" and Path("broken").exists():
        return "it broke"
    final = Path(value("--output_dir")) / "final"
    final.mkdir(parents=True)
    far = role == "baseline" and int(value("--seed")) >= 1000
    (final / "model.safetensors").write_text("member" if far else role)
    return None


def evaluate(run: Path) -> None:
    """Stands for `launch/evaluate_run.py`."""
    role = (run / "final" / "model.safetensors").read_text()
    width = 3 if role == "fuser" else 2
    labels = np.array([0, 1, 2, 0, 1, 2] if role == "fuser" else LABELS)
    for split in ("validation", "test"):
        ids = hash_ids([f"{split}{n}" for n in range(6)], dataset="toy")
        logits = 8 * np.eye(width, dtype=np.float32)[SAYS[role]]
        file = PredictionFile(ids, ids, {"complete": labels}, {"complete": logits})
        file.save(run / f"predictions-{split}.npz")
        (run / f"evaluation-{split}.json").write_text(json.dumps({"conditions": ["complete"]}))


def call(self, name, words, place, record) -> bool:
    """Stands for a program's process."""
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    why = train(words[at + 1 :]) if name == "train" else evaluate(Path(words[at + 1]))
    record["seconds"][name], record["error"] = 0.0, why or record["error"]
    return why is None


LABELS = np.array([1, 1, 1, 0, 0, 0])
RIGHT = {"text": [1, 1, 0] * 2, "context": [1, 0, 0] * 2}
WORDS = ("--interaction_table", "table.parquet", "--output", "out", "--resamples", "50")


def write_table(splits=("train", "validation", "test")) -> None:
    labels = np.tile(LABELS, len(splits))
    said = {
        name: np.where(np.tile(right, len(splits)), labels, 1 - labels)
        for name, right in RIGHT.items()
    }
    table_of(
        dataset="toy",
        label_names=("no", "yes"),
        ids=[f"{split}{n}" for split in splits for n in range(6)],
        splits=[split for split in splits for _ in range(6)],
        label_N=labels,
        predictions=said,
        probabilities={name: np.eye(2)[codes] for name, codes in said.items()},
        origin={"labeller": "made up"},
    ).save("table.parquet")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a table; trainings are faked."""
    monkeypatch.setattr(grid_cells.Runner, "_call", call)
    monkeypatch.setattr(interactions, "check_runs", check)
    monkeypatch.chdir(tmp_path)
    write_table()
    return tmp_path


def trained() -> list[str]:
    """What was trained since the last call."""
    path = Path("trained.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_from_a_table_to_a_report(here, capsys):
    assert interactions.main([*WORDS, "--seeds", "0", "1", "--reject_class"]) == 0
    start = "out/cells/baseline__complete__seed-{}/run/final"
    assert sorted(trained()) == sorted(
        [f"baseline {seed + 1000 * m} None None" for seed in (0, 1) for m in range(4)]
        + [f"{name} {s} {start.format(s)} true" for s in (0, 1) for name in ("R", "U", "AS")]
        + [f"fuser {seed} None None" for seed in (0, 1)]
    )
    result = json.loads(Path("out/results.json").read_text())
    (section,) = result["sections"]
    f1 = {row["name"]: row["scores"]["f1"] for row in section["rows"]}
    assert f1["baseline"]["mean"] == pytest.approx(1 / 2)
    assert f1["rus"] == {"mean": pytest.approx(6 / 7), "std": 0, "values": [6 / 7] * 2}
    # One baseline of four says what it says, the others always yes.
    assert f1["ensemble"]["mean"] == pytest.approx(2 / 3)
    # Each category has one yes and one no, so its frequencies say nothing: class 0.
    assert f1["category_prior"]["mean"] == 0
    assert section["fuser"]["accuracy"]["mean"] == pytest.approx(3 / 6)
    assert section["fuser"]["majority_accuracy"]["mean"] == pytest.approx(2 / 6)
    rus = next(row for row in section["rows"] if row["name"] == "rus")
    assert rus["against"]["ensemble"]["difference"] == pytest.approx(6 / 7 - 2 / 3)
    assert {"learned_gate", "stacking", "oracle"} <= set(f1)
    assert result["table"]["origin"] == {"labeller": "made up"}
    assert "oracle (leaks)" in Path("out/report.html").read_text()
    capsys.readouterr()
    assert interactions.main([*WORDS, "--seeds", "0", "1", "--reject_class"]) == 0
    assert trained() == []
    assert capsys.readouterr().out.count(": kept") == 16


def test_a_training_that_failed_is_named_and_run_again(here, capsys):
    Path("broken").touch()
    with pytest.raises(DataError, match=r"no seed has all its models.*it broke"):
        interactions.main([*WORDS, "--seeds", "0"])
    trained()
    Path("broken").unlink()
    assert interactions.main([*WORDS, "--seeds", "0"]) == 0
    assert [line.split()[0] for line in trained()] == ["U"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--seeds", "0", "1000"], ConfigError, "seed 1000 must lie from 0 to 999"),
        (["--tau", "2"], ConfigError, "--tau 2.0 must lie in"),
        (["--interaction_subset", "R"], ConfigError, "sets --interaction_subset for each training"),
        (["--expert_flags", "--seed 3"], ConfigError, "--expert_flags: the grid sets --seed"),
        (["--test", "image:0.5"], ConfigError, "pattern 'image:0.5'"),
        (["--interaction_table", "none.parquet"], DataError, "there is no interaction table"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(here, words, error, message):
    with pytest.raises(error, match=message):
        interactions.main([*WORDS, *words])
    assert trained() == []
    assert not Path("out").exists()


def test_a_table_without_the_test_split_is_refused(here):
    write_table(splits=("train", "validation"))
    with pytest.raises(DataError, match="has no row of split 'test'"):
        interactions.main([*WORDS])


def test_another_table_is_another_set_of_experts(here, monkeypatch):
    interactions.main([*WORDS, "--seeds", "0"])
    monkeypatch.setitem(RIGHT, "text", [0, 1, 0] * 2)
    write_table()
    with pytest.raises(ConfigError, match=r"method 'expert_U' had other settings"):
        interactions.main([*WORDS, "--seeds", "0"])


def test_a_dry_run_lists_the_trainings(here, capsys):
    assert interactions.main([*WORDS, "--seeds", "0", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "8 trainings: 1 seeds of 4 baselines, 3 experts (R, U, AS) and a fuser" in said
    assert "expert_AS, trained on complete, seed 0" in said
    assert trained() == []
