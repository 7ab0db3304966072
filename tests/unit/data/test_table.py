import json
import pickle

import pytest
import torch

from mm_moe.data.missing import MissingProtocol
from mm_moe.data.table import MissingTable, import_legacy_table, table_of
from mm_moe.errors import DataError

TWO = ("image", "text")
TABLE = MissingTable(
    ("a", "b", "c", "d"), (3, 1, 2, 3), TWO
)  # complete, no text, no image, complete


def test_a_table_answers_by_id():
    assert TABLE.present(["c", "a"], TWO).tolist() == [[False, True], [True, True]]
    assert TABLE.present(["c"], ("text", "image")).tolist() == [[True, False]]
    assert TABLE.describe() == "50% = 50% of samples lack something: 25% no text, 25% no image"


def test_a_protocol_and_its_table_agree(tmp_path):
    ids = [str(n) for n in range(50)]
    protocol = MissingProtocol(dataset="d", split="train", kind="both", ratio=0.6)
    table = table_of(protocol, ids=ids, modalities=TWO)
    table.save(tmp_path / "table.json")
    loaded = MissingTable.load(tmp_path / "table.json")
    assert loaded == table
    assert torch.equal(loaded.present(ids[::-1], TWO), protocol.present(ids[::-1], TWO))
    assert loaded.table_hash() == protocol.table_hash(ids, TWO)
    assert loaded.origin["ratio"] == 0.6


def test_a_changed_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "table.json"
    TABLE.save(path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "patterns": [3, 3, 3, 3]}))
    with pytest.raises(DataError, match="hash does not match"):
        MissingTable.load(path)
    for text in ("{}", "[1]", "no json", json.dumps({**record, "format": "other"})):
        path.write_text(text)
        with pytest.raises(DataError, match="not a missing table"):
            MissingTable.load(path)
    with pytest.raises(DataError, match="not a missing table"):
        MissingTable.load(tmp_path / "absent.json")


def test_wrong_tables_and_questions():
    with pytest.raises(DataError, match="1 ids and 2 patterns"):
        MissingTable(("a",), (3, 3), TWO)
    with pytest.raises(DataError, match="names a sample twice"):
        MissingTable(("a", "a"), (3, 3), TWO)
    with pytest.raises(DataError, match="outside 1 to 3"):
        MissingTable(("a",), (0,), TWO)
    with pytest.raises(DataError, match="1 samples are not in the missing table, first 'z'"):
        TABLE.present(["a", "z"], TWO)
    with pytest.raises(DataError, match="over image, text, the model over image, audio"):
        TABLE.present(["a"], ("image", "audio"))


def test_legacy_table(tmp_path):
    path = tmp_path / "food101_train_missing_both_07.pt"
    torch.save(torch.tensor([0.0, 1.0, 2.0, 0.0]), path)
    table = import_legacy_table(path, ids=["a", "b", "c", "d"])
    assert table.patterns == TABLE.patterns
    assert table.origin == {"legacy": path.name}


def test_legacy_table_that_does_not_fit(tmp_path):
    path = tmp_path / "t.pt"
    torch.save(torch.tensor([0.0, 1.0]), path)
    with pytest.raises(DataError, match="2 rows and the split 3 samples"):
        import_legacy_table(path, ids=["a", "b", "c"])
    torch.save(torch.tensor([0.0, 3.0]), path)
    with pytest.raises(DataError, match=r"codes \[3.0\]"):
        import_legacy_table(path, ids=["a", "b"])
    torch.save(torch.zeros(2, 2), path)
    with pytest.raises(DataError, match="one vector"):
        import_legacy_table(path, ids=["a", "b"])
    path.write_bytes(b"not a torch file")
    with pytest.raises(DataError, match="not a missing table of numbers"):
        import_legacy_table(path, ids=["a", "b"])


class Intruder:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a data file was run')",))


def test_legacy_table_cannot_run_code(tmp_path):
    torch.save(Intruder(), tmp_path / "t.pt", pickle_module=pickle)
    with pytest.raises(DataError, match="not a missing table of numbers"):
        import_legacy_table(tmp_path / "t.pt", ids=["a"])
    with pytest.raises(DataError) as caught:  # one line, without the library's way around it
        import_legacy_table(tmp_path / "t.pt", ids=["a"])
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x02h\x05.", b"c\n", b"(lp0\n."])
def test_legacy_table_that_is_damaged(tmp_path, content):
    (tmp_path / "t.pt").write_bytes(content)
    with pytest.raises(DataError, match="not a missing table of numbers"):
        import_legacy_table(tmp_path / "t.pt", ids=["a"])


@pytest.mark.parametrize("codes", [torch.zeros(2).to_sparse(), torch.zeros(2) + 0j])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_legacy_table_of_another_kind_of_tensor(tmp_path, codes):
    torch.save(codes, tmp_path / "t.pt")
    with pytest.raises(DataError, match="one vector"):
        import_legacy_table(tmp_path / "t.pt", ids=["a", "b"])


@pytest.mark.parametrize("change", [{"origin": None}, {"origin": [1]}, {"patterns": [3.0] * 4}])
def test_table_with_parts_of_another_type(tmp_path, change):
    TABLE.save(tmp_path / "t.json")
    record = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(record | change))
    with pytest.raises(DataError, match="is not a missing table"):
        MissingTable.load(tmp_path / "t.json")


def test_table_nested_too_deep(tmp_path):
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not a missing table"):
        MissingTable.load(tmp_path / "t.json")
