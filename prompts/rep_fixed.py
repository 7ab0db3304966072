"""REP's released computation without its faults.

Against `prompts.rep_code`: queries and attention of the dynamic group are trained; the share of new
tokens is a sigmoid and not decayed to zero; every table starts with noise of the same size relative
to its base vector (the source's differs by a factor of 20 between tables).
"""

from __future__ import annotations

from typing import ClassVar

from prompts.residual import ResidualOptions, ResidualPrompt


class RepFixedPrompt(ResidualPrompt):
    """REP with every part trained and every table started alike."""

    defaults: ClassVar[ResidualOptions] = ResidualOptions(
        train_queries=True, train_attention=True, bounded_share=True, relative_noise=True
    )
