"""Settings refuse what cannot work, with numbers and a way out."""

import pytest

from mm_moe.errors import ConfigError
from mm_moe.moe.settings import MoESettings


def test_a_round_trip_through_a_dict():
    settings = MoESettings(num_experts=8, top_k=2, router_z_coef=0.0)
    assert MoESettings.from_dict(settings.asdict()) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 0}, r"num_experts \(0\)"),
        ({"num_experts": 4, "top_k": 5}, r"top_k \(5\).*\(4\); try top_k=4"),
        ({"top_k": 0}, "try top_k=1"),
        ({"load_balance_coef": -1.0}, "load_balance_coef"),
        ({"router_z_coef": float("nan")}, "router_z_coef"),
        ({"router": "topk_sofmax"}, "did you mean topk_softmax"),
        ({"capacity_factor": 0.0}, "capacity_factor .*drop_tokens=False"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"jitter_eps": float("inf")}, "jitter_eps"),
        ({"slots_per_expert": 0}, r"slots_per_expert \(0\) must be at least 1"),
        ({"global_entropy_threshold": -1.0}, r"\(-1.0\) must be an entropy.*= 1.386"),
        ({"bias_update_rate": -0.1}, "bias_update_rate"),
        ({"use_residual": True, "num_shared_experts": 1}, "exclude each other"),
        ({"num_expert": 4}, "did you mean num_experts"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ConfigError, match=words):
        MoESettings.from_dict(values)
