"""A retriever that trusts supports by how much they are like the sample.

Axes: Q missing cells, N supports of a cell.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mm_moe.fill.base import Cells
from mm_moe.fill.retriever import RetrieverFill
from mm_moe.fill.similarity import nearness


class SimilarRetrieverFill(RetrieverFill):
    """A `RetrieverFill` whose supports weigh softmax(cosine / temperature) instead of all the same.

    The cosine is that of the encoded modalities that sample and support have in common, without a
    gradient. The published retriever draws supports uniformly and pools them evenly, so that they
    say what the modality is like, but not what it is like for *this* sample; with more supports
    (`num_supports` 16, say) and weights, they do. Ours.

    Its options are those of `RetrieverFill`; towards temperature 0 the nearest support alone
    counts, with a large one all do.
    """

    needs_whole: ClassVar[bool] = True
    own_temperature: ClassVar[float | None] = 0.1

    def scores(self, cells: Cells, place_QN: Tensor) -> Tensor:
        """Cosines over the temperature (Q, N)."""
        assert self.temperature is not None  # it has one of its own
        return nearness(cells, place_QN, self.shape.modalities) / self.temperature
