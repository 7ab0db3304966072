"""Tar shards as rows: what is a row, where its parts are, and what is refused."""

import json
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mm_moe.data.captions import Captions
from mm_moe.data.collate import Collator
from mm_moe.data.sets.webdataset import WebData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests.pairs_data import pair_files, picture, write_shards, write_tar


def samples(source, split="train", **options):
    return list(SampleStream(source, split=split, batch_size=1, epochs=1, **options))


def ids(source, split="train", **options):
    return [sample.id for sample in samples(source, split, **options)]


def one(path, files, **options):
    write_tar(path / "train.tar", files)
    return samples(WebData(str(path), **options))


def collated(found, **options):
    processors = {"image": lambda rows: {"n": rows}, "text": lambda rows: {"t": rows}}
    kind = Collator(
        modalities=("image", "text"), processors=processors, problem_type="none", num_labels=0
    )
    return kind(found), kind


def test_a_key_is_a_row_with_its_picture_and_caption(tmp_path):
    source = WebData(str(write_shards(tmp_path, rows=4, shards=2)))
    found = samples(source)
    assert [sample.id for sample in found] == [
        *("train-0/0000", "train-0/0001", "train-1/0002", "train-1/0003")
    ]
    assert [sample.payload["text"] for sample in found] == [f"caption {n}" for n in range(4)]
    assert found[2].payload["image"] == picture((14, 0, 0))
    assert source.size("train") is None


def test_splits_by_words_and_by_patterns_give_the_same_ids(tmp_path):
    write_shards(tmp_path, rows=4, shards=2)
    write_shards(tmp_path, rows=3, shards=1, split="val")
    by_words = WebData(str(tmp_path))
    assert by_words.splits() == ("train", "validation")
    by_pattern = WebData(f"{tmp_path}/train-{{0..1}}.tar", validation="val-*.tar")
    listed = WebData(str(tmp_path), train="train-0.tar::train-1.tar", validation="val-0.tar")
    for other in (by_pattern, listed):
        for split in by_words.splits():
            assert ids(other, split) == ids(by_words, split)
    assert by_words.name == by_pattern.name == f"webdataset/{tmp_path.name}"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_long_names(tmp_path, format):
    long = "folder/" + "x" * 60 + "/" + "y" * 90
    files = [(f"{long}.jpg", picture("red")), (f"{long}.txt", b"a red one")]
    write_tar(tmp_path / "a.tar", [*files, *pair_files([1])], format=format)
    found = samples(WebData(str(tmp_path)))
    assert [sample.id for sample in found] == [f"a/{long}", "a/0001"]
    assert found[0].payload == {"image": picture("red"), "text": "a red one"}


def test_a_row_may_lack_one_of_the_two_and_other_members_are_left_alone(tmp_path):
    files = [
        *(("a.png", picture("red", format="PNG")), ("a.cls", b"3")),
        *(("b.txt", b"only words"), ("README", b"nothing")),
        *(("c.cls", b"1"), ("d.JPG", picture("blue")), ("d.txt", b"")),
    ]
    found = one(tmp_path, files)
    assert [(s.id, sorted(s.payload)) for s in found] == [
        *(("train/a", ["image"]), ("train/b", ["text"]), ("train/d", ["image"]))
    ]


def test_captions_of_json_and_several(tmp_path):
    fields = {"caption": "short", "alt": ["one", "two"], "url": 3}
    files = [("a.jpg", picture("red")), ("a.json", json.dumps(fields).encode())]
    assert one(tmp_path, files)[0].payload["text"] == "short"  # no .txt: the JSON's caption
    text = {"json.caption": 2, "json.alt": 1, "json.url": 1}
    payload = one(tmp_path, files, text=text)[0].payload["text"]
    assert payload == Captions(("short", "one", "two"), (2, 0.5, 0.5))


def test_a_key_that_comes_again_is_another_row(tmp_path):
    files = [*pair_files([1]), *pair_files([1]), *pair_files([2]), *pair_files([1])]
    found = one(tmp_path, files)
    assert [sample.id for sample in found] == [
        *("train/0001", "train/0001~2", "train/0002", "train/0001~3")
    ]
    assert all(set(sample.payload) == {"image", "text"} for sample in found)


