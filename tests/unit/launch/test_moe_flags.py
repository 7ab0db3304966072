"""One value for what several flags can say, and expert-parallel sizes that fit every layer."""

import logging

import pytest

from launch import moe_flags
from launch.cli import RecipeParser
from launch.model_config import moe_settings
from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.models.configuration import expert_settings


@pytest.fixture
def settled(tmp_path):
    """The values of a command line with a recipe of its own."""

    def of(*argv: str, recipe: str = ""):
        path = tmp_path / "mine.yaml"
        path.write_text(recipe)
        words = ["--config", str(path), *argv]
        values = RecipeParser().namespace(words)
        moe_flags.settle_moe(values, words)
        return values

    return of


def test_flags_and_moe_config_say_the_same(settled):
    argv = ("--capacity_factor", "1.5", "--drop_tokens", "--use_residual", "true")
    argv += ("--moe_config", '{"noise_std": 0.5, "top_k": 2, "num_experts": [2, 4]}')
    values = settled(*argv)
    assert (values.top_k_experts, values.num_experts) == (2, [2, 4])
    small, large = expert_settings(moe_settings(values))
    assert (small.num_experts, large.num_experts) == (2, 4)
    assert (large.capacity_factor, large.drop_tokens, large.use_residual) == (1.5, True, True)
    assert (large.noise_std, large.top_k, large.eval_capacity_factor) == (0.5, 2, 2.0)


def test_without_flags_the_settings_are_the_defaults(settled):
    moe = moe_settings(settled())
    assert moe["num_experts"] == 4
    assert [s.asdict() for s in expert_settings(moe)] == [expert_settings({})[0].asdict()]


@pytest.mark.parametrize(
    ("recipe", "argv", "words"),
    [
        ("", ("--top_k_experts", "1", "--moe_config", '{"top_k": 2}'), "--top_k_experts 1 and"),
        ("num_experts: 4\n", ("--moe_config", '{"num_experts": 8}'), "--num_experts 4 and"),
        ("moe_config: {use_residual: true}\n", ("--use_residual", "false"), "use_residual True"),
        ("", ("--moe_config", '{"top_k": "two"}'), r"top_k \('two'\).*type int"),
        ("", ("--moe_config", '{"drop_tokens": 1}'), r"drop_tokens \(1\).*type bool"),
        ("", ("--moe_config", '{"num_experts": [2, true]}'), r"num_experts \(\[2, True\]\)"),
        ("", ("--moe_config", '{"num_experts": []}'), "--num_experts .*at least 1"),
        ("", ("--moe_config", '{"topk": 2}'), "did you mean top_k"),
        ("", ("--moe_mode", "dense", "--moe_every", "3"), "--moe_mode dense and --moe_every 3"),
        ("moe_mode: dense\nmoe_layers_idx: [0, 2]\n", (), "--moe_layers_idx 0 2 each"),
    ],
)
def test_contradictions_name_both_sides(settled, recipe, argv, words):
    with pytest.raises(ConfigError, match=words):
        settled(*argv, recipe=recipe)


def test_what_agrees_is_no_contradiction(settled):
    values = settled("--num_experts", "8", "--moe_config", '{"num_experts": 8}')
    assert values.num_experts == [8]
    assert settled("--moe_enable", "false", "--moe_mode", "none").num_experts == [4]


def test_a_typed_choice_of_blocks_beats_the_recipe(settled):
    values = settled("--moe-mode=first_half", recipe="moe_layers_idx: [0, 2]\nmoe_every: 3\n")
    assert (values.moe_mode, values.moe_layers_idx, values.moe_every) == ("first_half", None, None)
    values = settled("--prompt", "moe_mode", recipe="moe_every: 3\n")  # a value is no flag
    assert values.moe_every == 3


def layout(monkeypatch, settled, world: int, per_node: int, *argv: str) -> int:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    return moe_flags.expert_layout(settled(*argv))


def test_the_default_size_divides_every_layer_and_stays_in_a_node(monkeypatch, settled):
    assert layout(monkeypatch, settled, 8, 8, "--num_experts", "8") == 8
    assert layout(monkeypatch, settled, 8, 8, "--num_experts", "8", "4") == 4
    assert layout(monkeypatch, settled, 8, 8, "--num_experts", "8", "6") == 2
    assert layout(monkeypatch, settled, 8, 4, "--num_experts", "8") == 4
    assert layout(monkeypatch, settled, 8, 8, "--moe_enable", "false") == 1


def test_a_size_that_does_not_divide_some_layer_says_which(monkeypatch, settled):
    argv = ("--num_experts", "8", "6", "8", "--ep_size", "4")
    with pytest.raises(ParallelismError, match=r"the 6 experts of sparse block number 2 .*: 1, 2"):
        layout(monkeypatch, settled, 8, 8, *argv)
    with pytest.raises(ParallelismError, match=r"num_experts \(6\) must be a multiple"):
        layout(monkeypatch, settled, 8, 8, "--num_experts", "6", "--ep_size", "4")
    with pytest.raises(ParallelismError, match=r"processes \(8\) must be a multiple"):
        layout(monkeypatch, settled, 8, 8, "--num_experts", "6", "3", "--ep_size", "3")


def test_a_size_beyond_a_node_is_warned_of_once(monkeypatch, settled, caplog):
    argv = ("--num_experts", "8", "--ep_size", "8")
    with caplog.at_level(logging.WARNING, "mm_moe"):
        assert layout(monkeypatch, settled, 8, 8, *argv) == 8
        assert caplog.messages == []
        assert layout(monkeypatch, settled, 8, 4, *argv) == 8
        monkeypatch.setenv("RANK", "1")
        assert layout(monkeypatch, settled, 8, 4, *argv) == 8
    (said,) = caplog.messages
    assert "--ep_size 8 is more than the 4 processes of a node" in said
    assert "--ep_size 4 stays inside" in said
