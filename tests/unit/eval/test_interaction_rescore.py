"""Published artefacts of interaction experts, in their exact layout, scored with a pencil.

Six samples with the labels 1 1 1 0 0 0. `SAYS` holds what each model answers with certainty.
"""

import json
import re
from pathlib import Path

import pytest

from eval.interaction_rescore import rescore
from launch import evaluate_run
from mm_moe.errors import DataError

IDS = ("1_60", "1_70", "2_80", "2_81", "2_90", "2_91")
LABELS = (1, 1, 1, 0, 0, 0)
SAYS = {
    "R": (1, 1, 1, 1, 1, 1),
    "U": (1, 1, 0, 0, 0, 1),
    "AS": (0, 0, 1, 0, 0, 0),
    "baseline": (1, 0, 0, 0, 0, 0),
}
FUSER = ("R", "U", "AS", "U", "AS", "R")  # chooses 1 1 1 0 0 1: five of six right
TRUE = ("R", "U", "AS", "R", "U", "AS")  # the oracle: 1 1 1 1 0 0


def logits(said, *, sure=4.0):
    return [-sure, sure] if said else [sure, -sure]


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def expert_rows(part, *, ids=IDS, target=int, **more):
    return [
        {"image_id": one, "logits": logits(said), "target": target(label), **more}
        for one, said, label in zip(ids, SAYS[part], LABELS, strict=True)
    ]


def fuser_rows(ids=IDS):
    return [
        {"image_id": one, "logits": {name: 8.0 * (name == kind) for name in ("R", "U", "AS")}}
        for one, kind in zip(ids, FUSER, strict=True)
    ]


def write_experts(folder: Path, dataset: str, *, fuser=True, **how) -> Path:
    for part in SAYS:
        write_lines(folder / f"{dataset}_{part}_logits.jsonl", expert_rows(part, **how))
    if fuser:
        write_lines(folder / f"{dataset}_rus_logits.jsonl", fuser_rows(how.get("ids", IDS)))
    return folder


def write_split(root: Path, dataset: str, *, split="test", ids=IDS, key="sarcasm") -> None:
    for category in ("R", "U", "AS"):
        rows = {
            str(one): {"utterance": "u", key: bool(label)}
            for one, label, true in zip(ids, LABELS, TRUE, strict=True)
            if true == category
        }
        path = root / f"data_split_output/{dataset}_{category}_dataset_{split}_cogvlm2_qwen2.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))


@pytest.fixture
def mustard(tmp_path):
    data = tmp_path / "mustard_data"
    write_experts(data / "expert_inference_output/expert_blip2", "mustard")
    write_split(data, "mustard")
    return tmp_path


def row(section, name):
    return next(row for row in section["rows"] if row["name"] == name)


def values(section, name, *metrics):
    return [row(section, name)["scores"][metric]["mean"] for metric in metrics]


def test_every_rule_by_hand(mustard):
    (section,) = rescore(mustard, num_resamples=20).sections
    assert section["title"] == (
        "mustard: mustard_data/expert_inference_output/expert_blip2 (6 samples)"
    )
    # The baseline finds one of three: precision 1, recall 1/3, F1 2/4.
    assert values(section, "baseline", "accuracy", "precision", "recall", "f1") == pytest.approx(
        [4 / 6, 1, 1 / 3, 1 / 2]
    )
    # R says yes always: F1 = 6/9, and macro F1 half of it.
    assert values(section, "expert_R", "accuracy", "f1", "macro_f1") == pytest.approx(
        [1 / 2, 2 / 3, 1 / 3]
    )
    # The fuser's choices 1 1 1 0 0 1: three of four right when said, none missed.
    for name in ("rus", "hard_routing", "weighted_logits_raw"):
        assert values(section, name, "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])
    # Two of R, U, AS: 1 1 1 0 0 1 as well. With the baseline four say 3 2 2 1 1 2 of 4 yes; a tie
    # is class 0: 1 0 0 0 0 0.
    assert values(section, "mean_softmax", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])
    assert values(section, "mean_logits_all", "accuracy", "f1") == pytest.approx([4 / 6, 1 / 2])
    assert values(section, "oracle", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])
    # Two of each category, one of them a yes but for U (yes, no), R (yes, no), AS (yes, no).
    assert row(section, "oracle")["by_category"]["R"] == pytest.approx(
        row(section, "expert_R")["by_category"]["R"]
    )
    assert row(section, "expert_U")["by_category"]["U"]["accuracy"] == 1
    assert {r["name"] for r in section["rows"] if r["kind"] == "leaks"} == {
        "oracle",
        "subset_majority",
    }
    # rus has 2_80 and 1_70 right that the baseline has not, and 2_91 wrong: 2 against 1, p = 1.
    (test,) = row(section, "rus")["against"]["baseline"]["mcnemar"]
    assert (test["only_ours"], test["only_theirs"], test["p"]) == (2, 1, 1)


