"""One encoder (tower) per modality, as a sequence of blocks that can be edited from outside.

A tower runs its library's own modules; between the blocks an `Edit` may add or change tokens, and a
block's feed-forward may have been replaced by a `MoELayer`. With neither, the numbers are the
library's own.

Axes: N present rows of one modality, L tokens of a row, D width, P extra key/value pairs, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mm_moe.backbones.entrance import Entrance, Generated, append_rows
from mm_moe.backbones.recompute import recomputed, wants_recompute
from mm_moe.backbones.weights import load_weights
from mm_moe.batch import base_modality
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.registry import nearest

Payload = dict[str, Tensor]


@dataclass(frozen=True)
class SequenceNeeds:
    """What a tower for feature sequences takes in.

    Attributes:
        width: of one step.
        length: steps that the tower has positions for.
        mean: of each channel over the training rows, taken away; None: nothing is.
        std: likewise, divided by.
    """

    width: int
    length: int
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class ArrayNeeds:
    """What a tower for arrays of one shape takes in.

    Attributes:
        shape: of one row.
        scale: its values are divided by this.
        mean: after this was taken away from them.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    mean: float = 0.0


@dataclass(frozen=True)
class ProcessorNeeds:
    """What a backbone takes in, for the processors of its modalities; 0 where it has no such input.

    Attributes:
        image_size: side of the square image in pixels.
        max_text_tokens: longest text, marks of start and end included.
        vocab_size: token ids must be smaller.
        source: folder with the tokenizer that comes with the backbone.
        tokenizer: makes the library's tokenizer of a backbone without a folder.
        image_mean: per channel, of values in [0, 1]; None for CLIP's.
        image_std: likewise.
        sequences: modality -> its needs, where the modality is a sequence of features.
        arrays: modality -> its needs, where the modality is an array of one shape.
    """

    image_size: int = 0
    max_text_tokens: int = 0
    vocab_size: int = 0
    source: str | None = None
    tokenizer: Callable[[], Any] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    sequences: Mapping[str, SequenceNeeds] = field(default_factory=dict)
    arrays: Mapping[str, ArrayNeeds] = field(default_factory=dict)


