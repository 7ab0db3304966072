"""Cox's partial likelihood by hand, at its edges, and as an objective."""

from math import log

import pytest
import torch
from pytest import approx  # noqa: PT013

from finetune.supervised import task_loss
from finetune.survival import Cox, cox_loss
from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.collate import Collator
from mm_moe.data.schema import check_label
from mm_moe.errors import ConfigError, DataError

# relative risks 1 2 1 3; two events at time 1, one at 2, and a row that is censored at 3
RISK = torch.tensor([0.0, log(2), 0.0, log(3)], dtype=torch.float64)
LABELS = torch.tensor([[3.0, 0], [1, 1], [1, 1], [2, 1]], dtype=torch.float64)


def test_ties_by_hand():
    known = log(2) + log(3) - log(4)  # at time 2: 3 of 1 + 3
    breslow = -(known - 2 * log(7)) / 3
    assert cox_loss(RISK, LABELS, ties="breslow").item() == approx(breslow)
    efron = -(known - log(7) - log(7 - 3 / 2)) / 3  # the second event has half of both left
    assert cox_loss(RISK, LABELS).item() == approx(efron)


def test_without_ties_the_rules_agree_and_order_plays_no_part():
    labels = torch.tensor([[3.0, 1], [1, 1], [4, 0], [2, 1]], dtype=torch.float64)
    # time 1: 2 of 7; time 2: 3 of 5; time 3: 1 of 2
    wanted = -(log(2 / 7) + log(3 / 5) + log(1 / 2)) / 3
    for ties in ("efron", "breslow"):
        assert cox_loss(RISK, labels, ties=ties).item() == approx(wanted)
    order = [2, 0, 3, 1]
    assert cox_loss(RISK[order], labels[order]).item() == approx(wanted)
    assert cox_loss(RISK + 5, labels).item() == approx(wanted)


def test_gradients_are_those_of_the_value():
    risk = RISK.clone().requires_grad_()
    for ties in ("efron", "breslow"):
        assert torch.autograd.gradcheck(lambda x, ties=ties: cox_loss(x, LABELS, ties=ties), risk)


def test_rows_without_a_label_are_left_out():
    more = torch.cat([RISK, torch.tensor([9.0], dtype=torch.float64)])
    labels = torch.cat([LABELS, torch.full((1, 2), float(IGNORED_LABEL), dtype=torch.float64)])
    assert cox_loss(more, labels).item() == approx(cox_loss(RISK, LABELS).item())


@pytest.mark.parametrize("labels", [[[1.0, 0], [2, 0]], [[IGNORED_LABEL, IGNORED_LABEL]] * 2])
def test_without_an_event_the_loss_is_zero_and_connected(labels):
    risk = torch.zeros(2, requires_grad=True)
    loss = cox_loss(risk, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert risk.grad.tolist() == [0.0, 0.0]


def test_large_risks_stay_finite():
    risk = torch.tensor([300.0, -300.0, 300.0, 0.0], requires_grad=True)
    loss = cox_loss(risk, LABELS.float())
    loss.backward()
    assert loss.isfinite()
    assert risk.grad.isfinite().all()


class OneOutput(torch.nn.Module):
    def forward(self, **batch):
        from mm_moe.models.output import MultimodalMoEOutput

        return MultimodalMoEOutput(logits=RISK[:, None], losses={"router_z": torch.tensor(2.0)})


def test_the_objectives():
    from mm_moe.batch import Batch

    batch = Batch.of(["a"] * 4, torch.ones(4, 1, dtype=torch.bool), {}, LABELS)
    loss, parts, _ = Cox(ties="breslow")(OneOutput(), batch)
    assert parts["task"].item() == approx(cox_loss(RISK, LABELS, ties="breslow").item())
    assert loss.item() == approx(parts["task"].item() + 2)
    supervised = task_loss(RISK[:, None], LABELS, "survival").item()
    assert supervised == approx(cox_loss(RISK, LABELS).item(), abs=1e-6)
    with pytest.raises(ConfigError, match="did you mean efron"):
        Cox(ties="efrn")
    with pytest.raises(ConfigError, match=r"needs labels of \(time, event\)"):
        Cox(problem_type="regression")


def test_labels_are_checked_and_batched():
    from mm_moe.batch import Sample

    known = {"problem_type": "survival", "num_labels": 1, "sample_id": "x"}
    check_label((2.5, 1), **known)
    check_label(None, **known)
    for label, words in (
        (3.0, "must be"),
        ((1.0,), "must be"),
        ((-1, 0), "at least 0"),
        ((float("nan"), 1), "at least 0"),
        ((1.0, 2), "must say 1"),
    ):
        with pytest.raises(DataError, match=words):
            check_label(label, **known)
    collator = Collator(
        modalities=("a",),
        processors={"a": lambda rows: {"values": torch.tensor(rows)}},
        problem_type="survival",
        num_labels=1,
        missing=None,
        max_bad_samples=0,
    )
    samples = [
        Sample("x", {"a": 1.0}, (2.5, 1)),
        Sample("y", {"a": 1.0}),
        Sample("z", {}, (1.0, 0)),
    ]
    ignored = [IGNORED_LABEL] * 2
    assert collator(samples).labels.tolist() == [[2.5, 1.0], ignored, ignored]
    assert collator([]).labels.shape == (0, 2)
