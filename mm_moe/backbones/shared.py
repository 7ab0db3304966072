"""One tower for several modalities of a kind: two images of a pair are read by the same weights."""

from __future__ import annotations

from torch import Tensor, nn

from mm_moe.backbones.base import Payload, Tower
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord


class SharedTower(Tower):
    """A further modality's view of a tower that is registered under the first one's name.

    It has no parameters of its own, so that the weights are counted, trained and saved once; a
    gradient is the sum over the modalities. Routers see the view's own `modality_index`.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self._tower = (tower,)  # in a tuple, so that it is no submodule
        self.width, self.out_width = tower.width, tower.out_width
        self.num_blocks, self.causal = tower.num_blocks, tower.causal

    @property
    def tower(self) -> Tower:
        """The tower with the weights."""
        return self._tower[0]

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor | None]:
        """As the tower."""
        return self.tower.embed(payload)

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """As the tower."""
        return self.tower.block(index, x_NLD, mask_NL, keys_values, context, memory)

    def memory(self, payload: Payload) -> Tensor | None:
        """As the tower."""
        return self.tower.memory(payload)

    @property
    def source_width(self) -> int:
        """As the tower."""
        return self.tower.source_width

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """As the tower."""
        return self.tower.pool(x_NLD, payload, prefix)

    def blank(self) -> Payload:
        """As the tower."""
        return self.tower.blank()

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """As the tower."""
        return self.tower.stand_in(num_rows, length)

    def anchor(self) -> Tensor | None:
        """As the tower."""
        return self.tower.anchor()

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """The tower's own places: a block that is made sparse is so for every modality."""
        return self.tower.feed_forwards()
