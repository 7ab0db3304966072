"""Tiny downloads in the exact raw layouts of published data sets: names, nesting, types, quirks.

Each maker writes a folder and returns it. The good rows come first; the quirks that an adapter must
bear are part of every fixture, the faults are added by the tests.
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from tests import patient_layouts
from tests.av_mnist_layouts import av_mnist, avmnist_npy
from tests.clinical_layouts import adni
from tests.hospital_layouts import eicu, mimic3, mimic4, mimic_tensors
from tests.raw_slices import fastmri_knee


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


WIDTHS = {"text": 6, "audio": 4, "vision": 3}
LENGTHS = {"text": 5, "audio": 7, "vision": 4}


def sequences(rng, count: int, modality: str, *, dtype) -> np.ndarray:
    """(count, T, D): zeros before the words and after the frames, as the published files pad."""
    shape = (count, LENGTHS[modality], WIDTHS[modality])
    values = rng.normal(size=shape).astype(dtype)
    values[:, :2] = 0 if modality == "text" else values[:, :2]
    values[:, -1] = 0 if modality == "vision" else values[:, -1]
    return values


def sentiment_split(count: int, *, seed: int) -> dict:
    """MOSI's types: float32 text, float64 audio with -inf, labels (N, 1, 1)."""
    rng = np.random.default_rng(seed)
    split = {
        "text": sequences(rng, count, "text", dtype=np.float32),
        "audio": sequences(rng, count, "audio", dtype=np.float64),
        "vision": sequences(rng, count, "vision", dtype=np.float64),
        "labels": rng.uniform(-3, 3, (count, 1, 1)).astype(np.float32),
    }
    split["audio"][0, 3, 1] = -np.inf
    return split


def cmu_mosi(folder: Path) -> Path:
    """Without ids; one sample without a face (zeros alone)."""
    content = {
        name: sentiment_split(count, seed=count)
        for name, count in (("train", 6), ("valid", 3), ("test", 4))
    }
    content["train"]["vision"][2] = 0
    put(folder / "mosi_data.pkl", pickle.dumps(content))
    return folder


def cmu_mosei(folder: Path) -> Path:
    """Ids of (video, start, end)."""
    content = {}
    for name, count in (("train", 5), ("valid", 2), ("test", 3)):
        split = sentiment_split(count, seed=10 + count)
        ids = [[f"{name}vid", f"{n}.5", f"{n + 1}.5"] for n in range(count)]
        content[name] = split | {"id": np.array(ids)}
    put(folder / "mosei_senti_data.pkl", pickle.dumps(content, protocol=2))
    return folder


def ch_sims(folder: Path) -> Path:
    """Labels of one dimension in [-1, 1], lists of ids, and keys that nobody reads here."""
    content = {}
    for name, count in (("train", 4), ("valid", 2), ("test", 2)):
        split = sentiment_split(count, seed=20 + count)
        del split["labels"]
        content[name] = split | {
            "regression_labels": np.linspace(-1, 1, count).round(1),
            "id": [f"video_{name}$_${n:04d}" for n in range(count)],
            "raw_text": np.array(["words"] * count, dtype=object),
            "annotations": ["Neutral"] * count,
            "audio_lengths": [5] * count,
        }
    put(folder / "unaligned_39.pkl", pickle.dumps(content))
    return folder


def iemocap(folder: Path) -> Path:
    """Ten folds in the publication, two here; one-hot labels and names as (N, 1) bytes."""
    import h5py

    rng = np.random.default_rng(0)
    count = {"trn": 5, "val": 2, "tst": 3}
    for letter, file, modality in (
        ("L", "bert_large", "text"),
        ("A", "comparE", "audio"),
        ("V", "denseface", "vision"),
    ):
        put(folder / letter / "x", b"").unlink()
        with h5py.File(folder / letter / f"{file}.h5", "w") as h5:
            for split, n in count.items():
                for index in range(n):
                    length = LENGTHS[modality] + index
                    array = rng.normal(size=(length, WIDTHS[modality]))
                    h5[f"Ses01_{split}_{index}"] = array.astype(np.float32)
    put(folder / "A" / "comparE_mean_std.h5", b"not read")
    for fold in ("1", "2"):
        for split, n in count.items():
            place = folder / "target" / fold
            place.mkdir(parents=True, exist_ok=True)
            np.save(place / f"{split}_label.npy", np.eye(4)[np.arange(n) % 4])
            names = np.array([[f"Ses01_{split}_{index}".encode()] for index in range(n)])
            np.save(place / f"{split}_int2name.npy", names)
    return folder


