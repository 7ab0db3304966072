"""UR-FUNNY V2 (Hasan et al., 2019): sentences of TED talks with a frame, funny or not.

See `id_records`: a record is {"context_sentences", "punchline_sentence", "label"}, the frame
`{id}.png`.
"""

from __future__ import annotations

from typing import Any

from mm_moe.data.prepare.id_records import IdRecords, text_of, texts_of, truth_of


class UrfunnyRaw(IdRecords):
    """The tables and frames; the text is the punchline alone. Options as `IdRecords`."""

    name = "urfunny"
    label_names = ("not_humorous", "humorous")
    license = "UR-FUNNY (Hasan et al., 2019): for research; the talks are CC BY-NC-ND 4.0 (TED)"
    notes = ("One frame stands for the video.",)
    ending = ".png"
    has_context = True

    def parts(self, record: dict[str, Any]) -> tuple[str, list[str], int]:
        """Punchline, and the sentences before it."""
        return (
            text_of(record, "punchline_sentence"),
            texts_of(record, "context_sentences"),
            truth_of(record, "label"),
        )
