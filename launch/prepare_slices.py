"""fastMRI volumes and fastMRI+ findings to one file per slice.

`python launch/prepare_data.py fastmri_slices --source FASTMRI --annotations FASTMRI_PLUS --output
DIR`; afterwards `prepare_data.py fastmri_knee --source DIR --output OTHER` makes Parquet of it.
"""

from __future__ import annotations

from pathlib import Path

from launch.cli import ProgramParser
from mm_moe.data.prepare.fastmri_slices import write_slices


def main(argv: list[str]) -> int:
    """Write the slices and tell what was left out."""
    flags = ProgramParser(description=__doc__)
    flags.add_argument("--source", type=Path, required=True, help="has singlecoil_train and _val")
    flags.add_argument(
        "--annotations", type=Path, required=True, help="has knee.csv and knee_file_list.csv"
    )
    flags.add_argument("--output", type=Path, required=True, help="new folder")
    options = flags.parse_args(argv)
    counts = write_slices(options.source, annotations=options.annotations, output=options.output)
    print(
        f"{counts['slices']:,} slices of {counts['volumes']:,} volumes; {counts['too wide']:,} "
        f"volumes have too many columns, {counts['not there']:,} annotated ones are not there"
    )
    print(f"written to {options.output}")
    return 0