MAKERS |= {"cmu_mosi": cmu_mosi, "cmu_mosei": cmu_mosei, "ch_sims": ch_sims, "iemocap": iemocap}


def mimic_impk(folder: Path, *, count: int = 40) -> Path:
    """float64 arrays with NaN and infinities, labels as floats, a stay of zeros alone."""
    rng = np.random.default_rng(0)
    content = {
        "ep_tdata": rng.normal(3, 2, (count, 24, 12)),
        "adm_features_all": rng.normal(1, 4, (count, 5)),
        "adm_labels_all": (rng.random((count, 6)) < 0.2).astype(float),
        "y_icd9": (rng.random((count, 20)) < 0.4).astype(float),
    }
    content["ep_tdata"][0, 3, 4], content["ep_tdata"][0, 0, 0] = np.nan, -np.inf
    content["adm_features_all"][1, 2] = np.inf
    content["ep_tdata"][2] = 0
    put(folder / "im.pk", pickle.dumps(content))
    return folder


MAKERS |= {"mimic_impk": mimic_impk}


def mmsd(folder: Path) -> Path:
    """One object a split, ids as texts; images in a folder beside the tables."""
    number = 800
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        table = {}
        for index in range(count):
            number += 1
            table[str(number)] = {"text": f"words of {number} # tag", "label": index % 2}
            put(folder / "mmsd_data" / "data_raw" / "images" / f"{number}.jpg", jpeg())
        put_json(folder / "mmsd_data" / "data_raw" / f"mmsd_dataset_{split}.json", table)
    return folder


def mustard_records(ids, show: str) -> dict:
    """Records as published: context and its speakers of one length, truth values."""
    return {
        key: {
            "utterance": f"Well, {key}.",
            "speaker": "SHELDON",
            "context": [f"Before {key}.", "Really?"],
            "context_speakers": ["LEONARD", "PENNY"],
            "show": show,
            "sarcasm": index % 2 == 0,
        }
        for index, key in enumerate(ids)
    }


def mustard(folder: Path) -> Path:
    """Three tables with a frame for each utterance beside them; ids of two numbers."""
    for split, ids, show in (
        ("train", ["1_60", "1_70", "1_80", "1_90"], "BBT"),
        ("val", ["1_105", "1_213"], "GOLDENGIRLS"),
        ("test", ["2_484", "2_477"], "FRIENDS"),
    ):
        table = mustard_records(ids, show)
        put_json(folder / "mustard_data" / "data_raw" / f"mustard_dataset_{split}.json", table)
        for key in ids:
            put(folder / "mustard_data" / "data_raw" / f"{key}.jpg", jpeg())
    return folder


def mustard_original(folder: Path) -> Path:
    """One file, text only; the show FRIENDS is the test split."""
    shows = {"BBT": 8, "FRIENDS": 3, "SARCASMOHOLICS": 1}
    table = {}
    for place, (show, count) in enumerate(shows.items()):
        table |= mustard_records([f"{place}_{n}" for n in range(count)], show)
    put_json(folder / "sarcasm_data.json", table)
    return folder


def urfunny(folder: Path) -> Path:
    """PNG frames; a row without a sentence before it."""
    number = 100
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        table = {}
        for index in range(count):
            number += 1
            table[str(number)] = {
                "context_sentences": [f"So {number}.", "And then."][: index + 1] if index else [],
                "punchline_sentence": f"It was {number}.",
                "label": index % 2,
            }
            put(folder / "data_raw" / f"{number}.png", jpeg(format="PNG"))
        put_json(folder / "data_raw" / f"urfunny_dataset_{split}.json", table)
    return folder


