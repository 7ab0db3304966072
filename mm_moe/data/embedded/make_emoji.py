"""Make the embedded emoji data from the full set: `python -m mm_moe.data.embedded.make_emoji`.

    python -m mm_moe.data.embedded.make_emoji --source FOLDER_WITH_emoji.parquet

At most 150 emojis of each of the 9 categories are kept, chosen by keyed hash (whole emojis, with
all their drawing styles), so that the largest category is not five times the smallest and the file
stays under 7 MB. Nothing else is left out. The split is by emoji, never by drawing. Rows lie in
hash order, one row group a split, and the same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.data.chance import draws, split_of
from mm_moe.errors import DataError

logger = logging.getLogger("mm_moe.data")

NAME = "emoji"
MAX_PER_CATEGORY = 150
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
COLUMNS = ("id", "image", "text", "category", "vendor", "unified")
OUTPUT = Path(__file__).with_name("emoji.parquet")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in ("text", "category", "vendor", "unified", "split")),
    ],
    # What `datasets` writes beside an Image column, so that any reader of the file shows pictures.
    metadata={
        "huggingface": '{"info": {"features": {"id": {"dtype": "string", "_type": "Value"}, '
        '"image": {"_type": "Image"}, '
        + ", ".join(
            f'"{name}": {{"dtype": "string", "_type": "Value"}}'
            for name in ("text", "category", "vendor", "unified", "split")
        )
        + "}}}"
    },
)


def emoji_split(unified: str) -> str:
    """The split of an emoji with all its drawings, by its code points."""
    return split_of(unified, dataset=NAME, shares=SHARES)


def choose(rows: list[dict[str, Any]], *, limit: int = MAX_PER_CATEGORY) -> list[dict[str, Any]]:
    """Keep at most `limit` emojis a category, and give every row its split.

    Args:
        rows: rows with at least `category`, `unified` and `vendor`.
        limit: emojis (not drawings) per category.

    Returns:
        The rows in hash order.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        groups[row["category"]].add(row["unified"])
    place = {
        code: draws(code, purpose="choice", dataset=NAME)[0] for g in groups.values() for code in g
    }
    kept = {
        code for group in groups.values() for code in sorted(group, key=place.__getitem__)[:limit]
    }
    chosen = [
        {**row, "split": emoji_split(row["unified"])} for row in rows if row["unified"] in kept
    ]
    # By row, so that the drawings of an emoji and the rows of a category do not lie together.
    return sorted(chosen, key=lambda row: draws(row["id"], purpose="order", dataset=NAME))


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as Parquet, one row group a split."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=19) as writer:
        for split in SHARES:
            part = [row for row in rows if row["split"] == split]
            writer.write_table(pa.Table.from_pylist(part, SCHEMA), row_group_size=max(1, len(part)))


def main(arguments: list[str] | None = None) -> None:
    """Read the full set, choose, split and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, required=True, help="folder that holds emoji.parquet"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    source = options.source / "emoji.parquet"
    if not source.is_file():
        raise DataError(f"there is no {source}; give the folder that holds emoji.parquet.")
    rows = choose(pq.read_table(source, columns=list(COLUMNS)).to_pylist())
    write(rows, options.output)
    logger.info(
        "%s: %d drawings, %d bytes", options.output, len(rows), options.output.stat().st_size
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
