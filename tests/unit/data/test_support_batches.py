"""Supports in batches: packed once, from training rows alone, the same from any store."""

import dataclasses
import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from launch.scoring import Scorer
from mm_moe.batch import Batch, PackedArray, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.loading import SampleLoader
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.data.support_batch import Supports
from mm_moe.data.support_store import open_supports, write_store
from mm_moe.data.views import ViewCollator, views
from mm_moe.errors import ConfigError, DataError
from mm_moe.training.predict import batches_in_step

# row -> (lab value, text, volume): None is missing; two rows for each patient
ROWS = [
    (0.0, "a", 10),
    (1.0, None, 11),
    (2.0, "c", None),
    (None, "d", 13),
    (4.0, "e", 14),
    (5.0, "f", 15),
]
MODALITIES = ("lab", "text", "volume")


class Clinic(DataSource):
    """Three modalities; with random access if asked for."""

    name, modalities, problem_type, license = "clinic", MODALITIES, "none", "ours"
    label_names = ()

    def __init__(self, *, own_access: bool, rows=ROWS):
        super().__init__(None)
        self.own_access, self.rows, self.passes = own_access, rows, 0

    def splits(self):
        return ("train",)

    def stream(self, split):
        self.passes += 1
        numbers = datasets.Dataset.from_dict({"row": list(range(len(self.rows)))})
        return numbers.to_iterable_dataset()

    def to_sample(self, row):
        lab, text, volume = self.rows[row["row"]]
        payload = {
            "lab": None if lab is None else np.array([[lab, 1.0]], dtype="<f4"),
            "text": text,
            "volume": None if volume is None else PackedArray(bytes([volume]), "uint8", (1, 1)),
        }
        kept = {name: value for name, value in payload.items() if value is not None}
        return Sample(f"r{row['row']}", kept, group=f"patient{row['row'] // 2}")

    def size(self, split):
        return len(self.rows)

    def fingerprint(self):
        return "f"

    def samples_at(self, split, places):
        return [self.to_sample({"row": p}) for p in places] if self.own_access else None


def values(rows):
    return {"values": torch.from_numpy(np.stack(rows).astype("float32"))}


PROCESSORS = {
    "lab": values,
    "text": lambda rows: {"ids": torch.tensor([[ord(text)] for text in rows])},
    "volume": lambda rows: values([row.array() for row in rows]),
}


def collator(supports, missing=None):
    return Collator(
        modalities=MODALITIES,
        processors=PROCESSORS,
        problem_type="none",
        num_labels=0,
        missing=missing,
        vectors=("lab",),
        supports=supports,
    )


def supports_of(source, tmp_path, *, missing=None, **options):
    found = open_supports(source, split="train", missing=missing) or write_store(
        source, split="train", missing=missing, folder=tmp_path
    )
    return Supports(index=found[0], store=found[1], dataset="clinic", **options)


def samples(source):
    return [source.to_sample({"row": row}) for row in range(len(source.rows))]


@pytest.mark.parametrize("own_access", [True, False])
def test_a_batch_holds_what_is_lent(tmp_path, own_access):
    source = Clinic(own_access=own_access)
    batch = collator(supports_of(source, tmp_path, num_supports=3))(samples(source))
    text = batch["supports"]["text"]
    # row 1 (patient 0) lacks its text: complete rows of other patients are 4 and 5
    assert text["index"].tolist() == [4, 5]
    assert text["inputs"]["ids"].tolist() == [[ord("e")], [ord("f")]]
    assert sorted(text["rows"][0].tolist()) == [-1, 0, 1]
    assert text["present"].tolist() == [[True] * 3] * 2
    # row 2 lacks the volume: rows with all three, not of patient 1, are 0, 4 and 5
    volume = batch["supports"]["volume"]
    assert volume["inputs"]["values"][:, 0, 0].tolist() == [10.0, 14.0, 15.0]
    # row 3 lacks the lab value, and belongs to patient 1, too
    lab = batch["supports"]["lab"]
    assert lab["inputs"]["values"][:, 0].tolist() == [[0.0, 1.0], [4.0, 1.0], [5.0, 1.0]]


def test_nothing_lent_keeps_its_shape(tmp_path):
    supports = supports_of(Clinic(own_access=True), tmp_path)
    for found in (collator(supports)([]), collator(supports)(samples(Clinic(own_access=True))[4:])):
        lab = found["supports"]["lab"]
        assert lab["inputs"] == {}
        assert lab["rows"].shape == (0, 2)
        assert lab["present"].shape == (0, 3)
    alone = supports_of(Clinic(own_access=True, rows=[(1.0, None, None)] * 4), tmp_path)
    text = collator(alone)(samples(Clinic(own_access=True))[1:2])["supports"]["text"]
    assert text["inputs"] == {}
    assert text["rows"].tolist() == [[-1, -1]]


