"""Facts about rows become facts about real tokens."""

import torch
from torch import tensor

from mm_moe.moe.context import TokenContext


def test_values_of_rows_reach_their_real_tokens():
    context = TokenContext(modality=1, combination=tensor([3, 1]), interaction=tensor([0, 2]))
    # two rows of three tokens; real are the first of row 0 and the last two of row 1
    tokens = context.at(torch.Size([2, 3]), tensor([0, 4, 5]))
    assert tokens.modality == 1
    assert tokens.combination_T.tolist() == [3, 1, 1]
    assert tokens.interaction_T.tolist() == [0, 2, 2]
    row_T, place_T = tokens.rows_and_places(torch.device("cpu"))
    assert (row_T.tolist(), place_T.tolist()) == ([0, 1, 1], [0, 1, 2])


def test_without_a_mask_every_token_is_real():
    tokens = TokenContext(combination=tensor([2, 3])).at(torch.Size([2, 2]), None)
    assert tokens.combination_T.tolist() == [2, 2, 3, 3]
    assert tokens.interaction_T is None


def test_without_rows_each_token_speaks_for_itself():
    context = TokenContext(combination=tensor([2, 3]))
    assert context.combination_T.tolist() == [2, 3]
    assert context.at(torch.Size([2]), tensor([1])).combination_T.tolist() == [3]


def test_no_row_and_no_token_are_legal():
    none = tensor([], dtype=torch.int64)
    assert TokenContext(combination=none).at(torch.Size([0, 4]), None).combination_T.tolist() == []
    blank = TokenContext(combination=tensor([3])).at(torch.Size([1, 4]), none)
    assert blank.combination_T.tolist() == []
