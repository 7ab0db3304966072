"""Columns, prepared data and feature sequences that a run cannot take: one line, nothing left."""

from __future__ import annotations

import json

from refusals import file, refused

from launch import prepare_data
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts


def test_column_flags(here):
    file("train.jsonl", json.dumps({"words": "a", "kind": "x"}))
    file("test.jsonl", json.dumps({"words": "a", "kind": "x"}))
    argv = ("--dataset", "columns", "--data_dir", str(here), "--missing_type", "none")
    said = refused(DataError, *argv, "--text_column", "word", "--label_column", "kind")
    assert "no column 'word'; it has: words, kind." in said
    options = ("--dataset_options", '{"text_column": "words"}')
    said = refused(ConfigError, *argv, *options, "--text_column", "kind")
    assert "--text_column 'kind' contradicts --dataset_options, which says 'words'" in said
    said = refused(ConfigError, "--image_column", "picture")
    assert "'emoji'" in said
    assert "--image_column does not go with" in said
    assert "Column flags are for --dataset columns" in said
    said = refused(ConfigError, "--stream_retries", "3")
    assert "--stream_retries does not go with --dataset 'emoji'" in said
    for timeout in ("nan", "0"):
        said = refused(ConfigError, *argv, "--text_column", "words", "--stream_timeout_s", timeout)
        assert f"stream_timeout_s ({float(timeout)}) must be more than 0" in said
    said = refused(DataError, *argv, "--text_column", "words", "--data_dir", "http://u:secret@[x")
    assert said.startswith("http://... is no address of the web")


def test_a_split_without_labels_is_not_scored(here):
    raw = raw_layouts.hateful_memes(here / "raw")
    prepare_data.main(["hateful_memes", "--source", str(raw), "--output", "memes"])
    argv = ("--dataset", "hateful_memes", "--data_dir", "memes", "--missing_type", "none")
    said = refused(DataError, *argv)
    assert "split 'test' of 'hateful_memes' cannot be trained on or scored" in said
    assert "test_seen.jsonl" in said


def test_feature_sequences_and_their_backbone_need_each_other(here):
    raw = raw_layouts.cmu_mosi(here / "raw")
    prepare_data.main(["cmu_mosi", "--source", str(raw), "--output", "mosi"])
    argv = ("--dataset", "cmu_mosi", "--data_dir", "mosi", "--pretrained", "none")
    said = refused(ConfigError, *argv, "--missing_type", "any")
    assert "feature sequences (text, audio, vision)" in said
    assert "--backbone sequences" in said
    said = refused(ConfigError, *argv, "--missing_type", "both")
    assert "take one of none, text, audio, vision, any, subset" in said
    argv = ("--backbone", "sequences", "--backbone_config", "{}", "--pretrained", "none")
    assert "needs the widths of the data" in refused(ConfigError, *argv)