def test_what_the_mask_took_in_training_is_not_lent(tmp_path):
    missing = MissingProtocol(dataset="clinic", split="train", kind="text", ratio=1.0)
    for own_access in (True, False):
        source = Clinic(own_access=own_access)
        supports = supports_of(source, tmp_path, missing=missing)
        batch = collator(supports, missing)(samples(source))
        assert batch["supports"]["text"]["inputs"] == {}
        assert not batch["supports"]["volume"]["present"][:, 1].any()


def test_as_many_supports_as_modalities_by_default(tmp_path):
    source = Clinic(own_access=True)
    lab = collator(supports_of(source, tmp_path))(samples(source))["supports"]["lab"]
    assert (lab["rows"] >= 0).sum(1).tolist() == [2]


def test_whole_supports_are_found_under_all_that_they_have(tmp_path):
    rows = [*ROWS[:4], (4.0, "e", None), (5.0, b"\xff", 15)]
    source = Clinic(own_access=True, rows=rows)
    only = [samples(source)[0]]
    only[0].payload.pop("lab")
    only[0].payload.pop("volume")
    found = collator(supports_of(source, tmp_path, whole=True, num_supports=3))(only)["supports"]
    # rows 2, 4 and 5 have a lab value and a text, which row 5's does not turn out to be;
    # rows 3 and 5 have a text and a volume
    assert found["lab"]["index"].tolist() == [2, 4, 5]
    assert sorted(found["lab"]["rows"][0].tolist()) == [0, 1, 2]
    assert found["text"]["index"].tolist() == [2, 3, 4]
    assert found["text"]["rows"].shape == (0, 3)
    assert found["volume"]["index"].tolist() == [3, 5]
    plain = collator(supports_of(source, tmp_path, num_supports=3))(only)["supports"]
    assert plain["lab"]["index"].tolist() == [2, 4, 5]
    assert plain["text"]["index"].tolist() == []


def test_a_support_that_does_not_decode_is_padding(tmp_path):
    rows = [*ROWS[:4], (4.0, b"\xff", 14), (5.0, b"\xff", 15)]
    source = Clinic(own_access=True, rows=rows)
    supports = supports_of(source, tmp_path)
    text = collator(supports)([samples(source)[1]])["supports"]["text"]
    assert text["rows"].tolist() == [[-1, -1]]


def test_the_file_is_written_once_and_holds_no_id(tmp_path):
    source = Clinic(own_access=False)
    supports_of(source, tmp_path)
    again = Clinic(own_access=False)
    supports = supports_of(again, tmp_path)
    assert again.passes == 0
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"patient" not in written
    assert b"r1" not in written
    batch = samples(source)
    first = collator(supports)(batch)["supports"]
    twin = collator(pickle.loads(pickle.dumps(supports)))(batch)["supports"]
    assert first["lab"]["rows"].tolist() == twin["lab"]["rows"].tolist()
    assert torch.equal(first["lab"]["inputs"]["values"], twin["lab"]["inputs"]["values"])
    supports_of(Clinic(own_access=False, rows=ROWS), tmp_path, missing=None)
    assert len(list(tmp_path.iterdir())) == 2
    missing = MissingProtocol(dataset="clinic", split="train", kind="lab", ratio=0.5)
    supports_of(source, tmp_path, missing=missing)
    assert len(list(tmp_path.iterdir())) == 4  # another mask, another file


def test_another_version_of_the_data_gets_its_own_file(tmp_path):
    supports_of(Clinic(own_access=False), tmp_path)
    newer = Clinic(own_access=False)
    newer.fingerprint = lambda: "g"
    supports_of(newer, tmp_path)
    assert newer.passes == 1
    assert len(list(tmp_path.iterdir())) == 4


def test_other_options_of_the_data_get_their_own_file(tmp_path):
    clinic = {"split": "train", "missing": None, "folder": tmp_path}
    write_store(Clinic(own_access=False), **clinic, options={"column": "text", "fold": 1})
    same = Clinic(own_access=False)
    write_store(same, **clinic, options={"fold": 1, "column": "text"})
    assert same.passes == 0
    other = Clinic(own_access=False)  # the same files, of which other columns are read
    write_store(other, **clinic, options={"column": "note", "fold": 1})
    assert other.passes == 1
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("ending", ["npz", "arrow"])
def test_a_damaged_file_is_an_error(tmp_path, ending):
    source = Clinic(own_access=False)
    supports_of(source, tmp_path)
    [path] = tmp_path.glob(f"*.{ending}")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=ending):
        collator(supports_of(source, tmp_path))(samples(source))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="cannot be written"):
        supports_of(Clinic(own_access=False), tmp_path / "file")


