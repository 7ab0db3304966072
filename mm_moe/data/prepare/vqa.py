"""Questions about COCO images: VQA v2 (Goyal et al., 2017) and VQA-VS (Si et al., 2022).

Layout of VQA v2, in the folder itself or in `questions/` and `annotations/` below it:
`v2_OpenEnded_mscoco_{train,val}2014_questions.json` ({"questions": [{"image_id", "question",
"question_id"}]}) and `v2_mscoco_{train,val}2014_annotations.json` ({"annotations": [{"question_id",
"multiple_choice_answer", "answers": [{"answer"}, ...]}]}); the questions of test2015 have no
annotations.

Layout of VQA-VS, in the folder itself or in `VQA-VS/`: `Training/Training-{Ques,Ans}.json`,
`Val/Val-*`, `IID-Test/IID-Test-*` and `OOD-Test/<SET>/OOD-Test-<SET>-*` for the nine sets QT, KW,
KWP, QT+KW, KO, KOP, QT+KO, KW+KO, QT+KW+KO; plain lists of the same entries. The nine sets are
parts of the IID test set, so their rows are written again, under ids of their own; a set without a
file of answers takes those of the IID test set.

Images for both: `train2014/COCO_train2014_<12 digits>.jpg`, likewise `val2014` and `test2015`, in
the folder or in `images/`. An image is stored once for each of its questions.

A target gives 0.3, 0.6, 0.9 or 1 to an answer that one, two, three or more annotators gave; answers
outside the vocabulary (at least 9 training questions whose main answer they are; training questions
only) give nothing, so that a question may have a target of zeros, which counts in the score.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.answers import MIN_COUNT, answer_shares, vocabulary
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet, RawRow, read_json
from mm_moe.data.schema import MULTI_LABEL, VQA
from mm_moe.errors import ConfigError, DataError

LICENSE = "questions CC BY 4.0 (VQA v2); images of COCO under Flickr's terms, not to be shared"
FOLDERS = ("train2014", "val2014", "test2015")
LABELLED = {"train": "train2014", "validation": "val2014"}  # of VQA v2
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERS = "v2_mscoco_{}_annotations.json"
OOD_SETS = ("QT", "KW", "KWP", "QT+KW", "KO", "KOP", "QT+KO", "KW+KO", "QT+KW+KO")


class VqaRaw(RawDataSet):
    """What the two layouts share: entries of questions and answers, images by number.

    Args:
        source: the folder.
        min_count: training questions whose main answer a class of the vocabulary is.

    Raises:
        ConfigError: `min_count` below 1.
        DataError: a file is missing or not in the layout, or no answer is frequent enough.
    """

    problem_type = MULTI_LABEL
    task = VQA
    license = LICENSE
    notes = (
        "Shares are 0.3, 0.6, 0.9 and 1 for one, two, three and more annotators.",
        "The vocabulary comes from training questions only; released code often adds validation.",
        "Questions on one image are rows of one group.",
    )
    folders: ClassVar[tuple[str, ...]] = FOLDERS

    def __init__(self, source: Path, *, min_count: int = MIN_COUNT) -> None:
        super().__init__(source)
        if not isinstance(min_count, int) or min_count < 1:
            raise ConfigError(f"{self.name}: min_count ({min_count!r}) must be at least 1.")
        self.kinds = {IMAGE: IMAGES, TEXT: TEXTS}
        self.min_count = min_count
        self.root = self._root()
        self.questions = self._question_files()
        self.answers = self._answer_files()
        main = [a["multiple_choice_answer"] for a in self._answers_of("train").values()]
        self.label_names = vocabulary(main, min_count=min_count)
        if not self.label_names:
            raise DataError(
                f"no answer belongs to {min_count} of the {len(main)} training questions; take a "
                "smaller --options '{\"min_count\": 1}'."
            )
        self.index_of = {answer: index for index, answer in enumerate(self.label_names)}

    def _root(self) -> Path:
        """The folder that holds the questions."""
        return self.source

    @abstractmethod
    def _question_files(self) -> dict[str, Path]:
        """Split -> file of its questions."""

    @abstractmethod
    def _answer_files(self) -> dict[str, Path]:
        """Split -> file of its answers; a split that is not there has none."""

    def splits(self) -> tuple[str, ...]:
        """Those whose questions are there."""
        return tuple(self.questions)

    def indices(self) -> list[Path]:
        """The files of questions and answers."""
        return list(dict.fromkeys([*self.questions.values(), *self.answers.values()]))

    @property
    def options(self) -> dict[str, Any]:
        """How the vocabulary was made."""
        return {"min_count": self.min_count}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each question."""
        answers = self._answers_of(split)
        for number, question in enumerate(read_entries(self.questions[split], "questions")):
            try:
                asked, image = int(question["question_id"]), int(question["image_id"])
                text = question["question"]
            except (KeyError, TypeError, ValueError, OverflowError):
                yield RawRow(f"{split}:{number}", fault="no question_id, image_id or question")
                continue
            if not isinstance(text, str):
                yield RawRow(self._id(split, asked), fault="the question is no text")
                continue
            found = answers.get(asked)
            label = found and answer_shares(
                [entry.get("answer", "") for entry in found["answers"]], self.index_of
            )
            payload = {IMAGE: self._image(image), TEXT: text}
            name = self._id(split, asked)  # masks take from questions, not from images
            yield RawRow(name, payload, label, group=f"image {image}", mask_key=name)

    def _id(self, split: str, asked: int) -> str:
        return str(asked)

    def _image(self, number: int) -> Path:
        """The file of an image; where there is none, the first place that it could have."""
        names = [f"{folder}/COCO_{folder}_{number:012d}.jpg" for folder in self.folders]
        places = [base / name for base in (self.source, self.source / "images") for name in names]
        return next((place for place in places if place.is_file()), places[0])

    def _answers_of(self, split: str) -> dict[int, dict[str, Any]]:
        """Question -> its annotations."""
        if split not in self.answers:
            return {}
        path = self.answers[split]
        found: dict[int, dict[str, Any]] = {}
        for entry in read_entries(path, "annotations"):
            given = entry.get("answers")
            whole = isinstance(given, list) and all(isinstance(one, dict) for one in given)
            if not whole or "multiple_choice_answer" not in entry:
                raise DataError(f"{path}: an entry has no answers or no multiple_choice_answer.")
            try:
                found[int(entry["question_id"])] = entry
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(f"{path}: an entry has no number as question_id.") from error
        return found


