"""The mean of a modality's encoded tokens.

Axes: B samples, M modalities, P tokens, H their width, Q missing cells.
"""

from __future__ import annotations

from torch import Tensor

from mm_moe.fill.base import Cells, Fill, FillShape, number
from mm_moe.moe.layer import RoutingRecord
from mm_moe.moe.running_mean import RunningMean


class MeanFill(Fill):
    """The running mean of the training rows' tokens of the modality.

    Mean imputation fills the raw values and encodes them: one vector, whose encoding moves with the
    tower. Here the encodings are averaged, which is another vector wherever a tower is not affine,
    and the mean lags behind the tower by some 1 / momentum batches. No gradient reaches the tower
    through it. The mean is one of all processes and is saved with the weights; under gradient
    accumulation it moves with every micro-batch, so another split of a step has another lag.

    Args:
        shape: of the model's tokens.
        momentum: share of a batch's mean in the running one.
        warm_up_steps: see `Fill`; the mean runs from the start.
    """

    def __init__(self, shape: FillShape, *, momentum: float = 0.1, warm_up_steps: int = 0) -> None:
        super().__init__(shape, warm_up_steps=warm_up_steps)
        size = (len(shape.modalities), shape.num_tokens, shape.width)
        self.running = RunningMean(size, momentum=number("momentum", momentum, most=1.0))

    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """The modality's mean for each cell; in training after this batch was taken in."""
        if self.training:
            own_BMPH = cells.tokens_BMPH.detach() * cells.present_BM[:, :, None, None]
            self.running.update(own_BMPH.sum(0), cells.present_BM.sum(0))
        return self.running.mean.index_select(0, cells.modality_Q), {}
