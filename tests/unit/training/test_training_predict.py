"""Predictions of one process: every sample once, in the order of its id."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.training.predict import empty_batch, predict


class Double(nn.Module):
    """Logits (B, 2): the text value doubled and negated; 0 where there is no text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen_training: list[bool] = []
        self.seen_grad: list[bool] = []

    def forward(self, *, ids, present, inputs, labels):
        self.seen_training.append(self.training)
        self.seen_grad.append(torch.is_grad_enabled())
        value_B = torch.zeros(len(ids), dtype=self.weight.dtype)
        if "text" in inputs:
            value_B[present[:, 1]] = inputs["text"]["x"]
        return SimpleNamespace(logits=torch.stack([value_B * self.weight, -value_B], dim=1))


def batch(ids, present, x, labels) -> Batch:
    inputs = {"text": {"x": torch.tensor(x)}} if x else {}
    return Batch.of(list(ids), torch.tensor(present, dtype=torch.bool), inputs, labels)


BATCHES = [
    batch("cb", [[1, 1], [1, 0]], [3.0], torch.tensor([1, 0])),
    batch("a", [[0, 1]], [0.5], torch.tensor([IGNORED_LABEL])),
]


def test_ids_logits_labels_and_presence_in_the_order_of_ids():
    model = Double().train()
    found = predict(model, BATCHES, num_modalities=2)
    assert found.ids == ["a", "b", "c"]
    assert np.array_equal(found.logits, [[1.0, -0.5], [0.0, 0.0], [6.0, -3.0]])
    assert found.logits.dtype == np.float32
    assert found.labels.tolist() == [IGNORED_LABEL, 0, 1]
    assert found.present.tolist() == [[False, True], [True, False], [True, True]]


def test_the_model_is_in_evaluation_mode_without_gradients_and_comes_back():
    for mode in (True, False):
        model = Double().train(mode)
        predict(model, BATCHES, num_modalities=2)
        assert model.seen_training == model.seen_grad == [False, False]
        assert model.training is mode


def test_payloads_take_the_dtype_of_the_model_and_labels_keep_theirs():
    model = Double().to(torch.bfloat16)
    one = batch("a", [[0, 1]], [1.0], torch.tensor([[0.125]]))
    found = predict(model, [one], num_modalities=2)
    assert found.logits.dtype == np.float32
    assert found.logits.tolist() == [[2.0, -1.0]]
    assert found.labels.tolist() == [[0.125]]
    assert one.inputs["text"]["x"].dtype == torch.float32  # the caller's batch stays as it was


def test_no_sample_and_no_label():
    assert predict(Double(), [], num_modalities=2).ids == []
    found = predict(Double(), [batch("a", [[0, 1]], [1.0], None)], num_modalities=2)
    assert found.labels.tolist() == [IGNORED_LABEL]
    assert empty_batch(3).present.shape == (0, 3)