MAKERS |= {"mmsd": mmsd, "mustard": mustard, "urfunny": urfunny}
MAKERS |= {"av_mnist": av_mnist, "avmnist_npy": avmnist_npy, "digit_pairs": av_mnist}


def vqa_entries(numbers, *, answers) -> tuple[list, list]:
    """Questions and annotations; ten annotators, of whom three say something else."""
    questions, annotations = [], []
    for n in numbers:
        image, main = n // 2, answers[n % len(answers)]
        given = [main] * 7 + ["maybe", "maybe", f"word {n}"]
        questions.append({"image_id": image, "question": f"What is {n}?", "question_id": n})
        annotations.append(
            {
                "question_id": n,
                "image_id": image,
                "question_type": "what",
                "answer_type": "other",
                "multiple_choice_answer": main,
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": i}
                    for i, a in enumerate(given, start=1)
                ],
            }
        )
    return questions, annotations


def coco(folder: Path, part: str, numbers) -> None:
    for n in {n // 2 for n in numbers}:
        put(folder / part / f"COCO_{part}_{n:012d}.jpg", jpeg())


def vqa_v2(folder: Path) -> Path:
    """Answers in several spellings: nine of "Yes", nine of "two" and "2", one of "kite"."""
    answers = ["Yes", "two", "yes.", "2"] * 4 + ["the yes", "2", "kite"]
    sizes = {"train2014": range(19), "val2014": range(100, 104)}
    for part, numbers in sizes.items():
        questions, annotations = vqa_entries(numbers, answers=answers)
        info = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": part}
        named = {**info, "questions": questions}
        put_json(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", named)
        put_json(
            folder / f"v2_mscoco_{part}_annotations.json", {**info, "annotations": annotations}
        )
        coco(folder, part, numbers)
    return folder


def vqa_vs(folder: Path) -> Path:
    """Nine sets that are parts of the IID test set; only one has answers of its own."""
    root = folder / "VQA-VS"
    test = range(200, 212)
    whole = {"Training": range(18), "Val": range(100, 104), "IID-Test": test}
    sets = ["QT", "KW", "KWP", "QT+KW", "KO", "KOP", "QT+KO", "KW+KO", "QT+KW+KO"]
    parts = {f"OOD-Test/{name}": test[n : n + 3] for n, name in enumerate(sets)}
    for place, numbers in {**whole, **parts}.items():
        questions, annotations = vqa_entries(numbers, answers=["yes", "no"])
        name = place.replace("/", "-")
        put_json(root / place / f"{name}-Ques.json", questions)
        if place in whole or place.endswith("/QT"):
            put_json(root / place / f"{name}-Ans.json", annotations)
        coco(folder / "images", "val2014" if numbers[0] >= 100 else "train2014", numbers)
    return folder


def nlvr2(folder: Path) -> Path:
    """Two sentences about one pair; directories in train only."""
    for name, directory in (("train", 7), ("dev", None), ("test1", None)):
        lines = []
        for sentence, label in ((0, "True"), (1, "False")):
            row = {
                "validation": {},
                "sentence": f"There are {sentence} dogs.",
                "left_url": "http://a/b.jpg",
                "right_url": "http://a/c.jpg",
                "label": label,
                "synset": "dog",
                "query": "dogs",
                "identifier": f"{name}-10-3-{sentence}",
            }
            lines.append(json.dumps(row | ({"directory": directory} if directory else {})))
        put(folder / "data" / f"{name}.json", "\n".join(lines) + "\n")
        place = folder / "images" / name / (str(directory) if directory else "")
        for side, colour in ((0, (200, 0, 0)), (1, (0, 0, 200))):
            put(place / f"{name}-10-3-img{side}.png", jpeg(colour, format="PNG"))
    return folder


MAKERS |= {"vqa_v2": vqa_v2, "vqa_vs": vqa_vs, "nlvr2": nlvr2}


MAKERS |= {"fastmri_knee": fastmri_knee}


MAKERS |= {"adni": adni, "mimic3": mimic3, "mimic4": mimic4, "eicu": eicu}
MAKERS |= {"mimic_tensors": mimic_tensors}
MAKERS |= {"tables": patient_layouts.tables}
