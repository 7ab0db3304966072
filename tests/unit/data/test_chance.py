import hashlib

import pytest

from mm_moe.data.chance import draws, split_of


def test_draws_are_the_hash_that_the_docstring_names():
    # Worked out beside the code: a change of the key would move every mask and split ever made.
    digest = hashlib.blake2b(b'["d", "s", 3, "x"]', digest_size=16, person=b"missing").digest()
    expected = [int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:])]
    assert draws("x", purpose="missing", dataset="d", split="s", seed=3) == pytest.approx(expected)


def test_draws_differ_by_every_part_of_the_key():
    keys = [
        {"purpose": "a", "dataset": "ab", "split": "c"},
        {"purpose": "b", "dataset": "ab", "split": "c"},
        {"purpose": "a", "dataset": "a", "split": "bc"},
        {"purpose": "a", "dataset": "ab", "split": "c", "seed": 1},
    ]
    assert len({draws("x", **key) for key in keys}) == len(keys)


def test_draws_are_uniform_and_uncorrelated():
    pairs = [draws(str(n), purpose="t", dataset="d") for n in range(4000)]
    first, second = zip(*pairs, strict=True)
    # mean of 4000 uniform numbers: 0.5 with standard error 0.0046; four of them
    assert sum(first) / 4000 == pytest.approx(0.5, abs=0.018)
    assert sum(second) / 4000 == pytest.approx(0.5, abs=0.018)
    product = sum(a * b for a, b in pairs) / 4000
    assert product == pytest.approx(0.25, abs=0.015)


def test_split_of_gives_the_shares_and_the_rest_to_the_last():
    shares = {"train": 0.6, "validation": 0.15, "test": 0.25}
    splits = [split_of(str(n), dataset="d", shares=shares) for n in range(4000)]
    for split, share in shares.items():
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.03)
    assert split_of("x", dataset="d", shares={"a": 0.0, "b": 0.0}) == "b"
