"""MUStARD (Castro et al., 2019): utterances of TV shows, sarcastic or not, in two layouts.

Original: one `sarcasm_data.json`, id -> {"utterance", "speaker", "context", "context_speakers",
"show", "sarcasm"}; text only. Its speaker-independent test split is the show FRIENDS (356 of 690);
the other rows are dealt to train (251) and validation (83) by a hash of their ids.

With frames: three tables of the same records, see `id_records`; image `{id}.jpg`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_moe.data.chance import draws
from mm_moe.data.prepare.id_records import IdRecords, text_of, texts_of, truth_of
from mm_moe.data.prepare.raw import SPLITS, read_json
from mm_moe.errors import ConfigError

ORIGINAL = "sarcasm_data.json"
TEST_SHOW = "FRIENDS"
VALIDATION_SHARE = 0.25  # of the rows that are not in the test split
BY_SPEAKER, MIXED = "speaker_independent", "speaker_dependent"
MIXED_SHARES = (0.2, 0.2)  # test and validation, where shows are mixed


class MustardRaw(IdRecords):
    """Either layout.

    Args:
        source: the folder.
        images: as in `IdRecords`; the original layout has none.
        context: as in `IdRecords`; by default added where there are no images.
        speaker: write the speakers' names before what they say. Off by default: with one show as
            the test split, names tell the training rows' label and nothing else.
        show: write the show's name before the utterance. Off by default: all of SARCASMOHOLICS and
            39 of 40 rows of GOLDENGIRLS are sarcastic.
        split: of the original layout: "speaker_independent", or "speaker_dependent" (60 / 20 / 20
            by a hash of the ids).

    Raises:
        ConfigError: an unknown split, or one for the layout that has its own.
        DataError: the folder is in neither layout.
    """

    name = "mustard"
    label_names = ("not_sarcastic", "sarcastic")
    license = "MUStARD (Castro et al., 2019): texts MIT; frames belong to the shows' owners"
    notes = (
        "The test split has other shows and another prior (42.7% sarcastic) than train and "
        "validation (57.8%); always answering yes gives F1 59.8.",
    )
    has_context = True

    def __init__(
        self,
        source: Path,
        *,
        images: str | bool | None = None,
        context: bool | None = None,
        speaker: bool = False,
        show: bool = False,
        split: str | None = None,
    ) -> None:
        self.original = (source / ORIGINAL).is_file()
        if split not in (None, BY_SPEAKER, MIXED):
            raise ConfigError(f"--options split {split!r} is neither {BY_SPEAKER} nor {MIXED}.")
        if split and not self.original:
            raise ConfigError(f"--options split is for {ORIGINAL}; these tables have their splits.")
        self.split = split or (BY_SPEAKER if self.original else "published")
        self.speaker, self.show = speaker, show
        super().__init__(
            source, images=not self.original if images is None else images, context=context
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the rows were made of."""
        own = {"speaker": self.speaker, "show": self.show, "split": self.split}
        return super().options | own

    def find_tables(self) -> dict[str, Path]:
        """The one file for all splits, or the three tables."""
        if self.original:
            return dict.fromkeys(SPLITS, self.need(ORIGINAL))
        return super().find_tables()

    def read(self, split: str) -> dict[str, Any]:
        """The split's records."""
        if not self.original:
            return super().read(split)
        records = read_json(self.tables[split], kind=dict)
        chosen = split_ids(records, by_speaker=self.split == BY_SPEAKER)[split]
        return {key: record for key, record in records.items() if key in chosen}

    def parts(self, record: dict[str, Any]) -> tuple[str, list[str], int]:
        """Utterance, what was said before, and whether it is sarcastic."""
        text, before = text_of(record, "utterance"), texts_of(record, "context")
        if self.speaker:
            names = texts_of(record, "context_speakers")
            if len(names) != len(before):
                raise TypeError("context_speakers is not as long as context")
            before = [f"{name}: {words}" for name, words in zip(names, before, strict=True)]
            text = f"{text_of(record, 'speaker')}: {text}"
        if self.show:
            text = f"[{text_of(record, 'show')}] {text}"
        return text, before, truth_of(record, "sarcasm")


def split_ids(records: dict[str, Any], *, by_speaker: bool) -> dict[str, set[str]]:
    """Split -> ids, by show and hash or by hash alone; the sizes are exact."""

    def place(key: str) -> float:
        return draws(key, purpose="split", dataset=MustardRaw.name)[0]

    rest = sorted(records, key=place)
    if by_speaker:
        test = {key for key, row in records.items() if _show(row) == TEST_SHOW}
        rest = [key for key in rest if key not in test]
        count = int(VALIDATION_SHARE * len(rest))
    else:
        tests, count = (int(share * len(records)) for share in MIXED_SHARES)
        test, rest = set(rest[:tests]), rest[tests:]
    return {"train": set(rest[count:]), "validation": set(rest[:count]), "test": test}


def _show(record: Any) -> Any:
    return record.get("show") if isinstance(record, dict) else None
