"""What DeepSpeed's own layer cannot do is refused before anything is written."""

from __future__ import annotations

import pytest
from refusals import refused

from mm_moe.errors import ConfigError, ParallelismError

STOCK = ("--moe_backend", "deepspeed", "--top_k_experts", "2", "--router_z_loss_coef", "0")


def test_an_unknown_backend(here):
    said = refused(ConfigError, "--moe_backend", "deepsped")
    assert "'deepsped'" in said
    assert "deepspeed" in said.replace("'deepsped'", "")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--router", "topk_sigmoid"), ["'topk_sigmoid'", "topk_softmax"]),
        (("--router_z_loss_coef", "0.5"), ["z-loss", "0.5"]),
        (("--top_k_experts", "1"), ["top_k 1", '"renormalise": false']),
        (("--moe_config", '{"bias_update_rate": 0.001}'), ["bias_update_rate 0.001"]),
    ],
)
def test_settings_that_the_stock_layer_lacks(here, words, parts):
    said = refused(ParallelismError, *STOCK, *words)
    for part in [*parts, "--moe_backend ours"]:
        assert part in said
