"""Replay prompts by hand: what is carried, cached, mixed and replayed."""

import pytest
import torch

from mm_moe.errors import ConfigError
from prompts.base import NoPrompt
from prompts.replay import ReplayPrompt
from prompts.replay_tower import mix, normalised

TRIO = {
    "widths": {"a": 4, "b": 6, "c": 4},
    "num_blocks": {"a": 4, "b": 6, "c": 4},
    "modalities": ("a", "b", "c"),
}
PAIR = {"widths": {"a": 4, "b": 6}, "num_blocks": {"a": 4, "b": 6}, "modalities": ("a", "b")}
ALL = torch.ones(1, 2, dtype=torch.bool)
FIRST = {"a": torch.tensor([0])}


def run(prompt, block, x_NLD, mask_NL=None):
    """Inputs of each block when block l maps x to block(l, x)."""
    edit, entered = (
        prompt.start(ALL.expand(len(x_NLD), -1), {"a": torch.arange(len(x_NLD))})["a"],
        [],
    )
    for layer in range(4):
        x_NLD, mask_NL = edit.before(layer, x_NLD, mask_NL)
        entered.append(x_NLD)
        x_NLD = edit.after(layer, block(layer, x_NLD), mask_NL)
    return edit, entered


def test_slots_are_carried_past_the_early_blocks():
    prompt = ReplayPrompt(**PAIR, length=2, cache_layers=3, read=False)
    with torch.no_grad():
        prompt.towers["a"].bypass_J.zero_()
    edit, entered = run(prompt, lambda layer, x: x + 100, torch.zeros(1, 1, 4))
    assert edit.prefix == 4  # two private, two shared
    start = entered[0][:, :4]
    assert torch.equal(entered[1][:, :4], start)
    assert torch.equal(entered[2][:, :4], start)  # block outputs do not enter at a share of 0
    assert torch.allclose(entered[3][:, :4], start + 100)  # deep: they do
    assert [x[0, 4, 0].item() for x in entered] == [0, 100, 200, 300]  # own tokens untouched


def test_without_bypass_and_replay_the_slots_are_plain_tokens():
    prompt = ReplayPrompt(**PAIR, read=False, bypass=False, replay=False)
    _, entered = run(prompt, lambda layer, x: x + 1, torch.zeros(1, 1, 4))
    for layer, x_NLD in enumerate(entered):
        assert torch.allclose(x_NLD, entered[0] + layer)


def test_closed_gates_and_lifts_replay_nothing():
    with_replay, without = ReplayPrompt(**PAIR), ReplayPrompt(**PAIR, replay=False)
    without.load_state_dict(with_replay.state_dict(), strict=False)
    x_NLD = torch.randn(2, 3, 4)
    for a, b in zip(
        run(with_replay, lambda layer, x: x.sin(), x_NLD)[1],
        run(without, lambda layer, x: x.sin(), x_NLD)[1],
        strict=True,
    ):
        assert torch.equal(a, b)


PLAIN = {"read": False, "bypass": False, "replay_tokens": False, "gated": False}


def test_the_deep_blocks_get_the_mean_of_the_cache():
    prompt = ReplayPrompt(**PAIR, **PLAIN, aggregation="mean")
    # block l adds 1: the entries are s, s + 1 and s + 2, their mean s + 1
    _, entered = run(prompt, lambda layer, x: x + 1, torch.zeros(1, 1, 4))
    start = entered[0][:, :8]
    assert torch.allclose(entered[2][:, :8], (start + 2) + (start + 1))
    assert torch.equal(entered[2][:, 8:], torch.full((1, 1, 4), 2.0))


def test_the_last_entry_alone():
    prompt = ReplayPrompt(**PAIR, **PLAIN, aggregation="last")
    _, entered = run(prompt, lambda layer, x: x + 1, torch.zeros(1, 1, 4))
    start = entered[0][:, :8]
    assert torch.allclose(entered[2][:, :8], (start + 2) + (start + 2))


def test_summaries_are_means_of_own_real_tokens():
    prompt = ReplayPrompt(**PAIR, length=1, read=False)
    x_NLD = torch.tensor([[[1.0, 2, 3, 4], [3, 2, 1, 0], [90, 90, 90, 90]]])
    mask_NL = torch.tensor([[True, True, False]])
    edit, _ = run(prompt, lambda layer, x: x, x_NLD, mask_NL)
    assert torch.equal(edit.cache.summaries[0], torch.tensor([[2.0, 2, 2, 2]]))
    assert len(edit.cache.summaries) == len(edit.cache.slots) == 3  # before block 0, after 0 and 1


