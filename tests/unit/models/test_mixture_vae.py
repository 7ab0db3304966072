"""The mixture autoencoder as a model: folders, translation, shapes and wrong input."""

import pytest
import torch
from torch.distributions import Laplace, NegativeBinomial, Normal
from transformers import AutoModel

from mm_moe.errors import ConfigError, DataError
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from mm_moe.models.mixture.densities import Likelihood, simplex_scale

FIELDS = {
    "modalities": ["image", "audio", "genes"],
    "arrays": {
        "image": {"shape": [3, 8, 8], "scale": 255.0},
        "audio": {"shape": [8, 4], "scale": 1.0},
        "genes": {"shape": [6]},
    },
    "latent_size": 3,
    "networks": {
        "image": {"kind": "cnn", "channels": 2},
        "audio": {"kind": "cnn", "channels": 2},
        "genes": {"hidden": [5, 4]},
    },
    "likelihoods": {"image": {"kind": "bernoulli"}, "genes": {"kind": "nb"}},
}
ROWS = {
    "image": torch.rand(2, 3, 8, 8),
    "audio": torch.rand(2, 8, 4),
    "genes": torch.tensor([[0.0, 3, 1, 0, 9, 2], [1, 0, 0, 0, 2, 40]]),
}


def test_every_modality_from_every_other():
    model = MixtureVAE(MixtureVAEConfig(**FIELDS))
    for source, rows in ROWS.items():
        for target, wanted in ROWS.items():
            made = model.translate(rows, source=source, target=target)
            assert made.shape == wanted.shape
            z = model.encode(rows, source).mean
            assert torch.equal(made.flatten(1), model.decode(z, target).mean)


def test_a_folder_comes_back_with_all_weights(tmp_path):
    torch.manual_seed(0)
    model = MixtureVAE(MixtureVAEConfig(**FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is MixtureVAE
    assert again.config.likelihood("genes").counts
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    made = again.translate(ROWS["genes"], source="genes", target="image")
    assert torch.equal(made, model.translate(ROWS["genes"], source="genes", target="image"))


def test_new_weights_are_those_of_the_layers():
    """The library must not draw them again with its own spread of 0.02."""
    model = MixtureVAE(MixtureVAEConfig(**FIELDS))
    assert model.encoders["genes"].body[0].weight.std() > 0.1  # uniform up to 1 / sqrt(6)
    assert torch.equal(model.prior().scale, torch.ones(3) + 1e-6)


def test_scales_share_a_budget():
    scale = simplex_scale(torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]]))
    assert torch.allclose(scale, torch.tensor([[1.0, 1.0], [1.5, 0.5]]), atol=1e-5)


def test_likelihoods_against_the_library():
    x, said = torch.rand(3, 4), torch.randn(3, 4)
    mean = torch.sigmoid(said)
    own = Likelihood("laplace", scale=0.75, unit=True)
    assert torch.allclose(own.log_prob(x, said), Laplace(mean, 0.75).log_prob(x).sum(1), atol=1e-5)
    assert torch.allclose(own.distribution(said).mean, mean)
    own = Likelihood("normal", scale=0.3)
    assert torch.allclose(own.log_prob(x, said), Normal(said, 0.3).log_prob(x).sum(1), atol=1e-4)
    counts, theta = torch.tensor([[0.0, 2, 7, 1]]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    mu = said[:1].exp()
    theirs = NegativeBinomial(theta, probs=mu / (mu + theta))
    own = Likelihood("nb")
    log_p = own.log_prob(counts, said[:1], theta.log())
    assert torch.allclose(log_p, theirs.log_prob(counts).sum(1), atol=1e-4)
    assert torch.allclose(own.distribution(said[:1], theta.log()).mean, mu, atol=1e-4)


def test_a_modality_of_many_values_does_not_drown_another():
    config = MixtureVAEConfig(**FIELDS)
    assert [config.weight(name) for name in config.modalities] == [1.0, 6.0, 32.0]
    fixed = MixtureVAEConfig(**FIELDS, likelihood_weights={"image": 0.5})
    assert [fixed.weight(name) for name in fixed.modalities] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"posterior": "laplacian"}, "did you mean laplace"),
        ({"likelihoods": {"image": {"kind": "mse"}}}, "unknown likelihood 'mse'"),
        ({"likelihoods": {"image": {"spread": 1.0}}}, "unknown option 'spread'"),
        ({"likelihoods": {"image": {"scale": 0.0}}}, "scale"),
        ({"networks": {"genes": {"kind": "cnn"}}}, "halves pictures"),
        ({"networks": {"genes": {"kind": "rnn"}}}, "unknown network 'rnn'"),
        ({"networks": {"voice": {}}}, "the modalities are image, audio, genes"),
        ({"arrays": {"image": {"shape": [4, 4]}}, "networks": {}}, "'audio' is no array"),
        ({"latent_size": 0}, "at least 1"),
        ({"likelihood_weights": {"genes": 0.0}}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        MixtureVAEConfig(**(FIELDS | change))


def test_wrong_rows_are_refused():
    model = MixtureVAE(MixtureVAEConfig(**FIELDS))
    with pytest.raises(DataError, match=r"shape \(8, 8\)"):
        model.encode(torch.zeros(2, 8, 8), "audio")
    with pytest.raises(DataError, match="holds -1"):
        model.encode(-torch.ones(2, 6), "genes")
    with pytest.raises(ConfigError, match="no modality 'voice'"):
        model.translate(ROWS["audio"], source="audio", target="voice")
    present = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(DataError, match="0 rows of 'genes'"):
        model(present, {name: {"values": ROWS[name]} for name in ("image", "audio")})
