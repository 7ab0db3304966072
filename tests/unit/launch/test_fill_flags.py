"""The flags of fills: layouts of their experts, and what is refused before a run starts."""

import argparse
from types import SimpleNamespace

import pytest

from launch import fill_flags
from launch.fill_flags import fill_exchange, fill_layout
from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.fill.base import FillShape
from mm_moe.fill.retriever import RetrieverFill

SOURCE = SimpleNamespace(name="clinic", modalities=("a", "b", "c"))
ALONE = SimpleNamespace(name="photos", modalities=("image",))


def flags(**given):
    plain = {"fill": None, "fill_config": None, "experts_over": None, "ep_size": 0}
    plain |= {
        "fusion": "concat",
        "fusion_config": None,
        "moe_enable": False,
        "num_experts": [4],
        "interaction_experts": False,
    }
    return argparse.Namespace(**{**plain, **given})


@pytest.fixture
def four_processes(monkeypatch):
    monkeypatch.setattr(fill_flags.runtime, "world_size", lambda: 4)
    monkeypatch.setattr(fill_flags.runtime, "local_world_size", lambda: 4)


@pytest.mark.parametrize(
    ("given", "ep_size"),
    [
        ({}, 1),
        ({"fill": "bank"}, 1),
        ({"fill": "retriever", "fusion_config": '{"sparse": "all"}'}, 4),  # concat has none
        ({"fill": "retriever"}, 4),  # 3 * 8 + 4 experts
        ({"fill": "retriever", "fill_config": '{"num_candidates_shared": 2}'}, 2),  # 26
        ({"fill": "retriever", "fill_config": '{"legacy": true}'}, 1),
    ],
)
def test_a_free_layout_divides_the_fills_experts(given, ep_size, four_processes):
    assert fill_layout(flags(**given), SOURCE, ep_size=1) == ep_size


@pytest.mark.parametrize(
    "given",
    [{"moe_enable": True}, {"fusion": "transformer", "fusion_config": '{"sparse": "all"}'}],
)
def test_a_free_layout_divides_all_experts(given, four_processes):
    found = flags(fill="retriever", **given)
    assert [fill_layout(found, SOURCE, ep_size=size) for size in (1, 2, 4)] == [1, 2, 4]
    found.fill_config = '{"num_candidates_shared": 2}'
    assert fill_layout(found, SOURCE, ep_size=4) == 2  # 26 experts


def test_what_the_experts_of_a_fill_exchange():
    fill = RetrieverFill(FillShape(("a", "b"), 4, 8), num_supports=3)
    [layer] = fill_exchange(fill, missing={"a": 0.25, "b": 0.5}, samples=8)
    # 6 cells of 3 supports and on average 1.25 own modalities, 4 tokens each
    assert (layer.tokens, layer.width, layer.hidden, layer.top_k) == (6 * 4.25 * 4, 8, 16, 4)
    assert fill_exchange(None, missing={}, samples=8) == []


def test_an_asked_layout_has_to_divide_them(four_processes):
    given = flags(fill="retriever", fill_config='{"num_candidates_shared": 3}', ep_size=2)
    with pytest.raises(ParallelismError, match=r"27\) must be a multiple of ep_size \(2\)"):
        fill_layout(given, SOURCE, ep_size=2)
    assert fill_layout(flags(fill="retriever", ep_size=2), SOURCE, ep_size=2) == 2


@pytest.mark.parametrize(
    ("given", "source", "words"),
    [
        ({"fill_config": '{"beta": 1}'}, SOURCE, r"--fill_config is about a fill"),
        ({"fill": "retreive"}, SOURCE, r"unknown fill 'retreive'; did you mean retriever"),
        ({"fill": "bank", "fill_config": '{"beta": 1}'}, SOURCE, r"option 'beta'"),
        ({"fill": "zero", "experts_over": ["a", "b"]}, SOURCE, r"members of --experts_over"),
        ({"fill": "zero"}, ALONE, r"'photos' has image alone"),
        (
            {"fill": "retriever", "fill_config": '{"num_candidates": 1, "top_k": 6}'},
            SOURCE,
            r"top_k \(6\) is more than the 5 experts",
        ),
    ],
)
def test_what_cannot_work_is_refused(given, source, words):
    with pytest.raises(ConfigError, match=words):
        fill_layout(flags(**given), source, ep_size=1)
