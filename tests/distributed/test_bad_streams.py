"""A server that fails a fifth of its requests: the same training, to the bit."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here
from tests.flaky_server import serving

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

RECIPE = """\
dataset: columns
dataset_options: {image_column: image, text_column: text, label_column: label, id_column: key,
  train: "train-{0..2}.parquet"}
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 32, num_blocks: 2, width: 16, num_heads: 2, hidden: 16}
moe_layers_idx: [1]
num_experts: 2
prompt: missing_aware
global_batch_size: 4
shuffle_buffer: 5
max_steps: 8
save_steps: 4
logging_steps: 1
stream_retries: 20
final_evaluation: false
"""
SHARDS, ROWS = 3, 6  # 18 rows; 8 batches of 4 go into the second epoch
BROKEN = {"r0-1": "cut", "r1-3": "absent", "r2-5": "cut"}


def write_data(folder) -> None:
    """Parquet tables of names of pictures, three of which are broken or not there."""
    for shard in range(SHARDS):
        rows = []
        for index in range(ROWS):
            key = f"r{shard}-{index}"
            file = folder / f"{key}.png"
            Image.new("RGB", (8, 8), (40 * index, 90 * shard, 9)).save(file)
            if BROKEN.get(key) == "cut":
                file.write_bytes(file.read_bytes()[:40])
            elif BROKEN.get(key) == "absent":
                file.unlink()
            rows.append(
                {"key": key, "image": file.name, "text": f"word {index}", "label": "ab"[index % 2]}
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard}.parquet")
    (folder / "recipe.yaml").write_text(RECIPE)


def flags(folder, server) -> list[str]:
    """A run on the server's data, whose address holds a password and a token."""
    data = f"{server.url.replace('//', '//carol:hushed@')}/?token=hushed"
    return ["--config", str(folder / "recipe.yaml"), "--data_dir", data]


def told_here(rank: int, world_size: int, argv: list[str]) -> str:
    """The one line that a run ends with."""
    from mm_moe.errors import DataError

    try:
        train_here(rank, world_size, [argv])
    except DataError as error:
        return str(error)
    return "it went through"


def bad_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failing_server_changes_no_bit(tmp_path, resume):
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    clean, faulty = tmp_path / "clean", tmp_path / "faulty"
    with serving(data) as server:
        start = flags(data, server)
        argv = [*start, "--output_dir", str(clean)]
        quiet = run_distributed(train_here, 2, [argv], timeout_s=600)[0][0]
        server.share = 0.2
        server.faults = ("busy", "retry_after", "reset", "cut", "short_length", "bad_range")
        hard = [*start, "--dataloader_num_workers", "2", "--output_dir", str(faulty)]
        again = [*hard, "--resume_from_checkpoint", str(faulty / "checkpoint-4")]
        commands = [hard, again] if resume else [hard]
        roughs = run_distributed(train_here, 2, commands, timeout_s=900)[0]
        assert sum(server.failed.values()) > 10
    for rough in roughs:
        assert column(rough, "loss") == column(quiet, "loss")
        assert column(rough, "grad_norm") == column(quiet, "grad_norm")
        assert column(rough, "data/retries")[-1] > 0
    assert set(column(quiet, "data/retries")) == {0.0}
    for folder in (clean, faulty):
        assert sorted(entry["id"] for entry in bad_lines(folder)) == sorted(BROKEN)
        text = (folder / "run.json").read_text()
        record = json.loads(text)
        assert sorted(record["bad_samples"]) == sorted(BROKEN)
        assert "hushed" not in text
    assert record["stream_retries"] > 0


@pytest.mark.slow
def test_limits_and_refusals_end_the_run_in_one_line_on_all_ranks(tmp_path):
    write_data(tmp_path)
    with serving(tmp_path) as server:
        start = flags(tmp_path, server)
        few = [*start, "--max_bad_samples", "2", "--output_dir", str(tmp_path / "few")]
        ranks = run_distributed(told_here, 2, few, timeout_s=600)
        assert ranks[0] == ranks[1]
        assert "3 samples have an image that does not decode" in ranks[0]
        assert all(repr(name) in ranks[0] for name in BROKEN)
        server.status["/r1-0.png"] = 403
        closed = [*start, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "no")]
        told = run_distributed(told_here, 1, closed, timeout_s=600)[0]
    assert told == (
        f"{server.url}/r1-0.png cannot be read: status 403 (Forbidden), 1 try; "
        "check who may read it; a password or token in it is not kept, so give it at each start."
    )
