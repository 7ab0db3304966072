"""Bounds of the mixture autoencoder on a linear-Gaussian model whose log p(x) is known.

Axes: B samples, K draws, L latent width, V values of a row, P quadrature points.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mm_moe.batch import Batch
from mm_moe.errors import ConfigError
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from mm_moe.models.mixture.draws import Draws
from pretrain.mixture import BOUNDS, MixtureObjective, dreg_looser, iwae_looser, m_elbo

SPREAD = 0.7  # of the likelihoods


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(*sizes: int, latent: int = 2) -> MixtureVAE:
    """x_m = W_m z + c_m + noise: linear encoders and decoders, normal everything."""
    names = [f"m{index}" for index in range(len(sizes))]
    config = MixtureVAEConfig(
        modalities=names,
        arrays={name: {"shape": [size]} for name, size in zip(names, sizes, strict=True)},
        latent_size=latent,
        posterior="normal",
        prior="normal",
        learn_prior=False,
        networks={name: {"hidden": []} for name in names},
        likelihoods={name: {"kind": "normal", "scale": SPREAD} for name in names},
        likelihood_weights={},
    )
    return MixtureVAE(config).double()


def batch_of(values: list[Tensor], present: list[list[int]] | None = None) -> Batch:
    """Rows of each modality, (B, V); only present ones are kept."""
    rows = len(values[0])
    shown = torch.ones(rows, len(values)) if present is None else torch.tensor(present)
    shown_BM = shown.bool()
    inputs = {f"m{m}": {"values": x[shown_BM[:, m]]} for m, x in enumerate(values)}
    inputs = {name: payload for name, payload in inputs.items() if len(payload["values"])}
    return Batch.of([str(row) for row in range(rows)], shown_BM, inputs)


def rows(model: MixtureVAE, count: int) -> list[Tensor]:
    widths = [model.config.num_values(name) for name in model.modalities]
    return [torch.randn(count, width, dtype=torch.double) for width in widths]


def log_evidence(model: MixtureVAE, values: list[Tensor]) -> Tensor:
    """log N(x; c, W W^T + SPREAD^2 I) of complete rows, (B,)."""
    last = [model.decoders[name].body[-1] for name in model.modalities]
    weight_VL = torch.cat([layer.weight for layer in last])
    mean_V = torch.cat([layer.bias for layer in last])
    covariance = weight_VL @ weight_VL.T + SPREAD**2 * torch.eye(len(mean_V), dtype=torch.double)
    return MultivariateNormal(mean_V, covariance).log_prob(torch.cat(values, dim=1)).detach()


def bound(model: MixtureVAE, batch: Batch, name: str, samples: int) -> Tensor:
    with torch.no_grad():
        draws = model.draw(batch.present, batch.inputs, samples=samples, cross=name != "m_elbo")
        return BOUNDS[name](draws)


@pytest.mark.parametrize(("name", "sizes"), [("iwae", (2, 3)), ("iwae_looser", (4,))])
def test_iwae_grows_with_the_draws_and_reaches_log_p(name, sizes):
    model = linear(*sizes)
    values = [0.3 * x for x in rows(model, 4)]  # far away, weights would be heavy-tailed
    truth_B = log_evidence(model, values)
    many = batch_of([x.repeat(150, 1) for x in values])
    means, errors = [], []
    for samples in (1, 8, 64, 400):
        found = bound(model, many, name, samples).view(150, 4)
        means.append(found.mean(0))
        errors.append(found.std(0) / math.sqrt(150))
    for less, more, error in zip(means, means[1:], errors, strict=False):
        assert (more - less > -4 * error).all()
    assert (means[0] < truth_B - 0.05).all()  # one draw is far below
    assert ((means[-1] - truth_B).abs() < 4 * errors[-1] + 0.02).all()


def test_the_looser_bound_of_two_experts_stays_below():
    """An expert alone does not draw from the mixture: E w is p(x) on their average only."""
    model = linear(2, 3)
    values = rows(model, 4)
    batch = batch_of(values)
    tight, loose = (bound(model, batch, name, 20_000) for name in ("iwae", "iwae_looser"))
    assert torch.allclose(tight, log_evidence(model, values), atol=0.05, rtol=0)
    assert (loose < tight + 0.05).all()
    assert (loose < tight - 0.1).any()


def test_the_elbo_by_its_formula_lies_below_log_p():
    """E |x - W z - c|^2 of a normal z is |x - W mu - c|^2 + trace(W S W^T)."""
    model = linear(2, 3)
    values = rows(model, 5)
    expected_B = torch.zeros(5, dtype=torch.double)
    for r, x in enumerate(values):
        expert = model.encode(x, f"m{r}")
        for d, name in enumerate(model.modalities):
            layer = model.decoders[name].body[-1]
            off = (values[d] - layer(expert.mean)).pow(2).sum(1)
            spread = (expert.variance[:, None] * layer.weight.pow(2)).sum((1, 2))
            expected_B += -(off + spread) / (2 * SPREAD**2) / 2
            expected_B -= values[d].shape[1] * math.log(SPREAD * math.sqrt(2 * math.pi)) / 2
        kl = (expert.mean.pow(2) + expert.variance - 1 - expert.variance.log()).sum(1) / 2
        expected_B -= kl / 2
    expected_B = expected_B.detach()
    assert (expected_B < log_evidence(model, values)).all()
    found = bound(model, batch_of(values), "elbo", 40_000)
    assert torch.allclose(found, expected_B, atol=0.15, rtol=0)


def test_the_cheap_elbo_has_the_same_mean():
    model = linear(2, 2)
    for name in model.modalities:  # experts that lie near: importances have a small spread
        model.encoders[name].location.weight.data.mul_(0.2)
    batch = batch_of(rows(model, 3))
    whole, cheap = (bound(model, batch, name, 100_000) for name in ("elbo", "m_elbo"))
    assert torch.allclose(whole, cheap, atol=0.15, rtol=0)


def test_the_cheap_elbo_decodes_each_draw_once():
    model = linear(2, 2)
    batch = batch_of(rows(model, 3))
    draws = model.draw(batch.present, batch.inputs, samples=4, cross=False)
    assert (draws.log_px_DRKB[0, 1] == 0).all()
    assert (draws.log_px_DRKB[0, 0] != 0).all()
    m_elbo(draws).sum().backward()
    assert all(p.grad is not None for p in model.encoders.parameters())


def quadrature_bound(model: MixtureVAE, values: list[Tensor]) -> Tensor:
    """`iwae_looser` of one row with K = 2 and L = 1, without chance: (1,), differentiable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    point_P, weight_P = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    experts = [model.encode(x, f"m{m}") for m, x in enumerate(values)]
    total = torch.zeros(1, dtype=torch.double)
    for expert in experts:
        z_P1 = (expert.mean + expert.stddev * point_P).T
        log_w_P = model.prior().log_prob(z_P1).sum(1)
        for m, x in enumerate(values):
            log_w_P = log_w_P + model.decode(z_P1, f"m{m}").log_prob(x).sum(1)
        log_q_P = torch.stack([each.log_prob(z_P1).sum(1) for each in experts])
        log_w_P = log_w_P - log_q_P.logsumexp(0) + math.log(len(experts))
        pair_PP = torch.logaddexp(log_w_P[:, None], log_w_P[None]) - math.log(2)
        total = total + (weight_P[:, None] * weight_P * pair_PP).sum() / len(experts)
    return total


