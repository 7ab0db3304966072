"""Single cells to Parquet: `python launch/prepare_data.py cells --source DIR --output DIR`.

Reads `.h5ad` files and chunks (`{species}_counts_{k}.npz` with metadata as Parquet, CSV, or pickle,
which is read as a table and nothing else), checks every value, and writes a Parquet file of sparse
rows for each. Cells that cannot be used are named in `OUTPUT/quarantine.jsonl`. Afterwards
`--dataset cells --data_dir OUTPUT --dataset_options '{"split_column": "split"}'` streams them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.cli import ProgramParser
from mm_moe.arguments import parse_json
from mm_moe.data.cells.files import SPECIES, CellFile
from mm_moe.data.cells.listing import SPLITS
from mm_moe.data.cells.tables import OWN, cells_schema
from mm_moe.data.prepare.write import QUARANTINE
from mm_moe.data.sets.cells import CellsData
from mm_moe.errors import ConfigError

GROUP = 512  # cells of a row group: what a read at any place costs
SPLIT = "split"


def parser() -> ProgramParser:
    """The flags."""
    flags = ProgramParser(description=__doc__)
    flags.add_argument("--source", type=Path, required=True, help="folder of the files")
    flags.add_argument("--output", type=Path, required=True, help="folder to make")
    flags.add_argument(
        "--options", help="JSON object of the data set's options, such as files, layer, split_by"
    )
    return flags


def write_file(file: CellFile, path: Path, *, source: CellsData, split_N: np.ndarray) -> None:
    """The used cells of one file as Parquet.

    Args:
        file: what is read.
        path: what is written.
        source: the data set that it belongs to.
        split_N: the split of each of the file's cells, as text.
    """
    columns = tuple(c for c in file.store.columns if c not in (*OWN, SPECIES, SPLIT))
    schema = cells_schema(
        genes=source.vocabulary.genes[file.listed.species],
        columns=(SPECIES, SPLIT, *columns),
        checked=source.values,
    )
    labels = {name: file.column(name) for name in (SPECIES, *columns)} | {SPLIT: split_N}
    names = file.names()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(file.kept), GROUP):
            rows = file.kept[begin : begin + GROUP]
            cells = file.read(rows)
            offsets = pa.array(cells.crow.astype(np.int32))
            content = [
                pa.array(names[rows].tolist(), pa.string()),
                pa.ListArray.from_arrays(offsets, pa.array(cells.col)),
                pa.ListArray.from_arrays(offsets, pa.array(cells.val)),
                pa.array(file.library[rows]),
                *(pa.array(labels[name][rows].tolist(), pa.string()) for name in schema.names[4:]),
            ]
            writer.write_table(pa.Table.from_arrays(content, schema=schema), row_group_size=GROUP)


def quarantine(source: CellsData) -> list[str]:
    """A line for each cell that is not used."""
    lines = []
    for file in source.files:
        names = file.names()
        for reason, rows in file.dropped.items():
            lines += [json.dumps({"id": names[row], "why": reason}) for row in rows.tolist()]
    return lines


def main(argv: list[str]) -> int:
    """Check, write aside, rename, tell."""
    options = parser().parse_args(argv)
    output: Path = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r} holds something already; name a new folder.")
    own = parse_json("options", options.options)
    try:
        source = CellsData(str(options.source), **{"pickles": True, **own})
    except TypeError as error:
        raise ConfigError(f"--options for 'cells': {error}") from error
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        write_all(source, aside)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for species, genes in source.vocabulary.genes.items():
        used = sum(len(f.kept) for f in source.files if f.listed.species == species)
        aside_why = ", ".join(f"{n:,} {why}" for why, n in source.dropped[species].items())
        print(f"{species}: {used:,} cells of {len(genes):,} genes; not used: {aside_why or 'none'}")
    print(
        f"written to {output}; stream it with --dataset cells --data_dir {output} "
        f"--dataset_options '{json.dumps({'split_column': SPLIT})}'"
    )
    return 0


def write_all(source: CellsData, folder: Path) -> None:
    """All files, and the cells that are not used."""
    count: dict[str, int] = {}
    for number, file in enumerate(source.files):
        species = file.listed.species
        split_N = np.full(file.store.num_rows, "", dtype=object)
        for split in SPLITS:
            split_N[source.split_rows(split, number)] = split
        name = f"{species}_counts_{count.get(species, 0):05}.parquet"
        count[species] = count.get(species, 0) + 1
        write_file(file, folder / name, source=source, split_N=split_N)
    (folder / QUARANTINE).write_text("".join(f"{line}\n" for line in quarantine(source)))
