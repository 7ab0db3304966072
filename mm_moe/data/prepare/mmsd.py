"""MMSD2.0 (Qin et al., 2023): tweets with an image, sarcastic or not; see `id_records`.

A record is {"text", "label"}, the image `{id}.jpg`. 19,816 / 2,410 / 2,409 rows.
"""

from __future__ import annotations

from typing import Any

from mm_moe.data.prepare.id_records import IdRecords, text_of, truth_of


class MmsdRaw(IdRecords):
    """The tables and images; options as `IdRecords`, without a context."""

    name = "mmsd"
    label_names = ("not_sarcastic", "sarcastic")
    license = "MMSD2.0 (Qin et al., 2023): for research; tweets and pictures are their authors'"
    notes = ("The usual scores are accuracy and F1 of the sarcastic class.",)

    def parts(self, record: dict[str, Any]) -> tuple[str, list[str], int]:
        """The tweet."""
        return text_of(record, "text"), [], truth_of(record, "label")
