"""Clinical data sets in their published layouts, small enough for a pencil."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mm_moe.data.sets.physionet2012 import LEAKS, STATIC
from mm_moe.data.sets.tcga_luad import BARCODE, DIAGNOSIS, OUTCOMES, SMOKING, STAGE

NOT_AVAILABLE = "[Not Available]"


def tcga_luad(folder: Path, *, patients: int = 40, **cells) -> Path:
    """Every fourth patient never smoked; the gene table lacks every fifth, the protein every third.

    Args:
        folder: to write into.
        patients: rows of the clinical table.
        cells: column -> cells that replace those of the clinical table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"TCGA-00-{n:04d}" for n in range(patients)]
    columns = {name: [NOT_AVAILABLE] * patients for name in (*DIAGNOSIS, *OUTCOMES)}
    columns |= {
        BARCODE: names,
        "gender": ["MALE", "FEMALE"] * (patients // 2),
        SMOKING: ["1" if n % 4 == 0 else "2" for n in range(patients)],
        STAGE: [
            ("Stage IA", "Stage IIB", "Stage IIIA", "Stage IV")[n % 4] for n in range(patients)
        ],
        "age_at_initial_pathologic_diagnosis": [str(40 + n) for n in range(patients)],
        "vital_status": ["Dead" if n % 2 else "Alive" for n in range(patients)],
        "death_days_to": [str(10 * n) if n % 2 else "[Not Applicable]" for n in range(patients)],
        "last_contact_days_to": [str(20 * n) for n in range(patients)],
        **cells,
    }
    pa_csv.write_csv(pa.table(columns), folder / "clinical.csv")
    _matrix(folder / "gene_expression.parquet", [n for i, n in enumerate(names) if i % 5], 4)
    _matrix(folder / "mirna.parquet", names, 3)
    _matrix(folder / "protein_rppa.parquet", [n for i, n in enumerate(names) if i % 3], 2)
    _matrix(folder / "mutation.parquet", [*names, "TCGA-99-0000"], 2)
    return folder


def _matrix(path: Path, names: list[str], width: int) -> None:
    """Numbers 0, 1, 2, ... row by row."""
    values = np.arange(len(names) * width, dtype=np.float32).reshape(len(names), width)
    columns = {f"g{d}": values[:, d] for d in range(width)}
    pq.write_table(pa.table({"patient": names, **columns}), path)


def physionet2012(folder: Path, *, stays: int = 20, **events) -> Path:
    """Stay n has a heart rate of 60 + n at minute 30 and, unless n is a multiple of 4, a pH.

    Args:
        folder: to write into.
        stays: of each set.
        events: columns that replace those of set a's events.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, first in (("a", 1000), ("b", 5000)):
        records = np.arange(first, first + stays)
        columns = {name: np.zeros(stays) for name in (*STATIC, *LEAKS)}
        columns |= {
            "record_id": records,
            "ICUType": records % 2 + 1.0,
            "Age": 50.0 + records % 10,
            "Height": np.where(records % 2, 170.0, -1.0),
            "In-hospital_death": (records % 5 == 0).astype(int),
            "Length_of_stay": np.where(records % 7, records % 30, -1),
        }
        pq.write_table(pa.table(columns), folder / f"patients_{part}.parquet")
        rows = [(r, 30, "HR", 60.0 + r - first) for r in records]
        rows += [(r, 90, "pH", 7.25) for r in records if r % 4]
        rows += [(r, 0, "Weight", -1.0) for r in records]
        names = ("record_id", "minute", "parameter", "value")
        found = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        found |= events if part == "a" else {}
        pq.write_table(pa.table(found), folder / f"events_{part}.parquet")
    return folder


SCHEMA = {
    "patient": "who",
    "row": "stay",
    "license": "made for tests",
    "label": {"file": "out.csv", "column": "died", "kind": "binary", "classes": ["no", "yes"]},
    "split": {"column": "part"},
    "prediction_time": 24,
    "leaks": {"score": "given at discharge"},
    "modalities": {
        "static": {
            "file": "static.parquet",
            "kind": "table",
            "columns": {"age": "numeric", "unit": "categorical"},
        },
        "labs": {
            "file": "labs.csv",
            "kind": "events",
            "time": "hour",
            "variable": "test",
            "value": "result",
        },
        "vitals": {"file": "wide.csv", "kind": "events", "time": "hour", "columns": ["hr", "bp"]},
        "notes": {"file": "notes.csv", "kind": "text", "column": "text", "time": "hour"},
        "scan": {"file": "scans.csv", "kind": "array", "column": "path"},
    },
}


def tables(folder: Path, *, stays: int = 24, schema: dict | None = None, **files) -> Path:
    """Patient n // 2 has stay n; every third stay has no laboratory values, every fourth no scan.

    Args:
        folder: to write into.
        stays: lines of the label's file.
        schema: in place of `SCHEMA`.
        files: stem -> {column: cells} that replace columns of that file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(range(stays))
    names = [f"s{n}" for n in numbers]
    part = ["train", "train", "train", "train", "validation", "test"]
    content = {
        "out": {
            "stay": names,
            "who": [f"anna{n // 2}" for n in numbers],
            "died": ["yes" if n % 5 == 0 else "no" for n in numbers],
            "part": [part[n // 2 % 6] for n in numbers],
            "score": numbers,
        },
        "static": {
            "stay": names,
            "age": [None if n == 3 else 40.0 + n for n in numbers],
            "unit": [("a", "b")[n % 2] for n in numbers],
            "score": numbers,
        },
        "labs": {
            "stay": [f"s{n}" for n in numbers if n % 3],
            "hour": [1.5] * sum(n % 3 > 0 for n in numbers),
            "test": ["pH"] * sum(n % 3 > 0 for n in numbers),
            "result": [7.0 + n / 100 for n in numbers if n % 3],
        },
        "wide": {
            "stay": [name for name in names for _ in range(2)],
            "hour": [0, 12] * stays,
            "hr": [60 + n for n in numbers for _ in range(2)],
            "bp": [80, None] * stays,
        },
        "notes": {"stay": names, "hour": [2] * stays, "text": [f"note {n}" for n in numbers]},
        "scans": {
            "stay": [f"s{n}" for n in numbers if n % 4],
            "path": [f"scan{n}.npy" for n in numbers if n % 4],
        },
    }
    for n in numbers:
        np.save(folder / f"scan{n}.npy", np.full((1, 2, 2, 2), n, np.float32))
    for stem, columns in content.items():
        table = pa.table(columns | files.get(stem, {}))
        if stem == "static":
            pq.write_table(table, folder / "static.parquet")
        else:
            pa_csv.write_csv(table, folder / f"{stem}.csv")
    text = json.dumps(SCHEMA if schema is None else schema)
    (folder / "schema.json").write_text(text)
    return folder