def test_slots_read_what_is_there():
    prompt = ReplayPrompt(**PAIR, length=1, private=False)
    reader = prompt.towers["a"].read
    with torch.no_grad():
        reader.key.weight.zero_()  # every real token alike: the mean of what they hold
        for layer in (reader.value, reader.out):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    own_NLD = torch.tensor([[[1.0, -1, 1, -1], [1, 1, -1, -1], [-9, 9, 9, -9]]])
    mask_NL = torch.tensor([[True, True, False]])
    edit, entered = run(prompt, lambda layer, x: x, own_NLD, mask_NL)
    buffer = prompt.start(ALL, FIRST)["a"].slots_NSD
    read = torch.tensor([1.0, 0, 0, -1])  # tokens of mean 0 and variance 1 stay as they are
    assert torch.allclose(entered[0][0, 0], buffer[0, 0] + read, atol=1e-4)
    assert torch.allclose(edit.cache.summaries[0][0], torch.cat([read, read]), atol=1e-4)


def test_summaries_reach_the_own_tokens_through_the_lift():
    prompt = ReplayPrompt(**PAIR, read=False, bypass=False, aggregation="mean")
    lift = prompt.towers["a"].lift[0]
    with torch.no_grad():
        lift.up.weight.normal_()
    x_NLD = torch.randn(1, 3, 4)
    _, entered = run(prompt, lambda layer, x: x, x_NLD)
    lifted = lift(normalised(x_NLD.mean(1)))
    assert torch.allclose(entered[2][:, 8:], x_NLD + lifted[:, None], atol=1e-6)
    assert torch.equal(entered[2][:, :8], entered[0][:, :8])  # their gate is closed


def test_dropout_is_for_training_alone():
    prompt = ReplayPrompt(**PAIR, dropout=0.5)
    x_NLD = torch.randn(2, 3, 4)
    first, second = (run(prompt, lambda layer, x: x, x_NLD)[1][0] for _ in range(2))
    assert not torch.equal(first, second)
    prompt.eval()
    first, second = (run(prompt, lambda layer, x: x, x_NLD)[1][0] for _ in range(2))
    assert torch.equal(first, second)


def test_mix_by_hand():
    cached = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])]
    assert mix(torch.tensor([0.25, 0.75]), cached).tolist() == [[2.5], [5.0]]
    assert mix(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), cached).tolist() == [[1.0], [4.0]]


def test_patterns_find_their_rows():
    prompt = ReplayPrompt(**TRIO)
    present = torch.tensor([[True, True, True], [True, True, False], [False, True, True]])
    # of b: the other two in binary, a is the low bit
    assert prompt.pattern_rows("b", present, torch.arange(3)).tolist() == [3, 1, 2]
    # and back, with b's own bit (2) set: a c absent, a there, c there, both
    assert prompt.full_patterns(1).tolist() == [0b010, 0b011, 0b110, 0b111]
    assert prompt.shared_KnC.shape[0] == 7


def test_orthogonality_by_hand():
    prompt = ReplayPrompt(**PAIR, length=1, orthogonality_coef=2.0)
    with torch.no_grad():
        for name, angle in (("a", 0.0), ("b", 1.0)):
            part = prompt.towers[name]
            part.private_KnD.zero_()
            part.private_KnD[..., 0] = 3.0
            part.from_shared.weight.zero_()
            part.from_shared.bias.zero_()
            part.from_shared.bias[0] = 5.0 if angle else 0.0
            part.from_shared.bias[1] = 0.0 if angle else 5.0
    # cosine 0 in a, 1 in b: mean of squares .5, times 2
    assert prompt.losses()["orthogonality"].item() == pytest.approx(1.0)
    assert ReplayPrompt(**PAIR, shared=False).losses() == {}
    assert ReplayPrompt(**PAIR, orthogonality_coef=0.0).losses() == {}


def test_switches_remove_parameters():
    def names(**options):
        return {n.split(".")[-1] for n, _ in ReplayPrompt(**PAIR, **options).named_parameters()}

    full = names()
    assert full - names(private=False) == {"private_KnD"}
    assert full - names(bypass=False) == {"bypass_J"}
    assert full - names(gated=False) == {"slot_gate_RD"}
    assert full - names(aggregation="mean") == {"slot_weight_RJ", "token_weight_RJ"}
    plain = names(read=False, replay=False, bypass=False)
    assert plain == {"private_KnD", "shared_KnC", "weight", "bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_layers": 0}, r"cache_layers \(0\) must lie between 1 and 3"),
        ({"replay_layers": [1]}, "block 1 of the a tower; the replay can enter blocks 2 to 3"),
        ({"replay_layers": []}, "switch replay off instead"),
        ({"aggregation": "sum"}, "known: learned, attention, mean, last"),
        ({"private": False, "shared": False, "replay": False}, "every part"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must lie in \[0, 1\)"),
        ({"lenght": 3}, "did you mean length"),
        ({"length": 0}, r"length \(0\)"),
    ],
)
def test_wrong_options_give_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        ReplayPrompt(**PAIR, **options)


def test_too_many_modalities_for_a_table():
    names = tuple("abcdefghi")
    numbers = dict.fromkeys(names, 4)
    with pytest.raises(ConfigError, match="at most 8 modalities, not 9"):
        ReplayPrompt(widths=numbers, num_blocks=numbers, modalities=names)
    NoPrompt(widths=numbers, num_blocks=numbers, modalities=names)