@pytest.mark.parametrize(
    "place",
    [
        "expert_inference_output/expert_m",
        "urfunny_data/expert_inference_output/expert_m",
        "urfunny_data/new_expert_inference_output/expert_m",
        "expert_m",
    ],
)
def test_experts_are_found_wherever_they_may_lie(tmp_path, place):
    write_experts(tmp_path / place, "urfunny")
    assert len(rescore(tmp_path, num_resamples=5).sections) == 1


def test_a_part_of_the_tree_finds_what_lies_beside_it(mustard):
    outputs = mustard / "mustard_data/expert_inference_output"
    for folder in (outputs, outputs / "expert_blip2"):
        (section,) = rescore(folder, num_resamples=5).sections
        assert any(r["name"] == "oracle" for r in section["rows"])


def test_a_third_logit_is_dropped_and_told(tmp_path):
    folder = write_experts(tmp_path / "expert_blip2", "urfunny")
    for part in ("R", "U", "AS"):
        rows = [
            {**one, "logits": [*one["logits"], 9.0 if n < 4 else -9.0]}
            for n, one in enumerate(expert_rows(part))
        ]
        write_lines(folder / f"urfunny_{part}_logits.jsonl", rows)
    (section,) = rescore(tmp_path, num_resamples=5).sections
    assert values(section, "rus", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])
    assert (
        "R: 3 logits, the third of which is dropped; with it 4 of 6 answers would be neither"
        in (" ".join(section["notes"]))
    )
    assert any(r["name"] == "rus_reject" for r in section["rows"])


def test_ids_and_targets_of_other_types_are_the_same_samples(tmp_path):
    ids = tuple(range(100, 106))
    data = tmp_path / "mmsd_data"
    folder = write_experts(data / "expert_inference_output/expert_q", "mmsd", ids=ids, target=bool)
    write_lines(folder / "mmsd_U_logits.jsonl", expert_rows("U", ids=tuple(map(str, ids))))
    write_split(data, "mmsd", ids=ids, key="label")
    (section,) = rescore(tmp_path, datasets=["mmsd"], num_resamples=5).sections
    assert values(section, "rus", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])


def test_padded_lines_count_once(mustard):
    folder = mustard / "mustard_data/expert_inference_output/expert_blip2"
    padded = [{**one, "text": "t", "pred": 0} for one in expert_rows("R")]
    write_lines(folder / "mustard_R_logits.jsonl", [*padded, padded[0]])
    (section,) = rescore(mustard, num_resamples=5).sections
    assert values(section, "expert_R", "accuracy") == [1 / 2]
    assert "R: 1 lines repeat a sample (1 with equal logits" in " ".join(section["notes"])


def test_real_logits_beside_give_a_section_of_their_own(mustard):
    folder = mustard / "mustard_data/expert_inference_output/expert_blip2"
    (folder / "mustard_U_logits.jsonl").rename(folder / "mustard_U_logits_real.jsonl")
    copy = (folder / "mustard_baseline_logits.jsonl").read_text()
    (folder / "mustard_U_logits.jsonl").write_text(copy)
    stored, real = rescore(mustard, num_resamples=5).sections
    assert "U: its logits equal the baseline's value for value" in stored["notes"]
    assert values(stored, "expert_U", "f1") == values(stored, "baseline", "f1")
    assert ", real U" in real["title"]
    assert values(real, "rus", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])


def test_a_fuser_serves_folders_that_have_none(mustard):
    outputs = mustard / "mustard_data/expert_inference_output"
    write_experts(outputs / "expert_albef", "mustard", fuser=False)
    albef, blip2 = rescore(mustard, num_resamples=5).sections
    assert values(albef, "rus", "f1") == values(blip2, "rus", "f1")
    assert any("that of expert_blip2 is taken" in note for note in albef["notes"])
    other = [{**one, "logits": {"R": 1.0, "U": 0.0, "AS": 0.0}} for one in fuser_rows()]
    write_lines(write_experts(outputs / "expert_q", "mustard") / "mustard_rus_logits.jsonl", other)
    albef = rescore(mustard, num_resamples=5).sections[0]
    assert not any(r["name"] == "rus" for r in albef["rows"])
    assert any("differ: copy the right one" in note for note in albef["notes"])


def test_categories_from_the_unimodal_predictions(mustard):
    data = mustard / "mustard_data"
    # (text, image) for R R; U: text right; AS: both wrong; the fourth differs from the split file.
    said = [(1, 1), (1, 0), (0, 0), (1, 0), (0, 1), (1, 1)]
    for place, name in enumerate(("text_only_pred_qwen2", "image_only_pred_cogvlm2")):
        rows = {
            one: {"logits": {"Yes": 0.5, "No": 0.4}, "gth": gold, "pred": both[place]}
            for one, both, gold in zip(IDS, said, LABELS, strict=True)
        }
        path = data / f"data_gen_output/mustard_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    (section,) = rescore(mustard, num_resamples=5).sections
    assert "5 of 6 equal those from the unimodal predictions" in " ".join(section["notes"])
    for file in (data / "data_split_output").iterdir():
        file.unlink()
    (section,) = rescore(mustard, num_resamples=5).sections
    # Now the fourth sample is U: the oracle answers 1 1 1 0 0 0.
    assert values(section, "oracle", "accuracy", "f1") == [1, 1]


