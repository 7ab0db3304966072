"""The interaction objective with a pencil: the fuser's loss, each expert's own, and the sum."""

import math
from types import SimpleNamespace

import pytest
import torch

from finetune.interaction import Interaction, fuser_loss, kind_shares, log_likelihood, own_loss
from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.interaction_head import InteractionOutput, mix
from mm_moe.models.interaction_settings import InteractionSettings
from mm_moe.moe.layer import RoutingRecord

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
LOG_WEIGHT = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()
RECORD = RoutingRecord(torch.ones(4), {}, {})


def said_of(logits_BKC, log_weight_BK):
    mixed = mix(logits_BKC, log_weight_BK, problem_type=SINGLE)
    return InteractionOutput(mixed, log_weight_BK, logits_BKC, RECORD)


def test_kinds_as_weights():
    codes = torch.tensor([2, IGNORED_LABEL])
    assert kind_shares(codes, 4).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    soft = torch.tensor([[0.5, 0.1, 0.4, 0.0, 0.0]])  # two classes have no fifth kind
    assert kind_shares(soft, 4).tolist() == soft[:, :4].tolist()
    for wrong in (torch.tensor([4]), torch.tensor([-1]), torch.zeros(1, 9)):
        with pytest.raises(DataError, match="kinds 0 to 3"):
            kind_shares(wrong, 4)


def test_the_fuser_is_asked_for_the_kind_or_for_any_that_explains():
    share = kind_shares(torch.tensor([0, IGNORED_LABEL]), 4)
    exact = InteractionSettings(fuser_target="exact").explains(4)
    assert fuser_loss(LOG_WEIGHT, share, exact).item() == pytest.approx(math.log(2))
    # R is explained by R and both U: .5 + .25 + .125
    compatible = InteractionSettings().explains(4)
    expected = -math.log(0.875)
    assert fuser_loss(LOG_WEIGHT, share, compatible).item() == pytest.approx(expected)
    nothing = kind_shares(torch.tensor([IGNORED_LABEL, IGNORED_LABEL]), 4)
    assert fuser_loss(LOG_WEIGHT, nothing, exact).item() == 0


def test_soft_kinds_by_hand():
    share = torch.tensor([[0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    exact = torch.eye(4, dtype=torch.bool)
    expected = -(0.5 * math.log(0.5) + 0.5 * math.log(0.125))
    assert fuser_loss(LOG_WEIGHT, share, exact).item() == pytest.approx(expected)


def test_likelihoods_by_hand():
    single = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    found, real = log_likelihood(single, torch.tensor([0]), SINGLE)
    assert found[0].tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    assert real.all()
    # yes with 3/4 and no with 1/2
    found, _ = log_likelihood(single[:, :1], torch.tensor([[1.0, 0.0]]), MULTI)
    assert found.item() == pytest.approx(math.log(0.75 * 0.5))
    found, real = log_likelihood(
        torch.tensor([[[1.0]], [[4.0]]]), torch.tensor([3.0, -100]), NUMBER
    )
    assert found[0].item() == -2
    assert real.tolist() == [True, False]


def test_a_sample_trains_the_expert_that_explains_it_best_among_those_that_may():
    # experts 0 and 1 say 3/4 and 1/4 of the right class; weights are equal
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(3.0)]]], requires_grad=True)
    said = said_of(logits, torch.full((1, 2), 0.5).log())
    label = torch.tensor([0])
    free = own_loss(said, label, SINGLE, torch.zeros(1, 2))
    assert free.item() == pytest.approx(-math.log(0.75))
    told = own_loss(said, label, SINGLE, torch.tensor([[0.0, 1.0]]))
    assert told.item() == pytest.approx(-math.log(0.25))
    told.backward()
    assert not logits.grad[0, 0].any()


class OneModel(torch.nn.Module):
    """A model that always says the same; `interaction` must not reach it as weights."""

    def __init__(self, **options):
        super().__init__()
        settings = None if options.pop("plain", False) else {"fuser_target": "exact", **options}
        self.config = SimpleNamespace(interaction_experts=settings)
        self.logits = torch.nn.Parameter(torch.tensor([[[math.log(3.0), 0.0]] + [[0.0, 0.0]] * 3]))

    def forward(self, **batch):
        assert "interaction" not in batch or not batch["interaction"].is_floating_point()
        said = said_of(self.logits, LOG_WEIGHT[:1])
        return SimpleNamespace(logits=said.mixed_BC, interaction=said, losses={})


def batch_of(kind):
    labels = torch.tensor([0])
    return Batch.of(["a"], torch.ones(1, 2, dtype=torch.bool), {}, labels, kind)


@pytest.mark.parametrize("kind", [torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])])
def test_the_objective_adds_its_parts(kind):
    objective = Interaction(problem_type=SINGLE)
    task = -math.log(0.5 * 0.75 + 0.5 * 0.5)
    loss, parts, _ = objective(OneModel(), batch_of(None))
    assert loss.item() == pytest.approx(task)
    assert set(parts) == {"task"}
    loss, parts, _ = objective(OneModel(fuser_coef=0.5, own_coef=2.0), batch_of(kind))
    assert parts["fuser"].item() == pytest.approx(0.5 * math.log(2))
    assert parts["own"].item() == pytest.approx(-2 * math.log(0.75))
    assert loss.item() == pytest.approx(task + 0.5 * math.log(2) - 2 * math.log(0.75))


def test_a_model_without_interaction_experts_is_refused():
    with pytest.raises(ConfigError, match="--interaction_experts true"):
        Interaction(problem_type=SINGLE)(OneModel(plain=True), batch_of(None))
