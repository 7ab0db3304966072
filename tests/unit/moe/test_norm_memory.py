"""Batch norms that see rows which are no data."""

import pytest
import torch

from mm_moe.moe.batch_norm import BatchNorm, forgetting


@pytest.mark.parametrize("ranks", [None, lambda values: values], ids=["one process", "many"])
def test_what_is_no_data_is_normalised_and_not_kept(ranks):
    norm = BatchNorm(2, momentum=0.5).train()
    norm.sum_over_ranks = ranks
    rows = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    with forgetting(torch.nn.Sequential(norm)):
        out = norm(rows)
        assert torch.allclose(out, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-3)
        assert norm.running_mean_C.tolist() == [0, 0]
        assert norm.running_var_C.tolist() == [1, 1]
    norm(rows)
    assert norm.running_mean_C.tolist() == [1, 10]  # half of the batch's 2 and 20


def test_memory_is_back_after_an_error():
    norm = BatchNorm(1)
    with pytest.raises(ZeroDivisionError), forgetting(norm):
        raise ZeroDivisionError
    assert norm.remembers
