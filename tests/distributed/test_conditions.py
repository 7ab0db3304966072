"""Conditions composed from views, with experts spread over two ranks: as a pass per condition."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
PATTERNS = ("complete", "text:0.9", "both:0.5")


def composed_and_direct(rank: int, world_size: int) -> list:
    from eval.patterns import chosen_conditions
    from mm_moe.moe.parallel import make_expert_parallel
    from tests.patchy import Patchy, model_of, scorer_of

    model = model_of()
    if world_size > 1:
        make_expert_parallel(model, ep_size=world_size)
    scorer = scorer_of(model)
    key = {"modalities": Patchy.modalities, "dataset": Patchy.name, "split": "test"}
    protocols = list(chosen_conditions(PATTERNS, **key).values())
    composed = list(scorer.predict_all(protocols, "test"))
    direct = [scorer.predict(protocol, "test") for protocol in protocols]
    return [
        [(p.ids, p.logits, p.labels, p.present) for p in found] for found in (composed, direct)
    ] + [scorer.bad_ids]


def test_two_ranks_compose_what_one_process_predicts():
    alone, ranks = (
        run_distributed(composed_and_direct, 1)[0],
        run_distributed(composed_and_direct, 2),
    )
    for composed, direct, bad_ids in ranks:
        assert sorted(bad_ids) == ["row-10", "row-9"]
        for mine, ours, whole in zip(composed, direct, alone[1], strict=True):
            assert mine[0] == ours[0] == whole[0]
            for other in (ours, whole):
                np.testing.assert_allclose(mine[1], other[1], rtol=0, atol=1e-6)
                assert np.array_equal(mine[2], other[2])
                assert np.array_equal(mine[3], other[3])
