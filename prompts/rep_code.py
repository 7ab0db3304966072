"""REP as its released code computes it: no cache, no replay, and a frozen random attention.

See `prompts.residual` for the source, the equations and where we differ. The released settings for
MM-IMDb and Food-101 are the defaults; for Hateful Memes it trains the attention
(`train_attention`), each tower's last norm and the image projection. Its texts are padded to 77
tokens with token 0, which the dynamic group attends to. For equal numbers set `attend_padding` and
the model's `pad_text` to 0 (`--pad_text 0 --prompt_config '{"attend_padding": true}'`); a row then
does not depend on its batch either.
"""

from __future__ import annotations

from typing import ClassVar

from prompts.residual import ResidualOptions, ResidualPrompt


class RepCodePrompt(ResidualPrompt):
    """The released REP; queries and attention of the dynamic group stay as drawn."""

    defaults: ClassVar[ResidualOptions] = ResidualOptions()
