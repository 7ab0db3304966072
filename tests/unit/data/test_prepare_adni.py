import csv
import json

import numpy as np
import pandas as pd
import pytest

from launch import prepare_data
from launch.cli import run_program
from mm_moe.data.events import MISSING_DOSAGE
from mm_moe.data.prepare import adni_tables
from mm_moe.data.prepare.adni import stratified
from mm_moe.data.prepare.encoding import TableEncoder, fit_column, text_cells
from mm_moe.data.prepare.plink import PlinkSet
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import clinical_layouts as layouts


def run(raw, *flags):
    output = raw.parent / "out"
    words = ["adni", "--source", str(raw), "--output", str(output), *flags]
    assert prepare_data.main(words) == 0
    return PreparedData(str(output))


def found(source):
    """PTID -> (split, sample), with the ids translated back."""
    names = {}
    with (source.data_dir / "ids.csv").open() as file:
        for line in csv.DictReader(file):
            names[line["pseudonym"]] = line["id"]
    return {
        names[sample.id]: (split, sample)
        for split in source.splits()
        for sample in map(source.to_sample, source.stream(split))
    }


@pytest.fixture
def merged(tmp_path):
    for needed in ("nibabel", "anndata"):
        pytest.importorskip(needed, reason="pip install -e '.[clinical]'")
    return layouts.adni(tmp_path / "raw")


@pytest.fixture
def study(tmp_path):
    return layouts.adni_study(tmp_path / "raw")


# --- the rules of the columns -------------------------------------------------------------------


def column(*cells):
    return text_cells(pd.DataFrame({"X": cells}, dtype=object))["X"]


def test_numbers_go_to_the_training_range_and_gaps_to_their_own_mean():
    fitted = fit_column(column("2", "<4", ">6", None))
    assert fitted.kind == "numeric"
    # range 2 to 6, mean 4 -> 0; 9 is clipped, 3 -> -0.5
    assert fitted.encode(column("2", None, "9", "3")).ravel().tolist() == [-1, 0, 1, -0.5]


def test_each_column_gets_its_own_mean_not_that_of_the_first():
    train = text_cells(pd.DataFrame({"A": ["0", "1", "2"], "B": ["10", "12", "20"]}))
    test = pd.DataFrame({"A": [np.nan], "B": [np.nan]}, dtype=object)
    # A: mean 1 of 0..2 -> 0; B: mean 14 of 10..20 -> -0.2
    assert TableEncoder(train).encode(test)[0] == pytest.approx([0.0, -0.2])


def test_two_numbers_or_text_are_levels_and_gaps_the_most_frequent_one():
    fitted = fit_column(column("1", "2", "2", None))
    assert (fitted.kind, fitted.levels) == ("categorical", ("1", "2"))
    assert fitted.encode(column("1", None, "7")).tolist() == [[1, -1], [-1, 1], [-1, -1]]
    assert fit_column(column("3/3", "3/4", "4/4", "3/4")).kind == "categorical"


def test_dates_fall_into_five_bins_of_equal_width():
    cells = ("2010-01-01", "2010-01-11", "2010-01-06")
    fitted = fit_column(column(*cells))
    assert fitted.kind == "date"
    assert fitted.encode(column(*cells)).argmax(1).tolist() == [0, 4, 2]
    named = text_cells(pd.DataFrame({"EXAMDATE": ["2010-01-01", "garbage"]}))["EXAMDATE"]
    assert fit_column(named).kind == "date"


def test_a_minus_sign_makes_a_number_and_a_minus_inside_makes_text():
    assert fit_column(column("-1", "2", "3")).kind == "numeric"
    assert fit_column(column("1-2", "2-3", "3-4")).kind == "categorical"


def test_infinite_cells_are_empty_and_do_not_change_the_kind():
    fitted = fit_column(column("1", "2", "3", "inf", "NaN"))
    assert (fitted.kind, fitted.high) == ("numeric", 3)


def test_columns_without_use_are_dropped_with_the_reason():
    train = text_cells(pd.DataFrame({"E": [None] * 4, "T": list("abcd"), "N": list("1234")}))
    encoder = TableEncoder(train, max_levels=4)
    assert encoder.record()["columns"] == [["N", "numeric", 1]]
    assert set(encoder.dropped) == {"E", "T"}


# --- the study's tables -------------------------------------------------------------------------


def test_labels_are_diagnoses_that_never_change(tmp_path):
    lines = [("a", 1), ("a", 1), ("b", 1), ("b", 2), ("c", 3), ("c", None), ("d", 2)]
    path = layouts.put_csv(tmp_path / "DXSUM.csv", "PTID,DIAGNOSIS", *lines)
    assert adni_tables.labels_from_visits(path) == {"a": "1", "d": "2"}


