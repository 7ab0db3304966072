"""Who lends what to whom: exact pools, uniform draws, fallbacks."""

import itertools
from collections import Counter

import numpy as np
import pytest

from mm_moe.data.support import SupportIndex, group_code, support_numbers

A, B, C = 1, 2, 4  # bits of three modalities
STRANGER = group_code("nobody")


def index_of(*patterns, groups=None):
    groups = range(len(patterns)) if groups is None else groups
    codes = np.array([group_code(str(group)) for group in groups])
    return SupportIndex(np.array(patterns), codes, num_modalities=3)


def drawn(index, own, modality, *, count, key="s", epoch=0, seed=0, group=STRANGER):
    stream = support_numbers(key, modality="m", dataset="d", epoch=epoch, seed=seed)
    return index.draw(own, modality, count=count, stream=stream, group=group)


def test_supports_have_the_modality_and_all_that_the_sample_has():
    index = index_of(A | B, A | C, A | B | C, B | C, C, A | B | C)
    # has A and B, lacks C: only the complete rows 2 and 5
    assert sorted(drawn(index, A | B, 2, count=2)) == [2, 5]
    # has A alone, lacks C: rows 1, 2, 5
    assert sorted(drawn(index, A, 2, count=3)) == [1, 2, 5]


def test_fewer_rows_than_wanted_are_all_taken():
    assert sorted(drawn(index_of(A | C, A | B, A | C), A, 2, count=8)) == [0, 2]


def test_without_a_fitting_row_the_largest_overlap_lends():
    index = index_of(C, B | C, A | B, C)
    assert drawn(index, A | B, 2, count=2) == [1]  # shares B; rows 0 and 3 share nothing
    assert sorted(drawn(index_of(C, A | B, C), A | B, 2, count=2)) == [0, 2]


def test_a_modality_that_nobody_has_lends_nothing():
    assert drawn(index_of(A, B, A | B), A, 2, count=3) == []


def test_a_sample_with_nothing_borrows_from_all_that_have_it():
    assert sorted(drawn(index_of(C, B, A | C), 0, 2, count=5)) == [0, 2]


@pytest.mark.parametrize("others", [3, 300])
def test_rows_of_the_own_group_never_lend(others):
    # 1,000 rows of one patient and a few of others, in the small and the large pool's way
    groups = ["me"] * 1000 + [f"you{n}" for n in range(others)]
    index = index_of(*[A | C] * len(groups), groups=groups)
    for key in map(str, range(20)):
        rows = drawn(index, A, 2, count=3, key=key, group=group_code("me"))
        assert len(set(rows)) == 3
        assert min(rows) >= 1000


def test_the_own_group_alone_gives_way_to_the_next_best_rows():
    index = index_of(A | C, A | C, B | C, groups=["me", "me", "you"])
    assert drawn(index, A, 2, count=2, group=group_code("me")) == [2]


@pytest.mark.parametrize("size", [6, 200])  # a pool that is written out, and one that is not
def test_draws_are_uniform_without_replacement(size):
    index = index_of(*itertools.islice(itertools.cycle([C, A | C, A | B]), 3 * size // 2))
    fitting = [row for row in range(len(index)) if row % 3 < 2]
    counts: Counter = Counter()
    for key in map(str, range(3000)):
        rows = drawn(index, 0, 2, count=4, key=key)
        assert len(set(rows)) == 4
        counts.update(rows)
    assert set(counts) == set(fitting)
    share = 4 * 3000 / len(fitting)
    chi2 = sum((counts[row] - share) ** 2 / share for row in fitting)
    assert chi2 < len(fitting) + 5 * (2 * len(fitting)) ** 0.5  # five spreads


def test_a_draw_depends_on_its_key_alone():
    index = index_of(*[A | C] * 500)
    first = drawn(index, A, 2, count=4)
    drawn(index, A, 2, count=4, key="other")
    assert drawn(index, A, 2, count=4) == first
    for other in ({"key": "t"}, {"epoch": 1}, {"seed": 1}):
        assert drawn(index, A, 2, count=4, **other) != first


def test_memory_is_a_few_bytes_a_row():
    assert index_of(*[A] * 1000).num_bytes == 16_000
