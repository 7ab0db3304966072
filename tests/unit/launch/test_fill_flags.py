"""The flags of fills: layouts of their experts, and what is refused before a run starts."""

import argparse
from types import SimpleNamespace

import pytest

from launch import fill_flags
from launch.fill_flags import fill_layout
from mm_moe.errors import ConfigError, ParallelismError

SOURCE = SimpleNamespace(name="clinic", modalities=("a", "b", "c"))
ALONE = SimpleNamespace(name="photos", modalities=("image",))


def flags(**given):
    plain = {"fill": None, "fill_config": None, "experts_over": None, "ep_size": 0}
    plain |= {"moe_enable": False, "num_experts": [4], "interaction_experts": False}
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
        ({"fill": "retriever"}, 4),  # 3 * 8 + 4 experts
        ({"fill": "retriever", "fill_config": '{"num_candidates_shared": 2}'}, 2),  # 26
        ({"fill": "retriever", "fill_config": '{"legacy": true}'}, 1),
        ({"fill": "retriever", "moe_enable": True, "num_experts": [6]}, 2),
    ],
)
def test_a_free_layout_divides_the_fills_experts_and_the_others(given, ep_size, four_processes):
    assert fill_layout(flags(**given), SOURCE, ep_size=1) == ep_size


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