def test_merge_takes_the_last_known_value_and_drops_what_all_share():
    one = {
        "PTID": ["a", "a", "b"],
        "UPDATE_STAMP": ["2012-01-01", "2011-01-01", "2011-01-01"],
        "RID": ["1", "1", "2"],
        "W": [np.nan, "60", "70"],
        "BOTH": [np.nan, np.nan, "x"],
    }
    two = {
        "PTID": ["a", "c"],
        "UPDATE_STAMP": ["2012-01-01"] * 2,
        "RID": ["1", "3"],
        "BOTH": ["y", "z"],
    }
    three = {"PTID": ["d"], "UPDATE_STAMP": ["2012-01-01"], "RID": ["4"]}
    tables = {name: pd.DataFrame(t) for name, t in (("1", one), ("2", two), ("3", three))}
    whole = adni_tables.merge(tables)
    assert sorted(whole.columns) == ["BOTH", "W"]
    assert whole["W"].dropna().to_dict() == {"a": "60", "b": "70"}  # 60 is older, but known
    assert whole["BOTH"].dropna().to_dict() == {"a": "y", "b": "x", "c": "z"}
    assert whole.index.tolist() == ["a", "b", "c", "d"]


def test_elecsys_rows_find_their_participant_by_phase_and_rid():
    apoe = pd.DataFrame({"PTID": ["a", "b"], "PHASE": ["ADNI1", "ADNI2"], "RID": ["7", "7"]})
    table = pd.DataFrame({"PHASE": ["ADNI2", "ADNI3"], "RID": ["7.0", "7"], "TAU": ["1", "2"]})
    mapped, lost = adni_tables.with_ptid(table, apoe)
    assert (mapped["PTID"].tolist(), lost) == (["b"], 1)


def test_study_tables_become_two_modalities_without_leaks(study, capsys):
    source = run(study, "--options", '{"seed": 3}')
    said = capsys.readouterr().out
    assert "leakage columns dropped: clinical: PTCOGBEG" in said
    assert "lines with drugs against dementia: 6" in said
    assert source.modalities == ("clinical", "biospecimen")
    findings = source.info["findings"]
    names = [name for name, _, _ in findings["clinical"]["columns"]]
    assert "VSWEIGHT" in names
    assert not {"RID", "PTCOGBEG", "UPDATE_STAMP", "PHASE"} & set(names)
    rows = found(source)
    train = [n for n in range(20) if rows[layouts.ptid(n)][0] == "train"]
    place = sum(width for name, _, width in findings["clinical"]["columns"] if name < "VSWEIGHT")
    low, high = 60 + min(train), 60 + max(train)
    for n in range(20):
        _, sample = rows[layouts.ptid(n)]
        assert sample.label == n % 3
        weight = np.clip(2 * (60 + n - low) / (high - low) - 1, -1, 1)
        assert sample.payload["clinical"].array()[place] == pytest.approx(weight, abs=1e-6)


def test_drugs_against_dementia_stay_where_asked_for(study):
    source = run(study, "--options", '{"dementia_drugs": "keep"}')
    kept = {name: width for name, _, width in source.info["findings"]["clinical"]["columns"]}
    assert kept["CMMED"] == 3
    assert source.info["findings"]["lines with drugs against dementia"] == 0


# --- genotypes ----------------------------------------------------------------------------------


def test_bed_bits_by_hand(tmp_path):
    folder = layouts.plink(tmp_path, ["p", "q", "r", "s", "t"], np.zeros((5, 2), int))
    # variant 1: 00 01 10 11 from the lowest bits, then 10; variant 2: all 11
    body = bytes([0x6C, 0x1B, 1, 0b11100100, 0b10, 0xFF, 0b11])
    (folder / "genomic.bed").write_bytes(body)
    plink = PlinkSet(folder / "genomic.bed")
    counts = plink.dosages(np.array([0, 1, 2, 3, 4]))
    assert counts.tolist() == [[2, 0], [MISSING_DOSAGE, 0], [1, 0], [0, 0], [1, 0]]
    assert plink.dosages(np.array([4, 0])).tolist() == [[1, 0], [2, 0]]


