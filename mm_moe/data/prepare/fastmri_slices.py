"""fastMRI's single-coil knee volumes, with the findings of fastMRI+, to one file per slice.

Source: `singlecoil_train/*.h5` and `singlecoil_val/*.h5` (`kspace` (S, Y, X), `reconstruction_esc`
and `reconstruction_rss` (S, 320, 320); the test volumes have no reconstruction). Output, the layout
of the published experiments: `<volume>/knee_singlecoil_<volume>_<slice>.h5` with `sc_kspace`
(Y, 400), `recon_esc`, `recon_rss`, `sampled_indices` and `labels`, and `metadata_knee.csv`.

S slices, Y rows, X columns.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_moe.data.kspace import fill_columns
from mm_moe.data.prepare.hdf5 import need_h5py
from mm_moe.data.prepare.knee_labels import (
    SPLIT_NAMES,
    read_findings,
    read_volumes,
    split_volumes,
)
from mm_moe.errors import ConfigError, DataError

PARTS = ("singlecoil_train", "singlecoil_val")
WIDEST = 400  # columns; volumes with more are left out
METADATA = "metadata_knee.csv"
FIELDS = (
    *("", "index", "volume_id", "slice_id", "labels", "shape"),
    *("dataset", "data_type", "data_split", "location"),
)


def write_slices(source: Path, *, annotations: Path, output: Path) -> dict[str, int]:
    """Write the slices of every annotated volume that is there.

    Args:
        source: the folder with the volumes' folders.
        annotations: the folder with `knee.csv` and `knee_file_list.csv`.
        output: a new folder.

    Returns:
        Counts: "slices", "volumes", "too wide" (more than 400 columns), "not there".

    Raises:
        ConfigError: the output exists, or h5py is not installed.
        DataError: a file that is missing or not in the layout, or no annotated volume.
    """
    h5py = need_h5py("fastMRI's volumes")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r} holds something; name a new folder.")
    findings = read_findings(annotations / "knee.csv")
    volumes = read_volumes(annotations / "knee_file_list.csv")
    splits = split_volumes(volumes)
    paths = {path.stem: path for part in PARTS for path in (source / part).glob("*.h5")}
    counts = {"slices": 0, "volumes": 0, "too wide": 0, "not there": 0}
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with (aside / METADATA).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, FIELDS)
            table.writeheader()
            for volume in volumes:
                if volume not in paths:
                    counts["not there"] += 1
                    continue
                rows = _volume(h5py, paths[volume], aside, findings, SPLIT_NAMES[splits[volume]])
                counts["volumes" if rows else "too wide"] += 1
                for row in rows:
                    table.writerow({**row, "": counts["slices"]})
                    counts["slices"] += 1
        if not counts["slices"]:
            raise DataError(
                f"{str(source)!r} holds no annotated volume in {' or '.join(PARTS)} "
                f"({counts['not there']} are not there, {counts['too wide']} too wide)."
            )
        if output.exists():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def _volume(
    h5py: Any,
    path: Path,
    folder: Path,
    findings: Mapping[tuple[str, int], list[str]],
    split: str,
) -> list[dict[str, Any]]:
    """Write the slices of one volume; their lines of the table, none if it is too wide."""
    volume = path.stem
    lines: list[dict[str, Any]] = []
    try:
        with h5py.File(path, "r") as file:
            kspace_SYX = file["kspace"]
            if kspace_SYX.ndim != 3:
                raise DataError(f"{path}: kspace has shape {kspace_SYX.shape}, not (S, Y, X).")
            if kspace_SYX.shape[2] > WIDEST:
                return []
            (folder / volume).mkdir()
            for number in range(len(kspace_SYX)):
                name = f"knee_singlecoil_{volume}_{number}"
                labels = findings.get((volume, number), [])
                filled_YX, measured = fill_columns(kspace_SYX[number], WIDEST)
                with h5py.File(folder / volume / f"{name}.h5", "w") as out:
                    out["sc_kspace"] = filled_YX
                    out["recon_esc"] = file["reconstruction_esc"][number]
                    out["recon_rss"] = file["reconstruction_rss"][number]
                    out["sampled_indices"] = measured
                    out.create_dataset("labels", data=labels, dtype=h5py.string_dtype())
                lines.append(
                    {
                        "index": f"knee_{name}",
                        "volume_id": volume,
                        "slice_id": number,
                        "labels": labels if labels else "[None]",
                        "shape": filled_YX.shape,
                        "dataset": "knee",
                        "data_type": "original",
                        "data_split": split,
                        "location": f"{volume}/{name}.h5",
                    }
                )
    except (OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no volume of fastMRI ({type(error).__name__}); fetch it again."
        ) from error
    return lines
