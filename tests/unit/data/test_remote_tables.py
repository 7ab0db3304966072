"""Tables over HTTP: the rows of local files, in one order whatever the server does."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mm_moe.data.collate import Collator
from mm_moe.data.decode import UndecodableImageError, decode_image
from mm_moe.data.remote_tables import expand
from mm_moe.data.retrying import Remote, RemoteError
from mm_moe.data.sets.columns import ColumnsData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import DataError
from tests.flaky_server import serving

pytestmark = pytest.mark.faults
NAMED = {"text_column": "words", "label_column": "kind", "id_column": "key"}


def rows_of(shard, count=9):
    return [
        {"key": f"r{shard}-{n}", "words": f"word {n}", "kind": "ab"[n % 2], "image": f"{n}.png"}
        for n in range(count)
    ]


def picture(number):
    out = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


WRITERS = {
    "parquet": lambda path, rows: pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=4
    ),
    "csv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False),
    "tsv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False, sep="\t"),
    "jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
}


@pytest.fixture
def folder(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def write(folder, kind="parquet", shards=3):
    for shard in range(shards):
        WRITERS[kind](folder / f"train-{shard}.{kind}", rows_of(shard))


def remote_data(server, kind="parquet", shards=3, query="", **options):
    name = f"train-{{0..{shards - 1}}}.{kind}"
    source = ColumnsData(server.url + "/" + query, train=name, **NAMED, **options)
    source.remote.first_wait_s = 0.001
    return source


def ids(source, **options):
    options = {"batch_size": 1, "shuffle_buffer": 5, "seed": 3, "epochs": 2} | options
    return [sample.id for sample in SampleStream(source, split="train", **options)]


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_same_rows_as_from_local_files(folder, kind):
    write(folder, kind)
    local = ColumnsData(str(folder), train=f"train-*.{kind}", **NAMED)
    with serving(folder) as server:
        source = remote_data(server, kind)
        assert source.label_names == local.label_names == ("a", "b")
        assert source.size("train") == (27 if kind == "parquet" else None)
        assert ids(source, shuffle_buffer=0) == ids(local, shuffle_buffer=0)
        assert sorted(ids(source)) == sorted(ids(local))
        first = next(iter(SampleStream(source, split="train", batch_size=1)))
    assert (first.id, first.payload, first.label) == ("r0-0", {"text": "word 0"}, 0)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_server_that_fails_changes_nothing(folder, kind, has_ranges):
    write(folder, kind)
    with serving(folder) as server:
        server.has_ranges = has_ranges
        clean = ids(remote_data(server, kind))
        server.share = 0.2
        server.faults = ("busy", "retry_after", "reset", "cut", "short_length", "bad_range")
        source = remote_data(server, kind, stream_retries=20)
        assert ids(source) == clean
        assert source.remote.num_retries > 0


def test_pictures_at_addresses_come_whole_over_loader_workers(folder):
    write(folder)
    with serving(folder) as server:

        def pixels(**faults):
            server.share = faults.pop("share", 0.0)
            server.faults = ("busy", "reset", "cut", "short_length", "retry_after")
            source = remote_data(server, image_column="image", stream_retries=20)
            collate = Collator(
                modalities=("image",),
                processors={"image": lambda rows: {"sums": sum_of(rows)}},
                problem_type="none",
                num_labels=0,
                remote=source.remote,
            )
            stream = SampleStream(source, split="train", batch_size=4, epochs=1)
            loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=collate)
            found = [(batch.ids, batch.inputs["image"]["sums"].tolist()) for batch in loader]
            return found, source.remote.num_retries, collate.num_bad

        clean, none, no_bad = pixels()
        faulty, some, still_no_bad = pixels(share=0.3)
    assert faulty == clean
    assert (none, no_bad, still_no_bad) == (0, 0, 0)
    assert some > 0  # counted in the workers, seen here


def sum_of(images):
    import torch

    return torch.tensor([int(np.asarray(image, dtype=np.int64).sum()) for image in images])


def test_a_broken_picture_is_believed_when_its_length_was_right(folder):
    (folder / "half.png").write_bytes(picture(0)[:200])
    remote = Remote(first_wait_s=0.001)
    with serving(folder) as server:
        with pytest.raises(UndecodableImageError):
            decode_image(f"{server.url}/half.png", remote=remote)
        assert server.asked["/half.png"] >= 2
        with pytest.raises(UndecodableImageError, match="gone"):  # a dead link: a bad sample
            decode_image(f"{server.url}/absent.png", remote=remote)
        server.status["/0.png"] = 403  # no fault of the sample: this ends the run
        with pytest.raises(RemoteError, match=r"/0\.png cannot be read: status 403"):
            decode_image(f"{server.url}/0.png", remote=remote)


def test_an_absent_shard_is_named_and_nothing_else_is_told(folder):
    write(folder, shards=2)
    with serving(folder) as server:
        source = remote_data(server, shards=3, query="?token=hushed")
        with pytest.raises(RemoteError, match=r"/train-2\.parquet cannot be read: .* 404") as told:
            source.size("train")
    assert "hushed" not in str(told.value)
    assert source.name == "columns/" + source.name.split("/")[1]
    assert "hushed" not in source.name


def test_a_cut_file_on_the_server_itself_is_refused(folder):
    write(folder, shards=1)
    whole = (folder / "train-0.parquet").read_bytes()
    (folder / "train-0.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "train-0.jsonl").write_text(
        '{"key": "a", "words": "b", "kind": "a"}\n{"key": "c", "wo'
    )
    with serving(folder) as server:
        with pytest.raises(DataError, match="cannot be read"):
            ids(remote_data(server, shards=1))
        with pytest.raises(DataError, match="cannot be read"):
            ids(remote_data(server, "jsonl", shards=1))


def test_names_of_files():
    assert expand("a-{08..11}.csv") == ["a-08.csv", "a-09.csv", "a-10.csv", "a-11.csv"]
    assert expand("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert expand("plain.csv") == ["plain.csv"]
    with pytest.raises(DataError, match="names 0 files"):
        expand("{3..2}.csv")
    for options, words in (
        ({}, "no folder can be listed over HTTP; name the files"),
        ({"train": "x.txt"}, "must be tables of one format .*, not x.txt"),
        ({"train": "x.csv", "test": "y.parquet"}, "one format .*, not csv, parquet"),
    ):
        with pytest.raises(DataError, match=words):
            ColumnsData("http://127.0.0.1:9/data", **NAMED, **options)
