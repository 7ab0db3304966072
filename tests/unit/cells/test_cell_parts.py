"""The parts of the cell autoencoder, in numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.distributions import NegativeBinomial

from mm_moe.cells.adversary import Adversaries, reverse_gradient
from mm_moe.cells.annealing import KLAnnealer, reversal_weight
from mm_moe.cells.conditions import ConditionBank, Conditioner, Vocabulary
from mm_moe.cells.core import Posterior
from mm_moe.cells.counts import GeneRows, SparseRows
from mm_moe.cells.critic import OutputCritic, critic_loss, fooling_loss, roc_auc
from mm_moe.cells.likelihoods import nb_log_prob, nb_loss, squared_error, zinb_log_prob
from mm_moe.errors import ConfigError
from tests.unit.cells.cell_batches import compressed, config

D = torch.float64


def posterior(mu, var) -> Posterior:
    return Posterior(tensor(mu, dtype=D), tensor(var, dtype=D).log(), {})


def test_kl_by_hand():
    # (1 + .25 - 1 - ln .25) / 2 + (0 + 4 - 1 - ln 4) / 2; the standard normal costs nothing
    found = posterior([[1.0, 0.0], [0.0, 0.0]], [[0.25, 4.0], [1.0, 1.0]]).kl()
    assert found[0].item() == pytest.approx(0.125 + math.log(2) + 1.5 - math.log(2))
    assert found[1].item() == 0


def test_free_bits_are_free():
    # the cheap dimension costs .5 all the same and pulls no longer; the dear one costs itself
    found = posterior([[0.1, 3.0]], [[1.0, 1.0]])
    assert found.kl(free_bits=0.5).item() == pytest.approx(0.5 + 4.5)
    mu = tensor([[0.1, 3.0]], dtype=D, requires_grad=True)
    Posterior(mu, torch.zeros(1, 2, dtype=D), {}).kl(free_bits=0.5).sum().backward()
    assert mu.grad.tolist() == [[0.0, 3.0]]


def test_sample_moves_with_its_noise():
    found = posterior([[1.0, 2.0]], [[4.0, 9.0]]).sample(tensor([[1.0, -1.0]]))
    assert found.tolist() == [[pytest.approx(3.0), pytest.approx(-1.0)]]


@pytest.mark.parametrize(
    ("steps", "weight"),
    [(0, 0.1), (10, 0.1), (11, 0.1 + 0.9 / 20), (20, 0.55), (30, 1.0), (99, 1.0)],
)
def test_annealing_at_its_corners(steps, weight):
    annealer = KLAnnealer(low=0.1, high=1.0, warmup=10, climb=20)
    for _ in range(steps):
        annealer.step()
    assert annealer.weight == pytest.approx(weight, abs=1e-15)
    again = KLAnnealer(low=0.1, high=1.0, warmup=10, climb=20)
    again.load_state_dict(annealer.state_dict())
    assert again.weight == annealer.weight


def test_annealing_without_a_line_jumps():
    annealer = KLAnnealer(low=0.0, high=1.0, warmup=2)
    weights = []
    for _ in range(5):
        weights.append(annealer.weight)
        annealer.step()
    assert weights == [0, 0, 0, 1, 1]
    assert KLAnnealer(low=0.3, high=0.7).weight == 0.7
    with pytest.raises(ConfigError, match="negative"):
        KLAnnealer(low=-1, high=1)


def test_reversal_ramp():
    assert reversal_weight(0) == 0
    assert reversal_weight(0.1) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert reversal_weight(7) == reversal_weight(1) == pytest.approx(0.99990920)


def test_reversed_gradient_is_minus_lambda_times_the_plain_one():
    x, w = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(3, dtype=D)
    (plain,) = torch.autograd.grad((x @ w).square().sum(), x)
    (turned,) = torch.autograd.grad((reverse_gradient(x, 0.3) @ w).square().sum(), x)
    assert torch.allclose(turned, -0.3 * plain, atol=1e-14)
    assert torch.equal(reverse_gradient(x, 0.3), x)


def test_nb_equals_torch():
    counts = tensor([[0.0, 1.0, 7.0], [3.0, 0.0, 20.0]], dtype=D)
    mean = tensor([[0.5, 1.5, 6.0], [2.0, 0.1, 30.0]], dtype=D)
    theta = tensor([0.7, 2.0, 5.0], dtype=D)
    expected = NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(counts)
    found = nb_log_prob(counts, mean.log(), theta.log())
    assert torch.allclose(found, expected, atol=1e-12)


def test_zinb_by_its_definition():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    counts, mean, theta, zero = tensor([[0.0, 4.0]], dtype=D), 3.0, 2.0, 0.25
    logits = torch.full_like(counts, math.log(zero / (1 - zero)))
    found = zinb_log_prob(
        counts,
        torch.full_like(counts, math.log(mean)),
        tensor([math.log(theta)] * 2).double(),
        logits,
    )
    nb = stats.nbinom(theta, theta / (theta + mean))
    assert found[0, 0].item() == pytest.approx(math.log(zero + (1 - zero) * nb.pmf(0)), abs=1e-6)
    assert found[0, 1].item() == pytest.approx(math.log((1 - zero) * nb.pmf(4)), abs=1e-6)
    # all of it together is a distribution
    every = torch.arange(400, dtype=D)[None]
    whole = zinb_log_prob(
        every,
        torch.full_like(every, math.log(mean)),
        torch.full((400,), math.log(theta), dtype=D),
        torch.full_like(every, logits[0, 0].item()),
    )
    assert whole.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_squared_error_sums_over_genes():
    assert squared_error(tensor([[1.0, 2.0]]), tensor([[0.0, 4.0]])).tolist() == [5.0]


def test_log_normalisation_sums_to_ten_thousand_and_bears_an_empty_cell():
    rows = SparseRows.of({"values": tensor([[1.0, 3.0], [0.0, 0.0]])}, dtype=D)
    found = GeneRows(rows, 2).profile
    assert torch.expm1(found).sum(1).tolist() == [pytest.approx(1e4), 0.0]


def test_compressed_rows_are_the_matrix():
    values = tensor([[0, 2, 0, 1], [0, 0, 0, 0], [5, 0, 0, 0]], dtype=D)
    for given in (compressed(values), {"values": values}):
        rows = SparseRows.of(given, dtype=D)
        assert rows.length_R.tolist() == [2, 0, 1]
        assert rows.total_R.tolist() == [3, 0, 5]
        first, last = rows.split([1, 2])
        assert torch.equal(GeneRows(first, 4).counts, values[:1])
        assert torch.equal(GeneRows(last, 4).counts, values[1:])


def test_sparse_nb_loss_is_the_dense_one_forward_and_backward():
    values = tensor([[0, 2, 0, 9], [0, 0, 0, 0], [5, 0, 1, 0]], dtype=D)
    rows = GeneRows(SparseRows.of({"values": values}, dtype=D), 4)
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=D, requires_grad=True)
    log_theta = torch.randn(4, dtype=D, requires_grad=True)
    log_mean = logits.log_softmax(-1) + values.sum(1, keepdim=True).clamp(min=1).log()
    dense = -nb_log_prob(values, log_mean, log_theta).sum(1)
    found = nb_loss(rows, logits.log_softmax(-1), log_theta)
    assert torch.allclose(found, dense, atol=1e-12)
    weights = tensor([1.0, 2.0, 3.0], dtype=D)
    expected = torch.autograd.grad(dense @ weights, (logits, log_theta))
    own = torch.autograd.grad(found @ weights, (logits, log_theta))
    for mine, theirs in zip(own, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_vocabulary_of_own_labels_keeps_species_apart():
    words = Vocabulary({"human": ["a", "b"], "mouse": ["a"]}, species=["human", "mouse"])
    assert (words.size, words.num_labels) == (5, 3)
    code, species = tensor([0, 1, 2, 0, 1]), tensor([0, 0, 0, 1, 1])
    assert words.places(code, species).tolist() == [0, 1, 2, 3, 4]
    assert words.classes(code, species).tolist() == [-100, 0, 1, -100, 2]
    assert [words.code("a", species=1), words.code("b", species=1)] == [1, 0]


@pytest.mark.parametrize(
    ("mode", "rank"), [("sequential", 0), ("sequential", 2), ("concat", 0), ("film", 0)]
)
def test_conditioner_equals_a_loop_over_rows(mode, rank):
    torch.manual_seed(0)
    conditioner = Conditioner(config(conditioner=mode, condition_rank=rank)).double()
    for parameter in conditioner.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.randn(5, 3, dtype=D)
    codes = tensor([[0, 1], [1, 2], [3, 0], [2, 2], [0, 0]])
    species = tensor([0, 1, 1, 0, 0])
    found = conditioner(z, codes, species)
    for n in range(5):
        row, parts = z[n], []
        for name in ("species", "donor", "tissue"):
            bank = conditioner.banks[f"of_{name}"]
            code = {"species": species[n] + 1, "donor": codes[n, 0], "tissue": codes[n, 1]}[name]
            bent = map_of(bank, int(code), z[n] if mode == "concat" else row)
            row = bent if mode != "concat" else row
            parts.append(bent)
        if mode == "concat":
            row = conditioner.join(torch.cat(parts)).relu()
        assert torch.allclose(found[n], row, atol=1e-12)
    assert torch.equal(found, conditioner(z, codes, species))


def map_of(bank: ConditionBank, code: int, z: torch.Tensor) -> torch.Tensor:
    """One row by one label; code 0 has the mean of all maps."""
    each = []
    for label in range(bank.vocabulary.num_labels):
        scale, shift = bank.scale[label], bank.shift[label]
        if bank.kind == "film":
            each.append((scale, shift))
        else:
            each.append((scale, shift) if bank.down is None else (scale, shift, bank.down[label]))
    chosen = (
        each[code - 1]
        if code
        else tuple(sum(parts) / len(each) for parts in zip(*each, strict=True))
    )
    if bank.kind == "film":
        return z * (1 + chosen[0]) + chosen[1]
    low = z if bank.down is None else z @ chosen[2]
    return z + low @ chosen[0] + chosen[1]


def test_a_new_bank_is_the_identity_and_labels_may_be_renumbered():
    words = Vocabulary({"": ["a", "b"]}, species=["human"])
    z, species = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    for kind, rank in (("film", 0), ("linear", 0), ("linear", 2)):
        bank = ConditionBank(words, 4, kind=kind, rank=rank)
        assert torch.equal(bank(z, tensor([0, 1, 2]), species), z)
        for parameter in bank.parameters():
            torch.nn.init.normal_(parameter)
        before = bank(z, tensor([0, 1, 2]), species)
        for parameter in bank.parameters():
            parameter.data = parameter.data.flip(0)
        assert torch.allclose(bank(z, tensor([0, 2, 1]), species), before, atol=1e-6)


def test_override_names_keeps_and_forgets():
    conditioner = Conditioner(config(kept_columns=["tissue"]))
    codes = tensor([[1, 2], [2, 1]])
    assert conditioner.override(codes, {}, species=1).tolist() == [[0, 0], [0, 0]]
    found = conditioner.override(codes, {"donor": ["c", "new"]}, species=1, keep=["tissue"])
    assert found.tolist() == [[3, 2], [0, 1]]
    with pytest.raises(ConfigError, match="did you mean donor"):
        conditioner.override(codes, {"doner": "a"}, species=1)
    with pytest.raises(ConfigError, match="3 labels of 'donor' for 2 cells"):
        conditioner.override(codes, {"donor": ["a", "b", "c"]}, species=1)


def test_adversary_at_chance_costs_one_and_unknown_labels_nothing():
    adversaries = Adversaries({"z": 3}, hidden=[4], heads={"species": 2, "donor": 5, "one": 1})
    for parameter in adversaries.parameters():
        torch.nn.init.zeros_(parameter)
    assert list(adversaries.heads) == ["species", "donor"]
    classes = {"species": tensor([0, 1, 0]), "donor": tensor([-100, 4, -100])}
    counts = adversaries.counts(classes)
    assert counts.tolist() == [3, 1]
    loss, right = adversaries({"z": torch.randn(3, 3)}, classes, 1 / counts)
    assert loss.item() == pytest.approx(1)  # ln 2 / ln 2 and ln 5 / ln 5
    assert right["species"].item() == pytest.approx(2 / 3)  # it says 0


def test_critic_losses_and_area():
    assert [x.item() for x in critic_loss(tensor([0.0]), tensor([0.0]), kind="logits")] == [
        pytest.approx(math.log(2))
    ] * 2
    of_real, of_fake = critic_loss(tensor([0.5]), tensor([-2.0]), kind="hinge")
    assert (of_real.item(), of_fake.item()) == (0.5, 0.0)
    assert fooling_loss(tensor([3.0]), kind="hinge").item() == -3
    assert fooling_loss(tensor([0.0]), kind="logits").item() == pytest.approx(math.log(2))
    # of six pairs four are right and one is a tie
    assert roc_auc(tensor([2.0, 0.0]), tensor([1.0, 0.0, -1.0])) == pytest.approx(4.5 / 6)
    assert roc_auc(tensor([]), tensor([1.0])) == 0.5


def test_spectral_critic_is_a_contraction():
    torch.manual_seed(0)
    critic = OutputCritic(6, hidden=[5, 4]).train()
    for _ in range(60):  # power iterations
        critic(torch.randn(2, 6))
    critic.eval()
    x, y = torch.randn(50, 6), torch.randn(50, 6)
    assert ((critic(x) - critic(y)).abs() <= (x - y).norm(dim=1) * 1.001).all()