def test_bed_round_trip_over_several_reads_and_skipped_variants(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(0, 4, (7, 11))
    folder = layouts.plink(tmp_path, [f"p{n}" for n in range(7)], counts)
    lines = (folder / "genomic.bim").read_text().splitlines()
    lines[3] = lines[3].replace("A G", "A <DEL>")
    lines[5] = lines[5].replace("1 ", "26 ", 1)
    (folder / "genomic.bim").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("mm_moe.data.prepare.plink.PER_READ", 4)
    plink = PlinkSet(folder / "genomic.bed")
    assert plink.skipped == 2
    assert np.array_equal(plink.dosages(np.arange(7)), np.delete(counts, [3, 5], axis=1))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda body: body[:-1], "has 4 bytes; 2 variants of 3 people make 5"),
        (lambda body: b"\0" + body[1:], "does not start as a PLINK"),
        (lambda body: body[:2] + b"\0" + body[3:], "not ordered by variants"),
    ],
)
def test_damaged_bed_is_refused(tmp_path, break_it, said):
    bed = layouts.plink(tmp_path, ["p", "q", "r"], np.zeros((3, 2), int)) / "genomic.bed"
    bed.write_bytes(break_it(bed.read_bytes()))
    with pytest.raises(DataError, match=said):
        PlinkSet(bed)


def test_plink_genotypes_as_counts_and_scaled(study):
    names = [layouts.ptid(n) for n in range(18)]  # two have none
    counts = np.random.default_rng(5).integers(0, 4, (18, 9))
    layouts.plink(study / "genomic", [*names, "other"], np.vstack([counts, counts[:1]]))
    source = run(study, "--options", '{"modalities": "GC"}')
    assert source.modalities == ("genomic", "clinical")
    assert source.array_shapes["genomic"] == {"shape": [9], "scale": 1.0, "form": "dosages"}
    rows = found(source)
    for n, name in enumerate(names):
        assert rows[name][1].payload["genomic"].array().tolist() == counts[n].tolist()
    assert "genomic" not in rows[layouts.ptid(18)][1].payload
    scaled = '{"modalities": "GC", "genotypes": "scaled"}'
    source = run(study, "--options", scaled, "--overwrite")
    rows = found(source)
    train = counts[[n for n, name in enumerate(names) if rows[name][0] == "train"]]
    for d in range(9):
        known = train[:, d][train[:, d] < 3]
        mode, low, high = np.bincount(known).argmax(), known.min(), known.max()
        for n, name in enumerate(names):
            count = mode if counts[n, d] == 3 else counts[n, d]
            expected = np.clip(2 * (count - low) / max(high - low, 1) - 1, -1, 1)
            value = rows[name][1].payload["genomic"].array()[d]
            assert value == pytest.approx(expected if high > low else 0)


def test_too_many_variants_name_the_command_that_prunes(study):
    layouts.plink(study / "genomic", [layouts.ptid(0)], np.zeros((1, 9), int))
    with pytest.raises(ConfigError, match="indep-pairwise"):
        run(study, "--options", '{"max_variants": 8}')


# --- the merged files ---------------------------------------------------------------------------


def test_merged_files_give_four_modalities_and_the_latest_scan(merged, capsys):
    source = run(merged)
    said = capsys.readouterr().out
    assert "leakage columns dropped: clinical: PTCOGBEG_2005" in said
    assert "scans that failed: 1" in said
    assert source.modalities == ("mri", "genomic", "clinical", "biospecimen")
    assert {split: source.size(split) for split in source.splits()} == {
        "train": 27,
        "validation": 6,
        "test": 7,
    }
    assert source.array_shapes["mri"] == {"shape": [1, 5, 6, 7], "scale": 1.0, "form": "volume"}
    assert source.array_shapes["clinical"]["shape"] == [59]
    rows = found(source)
    mask = layouts.atlas(merged.parent / "again")
    maps = np.load(merged / "image" / "ADNI_G.npy").astype(float)
    scans = (merged / "image" / "ADNI_subj.txt").read_text().split()
    row_of = {scan.rsplit("_", 1)[0]: n for n, scan in enumerate(scans) if n not in (1, 5)}
    assert row_of[layouts.ptid(0)] == 0  # of 2012; row 1 is older
    train = maps[[n for name, n in row_of.items() if rows[name][0] == "train"]]
    for name, n in row_of.items():
        volume = np.zeros(mask.shape)
        volume[mask] = (maps[n] - train.mean()) / train.std()
        seen = rows[name][1].payload["mri"].array()
        assert np.allclose(seen, volume.transpose(2, 0, 1)[None], atol=1e-5)
    assert sum("mri" not in sample.payload for _, sample in rows.values()) == 8 + 1


def test_own_split_is_stratified_and_written_and_read_again(merged):
    source = run(merged)
    before = {name: split for name, (split, _) in found(source).items()}
    ids = {name: sample.id for name, (_, sample) in found(source).items()}
    text = (source.data_dir / "PTID_splits.json").read_text()
    assert {k: len(v) for k, v in json.loads(text).items()} == {
        "training": 27,
        "validation": 6,
        "testing": 7,
    }
    (merged / "PTID_splits.json").write_text(text)
    source = run(merged, "--overwrite", "--options", '{"seed": 99}')
    after = found(source)
    assert {name: split for name, (split, _) in after.items()} == before
    assert {name: sample.id for name, (_, sample) in after.items()} == ids
    assert not (source.data_dir / "PTID_splits.json").exists()


