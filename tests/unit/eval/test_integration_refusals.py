"""What `eval.integration` refuses, in one line and with status 2, and what it keeps count of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import integration
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.sets.cells import CellsData

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
from tests.cell_files import counts, two_species, write_h5ad

SIZES = {"expert_hidden": [4], "expert_width": 4, "core_hidden": [], "latent_size": 2}
ARGUMENTS = {"dataset": "cells", "dataset_options": {"conditions": ["donor"]}, "data_dir": None}


@pytest.fixture
def data(tmp_path) -> Path:
    return two_species(tmp_path / "data", cells=80)


@pytest.fixture
def run(tmp_path, data) -> Path:
    folder = tmp_path / "run"
    source = CellsData(str(data), conditions=["donor"])
    torch.manual_seed(0)
    CellVAE(CellVAE.config_for(source, SIZES)).save_pretrained(folder / "final")
    (folder / "run.json").write_text(json.dumps({"arguments": ARGUMENTS}))
    return folder


def refused(capsys, folder: Path, data: Path, *flags: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert integration.main([str(folder), "--data_dir", str(data), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert not (folder / "integration.json").exists()
    return said.err


def test_what_is_no_run(run, data, capsys, tmp_path):
    assert "this is no run" in refused(capsys, tmp_path / "nowhere", data)
    for text in ("[]", "{", '{"arguments": []}', '{"arguments": {}}', "\xff"):
        (run / "run.json").write_text(text, encoding="latin-1")
        assert "this is no run" in refused(capsys, run, data)
    for options in ("[3", '{"moon": 1}'):
        saved = {"arguments": {**ARGUMENTS, "dataset_options": options}}
        (run / "run.json").write_text(json.dumps(saved))
        assert "dataset_options" in refused(capsys, run, data)


def test_a_run_of_another_model_or_a_damaged_one(run, data, capsys):
    weights = run / "final" / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 9, len(whole) // 2):
        weights.write_bytes(whole[:cut])
        assert "cannot be read" in refused(capsys, run, data)
    weights.write_bytes(whole)
    (run / "final" / "config.json").write_text('{"model_type": "mm_moe"}')
    assert "type 'mm_moe'" in refused(capsys, run, data)
    (run / "final" / "config.json").unlink()
    assert "this is no run that ended" in refused(capsys, run, data)


def test_data_that_the_model_does_not_know(run, data, capsys):
    assert "did you mean donor" in refused(capsys, run, data, "--types", "donr")
    assert "no split 'moon'" in refused(capsys, run, data, "--split", "moon")
    write_h5ad(data / "mouse.h5ad", counts(40, 3))
    assert "has 3 genes where 4 are expected" in refused(capsys, run, data)
    whole = (data / "human.h5ad").read_bytes()
    (data / "human.h5ad").write_bytes(whole[: len(whole) // 2])
    assert "is cut" in refused(capsys, run, data)
    (data / "human.h5ad").unlink()
    (data / "mouse.h5ad").unlink()
    assert "no file of cells" in refused(capsys, run, data)


def test_cells_that_are_left_out_and_labels_that_are_not_known_are_counted(run, data, caplog):
    values = counts(80, 6)
    values[[3, 5]] = 0
    donors = [f"human-{n % 5}" if n else "stranger" for n in range(80)]
    write_h5ad(data / "human.h5ad", values[:, ::-1], genes=[f"g{n}" for n in range(5, -1, -1)],
               obs={"donor": donors})  # fmt: skip
    with caplog.at_level(logging.WARNING):
        _, source = integration.read_run(run, str(data))
    assert dict(source.left_out) == {"human: all-zero": 2}
    assert source.moved == {"human": 6}
    assert "6 genes are put into order by name" in caplog.text
    found = [found["donor"].get("stranger", 0) for found in source.unseen.values()]
    assert sum(found) == 1
    row = next(iter(source.stream("train")))
    cell = source.to_sample(row).payload["human"]
    number = int(source.to_sample(row).id.rpartition("c")[2])
    assert cell.library == values[number].sum()
    places = np.sort(np.frombuffer(cell.col, "<i4"))  # the file has its genes backwards
    assert places.tolist() == np.flatnonzero(values[number]).tolist()
