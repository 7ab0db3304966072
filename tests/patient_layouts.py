"""Clinical data sets in their published layouts, small enough for a pencil."""

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
