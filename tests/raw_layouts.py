"""Tiny downloads in the exact raw layouts of published data sets: names, nesting, types, quirks.

Each maker writes a folder and returns it. The good rows come first; the quirks that an adapter must
bear are part of every fixture, the faults are added by the tests.
"""

import io
import json
from pathlib import Path

from PIL import Image


def jpeg(colour=(120, 60, 30), *, format="JPEG", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_json(path: Path, value) -> Path:
    return put(path, json.dumps(value))


def mm_imdb(folder: Path) -> Path:
    """Ids with leading zeros as strings, two plots in a movie, genres outside the 23, no plot."""
    movies = {
        "0000008": {"plot": ["A man.", "A man sneezes."], "genres": ["Documentary", "Short"]},
        "0012349": {"plot": ["The Tramp."], "genres": ["Comedy", "Drama", "Family", "News"]},
        "0000012": {"plot": [], "genres": ["Short"]},
        "0034583": {"plot": ["In Casablanca"], "genres": ["Drama", "Romance", "War"]},
        "0041959": {"plot": ["Vienna.", " "], "genres": ["Film-Noir", "Mystery", "Thriller"]},
    }
    ids = list(movies)
    put_json(folder / "split.json", {"train": ids[:3], "dev": ids[3:4], "test": ids[4:]})
    for name, about in movies.items():
        put(folder / "images" / f"{name}.jpeg", jpeg())
        put_json(folder / "labels" / f"{name}.json", {**about, "year": 1942, "title": name})
    return folder


def food101(folder: Path) -> Path:
    """Class names with underscores, validation images under train, a photo without title."""
    put_json(folder / "class_idx.json", {"apple_pie": 0, "french_fries": 1})
    names = {
        "train": ["apple_pie_0.jpg", "french_fries_11.jpg", "apple_pie_2.jpg"],
        "val": ["french_fries_3.jpg"],
        "test": ["apple_pie_7.jpg"],
    }
    put_json(folder / "split.json", names)
    files = [name for split in names.values() for name in split]
    texts = {name: f"title of {name}" for name in files if name != "apple_pie_2.jpg"}
    put_json(folder / "text.json", texts)
    put(folder / "texts" / "train_titles.csv", "documented, not read\n")
    for split, part in (("train", "train"), ("val", "train"), ("test", "test")):
        for name in names[split]:
            put(folder / "images" / part / name.rpartition("_")[0] / name, jpeg())
    return folder


def hateful_memes(folder: Path, *, nested: bool = False, test_labels: bool = False) -> Path:
    """Ids as numbers and names of five digits; the challenge's test table has no labels."""
    root = folder / "data" if nested else folder
    number = 1230
    for table, labelled in (
        ("train", True),
        ("dev", True),
        ("test", test_labels),
        ("test_seen", True),
    ):
        lines = []
        for label in (0, 1):
            number += 1
            row = {"id": number, "img": f"img/{number:05d}.png", "text": f"words {number}"}
            lines.append(json.dumps(row | ({"label": label} if labelled else {})))
            put(root / "img" / f"{number:05d}.png", jpeg(format="PNG"))
        put(root / f"{table}.jsonl", "\n".join(lines) + "\n")
    return folder


MAKERS = {"mm_imdb": mm_imdb, "food101": food101, "hateful_memes": hateful_memes}
