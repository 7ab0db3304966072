"""What DeepSpeed's layer is refused for, by hand."""

import pytest

from mm_moe.errors import ParallelismError
from mm_moe.moe.parallel_stock import check_stock, refused_counts, stock_capacity, stock_warning
from mm_moe.moe.settings import MoESettings


def settings_with(**options) -> MoESettings:
    return MoESettings(**{"top_k": 2, "router_z_coef": 0.0, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "topk_sigmoid"}, ["'topk_sigmoid'", "topk_softmax"]),
        ({"router_z_coef": 0.5}, ["0.5", "set it to 0"]),
        ({"top_k": 1}, ["renormalise", "top_k 1"]),
        ({"bias_update_rate": 0.001}, ["bias_update_rate 0.001"]),
        ({"local_entropy_coef": 0.1}, ["local_entropy_coef 0.1"]),
        ({"renormalise": False}, ["top_k 2", "leave renormalise out"]),
        ({"top_k": 1, "router_z_coef": 0.5}, ["0.5", "top_k 1"]),
    ],
)
def test_settings_that_it_lacks_are_refused_together(options, words):
    with pytest.raises(ParallelismError) as caught:
        check_stock(settings_with(**options))
    for word in [*words, "--moe_backend ours"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1, "renormalise": False}, {"drop_tokens": True, "use_residual": True}]
)
def test_settings_that_it_has_are_accepted(options):
    check_stock(settings_with(**options))


def test_its_capacity_by_hand():
    settings = settings_with(drop_tokens=True, capacity_factor=1.5, min_capacity=4)
    # 10 tokens, 2 choices, 4 experts: 10 / 4 * 1.5 * 2 = 7.5
    assert stock_capacity(settings, num_tokens=10, training=True) == 8
    assert stock_capacity(settings, num_tokens=10, training=False) == 10  # factor 2
    assert stock_capacity(settings, num_tokens=3, training=True) == 4


DROPLESS_1 = settings_with(top_k=1, renormalise=False)
DROPPING = settings_with(drop_tokens=True, capacity_factor=1.0, min_capacity=2)
DROPPING_1 = settings_with(
    top_k=1, renormalise=False, drop_tokens=True, capacity_factor=1.0, min_capacity=2
)


@pytest.mark.parametrize(
    ("counts", "settings", "ep_size", "said"),
    [
        ([[64, 20], [20, 9]], DROPLESS_1, 2, None),  # 20 rows fit into 20 tokens
        ([[64, 21], [20, 9]], DROPLESS_1, 2, "64, 20 tokens, and their fullest experts get 21, 9"),
        ([[64, 21], [0, 0]], DROPLESS_1, 1, None),
        ([[64, 64], [64, 9]], DROPLESS_1, 2, None),
        ([[5, 5], [5, 5], [5, 5], [0, 0]], DROPLESS_1, 2, "processes 2 to 3"),
        ([[64, 64], [0, 0]], settings_with(), 2, None),
        ([[20, 9], [19, 9]], DROPPING, 2, None),  # capacities 10 and 9.5, rounded up to 10
        ([[20, 9], [18, 9]], DROPPING, 2, "capacities, 10, 9"),
        ([[20, 9], [18, 9]], DROPPING, 1, None),
        ([[4, 1], [0, 0]], DROPPING, 2, None),  # both have the least capacity, 2
        ([[2, 1], [1, 1]], DROPPING_1, 1, "process 1 has 1 tokens"),
        ([[0, 0], [0, 0]], DROPLESS_1, 2, None),
    ],
)
def test_counts_on_which_it_would_abort(counts, settings, ep_size, said):
    reason = refused_counts(counts, settings=settings, ep_size=ep_size, training=True)
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(
    ("settings", "ep_size", "word"),
    [
        (settings_with(), 4, None),
        (DROPLESS_1, 1, None),
        (DROPLESS_1, 2, "than another process has tokens"),
        (DROPPING, 2, "equal numbers of tokens"),
        (DROPPING, 1, None),
        (DROPPING_1, 1, "min_capacity (2)"),
    ],
)
def test_a_run_that_may_be_stopped_is_told_so(settings, ep_size, word):
    warning = stock_warning(settings, ep_size=ep_size)
    assert warning is None if word is None else word in warning