class Edit(Protocol):
    """What a prompt does to one tower during one forward pass; it holds all state of that pass.

    Attributes:
        prefix: number of extra tokens that stand before the tower's own tokens at this moment.
    """

    prefix: int

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask that enter block `layer`; may prepend to or replace the prefix."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (N, P, D) that every token of block `layer` also attends to, or None."""

    def after(self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Tokens that leave block `layer`."""


class Tower(nn.Module, ABC):
    """One modality's encoder: `embed`, then each `block`, then `pool`.

    Attributes:
        width: D, width of the tokens between blocks.
        out_width: width of the pooled feature.
        num_blocks: how many blocks there are.
        causal: whether a token attends only to itself and those before it.
        attends: whether the blocks have attention, by which a prompt can act.
        modality_index: place of the modality in the model's fixed order.
    """

    width: int
    out_width: int
    num_blocks: int
    causal: bool = False
    attends: bool = True
    modality_index: int = 0

    @abstractmethod
    def embed(self, payload: Payload) -> tuple[Tensor, Tensor | None]:
        """Tokens (N, L, D) that enter block 0 and bool mask (N, L), None when every token is real.

        The first token of every row is real, so that a prefix can take its place in the mask.
        """

    @abstractmethod
    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Run block `index`; the record is None where its feed-forward is dense.

        `memory` is what the tower's own `memory` gave for these rows.

        A mask that is False throughout marks the blank row: it is not routed, and its numbers are
        finite but mean nothing.
        """

    def prepare_adapters(self) -> None:
        """Give every attention projection a linear layer of its own, with the same numbers."""
        return

    def undo_adapters(self) -> None:
        """Take `prepare_adapters` back, once no adapter is left."""
        return

    def memory(self, payload: Payload) -> Tensor | None:
        """What the blocks attend to besides their tokens (N, S, width of its own), if anything."""
        return None

    @abstractmethod
    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Features (N, out_width) from the last tokens, the first `prefix` of which are extra."""

    @abstractmethod
    def blank(self) -> Payload:
        """A payload of one row, for a process whose batch has no row of this modality."""

    @property
    def source_width(self) -> int:
        """Width of the memory, or of the tokens in a tower without one."""
        return self.width

    def enter(self, payload: Payload) -> Entrance:
        """What of the payload reaches the blocks."""
        return Entrance(*self.embed(payload), self.memory(payload))

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """The payload for rows whose memory, or else tokens, of `length` a prompt generated.

        Raises:
            ConfigError: this tower takes no generated tokens.
        """
        raise ConfigError(
            f"{type(self).__name__} takes no generated tokens; turn the prompt's generative part "
            "off, or use another prompt."
        )

    def anchor(self) -> Tensor | None:
        """Embedding (D,), without position, of the token that the feature is read from, if any."""
        return None

    def new_parts(self) -> list[nn.Module]:
        """Parts that no pretrained weights fill; they train in a locked tower too."""
        return []

    @abstractmethod
    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """One (block module, attribute name) per block: where its feed-forward hangs."""


def run_feed_forward(
    feed_forward: nn.Module,
    x_NLD: Tensor,
    mask_NL: Tensor | None,
    context: TokenContext | None,
) -> tuple[Tensor, RoutingRecord | None]:
    """Run a block's feed-forward, dense or sparse. Only the sparse one looks at the rest."""
    if isinstance(feed_forward, MoELayer):
        return feed_forward(x_NLD, mask_NL, context)
    return feed_forward(x_NLD), None


class Backbone(nn.Module):
    """Towers by modality, in the model's fixed order.

    Several modalities of a kind ("image_0", "image_1") share one tower, which stands under the
    first one's name.

    Args:
        settings: the backbone's options, kept (JSON-able) so that a checkpoint can be rebuilt.
        modalities: which towers to build, and their order.

    Raises:
        ConfigError: a modality this backbone has no tower for, a repeated one, or a wrong setting.
    """

    supported: ClassVar[tuple[str, ...]] = ()
    takes_sequences: ClassVar[bool] = False  # whether modalities are feature sequences
    takes_arrays: ClassVar[bool] = False  # whether modalities can be arrays of one shape
    num_tokens: int = 1  # that make up a feature, side by side
    settings: dict[str, Any]
    towers: nn.ModuleDict

    def __init__(self, settings: dict[str, Any], *, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.modalities = check_modalities(modalities, self.supported)
        # modality -> the tower that reads it, by its name in `supported`
        self.parts = {name: part_of(name, self.supported) for name in self.modalities}
        self.settings = dict(settings)
        self.recompute_every = 0  # blocks; see `set_recompute`

    def set_recompute(self, every: int) -> None:
        """While training, keep the inputs only of every `every`-th block of a tower; 0 for none."""
        self.recompute_every = every

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> Backbone:
        """Build and fill with pretrained weights: here a `.safetensors` file of `save_weights`.

        Raises:
            CheckpointError: no such file, or weights of another shape.
        """
        backbone = cls(settings, modalities=modalities)
        load_weights(backbone, Path(pretrained), names=backbone.first_names)
        return backbone

    def adapted(self, settings: dict[str, Any]) -> Backbone:
        """This backbone as a model with other settings takes it over; itself where they agree."""
        return self

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """What raw images and texts must be turned into for a backbone of these settings."""
        return ProcessorNeeds()

    @property
    def out_width(self) -> int:
        """Width of every modality's feature."""
        return next(iter(self.towers.values())).out_width  # type: ignore[return-value]

    def feature_width(self, modality: str) -> int:
        """Width of one modality's feature; `out_width` where they are all equal."""
        return self.out_width

    def set_towers(self, towers: dict[str, Tower]) -> None:
        """Register the towers, by their names in `supported`, in the order of `modalities`."""
        from mm_moe.backbones.shared import SharedTower  # which is a Tower itself

        first = self.first_names
        found = {
            name: towers[part] if first[part] == name else SharedTower(towers[part])
            for name, part in self.parts.items()
        }
        for index, name in enumerate(self.modalities):
            found[name].modality_index = index
        self.towers = nn.ModuleDict(found)

    @property
    def first_names(self) -> dict[str, str]:
        """Tower -> the modality under whose name it is registered."""
        found: dict[str, str] = {}
        for name, part in self.parts.items():
            found.setdefault(part, name)
        return found

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names of their routing records, "<modality>.<block>"."""
        found: dict[str, MoELayer] = {}
        for name, tower in self.towers.items():
            places: list[tuple[nn.Module, str]] = tower.feed_forwards()  # type: ignore[operator]
            for block, (parent, attribute) in enumerate(places):
                layer = getattr(parent, attribute)
                if isinstance(layer, MoELayer):
                    found[f"{name}.{block}"] = layer
        return found

    def encode(
        self,
        modality: str,
        payload: Payload | None,
        edit: Edit | None = None,
        context: TokenContext | None = None,
        generated: Generated | None = None,
    ) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """Features (N, out_width) of one modality and the routing records of its sparse blocks.

        Args:
            modality: which tower runs.
            payload: its packed rows, or None: the tower then runs its blank row with nothing
                routed, so that a process without the modality makes the same collectives.
            edit: a prompt's edits of this pass.
            context: what routers may know of the rows (one row if the payload is None); None says
                the modality and no more.
            generated: tokens of further rows, which run behind the packed ones; `edit` and
                `context` know of them too.

        Returns:
            Features (N + G, out_width), and records named "<modality>.<block>".
        """
        tower: Tower = self.towers[modality]  # type: ignore[assignment]
        rows = tower.blank() if payload is None else payload
        context = context or TokenContext(modality=tower.modality_index)
        entrance = tower.enter(rows) if generated is None else generated.entrance
        x_NLD, mask_NL, memory = entrance.x_NLD, entrance.mask_NL, entrance.memory
        if payload is None:
            mask_NL = torch.zeros(x_NLD.shape[:2], dtype=torch.bool, device=x_NLD.device)
        num_own, length = x_NLD.shape[:2]
        if generated is not None:
            stand_in = tower.stand_in(*generated.tokens_GPD.shape[:2])
            new_GPD = generated.tokens_GPD
            if memory is not None:
                memory, new_GPD = torch.cat([memory, new_GPD]), tower.embed(stand_in)[0]
            x_NLD, mask_NL = append_rows(x_NLD, mask_NL, new_GPD)
        records: dict[str, RoutingRecord] = {}
        for layer in range(tower.num_blocks):
            keys_values = None
            if edit is not None:
                x_NLD, mask_NL = edit.before(layer, x_NLD, mask_NL)
                keys_values = edit.keys_values(layer)
            block: Callable[..., Any] = tower.block
            if wants_recompute(self.recompute_every, layer, training=self.training):
                block = recomputed(tower.block)
            x_NLD, record = block(layer, x_NLD, mask_NL, keys_values, context, memory)
            if edit is not None:
                x_NLD = edit.after(layer, x_NLD, mask_NL)
            if record is not None:
                records[f"{modality}.{layer}"] = record
        prefix = 0 if edit is None else edit.prefix
        if generated is None:
            return tower.pool(x_NLD, rows, prefix), records
        own_ND = tower.pool(x_NLD[:num_own, : prefix + length], rows, prefix)
        new_GD = tower.pool(x_NLD[num_own:, : prefix + new_GPD.shape[1]], stand_in, prefix)
        return torch.cat([own_ND, new_GD]), records


def part_of(modality: str, supported: tuple[str, ...]) -> str:
    """The name of the tower for a modality: its own, or "image" for "image_1"."""
    return modality if modality in supported else base_modality(modality)


def check_modalities(modalities: tuple[str, ...], supported: tuple[str, ...]) -> tuple[str, ...]:
    """Return `modalities` as a tuple; ConfigError if one is repeated or not supported."""
    if not modalities or len(set(modalities)) != len(modalities):
        raise ConfigError(
            f"modalities {tuple(modalities)} must be a non-empty list without repeats."
        )
    for name in modalities:
        if part_of(name, supported) not in supported:
            raise ConfigError(
                f"this backbone has no modality {name!r}; {nearest(name, list(supported))}"
            )
    return tuple(modalities)


def check_options(kind: str, options: dict[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first option that is not known, with the nearest names."""
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown {kind} option {name!r}; {nearest(name, known)}")
