"""Every input that cannot work is refused before training, in one line, with nothing left on disk.

The programs run in this process through their `main`; one real command line at the end shows what a
user sees of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import file, refused, tree

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError, DataError, ParallelismError

ROOT = Path(__file__).parents[2]


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "nearest"),
    [
        ("--backbone", "small_clup", "small_clip"),
        ("--prompt", "repaly", "replay"),
        ("--compare_with", "repaly", "replay"),
        ("--dataset", "emojis", "emoji"),
        ("--router", "topk_softmx", "topk_softmax"),
        ("--objective", "contrastiv", "contrastive"),
        ("--config", "emoji_repaly", "finetune/recipes/emoji_replay.yaml"),
    ],
)
def test_an_unknown_name_lists_the_nearest(here, flag, value, nearest):
    said = refused(ConfigError, flag, value)
    assert repr(value) in said
    assert nearest in said


@pytest.mark.parametrize(
    ("words", "value", "way_out"),
    [
        (["--num_expert", "4"], "--num_expert", "num_experts"),
        (["--num-expertz=4"], "--num-expertz", "num_experts"),
        (["--evaluation_strategy", "steps"], "--evaluation_strategy", "--eval_strategy"),
        (["-x"], "'-x'", "start with --"),
        (["stray"], "'stray'", "start with --"),
    ],
)
def test_an_unknown_flag(here, words, value, way_out):
    said = refused(ConfigError, *words)
    assert value in said
    assert way_out in said


def test_something_outside_that_does_not_import(here):
    said = refused(ConfigError, "--dataset", "no.such.module:Data")
    assert "'no.such.module:Data'" in said
    assert "does not import" in said


# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_experts: 4\nrouter: [a\n", ("not valid YAML at line 3, column 1",)),
        ("num_expert: 4\n", ("'num_expert'", "num_experts")),
        ("- num_experts\n", ("mapping of flags",)),
        ("num_experts: many\n", ("num_experts", "int", "'many'")),
    ],
)
def test_a_recipe_that_cannot_be_read(here, text, words):
    said = refused(ConfigError, "--config", file("my.yaml", text))
    assert all(word in said for word in words)


def test_a_flag_without_its_value(here):
    assert "--config" in refused(ConfigError, "--config", output=None)


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--num_experts", "four", "int"),
        ("--learning_rate", "fast", "float"),
        ("--bf16", "perhaps", "perhaps"),
        ("--moe_layers_idx", "x", "int"),
        ("--lr_scheduler_type", "cosin", "cosine"),
    ],
)
def test_a_value_of_the_wrong_type(here, flag, value, rule):
    said = refused(ConfigError, flag, value)
    assert flag in said
    assert value in said
    assert rule in said


@pytest.mark.parametrize(
    ("words", "said_words"),
    [
        (["--num_experts", "0"], ("--num_experts 0", "at least 1")),
        (["--global_batch_size", "-8"], ("--global_batch_size -8", "at least 0")),
        (["--per_device_eval_batch_size", "0"], ("per_device_eval_batch_size 0", "at least 1")),
        (["--learning_rate", "-1"], ("--learning_rate -1", "at least 0")),
        (["--learning_rate", "nan"], ("--learning_rate nan", "at least 0")),
        (["--dataloader_num_workers", "-1"], ("--dataloader_num_workers -1", "0 to")),
        (["--top_k_experts", "5"], ("--top_k_experts (5)", "--num_experts (4)")),
        (
            ["--num_experts", "8", "2", "--top_k_experts", "3"],
            ("--top_k_experts (3)", "smallest of --num_experts (8 2)"),
        ),
        (["--num_experts", "4", "0"], ("--num_experts 4 0", "at least 1")),
        (["--upcycle_drop", "1.5"], ("--upcycle_drop 1.5", "[0, 1]")),
        (["--upcycle_noise", "-1"], ("--upcycle_noise -1", "at least 0")),
        (["--moe_every", "0"], ("--moe_every 0", "at least 1")),
        (["--moe_mode", "second"], ("'second'", "second_half")),
        (["--capacity_factor", "0"], ("capacity_factor (0.0)", "above 0")),
        (["--moe_mode", "dense", "--moe_layers_idx", "1"], ("--moe_mode dense", "idx 1")),
        (["--num_experts", "4", "--moe_config", '{"num_experts": 8}'], ("4", "8", "drop one")),
        (["--missing_ratio", "1.5"], ("--missing_ratio 1.5", "[0, 1]")),
        (["--missing_type", "sound"], ("'sound'", "none, both, image, text")),
    ],
)
def test_a_value_out_of_range(here, words, said_words):
    said = refused(ConfigError, *words)
    assert all(word in said for word in said_words)


@pytest.mark.parametrize("flag", ["prompt_config", "backbone_config", "moe_config"])
def test_json_flags(here, flag):
    assert f"--{flag} is not valid JSON" in refused(ConfigError, f"--{flag}", '{"a": }')
    assert "line 1, column 7" in refused(ConfigError, f"--{flag}", '{"a": }')
    said = refused(ConfigError, f"--{flag}", "[1]")
    assert f"--{flag} must be a JSON object" in said
    assert "'[1]'" in said


@pytest.mark.parametrize(
    ("words", "said_words"),
    [
        (["--prompt_config", '{"lenght": 2}'], ("lenght", "length")),
        (["--backbone_config", '{"widht": 2}'], ("widht", "width")),
        (["--moe_config", '{"top": 2}'], ("top", "top_k")),
        (["--moe_config", '{"capacity_factor": -1}'], ("capacity_factor (-1)", "above 0")),
        (["--moe_layers_idx", "0", "99"], ("99", "blocks")),
    ],
    ids=str,
)
def test_what_only_the_model_can_judge(here, words, said_words):
    """These are told after the start of the processes, but still before anything is written."""
    said = refused(ConfigError, *words)
    assert all(word in said for word in said_words)


def test_pretrained_weights_that_are_not_there(here):
    said = refused(ConfigError, "--pretrained", "./absent/weights.safetensors")
    assert "absent/weights.safetensors" in said
    assert "--pretrained" in said


def test_flags_of_the_library_that_are_not_honoured(here):
    flags = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "100")
    assert "--checkpoint" in refused(ConfigError, *flags)
    assert "--hub_model_id" in refused(ConfigError, "--push_to_hub")
    assert "ORG/NAME" in refused(ConfigError, "--push_to_hub", "--hub_model_id", "a/b/c")


# ---- data ------------------------------------------------------------------------------------


def test_data_set_options_and_splits(here):
    assert "JSON" in refused(ConfigError, "--dataset_options", "{")
    said = refused(ConfigError, "--dataset_options", '{"sylte": "x"}')
    assert "sylte" in said
    assert "'emoji'" in said
    said = refused(ConfigError, "--train_split", "trian")
    assert "'trian'" in said
    assert "train, validation, test" in said


def test_data_that_are_not_there(here):
    options = json.dumps({"image_column": "image"})
    argv = ("--dataset", "columns", "--dataset_options", options)
    assert "data_dir" in refused(ConfigError, *argv)
    said = refused(DataError, *argv, "--data_dir", str(here / "absent"))
    assert "absent" in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_outside_the_classes(here, split):
    for name in ("train", "test"):
        labels = ["a", "b", "zebra" if name == split else "a"]
        rows = [
            json.dumps({"key": f"{name}-{index}", "text": "word", "label": label})
            for index, label in enumerate(labels)
        ]
        file(f"{name}.jsonl", "\n".join(rows))
    columns = {"text_column": "text", "label_column": "label", "id_column": "key"}
    options = json.dumps(columns | {"label_names": ["a", "b"]})
    argv = ("--dataset", "columns", "--data_dir", str(here), "--dataset_options", options)
    said = refused(DataError, *argv, "--missing_type", "none")
    assert f"'{split}-2'" in said
    assert "'zebra'" in said
    assert "known: a, b" in said


# ---- processes and experts -------------------------------------------------------------------


def test_experts_that_do_not_divide(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(ParallelismError, "--num_experts", "3", "--ep_size", "2")
    assert "num_experts (3)" in said
    assert "ep_size (2)" in said
    assert said.endswith("possible with 2 processes: 1.")


@pytest.mark.parametrize(("world", "ep_size"), [("2", "4"), ("1", "2")])
def test_processes_that_do_not_divide(here, monkeypatch, world, ep_size):
    monkeypatch.setenv("WORLD_SIZE", world)
    said = refused(ParallelismError, "--num_experts", "4", "--ep_size", ep_size)
    assert f"processes ({world})" in said
    assert f"ep_size ({ep_size})" in said
    assert "possible with 4 experts: 1" in said


# ---- batch sizes -----------------------------------------------------------------------------


def test_a_global_batch_that_does_not_divide(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ("--global_batch_size", "15", "--gradient_accumulation_steps", "2")
    said = refused(ConfigError, *argv)
    assert "(15)" in said
    assert "(4); try 12" in said


def test_two_flags_for_one_batch(here):
    said = refused(ConfigError, "--global_batch_size", "16", "--per_device_train_batch_size", "8")
    assert "--global_batch_size 16" in said
    assert "--per_device_train_batch_size says 8" in said
    assert "drop one" in said


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("train_micro_batch_size_per_gpu", 4, "per_device_train_batch_size = 64"),
        ("train_batch_size", 32, "1 processes = 64"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps = 1"),
    ],
)
def test_a_batch_size_said_differently_in_the_file(here, key, value, flag):
    said = refused(ConfigError, "--deepspeed", file("ds.json", json.dumps({key: value})))
    assert f"{key} = {value}" in said
    assert flag in said
    assert "auto" in said


# ---- the DeepSpeed file ----------------------------------------------------------------------


def test_zero_3_says_what_to_take_instead(here):
    config = json.dumps({"zero_optimization": {"stage": 3}})
    said = refused(ConfigError, "--deepspeed", file("ds.json", config))
    assert "stage 3" in said
    assert "ds_configs/zero2.json" in said


def test_a_deepspeed_file_that_cannot_be_read(here):
    said = refused(ConfigError, "--deepspeed", "ds_configs/zero7.json")
    assert "'ds_configs/zero7.json' does not exist" in said
    assert "zero2_offload.json" in said
    said = refused(ConfigError, "--deepspeed", file("ds.json", '{\n "bf16": {,}\n}'))
    assert "line 2, column 11" in said
    assert "must be an object" in refused(
        ConfigError, "--deepspeed", file("ds.json", '{"zero_optimization": 2}')
    )


# ---- folders and checkpoints -----------------------------------------------------------------


def checkpoint(run: str, step: int) -> Path:
    """A folder that the store takes for a checkpoint."""
    folder = Path(run, f"checkpoint-{step}")
    folder.mkdir(parents=True)
    for name in (store.WEIGHTS, *store.RESUMED):
        (folder / name).write_bytes(b"weights")
    store.write_manifest(folder, step)
    return folder


def test_an_output_folder_that_is_not_empty(here):
    Path("run").mkdir()
    file("run/run.json", "{}")
    said = refused(ConfigError)
    assert "'run' already holds another run" in said
    assert "--resume_from_checkpoint latest" in said
    Path("run/run.json").rename("run/notes.txt")
    assert "already holds files" in refused(ConfigError)
    assert "already holds" in refused(ConfigError, output="run/notes.txt")


def test_a_checkpoint_does_not_resume_into_another_run(here):
    good = checkpoint("mine", 10)
    Path("run").mkdir()
    file("run/run.json", "{}")
    said = refused(ConfigError, "--resume_from_checkpoint", str(good))
    assert "'run' already holds another run" in said


def test_an_incomplete_checkpoint(here):
    good = checkpoint("run", 10)
    weights = good / store.WEIGHTS
    weights.write_bytes(b"weigh")
    for wanted in (str(good), "latest"):
        said = refused(CheckpointError, "--resume_from_checkpoint", wanted)
        assert "checkpoint-10' is damaged: model.safetensors" in said
        assert "earlier checkpoint" in said
    weights.unlink()
    assert "is missing" in refused(CheckpointError, "--resume_from_checkpoint", str(good))
    (good / store.MANIFEST).unlink()
    said = refused(CheckpointError, "--resume_from_checkpoint", str(good), output=None)
    assert "no readable manifest.json" in said


def test_nothing_to_resume_from(here):
    said = refused(CheckpointError, "--resume_from_checkpoint", "latest", output=None)
    assert "needs --output_dir" in said
    assert "no good checkpoint" in refused(CheckpointError, "--resume_from_checkpoint", "latest")
    said = refused(CheckpointError, "--resume_from_checkpoint", "run/checkpoint-7")
    assert "does not exist; name a checkpoint-N" in said


# ---- what a user sees ------------------------------------------------------------------------


def test_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--num_expert", "4"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: unknown flag '--num_expert'; {done.stderr.split('; ')[1]}"
    assert "num_experts" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path) == {}
