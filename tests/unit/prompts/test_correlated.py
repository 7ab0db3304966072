"""Deep correlated prompts: which table rows meet, what is overwritten, what is kept."""

import pytest
import torch

from mm_moe.errors import ConfigError
from prompts.correlated import CorrelatedPrompt, DynamicAttention

PAIR = {"widths": {"a": 4, "b": 6}, "num_blocks": {"a": 4, "b": 6}, "modalities": ("a", "b")}


def test_patterns_choose_present_and_absent_rows():
    prompt = CorrelatedPrompt(**PAIR, length=1, layers=1)
    with torch.no_grad():
        for name, value in (("a", 1.0), ("b", 2.0)):
            prompt.states[name][0] = 0.0  # absent
            prompt.states[name][1] = value
    seen = []
    prompt.norms["a"][0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    prompt.private_tokens()
    # patterns a, b, both: the first four values are a's, the other six b's
    assert seen[0][:, 0, [0, 9]].tolist() == [[1, 0], [0, 2], [1, 2]]


def test_correlated_slots_are_overwritten_and_the_others_kept():
    prompt = CorrelatedPrompt(**PAIR, length=2, layers=2)
    present = torch.ones(1, 2, dtype=torch.bool)
    edit = prompt.start(present, {"a": torch.tensor([0])})["a"]
    x_NLD, mask_NL = edit.before(0, torch.zeros(1, 3, 4), torch.tensor([[True, True, False]]))
    assert edit.prefix == 6
    assert mask_NL.tolist() == [[True] * 8 + [False]]
    later, _ = edit.before(1, x_NLD + 100, mask_NL)
    tokens = prompt.private_tokens()["a"]
    assert torch.equal(later[:, :2], tokens[1][2:])
    assert torch.equal(later[:, 2:], x_NLD[:, 2:] + 100)
    same, _ = edit.before(2, later, mask_NL)
    assert same is later


def test_dynamic_tokens_see_real_tokens_only():
    attention = DynamicAttention(4)
    query, x_NLD = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    mask_NL = torch.tensor([[True, True, False]])
    short = attention(query, x_NLD[:, :2], None)
    assert torch.allclose(attention(query, x_NLD, mask_NL), short, atol=1e-6)
    assert attention(query, x_NLD, torch.zeros(1, 3, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, r"\(5\) must lie between 0 .no prompt. and 4"),
        ({"hidden": 0}, r"hidden \(0\)"),
        ({"correlated": False, "dynamic": False, "common": False}, "every group"),
    ],
)
def test_wrong_options_give_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        CorrelatedPrompt(**PAIR, **options)
