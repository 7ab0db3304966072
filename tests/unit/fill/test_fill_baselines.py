"""Means, defaults, banks and neighbours with a pencil."""

import pytest
import torch

from mm_moe.errors import ConfigError, DataError
from mm_moe.fill.bank import BankFill, others_index
from mm_moe.fill.base import FillShape, SupportTokens
from mm_moe.fill.mean import MeanFill
from mm_moe.fill.neighbour import NeighbourFill
from mm_moe.fill.simple import DefaultFill, ZeroFill

torch.set_num_threads(1)
TWO = FillShape(("a", "b"), 1, 2)
YES, NO = True, False


def row(*values):
    return torch.tensor(values).view(-1, 1, 2)


def test_zero_leaves_zeros_and_default_writes_its_tokens():
    present = torch.tensor([[YES, NO], [NO, YES]])
    tokens = {"a": row([1.0, 2.0], [0.0, 0.0]), "b": row([0.0, 0.0], [3.0, 4.0])}
    assert ZeroFill(TWO)(tokens, present).tokens["a"].tolist() == [[[1, 2]], [[0, 0]]]
    fill = DefaultFill(TWO)
    fill.default.tokens_MPH.data = torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]])
    filled = fill(tokens, present).tokens
    assert filled["a"].tolist() == [[[1, 2]], [[5, 6]]]
    assert filled["b"].tolist() == [[[7, 8]], [[3, 4]]]


def test_the_mean_runs_over_the_rows_that_are_there():
    fill = MeanFill(TWO, momentum=0.25)
    present = torch.tensor([[YES, NO], [YES, NO], [NO, NO]])
    first = {"a": row([2.0, 4.0], [4.0, 8.0], [0.0, 0.0]), "b": torch.zeros(3, 1, 2)}
    assert fill(first, present).tokens["a"][2].tolist() == [[3, 6]]  # the first batch sets it
    second = {"a": row([7.0, 2.0], [7.0, 2.0], [0.0, 0.0]), "b": torch.zeros(3, 1, 2)}
    assert fill(second, present).tokens["a"][2].tolist() == [[4, 5]]  # 3/4 of the way stays
    fill.eval()
    assert fill(first, present).tokens["a"][2].tolist() == [[4, 5]]
    assert not fill(first, present).tokens["b"].any()  # never seen


def test_the_bank_has_an_entry_for_each_set_of_other_modalities():
    present = torch.tensor([[NO, YES, NO], [NO, NO, YES], [NO, NO, NO], [YES, NO, YES]])
    modality = torch.tensor([0, 0, 0, 1])
    # the others of a are b, c (bits 1, 2 of the table); the others of b are a, c
    assert others_index(present, modality).tolist() == [1, 2, 0, 3]
    shape = FillShape(("a", "b", "c"), 1, 2)
    fill = BankFill(shape)
    tokens = {name: torch.zeros(4, 1, 2) for name in shape.modalities}
    filled = fill(tokens, present).tokens
    assert torch.equal(filled["a"][0], fill.bank_MRPH[0, 1])
    assert torch.equal(filled["b"][3], fill.bank_MRPH[1, 3])
    with pytest.raises(ConfigError, match=r"at most 8 modalities, not 9"):
        BankFill(FillShape(tuple("abcdefghi"), 1, 2))


def supports(rows, index_a=(4, 5, 6)):
    """Three training rows that have a and b; b lies at 0, 90 and 45 degrees."""
    there = torch.ones(3, 2, dtype=torch.bool)
    b = row([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    a = row([1.0, 1.0], [2.0, 2.0], [3.0, 3.0])
    nothing = torch.empty(0, 3, dtype=torch.int64)
    return {
        "a": SupportTokens(a, torch.tensor(rows), there, torch.tensor(index_a)),
        "b": SupportTokens(b, nothing, there, torch.tensor([4, 5, 6])),
    }


def test_the_neighbour_is_the_row_most_alike_in_what_both_have():
    present = torch.tensor([[NO, YES], [NO, YES], [NO, YES]])
    tokens = {"a": torch.zeros(3, 1, 2), "b": row([0.1, 9.0], [2.0, 1.9], [0.0, 5.0])}
    fill = NeighbourFill(TWO)
    # the last cell may only take the rows 0 and 2, of which 2 is nearer
    filled = fill(tokens, present, supports([[0, 1, 2], [0, 1, 2], [0, 2, -1]])).tokens
    assert filled["a"].tolist() == [[[2, 2]], [[3, 3]], [[3, 3]]]
    none = fill(tokens, present, supports([[-1, -1, -1]] * 3)).tokens
    assert torch.equal(none["a"][0], fill.default.tokens_MPH[0])


def test_a_row_with_nothing_in_common_is_the_farthest():
    present = torch.tensor([[NO, YES]])
    tokens = {"a": torch.zeros(1, 1, 2), "b": row([-1.0, 0.9])}
    # two rows are not among b's supports: the third alone can be compared, at an obtuse angle
    found = supports([[1, 2, 0]], index_a=(4, 15, 16))
    assert NeighbourFill(TWO)(tokens, present, found).tokens["a"].tolist() == [[[1, 1]]]


def test_fills_that_need_supports_say_so():
    present = torch.tensor([[NO, YES]])
    tokens = {"a": torch.zeros(1, 1, 2), "b": torch.ones(1, 1, 2)}
    with pytest.raises(DataError, match=r"brings no 'supports' for the 1 modalities"):
        NeighbourFill(TWO)(tokens, present)
    with pytest.raises(DataError, match=r"supports of 'a' for 2 samples, but 1 of its 1"):
        NeighbourFill(TWO)(tokens, present, supports([[0, 1, 2]] * 2))


@pytest.mark.parametrize(
    ("fill", "options", "words"),
    [
        (ZeroFill, {"warm_up_steps": -1}, r"warm_up_steps \(-1\) must be a whole number from 0"),
        (MeanFill, {"momentum": 2}, r"momentum \(2\) must be a number in 0 to 1"),
        (NeighbourFill, {"num_supports": 0}, r"num_supports \(0\) must be a whole number from 1"),
    ],
)
def test_options_that_cannot_work_are_refused(fill, options, words):
    with pytest.raises(ConfigError, match=words):
        fill(TWO, **options)