def gradients(model: MixtureVAE, values: list[Tensor], *, estimator, samples: int) -> Tensor:
    """60 gradients, each the mean over 400 repetitions, of encoders and then of decoders."""
    batch = batch_of([x.repeat(400, 1) for x in values])
    found = []
    for _ in range(60):
        draws = model.draw(batch.present, batch.inputs, samples=samples)
        grads = torch.autograd.grad(estimator(draws).mean(), weights(model))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def weights(model: MixtureVAE) -> list[Tensor]:
    """Of one latent the scale is always 1, so its logits have no gradient."""
    experts = [model.encoders[name].location for name in model.modalities]
    return [p for part in (*experts, model.decoders) for p in part.parameters()]


def exact_gradient(model: MixtureVAE, values: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(quadrature_bound(model, values), weights(model))
    return torch.cat([g.flatten() for g in grads])


def test_dreg_is_unbiased_and_varies_less():
    model = linear(3, latent=1)
    values = rows(model, 1)
    exact = exact_gradient(model, values)
    of_expert = sum(p.numel() for p in model.encoders["m0"].location.parameters())
    spreads = {}
    for estimator in (iwae_looser, dreg_looser):
        found = gradients(model, values, estimator=estimator, samples=2)
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - exact).abs() < 4 * error).all()
        spreads[estimator] = found.var(0)[:of_expert].sum()
    assert spreads[dreg_looser] < 0.8 * spreads[iwae_looser]