def test_a_payload_that_cannot_be_kept_is_an_error(tmp_path):
    source = Clinic(own_access=False, rows=[(1.0, {"no": "text"}, None)])
    with pytest.raises(DataError, match="'text' is a dict"):
        supports_of(source, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_those_of_the_sample_wherever_it_is_packed(tmp_path, workers):
    source = Clinic(own_access=False)
    supports = supports_of(source, tmp_path, num_supports=1)
    found = {}
    for start in (0, 4):  # as after a resume
        stream = SampleStream(source, split="train", batch_size=2, start=start, epochs=2)
        loader = SampleLoader(
            stream, batch_size=2, collate_fn=collator(supports), num_workers=workers
        )
        for step, batch in enumerate(loader, start // 2):
            one = {m: part["index"].tolist() for m, part in batch["supports"].items()}
            assert found.setdefault(step, one) == one
    assert len(found) == 6
    assert found[0] != found[3]  # the same rows in another epoch


def test_a_view_borrows_what_its_protocol_alone_would(tmp_path):
    source = Clinic(own_access=True)
    supports = supports_of(source, tmp_path)
    missing = MissingProtocol(dataset="clinic", split="train", kind="volume", ratio=1.0)
    alone = collator(supports, missing)(samples(source)[4:])["supports"]["volume"]
    found = views(samples(source)[4:], protocols=[missing], modalities=MODALITIES)
    seen = ViewCollator(collator(supports))(found)["supports"]["volume"]
    assert alone["index"].tolist() == seen["index"].tolist()
    assert alone["rows"].tolist() == seen["rows"].tolist()


def test_scoring_keeps_the_supports_and_casts_them():
    supports = {"lab": {"inputs": {"values": torch.ones(1, 2)}, "rows": torch.zeros(1, 1).long()}}
    batch = Batch.of(["x"], torch.ones(1, 1, dtype=torch.bool), {}, torch.zeros(1))
    batch["supports"] = supports
    model = nn.Linear(1, 1).double()
    [found] = batches_in_step(model, [batch], num_modalities=1)
    assert found["supports"]["lab"]["inputs"]["values"].dtype == torch.float64
    assert found["supports"]["lab"]["rows"].dtype == torch.int64


def test_no_support_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_supports"):
        supports_of(Clinic(own_access=True), tmp_path, num_supports=0)


class Lent(nn.Module):
    """Says of a sample the sum of the lab values that it is lent, and 1000 if it has its own."""

    def __init__(self):
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(()))

    def forward(self, present, inputs, supports=None, **_):
        has_B = present[:, 0]
        logits = torch.where(has_B, 1000.0, 0.0)
        if not has_B.all():
            lent = supports["lab"]
            rows = lent["inputs"]["values"][lent["rows"]]  # (Q, n, 1, 2), the second feature is 1
            logits[~has_B] = rows[..., 0].flatten(1).sum(1)
        return SimpleNamespace(logits=logits[:, None])


def test_scoring_averages_over_draws(tmp_path):
    source = Clinic(own_access=True)
    drawn = supports_of(source, tmp_path, num_supports=1)
    protocol = MissingProtocol(dataset="clinic", split="train", kind="lab", ratio=1.0)

    def logits(**options):
        supports = dataclasses.replace(drawn, **options)
        scorer = Scorer(Lent(), source, PROCESSORS, 4, max_bad_samples=0, supports=supports)
        return list(scorer.predict_all([None, protocol], "train")), scorer

    once, _ = logits()
    found, scorer = logits(num_draws=5)
    for plain, mean in zip(once, found, strict=True):
        assert plain.ids == mean.ids
        assert (plain.present == mean.present).all()
    # of the samples as they are, only row 3 lacks its lab value
    assert [row for row in range(6) if once[0].logits[row, 0] != 1000] == [3]
    for place, samples_seen in ((0, samples(source)), (1, taken(samples(source)))):
        by_hand = []
        for epoch in range(5):
            copies = [dataclasses.replace(sample, epoch=epoch) for sample in samples_seen]
            batch = collator(drawn)(copies)
            by_hand.append(Lent()(batch.present, batch.inputs, batch["supports"]).logits.numpy())
        assert np.allclose(found[place].logits, np.mean(by_hand, axis=0))
    assert not np.allclose(found[1].logits, once[1].logits)
    assert np.allclose(scorer.predict(protocol, "train").logits, found[1].logits)


def taken(found):
    """The same samples without their lab value, where they have another one."""
    payloads = [{k: v for k, v in s.payload.items() if k != "lab"} or s.payload for s in found]
    return [dataclasses.replace(s, payload=p) for s, p in zip(found, payloads, strict=True)]
