"""Every registered fill: missing cells alone change, nothing dead, deterministic, warm-up."""

import pytest
import torch

from mm_moe.fill.base import SupportTokens
from mm_moe.registry import FILLS
from tests.fill_cases import NAMES, PRESENT, SHAPE, H, P, supports_of, tokens_of

torch.set_num_threads(1)
VARIANTS = {
    "retriever": [
        {"legacy": True},
        {"residual": True, "segments": True, "dropout": 0.0},
        {"around_default": True},
        {"around_zero": True},
        {"num_candidates": 1, "num_candidates_shared": 1, "top_k": 1, "num_heads": 2, "beta": 1.0},
    ],
    "mean": [{"momentum": 1.0}],
}
CASES = [(name, options) for name in FILLS for options in ({}, *VARIANTS.get(name, []))]


def fill_of(name, options, *, seed=0):
    torch.manual_seed(seed)
    return FILLS.resolve(name)(SHAPE, **options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_present_cells_stay_and_shapes_are_kept(name, options):
    tokens = tokens_of(PRESENT)
    filled = fill_of(name, options)(tokens, PRESENT, supports_of(PRESENT))
    for m, modality in enumerate(NAMES):
        assert filled.tokens[modality].shape == (len(PRESENT), P, H)
        assert filled.tokens[modality].isfinite().all()
        there_B = PRESENT[:, m]
        assert torch.equal(filled.tokens[modality][there_B], tokens[modality][there_B])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_parameter_gets_a_gradient(name, options):
    fill = fill_of(name, options)
    # Many samples, so that every expert is chosen, and a nothing pattern for the bank.
    present = torch.cat([PRESENT, torch.zeros(1, 3, dtype=torch.bool)]).repeat(4, 1)
    supports = supports_of(present)
    for support in supports.values():
        support.rows_QN[1] = -1  # a default token of every modality
    filled = fill(tokens_of(present), present, supports)
    loss = sum((x * torch.randn(x.shape)).sum() for x in filled.tokens.values())
    if list(fill.parameters()):
        (loss + sum(filled.losses.values())).backward()
    dead = [n for n, p in fill.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_batch_that_lacks_nothing_gives_every_gradient_and_the_same_records(name, options):
    fill = fill_of(name, options)
    present = torch.ones(2, 3, dtype=torch.bool)
    tokens = tokens_of(present)
    filled = fill(tokens, present, {} if fill.needs_supports else None)
    assert all(torch.equal(filled.tokens[n], tokens[n]) for n in NAMES)
    assert set(filled.routing) == set(fill.sparse_layers())
    parameters = list(fill.parameters())
    loss = sum(x.sum() for x in filled.tokens.values()) + sum(filled.losses.values())
    if parameters:
        loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_evaluation_is_deterministic_and_a_sample_depends_on_itself(name, options):
    fill = fill_of(name, options).eval()
    tokens, supports = tokens_of(PRESENT), supports_of(PRESENT)
    one, two = (fill(tokens, PRESENT, supports).tokens for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in NAMES)
    alone = {}
    for m, n in enumerate(NAMES):
        before = int((~PRESENT[:1, m]).sum())
        s = supports[n]
        rows_QN = s.rows_QN[before : before + int(~PRESENT[1, m])]
        alone[n] = SupportTokens(s.tokens_SPH, rows_QN, s.present_SM, s.index_S)
    three = fill({n: x[1:2] for n, x in tokens.items()}, PRESENT[1:2], alone).tokens
    assert all(torch.allclose(three[n][0], one[n][1], atol=1e-6) for n in NAMES)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_through_the_warm_up_missing_tokens_are_zero_and_losses_are_zero(name, options):
    fill = fill_of(name, {**options, "warm_up_steps": 3})
    tokens, supports = tokens_of(PRESENT), supports_of(PRESENT)
    for steps in (0, 2):
        fill.set_steps(steps)
        filled = fill(tokens, PRESENT, supports)
        for m, n in enumerate(NAMES):
            assert not filled.tokens[n][~PRESENT[:, m]].any()
        assert not any(loss.item() for loss in filled.losses.values())
        assert set(filled.routing) == set(fill.sparse_layers())
    fill.set_steps(3)
    filled = fill(tokens, PRESENT, supports)
    assert filled.tokens["b"][~PRESENT[:, 1]].any() == (name != "zero")
    assert "steps_done" in fill.state_dict()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_all_state_is_in_the_state_dict(name, options):
    fill, other = fill_of(name, options), fill_of(name, options, seed=5)
    tokens, supports = tokens_of(PRESENT), supports_of(PRESENT)
    fill(tokens, PRESENT, supports)  # in training: the mean moves
    other.load_state_dict(fill.state_dict())
    one, two = (f.eval()(tokens, PRESENT, supports).tokens for f in (fill, other))
    assert all(torch.equal(one[n], two[n]) for n in NAMES)