def test_the_hook_equals_the_two_terms_written_out():
    """Decoders: sum v d log w. Experts: sum v^2 (d log w / dz) dz, nothing inside log q."""
    model = linear(2, 3)
    batch = batch_of(rows(model, 4))
    encoder, decoder = list(model.encoders.parameters()), list(model.decoders.parameters())

    def drawn():
        torch.manual_seed(5)
        return model.draw(batch.present, batch.inputs, samples=6)

    dreg_looser(drawn()).sum().backward()
    draws = drawn()
    log_w_RKB = draws.log_weights(path_only=True)
    share_RKB = log_w_RKB.detach().softmax(1)
    slope_RKBL = torch.autograd.grad(log_w_RKB.sum(), draws.z_RKBL, retain_graph=True)[0]
    pull_RKBL = share_RKB[..., None] ** 2 * slope_RKBL / 2
    theirs = torch.autograd.grad(draws.z_RKBL, encoder, pull_RKBL, retain_graph=True)
    theirs += torch.autograd.grad((share_RKB * log_w_RKB).sum() / 2, decoder)
    for mine, expected in zip([*encoder, *decoder], theirs, strict=True):
        assert torch.allclose(mine.grad, expected, atol=1e-12, rtol=1e-9)
    torch.manual_seed(5)
    unhooked = (
        share_RKB * model.draw(batch.present, batch.inputs, samples=6).log_weights(path_only=True)
    ).sum() / 2
    dead = torch.autograd.grad(unhooked, encoder)
    assert not all(torch.allclose(p.grad, g, rtol=0.01) for p, g in zip(encoder, dead, strict=True))


def test_the_mixture_density_by_hand():
    """Two unit normals at 0 and 2, drawn at 0: (0.3989 + 0.0540) / 2; alone: 0.3989."""
    draws = Draws(
        present_BM=torch.tensor([[True, True], [True, False]]),
        family=torch.distributions.Normal,
        location_RBL=torch.tensor([[[0.0], [0.0]], [[2.0], [7.0]]]),
        scale_RBL=torch.ones(2, 2, 1),
        z_RKBL=torch.zeros(2, 1, 2, 1),
        log_prior_RKB=torch.zeros(2, 1, 2),
        log_px_DRKB=torch.zeros(2, 2, 1, 2),
        kl_RB=torch.zeros(2, 2),
    )
    density_RKB = draws.log_posterior().exp()
    assert density_RKB[0, 0, 0].item() == pytest.approx((0.39894 + 0.05399) / 2, abs=1e-5)
    assert density_RKB[0, 0, 1].item() == pytest.approx(0.39894, abs=1e-5)


def test_one_modality_is_a_vae():
    """K = 1, M = 1: every bound is log p(x | z) + log p(z) - log q(z), or has KL in closed form."""
    model = linear(3)
    (x,) = values = rows(model, 4)
    batch = batch_of(values)
    torch.manual_seed(1)
    draws = model.draw(batch.present, batch.inputs, samples=1)
    expert, z_BL = model.encode(x, "m0"), draws.z_RKBL[0, 0]
    fit_B = model.decode(z_BL, "m0").log_prob(x).sum(1)
    one_draw_B = fit_B + (model.prior().log_prob(z_BL) - expert.log_prob(z_BL)).sum(1)
    closed_B = fit_B - torch.distributions.kl_divergence(expert, model.prior()).sum(1)
    for name, value in BOUNDS.items():
        expected_B = closed_B if "elbo" in name else one_draw_B
        assert torch.allclose(value(draws), expected_B), name


@pytest.mark.parametrize("name", BOUNDS)
def test_a_sample_with_one_modality_is_that_modality_alone(name):
    """The other's encoder, decoder and values change nothing; a sample without any counts for 0."""
    model = linear(2, 3)
    x, y = rows(model, 3)
    batch = batch_of([x, y], [[1, 0], [0, 1], [0, 0]])
    torch.manual_seed(2)
    found_B = BOUNDS[name](model.draw(batch.present, batch.inputs, samples=4))
    assert found_B[2] == 0 if name != "iwae" else torch.isfinite(found_B[2])
    expert = model.encode(x[:1], "m0")
    alone = batch_of([x[:1], y[:1]], [[1, 0]])
    torch.manual_seed(2)
    draws = model.draw(alone.present, alone.inputs, samples=4)
    assert torch.equal(draws.location_RBL[0], expert.mean)
    grads = torch.autograd.grad(
        BOUNDS[name](draws).sum(), list(model.encoders["m1"].parameters()), allow_unused=True
    )
    assert all(g is None or (g == 0).all() for g in grads)


@pytest.mark.parametrize("name", BOUNDS)
def test_loss_is_the_mean_over_samples_that_have_something(name):
    model = linear(2, 3)
    x, y = rows(model, 3)
    objective = MixtureObjective(bound=name, samples=3)
    torch.manual_seed(3)
    loss, parts, output = objective(model, batch_of([x, y], [[1, 1], [0, 1], [0, 0]]))
    loss.backward()
    assert parts[name] is loss
    assert output.routing == {}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(3)
    nothing, _, _ = objective(model, batch_of([x, y], [[0, 0]] * 3))
    model.zero_grad()
    nothing.backward()
    assert nothing == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"bound": "dreg"}, "dreg_looser"), ({"samples": 0}, "from 1"), ({"samples": 2.5}, "2.5")],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        MixtureObjective(**options)
