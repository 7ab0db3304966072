"""`--resume_from_checkpoint auto`: go on where there is something, start where there is nothing."""

import argparse

import pytest

from launch.checks import check_output, resume_point
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError


def flags(folder, wanted="auto") -> argparse.Namespace:
    return argparse.Namespace(output_dir=str(folder), resume_from_checkpoint=wanted)


def good_checkpoint(folder):
    folder.mkdir(parents=True)
    for name in ("weights", *store.RESUMED):
        (folder / name).write_text("w")
    store.write_manifest(folder, int(folder.name.split("-")[1]))
    return folder


def test_a_new_folder_starts_anew(tmp_path):
    values = flags(tmp_path / "run")
    assert resume_point(values) is None
    check_output(values, resume=None)


def test_a_run_without_checkpoint_starts_again(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    check_output(flags(tmp_path), resume=None)
    with pytest.raises(ConfigError, match="another run"):
        check_output(flags(tmp_path, None), resume=None)


def test_another_folder_is_not_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="already holds files"):
        check_output(flags(tmp_path), resume=None)


def test_the_newest_good_checkpoint_is_taken(tmp_path):
    good_checkpoint(tmp_path / "checkpoint-2")
    (good_checkpoint(tmp_path / "checkpoint-3") / "weights").write_text("v")
    assert resume_point(flags(tmp_path)) == tmp_path / "checkpoint-2"


def test_damaged_checkpoints_are_no_new_start(tmp_path):
    (good_checkpoint(tmp_path / "checkpoint-3") / "weights").unlink()
    with pytest.raises(CheckpointError, match="weights is missing"):
        resume_point(flags(tmp_path))