def test_strata_by_hand():
    labels = {f"a{n}": 0 for n in range(20)} | {f"b{n}": 1 for n in range(10)}
    dealt = stratified(labels, seed=0)
    # 20: 14, 3, 3; 10: 7, 1, 2
    counts = {s: [sum(n[0] == c for n in names) for c in "ab"] for s, names in dealt.items()}
    assert counts == {"train": [14, 7], "validation": [3, 1], "test": [3, 2]}
    assert dealt != stratified(labels, seed=1)
    assert dealt == stratified(dict(reversed(labels.items())), seed=0)


def test_private_names_stay_in_one_file_of_the_owner(merged):
    source = run(merged)
    for path in source.data_dir.iterdir():
        holds = any(layouts.ptid(n).encode() in path.read_bytes() for n in range(40))
        assert holds == (path.name in ("ids.csv", "PTID_splits.json")), path.name
        if holds:
            assert path.stat().st_mode & 0o777 == 0o600
    assert source.private


# --- bad input ----------------------------------------------------------------------------------


def broken_split(raw):
    names = [layouts.ptid(n) for n in range(40)]
    layouts.adni_split(raw, training=names[:30], validation=names[29:34], testing=names[34:])


def another_width(raw):
    np.save(raw / "image" / "ADNI_G.npy", np.ones((33, 83), np.float32))


def cut(raw):
    path = raw / "image" / "ADNI_G.npy"
    path.write_bytes(path.read_bytes()[:-9])


def replaced(name, old, new):
    def change(raw):
        path = raw / name
        path.write_text(path.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda raw: (raw / "label.csv").unlink(), "no label.csv and no DXSUM"),
        (replaced("label.csv", "DIAGNOSIS", "DX"), "no column 'DIAGNOSIS'"),
        (replaced("label.csv", "001_S_0001", "000_S_0000"), "line 3 repeats the PTID"),
        (broken_split, "entry 1 of 'validation' is in an earlier split"),
        (another_width, "84 voxels of label 150"),
        (cut, "is the file whole"),
        (replaced("image/ADNI_subj.txt", "_2010-01-31", ""), "line 2 is not PTID_DATE"),
        (lambda raw: (raw / "image" / "ADNI_subj.txt").unlink(), "FileNotFoundError"),
        (lambda raw: (raw / "image" / layouts.ATLAS).write_bytes(b"0"), "no image of NIfTI"),
        (lambda raw: (raw / "genomic/genomic_merged.h5ad").write_bytes(b"0"), "no AnnData"),
        (replaced("clinical/clinical_merged.csv", "PTID", "NAME"), "no column 'PTID'"),
    ],
)
def test_what_breaks_the_layout_is_one_line(merged, capsys, monkeypatch, break_it, said):
    break_it(merged)
    words = ["adni", "--source", str(merged), "--output", str(merged.parent / "out")]
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *words])
    with pytest.raises(SystemExit) as end:
        run_program(prepare_data.main)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert "_S_0" not in error.replace("002_S_0001_2010-01-31", "")  # names nobody


def test_rows_that_are_bad_go_to_quarantine_without_their_values(merged):
    path = merged / "label.csv"
    path.write_text(path.read_text().replace("002_S_0002,3", "002_S_0002,4"))
    maps = np.load(merged / "image" / "ADNI_G.npy")
    maps[20, 3] = np.inf
    np.save(merged / "image" / "ADNI_G.npy", maps)
    source = run(merged, "--max_bad_ratio", "0.5")
    lines = (source.data_dir / "quarantine.jsonl").read_text().splitlines()
    reasons = sorted(json.loads(line)["reason"] for line in lines)
    assert reasons == ["DIAGNOSIS is not 1, 2 or 3", "NaN, infinite or too large values in mri"]
    assert "_S_" not in "".join(lines)


def test_modality_that_was_asked_for_must_be_there(study):
    with pytest.raises(DataError, match=r"image/ADNI_G\.npy"):
        run(study, "--options", '{"modalities": "IC"}')
    (study / "clinical" / "VITALS.csv").unlink()
    with pytest.raises(DataError, match=r"no VITALS\.csv"):
        run(study)


def test_a_mask_that_was_changed_is_refused(merged):
    source = run(merged)
    (source.data_dir / "mri_mask.npy").write_bytes(b"0")
    with pytest.raises(DataError, match="missing or was changed"):
        list(map(source.to_sample, source.stream("train")))
