"""Missing-aware prompts by hand."""

import pytest
import torch

from mm_moe.errors import ConfigError
from prompts.missing_aware import MissingAwarePrompt

PAIR = {"widths": {"a": 2, "b": 2}, "num_blocks": {"a": 4, "b": 4}, "modalities": ("a", "b")}
ROWS = {"a": torch.tensor([0, 1])}
PRESENT = torch.tensor([[True, False], [True, True]])  # sample 0 lacks b


def filled(**options) -> MissingAwarePrompt:
    """Tables whose values say pattern and block: 10 * pattern + block."""
    prompt = MissingAwarePrompt(**PAIR, **options)
    with torch.no_grad():
        for table in prompt.tables.values():
            patterns, blocks = torch.arange(table.shape[0]), torch.arange(table.shape[1])
            table.copy_((10 * patterns[:, None] + blocks)[..., None, None].expand_as(table))
    return prompt


def test_input_mode_prepends_and_keeps():
    edit = filled(length=1).start(PRESENT, ROWS)["a"]
    x_NLD = torch.full((2, 1, 2), 5.0)
    mask_NL = torch.tensor([[True], [False]])
    x_NLD, mask_NL = edit.before(0, x_NLD, mask_NL)
    x_NLD, mask_NL = edit.before(1, x_NLD, mask_NL)
    same, _ = edit.before(2, x_NLD, mask_NL)  # half of 4 blocks are prompted
    assert same is x_NLD
    assert edit.prefix == 2
    assert x_NLD[0, :, 0].tolist() == [1, 0, 5]  # b missing: pattern 0, newest first
    assert x_NLD[1, :, 0].tolist() == [11, 10, 5]  # complete: pattern 1
    assert mask_NL.tolist() == [[True] * 3, [False] * 3]


def test_attention_mode_halves_the_tokens():
    edit = filled(length=6, mode="attention").start(PRESENT, ROWS)["a"]
    key_NPD, value_NPD = edit.keys_values(1)
    assert key_NPD.shape == value_NPD.shape == (2, 3, 2)
    assert key_NPD[:, 0, 0].tolist() == [1, 11]
    assert edit.keys_values(2) is None
    assert edit.prefix == 0


def test_the_sources_start_marks_the_pattern():
    tables = MissingAwarePrompt(**PAIR, length=4, init="one_hot").tables
    # rows: 0 the other one is missing, 1 complete; a lacks b: place 2, b lacks a: place 1
    assert tables["a"][0, 0, :, 0].tolist() == [0, 0, 1, 0]
    assert tables["b"][0, 1, :, 1].tolist() == [0, 1, 0, 0]
    assert tables["a"][1, 0, :, 0].tolist() == tables["b"][1, 0, :, 0].tolist() == [1, 0, 0, 0]
    halves = MissingAwarePrompt(**PAIR, length=6, mode="attention", init="one_hot").tables["a"]
    assert halves[0, 0, :, 0].tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "known: noise, one_hot"),
        ({"mode": "output"}, "known: input, attention"),
        ({"mode": "attention", "length": 5}, r"length \(5\).*try length=6"),
        ({"layers": 5}, r"layers \(5\).*4 blocks of the a tower"),
        ({"length": 0}, r"length \(0\)"),
    ],
)
def test_wrong_options_give_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        MissingAwarePrompt(**PAIR, **options)
