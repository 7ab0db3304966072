import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data.kspace import centred_image, magnitude_and_phase
from mm_moe.data.prepare.knee_labels import four_labels, read_findings, split_volumes
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts, raw_slices

h5py = pytest.importorskip("h5py", reason="pip install h5py")
VOLUMES = raw_slices.KNEE_VOLUMES


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Volumes through the program that writes slices."""
    folder = tmp_path_factory.mktemp("knee")
    volumes, annotations = raw_slices.fastmri_volumes(folder)
    flags = ["--source", str(volumes), "--annotations", str(annotations)]
    assert prepare_data.main(["fastmri_slices", *flags, "--output", str(folder / "slices")]) == 0
    return folder / "slices"


def run(slices, output, *flags):
    words = ["fastmri_knee", "--source", str(slices), "--output", str(output), *flags]
    assert prepare_data.main(words) == 0
    return PreparedData(str(output))


def samples(source):
    rows = (row for split in source.splits() for row in source.stream(split))
    return {row["id"]: source.to_sample(row) for row in rows}


def test_findings_as_four_labels():
    assert four_labels(["Meniscus Tear", "ACL High Grade Sprain"]) == [0, 1, 1, 0]
    assert four_labels(["Cartilage - Full Thickness loss/defect", "Joint Effusion"]) == [1, 0, 0, 1]
    assert four_labels([]) == [0, 0, 0, 0]


def test_volumes_are_split_70_15_15_whatever_their_order():
    names = [f"file{n}" for n in range(100)]
    found = split_volumes(names)
    assert found == split_volumes(names[::-1])
    counts = [list(found.values()).count(split) for split in ("train", "validation", "test")]
    assert counts == [70, 15, 15]


def test_slices_have_the_published_layout(slices):
    lines = list(csv.DictReader((slices / "metadata_knee.csv").open()))
    assert len(lines) == 7  # of seven volumes, one is too wide; the first has two slices
    assert {line["volume_id"] for line in lines} == set(VOLUMES[:7]) - {VOLUMES[5]}
    line = next(x for x in lines if (x["volume_id"], x["slice_id"]) == (VOLUMES[0], "1"))
    assert line["index"] == f"knee_knee_singlecoil_{VOLUMES[0]}_1"
    assert line["labels"] == "['Meniscus Tear', 'ACL High Grade Sprain']"
    assert line["data_split"] in ("train_class", "val_class", "test_class")
    with h5py.File(slices / VOLUMES[1] / f"knee_singlecoil_{VOLUMES[1]}_0.h5") as file:
        assert file["sc_kspace"].shape == (640, 400)
        measured = file["sampled_indices"][()]
        assert measured.tolist() == list(range(14, 14 + 371))  # 29 columns are filled
        assert not file["sc_kspace"][:, 13].any()
        assert file["sc_kspace"][:, 14].all()
        assert file["recon_rss"].shape == (320, 320)


def test_magnitude_phase_and_labels(slices, tmp_path):
    source = run(slices, tmp_path / "out")
    assert (source.task, source.modalities) == ("knee_findings", ("magnitude", "phase"))
    found = samples(source)
    sample = found[f"{VOLUMES[0]}-1"]
    assert (sample.label, sample.group, sample.mask_key) == (
        [0, 1, 1, 0],
        VOLUMES[0],
        f"{VOLUMES[0]}-1",
    )
    assert found[f"{VOLUMES[0]}-0"].label == [0, 0, 0, 0]
    assert found[f"{VOLUMES[1]}-0"].label == [0, 0, 0, 1]
    assert found[f"{VOLUMES[2]}-0"].label == [1, 0, 0, 0]  # of the whole study, at slice 0
    with h5py.File(slices / VOLUMES[0] / f"knee_singlecoil_{VOLUMES[0]}_1.h5") as file:
        magnitude, phase = magnitude_and_phase(centred_image(file["sc_kspace"][()]), 320)
    for name, wanted in (("magnitude", magnitude), ("phase", phase)):
        assert np.array_equal(sample.payload[name].array(), wanted)
        assert source.array_shapes[name] == {"shape": [320, 320], "scale": 1.0}  # not normalised
    volumes = {split: {s.group for s in source.index(split)} for split in source.splits()}
    assert not volumes["train"] & volumes["test"]
    assert not volumes["train"] & volumes["validation"]


def test_noise_belongs_to_the_slice_and_training_draws_below(slices, tmp_path):
    plain, noisy = (
        samples(run(slices, tmp_path / f"{noise}", "--options", json.dumps({"noise": noise})))
        for noise in (0, 20)
    )
    again = samples(run(slices, tmp_path / "again", "--options", '{"noise": 20}'))
    assert noisy == again
    assert all(noisy[name].payload != plain[name].payload for name in plain)
    with pytest.raises(ConfigError, match="percentage"):
        run(slices, tmp_path / "never", "--options", '{"noise": 200}')


def test_a_lost_slice_is_named(slices, tmp_path):
    copy = tmp_path / "copy"
    for path in slices.rglob("*"):
        if path.is_file() and not path.name.endswith(f"{VOLUMES[0]}_1.h5"):
            raw_layouts.put(copy / path.relative_to(slices), path.read_bytes())
    source = run(copy, tmp_path / "out", "--max_bad_ratio", "0.5")
    lines = Path(source.data_dir, "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{VOLUMES[0]}-1"]


def test_slices_are_not_written_over(slices):
    words = ["--source", str(slices), "--annotations", str(slices), "--output", str(slices)]
    with pytest.raises(ConfigError, match="name a new folder"):
        prepare_data.main(["fastmri_slices", *words])


@pytest.mark.parametrize("kind", ["group", "text", "link"])
def test_kspace_of_another_kind_is_quarantined(slices, tmp_path, kind):
    folder = shutil.copytree(slices, tmp_path / "slices")
    with h5py.File(min(folder.rglob("*.h5")), "a") as file:
        del file["sc_kspace"]
        if kind == "group":
            file.create_group("sc_kspace")
        else:
            link = h5py.ExternalLink("/nowhere.h5", "/x")
            file["sc_kspace"] = "text" if kind == "text" else link
    source = run(folder, tmp_path / "out", "--max_bad_ratio", "0.6")
    assert sum(record["quarantined"] for record in source.info["splits"].values()) == 1


def test_tables_of_the_knee_that_are_no_text(slices, tmp_path):
    folder = shutil.copytree(slices, tmp_path / "slices")
    (folder / "metadata_knee.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="UnicodeDecodeError"):
        run(folder, tmp_path / "out")
    (tmp_path / "knee.csv").write_bytes(b'file,slice,label\n"' + b"x" * 200_000)
    with pytest.raises(DataError, match=r"knee\.csv cannot be read: Error"):
        read_findings(tmp_path / "knee.csv")
    (tmp_path / "knee.csv").write_text("file,slice,label\nv,\u00b2,tear\nv,1\nv,2,tear\n")
    assert read_findings(tmp_path / "knee.csv") == {("v", 2): ["tear"]}


def test_split_of_too_few_volumes_is_refused():
    assert sorted(split_volumes("abcd").values()) == ["test", "train", "train", "validation"]
    with pytest.raises(DataError, match="3 volumes cannot be dealt"):
        split_volumes("abc")


def test_volume_with_fewer_reconstructions_than_slices(tmp_path):
    volumes, annotations = raw_slices.fastmri_volumes(tmp_path)
    with h5py.File(volumes / "singlecoil_train" / f"{VOLUMES[0]}.h5", "a") as file:
        whole = file["reconstruction_esc"][()]
        del file["reconstruction_esc"]
        file["reconstruction_esc"] = whole[:1]
    words = ["--source", str(volumes), "--annotations", str(annotations)]
    with pytest.raises(DataError, match="is no volume of fastMRI"):
        prepare_data.main(["fastmri_slices", *words, "--output", str(tmp_path / "out")])
    assert not list(tmp_path.glob("*out*"))