def test_training_labels_of_categories_give_the_prior(mustard):
    write_split(mustard / "mustard_data", "mustard", split="train")
    (section,) = rescore(mustard, num_resamples=5).sections
    # Each category has one yes and one no: a tie, which is class 0.
    assert values(section, "category_prior", "accuracy") == [1 / 2]


def broken(rows, at, **change):
    return [{**one, **change} if n == at else one for n, one in enumerate(rows)]


@pytest.mark.parametrize(
    ("part", "rows", "words"),
    [
        ("U", expert_rows("U")[:-1], "U_logits.jsonl lacks 1 of the ids.*'2_91'"),
        ("U", broken(expert_rows("U"), 2, target=0), "'2_80': key 'target' is 0, but 1"),
        ("U", broken(expert_rows("U"), 2, logits=[1.0]), "line 3, id '2_80': key 'logits' must"),
        ("U", broken(expert_rows("U"), 1, logits=[1.0, None]), "line 2, id '1_70': key 'logits'"),
        ("AS", broken(expert_rows("AS"), 0, image_id="9"), "lacks 1 of the ids.*'1_60'"),
        ("AS", [*expert_rows("AS"), {**expert_rows("R")[0]}], "line 7.*contradicts line 1"),
        ("rus", broken(fuser_rows(), 4, logits={"R": 1, "U": 0}), "line 5, id '2_90': key 'logits"),
        ("rus", fuser_rows()[1:], "the fuser's file lacks 1 of the ids.*'1_60'"),
    ],
)
def test_a_file_that_deviates_is_named(mustard, part, rows, words):
    folder = mustard / "mustard_data/expert_inference_output/expert_blip2"
    write_lines(folder / f"mustard_{part}_logits.jsonl", rows)
    done = rescore(mustard, num_resamples=5)
    assert done.sections == []
    (why,) = done.failures.values()
    assert re.search(words, why), why


def test_categories_that_deviate_are_told_and_the_logits_scored(mustard):
    data = mustard / "mustard_data"
    write_split(data, "mustard", split="train")
    (data / "data_split_output/mustard_U_dataset_train_cogvlm2_qwen2.json").unlink()
    for name in ("text_only_pred_qwen2", "image_only_pred_cogvlm2"):
        path = data / f"data_gen_output/mustard_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"1_60": {"logits": {"Yes": 1, "No": 0}, "gth": null, "pred": 1}}')
    done = rescore(mustard, num_resamples=5)
    (section,) = done.sections
    # The test categories are whole, so the oracle is there; the training ones are not.
    assert values(section, "oracle", "accuracy", "f1") == pytest.approx([5 / 6, 6 / 7])
    assert not any(r["name"] == "category_prior" for r in section["rows"])
    assert "id '1_60': key 'gth'" in done.failures["mustard: unimodal predictions"]
    assert "U_dataset_train" in done.failures["mustard: training categories"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("4.0]", "1" + "0" * 400 + "]", "line 1, id '1_60': key 'logits' must be finite"),
        ("4.0]", "1" + "0" * 5000 + "]", "line 1, not readable as JSON"),
        ('"target": 1', '"target": "\u00b2"', "line 1, id '1_60': key 'target' must be a class"),
    ],
)
def test_numbers_that_python_cannot_read_are_named(mustard, old, new, words):
    path = mustard / "mustard_data/expert_inference_output/expert_blip2/mustard_R_logits.jsonl"
    path.write_text(path.read_text().replace(old, new, 1), encoding="utf-8")
    (why,) = rescore(mustard, num_resamples=5).failures.values()
    assert words in why


def test_the_program_prints_writes_and_fails_loudly(mustard, monkeypatch, capsys):
    monkeypatch.chdir(mustard)
    words = ["--rescore", str(mustard), "--dataset", "mustard", "--output", "out"]
    assert evaluate_run.main([*words, "--resamples", "20"]) == 0
    said = capsys.readouterr().out
    assert "oracle (leaks)" in said
    assert "learned_gate, stacking: left out, there are no validation logits" in said
    assert "oracle (leaks)" in Path("out/rescore.html").read_text()
    stored = json.loads(Path("out/rescore.json").read_text())["sections"][0]
    assert values(stored, "rus", "f1") == pytest.approx([6 / 7])
    missing = mustard / "mustard_data/expert_inference_output/expert_blip2/mustard_AS_logits.jsonl"
    missing.unlink()
    with pytest.raises(DataError, match=r"mustard_AS_logits.jsonl is not there"):
        evaluate_run.main(words)
    with pytest.raises(DataError, match="holds no logits of mmsd"):
        evaluate_run.main(["--rescore", str(mustard), "--dataset", "mmsd"])
    with pytest.raises(DataError, match="is no folder"):
        evaluate_run.main(["--rescore", "nowhere"])