class VqaV2Raw(VqaRaw):
    """VQA v2: train2014 and val2014; test2015 has no answers and is a split only if it is there."""

    name = "vqa_v2"

    def _question_files(self) -> dict[str, Path]:
        found = {
            split: self.need(*self._nested("questions"), QUESTIONS.format(part))
            for split, part in LABELLED.items()
        }
        test = self.source.joinpath(*self._nested("questions"), QUESTIONS.format("test2015"))
        if test.is_file():
            found["test"] = test
            self.unlabelled["test"] = "the answers of test2015 are not public; score validation"
        return found

    def _answer_files(self) -> dict[str, Path]:
        return {
            split: self.need(*self._nested("annotations"), ANSWERS.format(part))
            for split, part in LABELLED.items()
        }

    def _nested(self, folder: str) -> tuple[str, ...]:
        return (folder,) if (self.source / folder).is_dir() else ()


class VqaVsRaw(VqaRaw):
    """VQA-VS: "test" is the IID test set, `ood_*` are the nine others (see `eval.ood`)."""

    name = "vqa_vs"

    def _root(self) -> Path:
        return self.source / "VQA-VS" if (self.source / "VQA-VS").is_dir() else self.source

    def _paths(self, what: str) -> dict[str, Path]:
        """Split -> where its file of this kind ("Ques", "Ans") has to be."""
        whole = {"train": "Training", "validation": "Val", "test": "IID-Test"}
        found = {split: self.root / name / f"{name}-{what}.json" for split, name in whole.items()}
        for name in OOD_SETS:
            folder = self.root / "OOD-Test" / name
            found[ood_split(name)] = folder / f"OOD-Test-{name}-{what}.json"
        return found

    def _question_files(self) -> dict[str, Path]:
        return {
            split: self.need(*path.relative_to(self.source).parts)
            for split, path in self._paths("Ques").items()
        }

    def _answer_files(self) -> dict[str, Path]:
        found = self._paths("Ans")
        for split in ("train", "validation", "test"):
            self.need(*found[split].relative_to(self.source).parts)
        return {split: path if path.is_file() else found["test"] for split, path in found.items()}

    def _id(self, split: str, asked: int) -> str:
        return f"{split}-{asked}" if split.startswith("ood_") else str(asked)


def ood_split(name: str) -> str:
    """Our name of one of the nine sets: "ood_qt_kw" for "QT+KW"."""
    return "ood_" + name.lower().replace("+", "_")


def read_entries(path: Path, key: str) -> list[dict[str, Any]]:
    """The entries of a file: a list, or an object that holds it under `key`.

    Raises:
        DataError: neither.
    """
    content = read_json(path, kind=object)
    entries = content.get(key) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} holds neither a list of objects nor one under {key!r}.")
    return entries
