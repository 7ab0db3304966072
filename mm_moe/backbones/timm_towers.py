"""Image towers of `timm`: vision transformers block by block, convolutional networks as a whole.

Axes: N rows, L tokens, D width, C channels.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Payload, Tower, run_feed_forward
from mm_moe.backbones.block import Attention, BlockTower, TransformerBlock
from mm_moe.backbones.inputs import blank_image, check_pixels
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

HEAD_WIDTH = 64


class VitImageTower(Tower):
    """A plain vision transformer; payload: pixel_values (N, 3, H, W).

    Args:
        vit: without classifier.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.width = self.out_width = vit.embed_dim
        self.num_blocks = len(vit.blocks)
        self.image_size: int = vit.patch_embed.img_size[0]

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Patches and class token, with positions."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        x_NLD = self.vit._pos_embed(self.vit.patch_embed(pixels_NCHW))
        return self.vit.norm_pre(x_NLD), None

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One pre-norm block."""
        block: Any = self.vit.blocks[index]
        y_NLD = block.norm1(x_NLD)
        y_NLD = (
            block.attn(y_NLD) if keys_values is None else _attend(block.attn, y_NLD, keys_values)
        )
        x_NLD = x_NLD + block.drop_path1(block.ls1(y_NLD))
        y_NLD, record = run_feed_forward(block.mlp, block.norm2(x_NLD), mask_NL, context)
        return x_NLD + block.drop_path2(block.ls2(y_NLD)), record

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The library's pooling of the tower's own tokens."""
        return self.vit.forward_head(self.vit.norm(x_NLD[:, prefix:]), pre_logits=True)

    def blank(self) -> Payload:
        """One grey image."""
        weight = self.vit.patch_embed.proj.weight
        return blank_image(weight, self.image_size, channels=weight.shape[1])

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: every token is read."""
        return {}

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.vit.blocks]


def _attend(attention: Any, y_NLD: Tensor, extra: tuple[Tensor, Tensor]) -> Tensor:
    out_NLD = attend(
        *attention.qkv(y_NLD).chunk(3, dim=-1),
        num_heads=attention.num_heads,
        extra=extra,
        dropout=attention.attn_drop.p if attention.training else 0.0,
    )
    return attention.proj_drop(attention.proj(out_NLD))


def is_plain_vit(model: nn.Module) -> bool:
    """Whether a model is a vision transformer that can be run block by block with extra keys."""
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_drop, nn.Identity):
        return False
    return all(type(block) is Block and _is_plain(block.attn) for block in model.blocks)


def _is_plain(attention: Any) -> bool:
    if type(attention) is not TimmAttention:
        return False
    extras = (attention.q_norm, attention.k_norm, attention.norm)
    return attention.gate is None and all(isinstance(extra, nn.Identity) for extra in extras)


class ConvImageTower(BlockTower):
    """A convolutional network whose feature map gives the tokens; payload: pixel_values.

    The network runs as a whole before block 0: no prompt and no expert acts inside it. With
    `num_blocks` 0 there is nothing to act in at all, and the feature is the library's own mean over
    the map. New transformer blocks on top make prompts and experts possible; their last layers
    start at zero, so that the feature starts as the mean over the projected map.

    Batch norms always use their stored statistics: a batch here may be one blank row.

    Args:
        net: without classifier.
        image_size: side of the image.
        num_blocks: new blocks.
        width: of the new blocks.
    """

    def __init__(self, net: Any, *, image_size: int, num_blocks: int, width: int) -> None:
        channels = net.num_features
        width = width if num_blocks else channels
        blocks = [new_block(width) for _ in range(num_blocks)]
        super().__init__(blocks, width=width, out_width=width)
        self.net = net
        self.image_size = image_size
        self.project = nn.Linear(channels, width) if num_blocks else nn.Identity()
        self.train(self.training)

    def new_parts(self) -> list[nn.Module]:
        """The new blocks, and what leads to them."""
        return [self.project, *self.blocks]

    def train(self, mode: bool = True) -> ConvImageTower:
        """Training mode for all but the batch norms."""
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """One token per place of the feature map."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        map_NCHW = self.net.forward_features(pixels_NCHW)
        return self.project(map_NCHW.flatten(2).transpose(1, 2)), None

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Mean of the tower's own tokens."""
        return x_NLD[:, prefix:].mean(1)

    def blank(self) -> Payload:
        """One grey image."""
        weight = next(self.net.parameters())
        return blank_image(weight, self.image_size, channels=weight.shape[1])

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: every token is read."""
        return {}


def new_block(width: int) -> TransformerBlock:
    """A pre-norm block with new weights whose two parts put out zero at first."""
    query, key, value, out = (nn.Linear(width, width) for _ in range(4))
    second = nn.Linear(4 * width, width)
    for last in (out, second):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return TransformerBlock(
        attention=Attention(
            query=query,
            key=key,
            value=value,
            out=out,
            num_heads=max(1, width // HEAD_WIDTH),
            dropout=0.0,
        ),
        attention_norm=nn.LayerNorm(width),
        mlp=nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), second),
        mlp_norm=nn.LayerNorm(width),
        norm_first=True,
    )