def test_a_caption_that_is_no_utf8_and_a_broken_json_are_counted(tmp_path):
    files = [("a.jpg", picture("red")), ("a.txt", b"caf\xe9"), *pair_files([1])]
    batch, collate = collated(one(tmp_path, files))
    assert batch.present.tolist() == [[True, False], [True, True]]
    assert collate.bad == {"train/a": "its text is no UTF-8"}
    files = [("a.jpg", picture("red")), ("a.json", b"{not"), *pair_files([1])]
    batch, collate = collated(one(tmp_path, files, text="json.caption"))
    assert batch.present.tolist() == [[True, False], [True, False]]
    assert collate.bad_ids == ["train/a"]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def refusals(tmp_path):
    """Name -> (options, words of the error)."""
    good = write_shards(tmp_path / "good", rows=2, shards=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.tar").write_bytes(b"")
    write_tar(tmp_path / "nothing" / "a.tar", [])
    write_tar(tmp_path / "other" / "a.tar", [("a.npy", b"123"), ("b.cls", b"1")])
    write_shards(tmp_path / "cut", rows=2, shards=1)
    cut(tmp_path / "cut" / "train-0.tar", 1000)
    write_shards(tmp_path / "short", rows=2, shards=1)
    whole = (tmp_path / "short" / "train-0.tar").read_bytes().rstrip(b"\0")
    end = -(-len(whole) // 512) * 512  # of the last member: only the end mark is lost
    cut(tmp_path / "short" / "train-0.tar", end)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 4)
    return [
        ({"data_dir": str(empty)}, "a.tar is empty"),
        ({"data_dir": str(tmp_path / "nothing")}, "holds no pair"),
        ({"data_dir": str(tmp_path / "other")}, "holds no pair.*images and text"),
        ({"data_dir": str(tmp_path / "cut")}, "cut off.*it has 1,000"),
        ({"data_dir": str(tmp_path / "short")}, "without tar's end mark"),
        ({"data_dir": str(tmp_path / "packed")}, "is no tar, or is damaged"),
        ({"data_dir": str(tmp_path / "nowhere")}, "no folder"),
        ({"data_dir": f"{good}/{{5..9}}.tar"}, "there is no file .*5.tar"),
        ({"data_dir": f"{good}/none-*.tar"}, "no file matches"),
        ({"data_dir": str(good), "train": "train-0.tar::*.tar"}, "named twice"),
        ({"data_dir": "http://127.0.0.1:9/folder"}, "no folder can be listed"),
    ]


def test_what_cannot_be_read_is_said(tmp_path):
    for options, words in refusals(tmp_path):
        with pytest.raises(DataError, match=words):
            samples(WebData(**options))
    with pytest.raises(ConfigError, match="needs data_dir"):
        WebData()
    with pytest.raises(ConfigError, match="'txt' the weight 0"):
        WebData(str(tmp_path / "good"), text={"txt": 0})


def test_sizes_are_told_and_a_wrong_one_is_refused(tmp_path):
    folder = write_shards(tmp_path, rows=6, shards=2)
    (folder / "sizes.json").write_text(json.dumps({"train-0.tar": 3, "train-1.tar": 3}))
    assert WebData(str(folder)).size("train") == 6
    assert len(ids(WebData(str(folder), num_samples=6))) == 6
    with pytest.raises(DataError, match="has 6 rows and not 7"):
        ids(WebData(str(folder), num_samples=7))


@pytest.mark.parametrize("told", [None, 12])
def test_shuffled_order_resumes_exactly_and_travels_to_workers(tmp_path, told):
    source = WebData(str(write_shards(tmp_path)), num_samples=told)
    make = partial(SampleStream, source, split="train", batch_size=2, shuffle_buffer=5, seed=3)
    line = iter(make())
    whole = [(sample.id, sample.epoch) for sample, _ in zip(line, range(40), strict=False)]
    assert sorted(i for i, _ in whole[:12]) == sorted(i for i, _ in whole[12:24])
    assert [i for i, _ in whole[:12]] != [i for i, _ in whole[12:24]]
    assert [epoch for _, epoch in whole] == [n // 12 for n in range(40)]
    rest = pickle.loads(pickle.dumps(make(start=17)))
    assert [(s.id, s.epoch) for s, _ in zip(rest, range(23), strict=False)] == whole[17:]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    write_shards(tmp_path, rows=6, shards=2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_over_http_are_the_same_rows(tmp_path, address):
    remote = WebData(f"{address}/train-{{0..1}}.tar?token=secret")
    local = WebData(str(tmp_path))
    assert [(s.id, s.payload) for s in samples(remote)] == [
        (s.id, s.payload) for s in samples(local)
    ]
    cut(tmp_path / "train-1.tar", 1500)
    with pytest.raises(DataError, match="cut off") as caught:
        samples(WebData(f"{address}/train-{{0..1}}.tar?token=secret"))
    assert "secret" not in str(caught.value)
